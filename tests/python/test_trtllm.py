"""TensorRT-LLM's engines without TensorRT-LLM: the model class over stand-ins that compute, the
folder, the command line, and one clear line for bad input."""

import ctypes
import importlib.util
import json
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import fake_tensorrt_llm
from helpers import load_script, save_tiny_model
from star_attention.cli import main as cli
from star_attention.cli import trtllm as trtllm_cli
from star_attention.config import StarConfig
from star_attention.distributed import SingleProcess
from star_attention.engines.base import PagedStep
from star_attention.engines.loader import division_of, load_engine
from star_attention.engines.options import EngineOptions
from star_attention.engines.tensorrt.build import profiles
from star_attention.engines.tensorrt.folder import EngineConfig, EngineLimits, write_rotary
from star_attention.engines.tensorrt.onnx import export_graph, graph_inputs
from star_attention.engines.tensorrt.read import read_engine_config
from star_attention.errors import UserError
from star_attention.llm import LLM
from star_attention.models.checkpoint import find_model, is_engine_folder, open_checkpoint
from star_attention.models.tokenizer import Tokenizer, save_tokenizer
from star_attention.models.weights import weight_table
from star_attention.runtime.sampling import SamplingParams
from star_attention.trtllm import settings
from star_attention.trtllm.engine_folder import finish, load_plugins, used_plugins
from star_attention.trtllm.settings import MODEL_CLASSES, MODEL_FILE, check_model, check_version
from test_export import STEPS, StarAttention
from test_llm import QUESTION, TEXT

ROOT = Path(__file__).parents[2]


def pretrained_config(folder, **changes):
    """What TensorRT-LLM's convert_checkpoint.py would write of a Hugging Face folder."""
    hf = json.loads((folder / "config.json").read_text())
    rope = hf.get("rope_parameters") or {}
    return {
        "architecture": hf["architectures"][0],
        "dtype": "float16",
        "logits_dtype": "float32",
        "num_hidden_layers": hf["num_hidden_layers"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_key_value_heads": hf["num_key_value_heads"],
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "head_size": hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        "vocab_size": hf["vocab_size"],
        "max_position_embeddings": hf["max_position_embeddings"],
        "hidden_act": "silu",
        "norm_epsilon": hf["rms_norm_eps"],
        "rotary_base": rope.get("rope_theta", 10000.0),
        "rotary_scaling": None if rope.get("rope_type") == "default" else rope,
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1, "cp_size": 1},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
        **changes,
    }


SIZES = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(params=["llama", "qwen2"])
def model(request, tmp_path):
    save_tiny_model(tmp_path / "model", request.param, **SIZES)
    return tmp_path / "model"


@pytest.fixture
def plugin(monkeypatch):
    """The plugin's library, which is not built here."""
    loaded, load = [], ctypes.CDLL

    def stand_in(path, *arguments, **options):
        if "star_attention" not in str(path):
            return load(path, *arguments, **options)
        return loaded.append(path)

    monkeypatch.setattr(ctypes, "CDLL", stand_in)
    return loaded


def load_model_file():
    """As trtllm-build does."""
    loader = SourceFileLoader("models", str(MODEL_FILE))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("models", loader))
    loader.exec_module(module)
    return module


