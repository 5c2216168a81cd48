"""TensorRT engines of SmolLM2, built, asked, and held to Hugging Face's logits and the torch
engine's tokens. STAR_ATTENTION_TEST_ENGINES names a folder that keeps engines between runs."""

import json
import os
import shutil
import subprocess
import time

import numpy as np
import pytest
import torch
from test_engine import MODES, check
from test_plugin import ROOT, built, environment

from helpers import run_job
from star_attention.errors import UserError
from star_attention.models.tokenizer import Tokenizer

pytest.importorskip("star_attention._trt", exc_type=ImportError)
pytest.importorskip("cupy", exc_type=ImportError)
pytest.importorskip("onnx")

LEVEL = 1
LIMITS = ["--max_seq_len", 4096, "--max_num_tokens", 2048, "--tokens_per_block", 64]


@pytest.fixture(scope="module", autouse=True)
def tensorrt():
    from star_attention.engines.tensorrt.library import load_tensorrt

    try:
        trt = load_tensorrt()
    except UserError as error:
        pytest.skip(str(error))
    if not trt.HAS_PARSER:
        pytest.skip("built without NvOnnxParser.h")
    return trt


def build(folder, *options, **environment):
    common = ["--model", "smollm2", "--output_dir", folder, "--optimization_level", LEVEL]
    return run_job(
        1, "-m", "star_attention", "build", *common, *LIMITS, *options, timeout=580, **environment
    )


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    kept = os.environ.get("STAR_ATTENTION_TEST_ENGINES")
    folder = tmp_path_factory.mktemp("engines") if kept is None else kept
    folder = os.path.join(folder, "smollm2")
    if not os.path.exists(folder):
        build(folder, "--block_size", 512)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "report.txt"
    path.write_text("The grass is green. The sky is blue. " * 150 + "The magic number is 7421. ")
    return path


def job(num_ranks, *arguments):
    return json.loads(
        run_job(num_ranks, "tests/gpu/trt_job.py", *arguments).stdout.splitlines()[-1]
    )


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_same_tokens_as_torch(engine, text, num_ranks):
    modes = MODES if num_ranks == 1 or torch.cuda.device_count() > 1 else MODES[:2]
    results = [
        job(num_ranks, model, text, "float16", ",".join(modes)) for model in (engine, "smollm2")
    ]
    assert results[0]["answers"] == results[1]["answers"]
    assert "7421" in results[0]["text"]
    assert len({json.dumps(answers) for answers in results[0]["answers"].values()}) == 1


def test_logits(tmp_path, engine, smollm2, hf_smollm2):
    tokens = np.random.default_rng(3).integers(0, 49152, 3 * 512 + 40 + 2 * 6).astype(np.int32)
    check(tmp_path, 1, engine, hf_smollm2, tokens, 6, 512, "float16", ring=False)


def test_logits_of_two_ranks(tmp_path, engine, smollm2, hf_smollm2):
    modes = MODES if torch.cuda.device_count() > 1 else MODES[:2]
    tokens = np.random.default_rng(4).integers(0, 49152, 4 * 512 + 5 + 2 * 6).astype(np.int32)
    check(tmp_path, 2, engine, hf_smollm2, tokens, 6, 512, "float16", modes, ring=False)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_compute_a_block_together(engine, num_ranks):
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs")
    tests = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT / "tests/python")])
    run_job(num_ranks, ROOT / "tests/gpu/exchange_job.py", engine, PYTHONPATH=tests)


def test_without_torch(engine, text):
    """As where torch is not installed."""
    code = (
        "import sys; sys.modules['torch'] = None; from star_attention.cli import main; main.main()"
    )
    question = ["--context-file", text, "--question", "What is the magic number?"]
    options = ["--tokens-per-block", 64, "--kv-cache-gib", 1, "--max-tokens", 16, "--json"]
    run = run_job(1, "-c", code, "ask", "--engine_dir", engine, *question, *options)
    result = json.loads(run.stdout)
    assert "7421" in result["answers"][0]["text"]
    assert result["plan"]["block_size"] == 512


