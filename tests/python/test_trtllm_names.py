"""The code uses no name of TensorRT-LLM and TensorRT but those that trtllm/names.py lists, all of
them; where TensorRT-LLM is installed, the list is true and trtllm-build takes the model class."""

import ast
import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fake_tensorrt_llm
from helpers import save_tiny_model
from star_attention.trtllm.names import MEMBERS, NAMES
from star_attention.trtllm.settings import MODEL_FILE
from test_trtllm import pretrained_config

ROOT = Path(__file__).parents[2]
FILES = [MODEL_FILE, ROOT / "scripts/trtllm_run.py"]
PACKAGES = ("tensorrt_llm", "tensorrt")
HAS_TENSORRT_LLM = importlib.util.find_spec("tensorrt_llm") is not None


def imported(tree):
    """(module, name) of every import from the packages; name None: the module itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in PACKAGES:
            yield from ((node.module, alias.name) for alias in node.names)
        if isinstance(node, ast.Import):
            yield from (
                (alias.name, None) for alias in node.names if alias.name.split(".")[0] in PACKAGES
            )


def attributes(tree):
    """Names of attributes that the code takes of objects which may be foreign, and of those that it
    sets or defines itself. What hangs on another module's name is not foreign."""
    taken = set()
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    origin = {}  # name in the code -> the module that it comes from
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                origin[alias.asname or alias.name] = getattr(node, "module", alias.name)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        if isinstance(node.ctx, ast.Store):
            own.add(node.attr)
            continue
        root = node
        while isinstance(root, ast.Attribute | ast.Call | ast.Subscript):
            root = root.func if isinstance(root, ast.Call) else root.value
        module = origin.get(getattr(root, "id", None), PACKAGES[0])
        if module.split(".")[0] in PACKAGES and not isinstance(root, ast.Constant):
            taken.add(node.attr)
    return taken, own


# Of Python's, NumPy's and our own objects.
OURS = {
    *("items", "append", "split", "get", "end", "start", "blocks", "prefix", "limits", "model"),
    *("tokens_per_block", "num_layers", "num_kv_heads", "num_q_heads", "head_dim", "vocab_size"),
    *("max_num_tokens", "eos_token_ids", "divide", "context_tokens", "question_tokens", "decode"),
    *("step_workspace_bytes", "register_plugins", "StepContext", "address", "view", "argmax"),
    *("cuda_stream", "synchronize"),
}


@pytest.fixture(scope="module")
def trees():
    return [ast.parse(path.read_text()) for path in FILES]


def test_imports_are_listed(trees):
    used = {pair for tree in trees for pair in imported(tree)}
    listed = {(module, name) for module, names in NAMES.items() for name in names}
    listed -= {("tensorrt_llm", "__version__")}
    assert used == listed | {("tensorrt_llm", None), ("tensorrt", None)}


def test_attributes_are_listed(trees):
    listed = {name for names in MEMBERS.values() for name in names}
    taken, own = (set().union(*names) for names in zip(*map(attributes, trees), strict=True))
    unknown = taken - listed - OURS - own
    assert not unknown, f"not in trtllm/names.py: {sorted(unknown)}"
    unused = (listed | OURS) - taken - own
    assert not unused, f"used nowhere: {sorted(unused)}"


def test_another_attribute_is_noticed():
    source = MODEL_FILE.read_text().replace("logits.mark_output(", "logits.cast('x').mark_output(")
    taken, own = attributes(ast.parse(source))
    listed = {name for names in MEMBERS.values() for name in names}
    assert taken - listed - OURS - own == {"cast"}


def test_only_these_files_use_them():
    for folder in (ROOT / "python", ROOT / "scripts"):
        for path in folder.rglob("*.py"):
            if list(imported(ast.parse(path.read_text()))):
                assert path in FILES or path.parent == MODEL_FILE.parent / "pytorch"


def test_stand_in_has_the_listed_signatures():
    """So that what the model class does to the stand-in is what TensorRT-LLM would see."""
    for module, names in NAMES.items():
        for name, (signature, _) in names.items():
            stand_in = getattr(fake_tensorrt_llm, name, None)
            if stand_in is not None and signature:
                check_signature(stand_in, signature, f"{module}.{name}")


def check_signature(function, signature, name):
    """Every listed argument is one of the function's, in that order; nothing else is needed."""
    wanted = [word for word in signature.strip("()").split(", ") if word]
    parameters = inspect.signature(function).parameters.values()
    names = [parameter.name for parameter in parameters]
    assert [word for word in names if word in wanted] == wanted, f"{name}{signature}: has {names}"
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
    assert set(needed) <= set(wanted), f"{name} needs {needed}"


def test_releases_are_before_1_0():
    for names in NAMES.values():
        for _, since in names.values():
            assert since.startswith("0.")


@pytest.mark.skipif(not HAS_TENSORRT_LLM, reason="TensorRT-LLM is not installed")
def test_tensorrt_llm_has_the_names():
    for module, names in NAMES.items():
        for name, (signature, _) in names.items():
            value = getattr(importlib.import_module(module), name)
            if signature:
                check_signature(value, signature, f"{module}.{name}")
    for owner in ("functional.Tensor", "models.LLaMAForCausalLM", "runtime.Session"):
        module, _, name = owner.rpartition(".")
        value = getattr(importlib.import_module(f"tensorrt_llm.{module}"), name)
        for member in MEMBERS.get(f"tensorrt_llm.{owner}", ("forward", "prepare_inputs")):
            assert member == "trt_tensor" or hasattr(value, member), f"{owner}.{member}"


@pytest.mark.skipif(not HAS_TENSORRT_LLM, reason="TensorRT-LLM is not installed")
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_dry_run(tmp_path, architecture):
    """trtllm-build makes the network of a random model and no engine of it."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    save_tiny_model(tmp_path / "model", architecture, **sizes)
    extra = {"qwen_type": "qwen2", "seq_length": 512} if architecture == "qwen2" else {}
    config = pretrained_config(tmp_path / "model", position_embedding_type="rope_gpt_neox", **extra)
    (tmp_path / "checkpoint.json").write_text(json.dumps(config))
    command = ["trtllm", "build", "--checkpoint_dir", tmp_path / "checkpoint.json", "--dry_run"]
    command += ["--output_dir", tmp_path / "engine", "--max_seq_len", 512, "--max_batch_size", 2]
    run = subprocess.run(
        [sys.executable, "-m", "star_attention", *map(str, command)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    written = json.loads((tmp_path / "engine/config.json").read_text())
    assert written["pretrained_config"]["star_attention"]["build_id"]