def make_model(folder, **changes):
    checkpoint = open_checkpoint(folder)
    fields = pretrained_config(folder, **changes)
    names = json.loads((folder / "config.json").read_text())
    layers = range(names["num_hidden_layers"])
    weights = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in (f"model.layers.{index}." for index in layers):
        weights |= {f"{layer}{part}layernorm.weight" for part in ("input_", "post_attention_")}
        weights |= {f"{layer}self_attn.{part}_proj.weight" for part in "qkvo"}
        weights |= {f"{layer}mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
        if checkpoint.config.qkv_bias:
            weights |= {f"{layer}self_attn.{part}_proj.bias" for part in "qkv"}
    table = {weight.name: weight for weight in weight_table(checkpoint.config)}
    config = fake_tensorrt_llm.PretrainedConfig(
        **fields, weights={name: checkpoint.tensor(table[name]).float() for name in weights}
    )
    return getattr(load_model_file(), MODEL_CLASSES[config.architecture])(config)


BUILD = {
    "max_batch_size": 2,
    "max_input_len": 1024,
    "max_seq_len": 512,
    "max_num_tokens": 256,
    "use_cache": True,
    "max_beam_width": 1,
    "opt_num_tokens": None,
    "prompt_embedding_table_size": 0,
    "max_draft_len": 0,
    "gather_context_logits": False,
    "lora_target_modules": None,
}


def test_inputs_are_those_of_star_attn_build(monkeypatch, plugin, model):
    network = fake_tensorrt_llm.install(monkeypatch)
    star = make_model(model)
    assert [Path(path).name for path in plugin] == ["libstar_attention_plugin.so"]
    inputs = star.prepare_inputs(**BUILD)
    config = open_checkpoint(model).config
    assert list(inputs) == list(network.inputs) == list(graph_inputs(config))
    expected = profiles(config, EngineLimits(2, 511, 512, 256, 64))
    for name, (_, dims) in graph_inputs(config).items():
        tensor = inputs[name]
        assert tensor.dtype == (torch.float32 if name == "rotary" else torch.int32)
        assert tensor.shape == [dim if isinstance(dim, int) else -1 for dim in dims]
        for index, profile in enumerate(expected):
            given = [ranges[index] for ranges in tensor.dim_range.values()]
            given = [[size] * 3 if isinstance(size, int) else size for size in given]
            wanted = profile.get(name, ([2], [2], [2]))  # the runtime context
            assert [list(sizes) for sizes in zip(*given, strict=True)] == list(wanted)


def test_logits_are_the_torch_engines(monkeypatch, plugin, model):
    """Two blocks behind an anchor in one pass, then a question that sees everything."""
    network = fake_tensorrt_llm.install(monkeypatch)
    star = make_model(model)
    engine = load_engine(model, SingleProcess(), 64, EngineOptions())
    engine.reserve_pages(4)
    engine.reserve_positions(200)
    tokens = np.random.default_rng(3).integers(0, 97, 200).astype(np.int32)
    places = np.arange(200, dtype=np.int32)
    two_blocks = PagedStep(
        slot_mapping=places[:192],
        cu_seqlens_q=np.array([0, 64, 192], np.int32),
        kv_lens=np.array([64, 192], np.int32),
        page_table=np.array([[0, 0, 0], [0, 1, 2]], np.int32),
    )
    question = PagedStep(
        slot_mapping=places[192:],
        cu_seqlens_q=np.array([0, 8], np.int32),
        kv_lens=np.array([200], np.int32),
        page_table=np.array([[0, 1, 2, 3]], np.int32),
    )
    rotary = torch.from_numpy(rotary_of(engine.config))
    with fake_tensorrt_llm.pools(engine.config, 4, 64):
        for step, span, rows in (
            (two_blocks, slice(192), [5, 191]),
            (question, slice(192, 200), [7]),
        ):
            rows = np.array(rows, np.int32)
            expected = engine.step(tokens[span], places[span], step, rows)
            values = {
                "input_ids": tokens[span],
                "position_ids": places[span],
                "logit_rows": rows,
                "runtime_context": np.zeros(2, np.int32),
                **{name: getattr(step, name) for name in ("slot_mapping", "cu_seqlens_q")},
                **{name: getattr(step, name) for name in ("kv_lens", "page_table")},
            }
            inputs = star.prepare_inputs(**BUILD)
            for name, value in values.items():
                inputs[name].trt_tensor = torch.from_numpy(value.copy())
            inputs["rotary"].trt_tensor = rotary
            star(**inputs)
            logits, dtype = network.outputs["logits"]
            assert dtype == "float32"
            np.testing.assert_allclose(logits.numpy(), np.asarray(expected), atol=2e-5)


def rotary_of(config):
    from star_attention.models.rotary import rotary_table

    return rotary_table(config.rope, config.head_dim, 512, torch.device("cpu")).numpy()


def refusal(capsys, action):
    capsys.readouterr()  # what came before
    with pytest.raises(SystemExit) as exit_:
        action()
    assert exit_.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


@pytest.mark.parametrize("version", ["0.21.0", "1.3.0", "2.0"])
def test_model_file_refuses_other_releases(monkeypatch, plugin, capsys, version):
    fake_tensorrt_llm.install(monkeypatch, version)
    assert f"TensorRT-LLM {version} is installed: use 1.0 to 1.2" in refusal(
        capsys, load_model_file
    )


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0rc2.post1", "1.2.0rc6", "1.2"])
def test_releases(version):
    check_version(version)


def test_model_file_without_the_plugin(monkeypatch, capsys):
    def missing(path, **_):
        raise OSError(f"{path}: cannot open shared object file")

    fake_tensorrt_llm.install(monkeypatch)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert "the plugin cannot be loaded: set TENSORRT_ROOT" in refusal(capsys, load_model_file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_beam_width": 4}, "--max_beam_width is 4: there is no beam search: use 1"),
        ({"max_draft_len": 3}, "--max_draft_len is 3: there is no speculative decoding"),
        ({"prompt_embedding_table_size": 9}, "--max_prompt_embedding_table_size is 9"),
        ({"gather_context_logits": True}, "--gather_context_logits is True"),
        ({"remove_input_padding": False}, "--remove_input_padding is False: tokens are packed"),
        ({"paged_kv_cache": False}, "--paged_kv_cache is False: the KV cache is paged"),
        ({"lora_plugin": "float16"}, "--lora_plugin is float16: there is no LoRA"),
        ({"manage_weights": True}, "--manage_weights is True"),
        ({"tokens_per_block": 32}, "--tokens_per_block is 32: use 64 or 128"),
    ],
)
def test_model_class_refuses_flags(monkeypatch, plugin, capsys, tmp_path, change, message):
    """Also those that trtllm-build gets without star-attn."""
    network = fake_tensorrt_llm.install(monkeypatch)
    save_tiny_model(tmp_path, **SIZES)
    star = make_model(tmp_path)
    for name in change.keys() & vars(network.plugin_config).keys():
        setattr(network.plugin_config, name, change[name])
    build = {name: change.get(name, value) for name, value in BUILD.items()}
    assert message in refusal(capsys, lambda: star.prepare_inputs(**build))