def test_example_without_python(engine, text, smollm2):
    """The C++ example over token ids, in blocks as the engine has them."""
    tokenizer = Tokenizer(smollm2)
    question = tokenizer.question_tokens("What is the magic number?")
    ids = tokenizer.context_tokens(text.read_text()) + question
    command = [built("ask_tokens"), engine, str(len(question)), "24"]
    run = subprocess.run(
        command,
        input=" ".join(map(str, ids)),
        capture_output=True,
        text=True,
        env=environment(os.environ.get("TENSORRT_LIB_DIR", "")),
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    answer = list(map(int, run.stdout.split()))
    expected = job(1, engine, text, "float16", "recompute")["answers"]["recompute"][2]
    assert answer[: len(expected)] == expected


def edit(folder, change):
    path = os.path.join(folder, "config.json")
    with open(path) as file:
        config = json.load(file)
    change(config)
    with open(path, "w") as file:
        json.dump(config, file)


def cut(folder):
    with open(os.path.join(folder, "engine.plan"), "r+b") as file:
        file.truncate(100_000)


BAD = {
    "corrupt engine": (cut, (), "engine.plan"),
    "corrupt config": (
        lambda folder: edit(folder, lambda config: config.pop("dtype")),
        (),
        "config.json is damaged ('dtype'): build the engine again",
    ),
    "another GPU": (
        lambda folder: edit(folder, lambda config: config.update(compute_capability="8.0")),
        (),
        "the engine was built for",
    ),
    "another TensorRT": (
        lambda folder: edit(folder, lambda config: config.update(tensorrt="7.1.0")),
        (),
        "the engine was built with TensorRT 7.1.0, here is",
    ),
    "cp_size": (
        lambda folder: edit(folder, lambda config: config["limits"].update(cp_size=4)),
        (),
        "the engine was built for --cp_size 4, there are 1 ranks: use mpirun -n 4",
    ),
    "page size": (
        lambda folder: None,
        ("--tokens-per-block", 128),
        "--tokens-per-block is 128, but the engine's pages hold 64",
    ),
    "dtype": (
        lambda folder: None,
        ("--dtype", "bfloat16"),
        "--dtype is bfloat16, but the engine computes in float16: leave it away",
    ),
    "tp": (lambda folder: None, ("--tp", 1, "--load-format", "dummy"), "an engine has its weights"),
    "ring": (lambda folder: None, ("--attention", "ring"), "no ring attention"),
    "long answer": (
        lambda folder: None,
        ("--max-tokens", 3000, "--block-size", 512),
        "the engine was built for --max_seq_len 4096: use a shorter text",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(tmp_path, engine, text, name):
    change, options, message = BAD[name]
    folder = shutil.copytree(engine, tmp_path / "engine")
    change(folder)
    longer = tmp_path / "longer.txt"  # than a pass of the engine
    longer.write_text(text.read_text() * 2)
    question = ["--context-file", longer, "--question", "What is the magic number?"]
    sizes = () if "--tokens-per-block" in options else ("--tokens-per-block", 64)
    arguments = ["ask", "--engine_dir", folder, *question, "--kv-cache-gib", 1, *sizes, *options]
    run = run_job(1, "-m", "star_attention", *arguments, check=False)
    assert run.returncode == 2, run.stderr
    assert message in run.stderr
    assert len(run.stderr.strip().splitlines()) <= 2


def test_timing_cache(tmp_path):
    """A second build times no kernel again."""
    options = "--gemm_plugin", "disable", "--timing_cache", tmp_path / "timing"
    timed = []
    for index in range(2):
        began = time.monotonic()
        build(tmp_path / f"engine{index}", *options)
        seconds = time.monotonic() - began
        timed.append((tmp_path / f"engine{index}.build.log").read_text().count("Tactic Name:"))
        print(f"\nSmolLM2 by TensorRT's own GEMMs: {seconds:.0f} s, {timed[-1]} kernels timed")
        assert seconds < 300
    assert timed[0] > 0 == timed[1]