BAD_CHECKPOINTS = [
    ({"architecture": "MixtralForCausalLM"}, "architecture is MixtralForCausalLM: use Llama"),
    ({"architecture": "DecoderModel"}, "architecture is DecoderModel: use LlamaForCausalLM or Qw"),
    ({"mapping": {"tp_size": 2}}, "the checkpoint's tp_size is 2: one engine serves all ranks"),
    ({"mapping": {"pp_size": 2}}, "the checkpoint's pp_size is 2: .* convert it with --pp_size 1"),
    ({"mapping": {"cp_size": 8}}, "cp_size is 8: .* start the ranks with mpirun -n"),
    ({"quantization": {"kv_cache_quant_algo": "FP8"}}, "kv_cache_quant_algo is FP8: the KV cache"),
    ({"quantization": {"quant_algo": "W8A8_SQ_PER_CHANNEL"}}, "quant_algo is W8A8_SQ_PER_CHANNEL"),
    ({"dtype": "float32"}, "the checkpoint's dtype is float32: convert it with --dtype float16"),
    ({"head_size": 80}, "the checkpoint's head_size is 80: use a model"),
    (
        {"rotary_scaling": {"type": "yarn", "factor": 2.0}},
        "rotary_scaling is .*yarn.*: use default, linear",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD_CHECKPOINTS)
def test_checkpoints_that_cannot_be_served(tmp_path, change, message):
    save_tiny_model(tmp_path, **SIZES)
    with pytest.raises(UserError, match=message):
        check_model(pretrained_config(tmp_path, **change))


def test_model_of_a_checkpoint(model):
    ours, theirs = open_checkpoint(model).config, check_model(pretrained_config(model))
    assert ours.rope == theirs.rope
    for name in ("num_layers", "num_kv_heads", "head_dim", "vocab_size", "qkv_bias"):
        assert getattr(ours, name) == getattr(theirs, name)


def trtllm_engine(folder, model, plugins=(), **star):
    """What trtllm-build would write with the model class."""
    folder.mkdir()
    (folder / "rank0.engine").touch()
    star = {"tensorrt": "10.14.1", "gpu": "a GPU", "compute_capability": "9.0", **star}
    plugin_config = {"tokens_per_block": 64, "gpt_attention_plugin": "auto", "context_fmha": True}
    content = {
        "version": "1.2.0",
        "pretrained_config": pretrained_config(model, star_attention={"build_id": "7", **star}),
        "build_config": {
            "max_batch_size": 2,
            "max_input_len": 1024,
            "max_seq_len": 512,
            "max_num_tokens": 256,
            "plugin_config": {**plugin_config, **dict.fromkeys(plugins, "float16")},
        },
    }
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_engine_folder(tmp_path, tiny_chat_model):
    folder = trtllm_engine(tmp_path / "engine", tiny_chat_model, ["gemm_plugin"])
    change_config(folder, lambda pretrained: pretrained.update(head_size=64))
    assert is_engine_folder(folder)
    assert find_model(str(folder)) == folder
    with pytest.raises(UserError, match=f"run star-attn trtllm finish --engine_dir {folder}"):
        read_engine_config(folder)
    star = {"star_block_size": 128, "star_anchor_size": 64, "star_anchor_mode": "local"}
    finish(folder, tiny_chat_model, **star)
    pretrained = json.loads((folder / "config.json").read_text())["pretrained_config"]
    division = {"block_size": 128, "anchor_size": 64, "anchor_mode": "local"}
    assert pretrained["star_attention"].items() >= division.items()
    config = read_engine_config(folder)
    assert isinstance(config, EngineConfig)
    assert config.limits == EngineLimits(2, 511, 512, 256, 64, **division)
    assert (config.tensorrt, config.dtype) == ("10.14.1", "float16")
    table = np.fromfile(folder / "rotary.bin", np.float32).reshape(512, 64)
    assert (table[0] == [1.0] * 32 + [0.0] * 32).all()
    expected = Tokenizer(tiny_chat_model).context_tokens("a fox")
    assert Tokenizer(folder).context_tokens("a fox") == expected
    options = StarConfig(tokens_per_block=64)
    asked = division_of(folder, options, EngineOptions())
    assert asked == StarConfig(128, 64, "local", tokens_per_block=64)
    finish(folder, None)  # again, with nothing new
    assert read_engine_config(folder) == config


def test_end_tokens_are_those_of_config_and_generation_config(tmp_path, tiny_chat_model):
    """The tokenizer's come on top of them, as with any engine."""
    model = shutil.copytree(tiny_chat_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": 5}))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 5, 7]}))
    folder = trtllm_engine(tmp_path / "engine", tiny_chat_model)
    change_config(folder, lambda pretrained: pretrained.update(head_size=64))
    finish(folder, model)
    ends = read_engine_config(folder).model.eos_token_ids
    assert ends == open_checkpoint(model, with_weights=False).config.eos_token_ids == (5, 6, 7)
    finish(folder, None, star_block_size=128)
    assert read_engine_config(folder).model.eos_token_ids == ends
    change_config(folder, lambda pretrained: pretrained["star_attention"].update(eos_token_ids=9))
    with pytest.raises(UserError, match="is damaged"):
        read_engine_config(folder)


def change_config(folder, change):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content["pretrained_config"])
    path.write_text(json.dumps(content))


def test_engines_that_are_not_ours(tmp_path, model):
    folder = trtllm_engine(tmp_path / "engine", model)
    with pytest.raises(UserError, match="use at least --block_size, 512"):
        finish(folder, None, star_block_size=512)
    change_config(folder, lambda pretrained: pretrained["star_attention"].pop("gpu"))
    with pytest.raises(UserError, match=r"is damaged \('gpu'\)"):
        finish(folder, None)
    change_config(folder, lambda pretrained: pretrained.pop("star_attention"))
    with pytest.raises(UserError, match="has TensorRT-LLM's own attention: build it with star-at"):
        finish(folder, None)


def test_plugin_library(monkeypatch, tmp_path, model):
    folder = trtllm_engine(tmp_path / "plain", model)
    load_plugins(folder)  # nothing to load
    folder = trtllm_engine(tmp_path / "engine", model, ["gemm_plugin"])
    assert used_plugins(json.loads((folder / "config.json").read_text())) == ["gemm_plugin"]
    with pytest.raises(UserError, match="TensorRT-LLM's gemm_plugin: install TensorRT-LLM, or bui"):
        load_plugins(folder)
    package = tmp_path / "packages/tensorrt_llm"
    (package / "libs").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('not needed')")
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(UserError, match=r"its library cannot be loaded: .*libnvinfer_plugin_tens"):
        load_plugins(folder)

    class Library:
        def __init__(self, path, mode):
            assert path == str(package / "libs/libnvinfer_plugin_tensorrt_llm.so")
            self.calls = []
            self.initTrtLlmPlugins = Initialize()

    class Initialize:
        works = True

        def __call__(self, logger, namespace):
            assert (logger, namespace) == (None, b"tensorrt_llm")
            return self.works

    monkeypatch.setattr(ctypes, "CDLL", Library)
    load_plugins(folder)
    Initialize.works = False
    with pytest.raises(UserError, match="does not register them"):
        load_plugins(folder)


@pytest.fixture
def trtllm_build(monkeypatch, tmp_path):
    """A program that writes down how it was called and makes the engine's folder."""
    program = tmp_path / "bin/trtllm-build"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, shutil, sys\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "(here / 'called.json').write_text(json.dumps(sys.argv[1:]))\n"
        "if '--fails' in sys.argv: sys.exit(3)\n"
        "if '--dry_run' not in sys.argv: shutil.copytree(here / 'made', here / 'engine')\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setattr(trtllm_cli, "version", lambda name: "1.2.0")
    return tmp_path


def star_attn(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["star-attn", "trtllm", *map(str, arguments)])
    cli.main()


def checkpoint(folder, model, **changes):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(pretrained_config(model, **changes)))
    return folder


def test_build(monkeypatch, trtllm_build, model):
    trtllm_engine(trtllm_build / "made", model)
    source, engine = checkpoint(trtllm_build / "checkpoint", model), trtllm_build / "engine"
    passed = ["--gemm_plugin", "auto", "--max_seq_len", "512", "--max_num_tokens=256"]
    folders = ["--checkpoint_dir", source, "--output_dir", engine]
    star = ["--star_block_size", "128", "--star_anchor_size", "64", "--tokens_per_block", "64"]
    star_attn(monkeypatch, "build", *folders, *passed, *star)
    name = MODEL_CLASSES[pretrained_config(model)["architecture"]]
    assert json.loads((trtllm_build / "called.json").read_text()) == [
        *("--checkpoint_dir", str(source), "--model_cls_file", str(MODEL_FILE)),
        *("--model_cls_name", name, "--output_dir", str(engine), "--tokens_per_block", "64"),
        *passed,
    ]
    assert read_engine_config(engine).limits.block_size == 128


def test_build_that_makes_no_engine(monkeypatch, trtllm_build, model):
    source = checkpoint(trtllm_build / "checkpoint", model)
    star_attn(monkeypatch, "build", "--checkpoint_dir", source, "--dry_run")
    with pytest.raises(SystemExit) as exit_:
        star_attn(monkeypatch, "build", "--checkpoint_dir", source, "--fails")
    assert exit_.value.code == 3


def test_model_file(monkeypatch, capsys):
    star_attn(monkeypatch, "model-file")
    path = Path(capsys.readouterr().out.strip())
    for name in MODEL_CLASSES.values():
        assert f"class {name}(" in path.read_text()


BAD_FLAGS = {
    "--star_block_size 1024 --model_cls_file my.py": "--model_cls_file is my.py: leave it away",
    "--model_cls_name Llama": "--model_cls_name is Llama: leave it away",
    "--max_beam_width 4": "--max_beam_width is 4: there is no beam search: use 1",
    "--max_beam_width=4": "--max_beam_width is 4",
    "--kv_cache_type continuous": "--kv_cache_type is continuous: the KV cache is paged",
    "--paged_kv_cache disable": "--paged_kv_cache is disable: the KV cache is paged: use enable",
    "--remove_input_padding disable": "--remove_input_padding is disable: tokens are packed",
    "--max_encoder_input_len 512": "--max_encoder_input_len is 512: there is no cross attention",
    "--speculative_decoding_mode medusa": "there is no speculative decoding: leave it away",
    "--lora_plugin float16": "--lora_plugin is float16: there is no LoRA",
    "--fast_build": "--fast_build is true: it turns on manage_weights: leave it away",
    "--strip_plan": "--strip_plan is true: the engine holds its weights",
    "--logits_dtype float16": "--logits_dtype is float16: logits are float32",
    "--workers 8": "--workers is 8: there is one engine to build",
    "--star_block_size 16K": "--max_num_tokens is 8192: use at least --star_block_size, 16384",
    "--star_block_size 1000": "block size 1000 is not a multiple of the page of 128 tokens",
    "--star_block_size 1K --star_anchor_size 2K": "anchor size is 2048: use 0 to 1024",
    "--star_anchor_mode none": "'none' is not one of 'recompute', 'local', 'broadcast'",
    "--tokens_per_block x": "'x' is not a number of tokens",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags(monkeypatch, capsys, tmp_path, flags):
    save_tiny_model(tmp_path / "model", **SIZES)
    source = checkpoint(tmp_path / "checkpoint", tmp_path / "model")
    command = ["build", "--checkpoint_dir", source, *flags.split()]
    assert BAD_FLAGS[flags] in refusal(capsys, lambda: star_attn(monkeypatch, *command))


def test_bad_checkpoint_folders(monkeypatch, capsys, tmp_path):
    def said(*command):
        return refusal(capsys, lambda: star_attn(monkeypatch, "build", *command))

    assert "Missing option '--checkpoint_dir'" in said()
    where = f"--checkpoint_dir {tmp_path} is not convert_checkpoint.py's output: "
    assert where in said("--checkpoint_dir", tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert where in said("--checkpoint_dir", tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "LlamaForCausalLM"}')
    lacking = said("--checkpoint_dir", tmp_path)
    assert "the model's config.json lacks" in lacking


@pytest.mark.parametrize("version", [None, "1.3.0"])
def test_wrong_tensorrt_llm(monkeypatch, capsys, trtllm_build, model, version):
    def installed(name):
        if version is None:
            raise trtllm_cli.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(trtllm_cli, "version", installed)
    source = checkpoint(trtllm_build / "checkpoint", model)
    build = ["build", "--checkpoint_dir", source]
    line = refusal(capsys, lambda: star_attn(monkeypatch, *build))
    expected = "TensorRT-LLM is not installed" if version is None else "1.3.0 is installed: use 1.0"
    assert expected in line


class Session:
    """TensorRT-LLM's Session over the ONNX graph of the same model, and the step contexts."""

    graph = None

    @staticmethod
    def from_serialized_engine(engine):
        session = Session()
        session.evaluator = ReferenceEvaluator(str(Session.graph), new_ops=[StarAttention])
        return session

    def set_shapes(self, tensor_dict, context=None):
        assert set(tensor_dict) == set(self.evaluator.input_names)

    def run(self, inputs, outputs, stream, context=None):
        feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
        outputs["logits"].copy_(torch.from_numpy(self.evaluator.run(None, feeds)[0]))
        return True


class StepContext:
    address = 9 << 32

    def __init__(self, kv_pool, causal, **_):
        STEPS[self.address] = torch.zeros(kv_pool.shape), causal, None


def test_script_answers_as_star_attn_does(monkeypatch, capsys, tmp_path, tiny_chat_model):
    fake_tensorrt_llm.install(monkeypatch)
    sys.modules["tensorrt_llm.runtime"].Session = Session
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda: SimpleNamespace(cuda_stream=0, synchronize=lambda: None),
    )
    Session.graph = export_graph(tiny_chat_model, tmp_path / "graph", "float32")
    folder = tmp_path / "engine"
    folder.mkdir()
    model = replace(open_checkpoint(tiny_chat_model).config, eos_token_ids=())
    limits = EngineLimits(1, 2047, 2048, 1024, 64, block_size=256, anchor_size=64)
    parts = ("float32", "10.14.1", "a GPU", "9.0", "7", "0")
    EngineConfig(model, limits, *parts).write(folder)
    (folder / "engine.plan").touch()
    write_rotary(model, 2048, folder / "rotary.bin")
    save_tokenizer(tiny_chat_model, folder / "tokenizer")

    script = load_script("trtllm_run")
    registered = []
    fake = SimpleNamespace(
        StepContext=StepContext,
        step_workspace_bytes=lambda **_: 1,
        register_plugins=lambda: registered.append(1),
    )
    monkeypatch.setattr(script, "load_tensorrt", lambda: fake)
    monkeypatch.setattr(script, "DEVICE", "cpu")
    script.main(folder, TEXT, QUESTION, max_tokens=6)
    assert registered
    llm = LLM(tiny_chat_model, StarConfig(256, 64, tokens_per_block=64))
    context = llm.encode(TEXT)
    assert context.plan.context_len > 256
    answer = llm.ask(context, QUESTION, SamplingParams(max_tokens=6, ignore_eos=True))
    assert len(set(answer.token_ids)) > 1
    assert capsys.readouterr().out == Tokenizer(folder).decode(answer.token_ids) + "\n"


def test_docs_name_every_rule():
    text = (ROOT / "docs/tensorrt_llm.md").read_text()
    for rule in (*settings._FLAGS, *settings._CHECKPOINT, *settings.MODEL_CLASSES):
        assert rule in text, rule


def test_star_attn_trtllm_help():
    run = subprocess.run(
        [sys.executable, "-m", "star_attention", "trtllm", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(name in run.stdout for name in ("build", "finish", "model-file"))
