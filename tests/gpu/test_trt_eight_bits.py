"""TensorRT engines of SmolLM2 in 8 bits: projections in FP8 beside the torch engine's, contexts in
FP8 and INT8 beside 16 bits. STAR_ATTENTION_TEST_ENGINES as in test_trt_engine.py."""

import json
import os

import numpy as np
import pytest
import torch
from test_engine import relative_error
from test_trt_engine import build, tensorrt  # noqa: F401

from helpers import run_job, run_oracle_job

pytest.importorskip("star_attention._trt", exc_type=ImportError)
pytest.importorskip("cupy", exc_type=ImportError)
pytest.importorskip("onnx")

CASE = {"block_size": 256, "tokens_per_block": 64, "kv_placement": ["tail"]}

JOB = """
import json, sys
from star_attention import LLM, SamplingParams, StarConfig

model, kv_dtype, folder = sys.argv[1:]
config = StarConfig(256, 256, "local", tokens_per_block=64, kv_dtype=kv_dtype)
text = "The grass is green. The sky is blue. " * 100
texts = [text + "The magic number is 7421. ", text + "The magic word is banana. "]
questions = ["What is the magic number?", "What is the magic word?", "What colour is the sky?"]
params = SamplingParams(max_tokens=12, logprobs=0)
options = {"device": "cuda", "dtype": "float16", "kv_cache_gib": 1, "context_dir": folder}
with LLM(model, config, **options) as llm:
    contexts = [llm.encode(text) for text in texts]
    answers = llm.ask([*contexts, contexts[0]], questions, params)
    report = llm.report()
    llm.save(contexts[0], "first")
    del contexts
with LLM(model, config, **options) as llm:
    again = llm.ask(llm.load("first"), questions[0], params)
print(json.dumps({
    "texts": [answer.text for answer in (*answers, again)],
    "first": [answer.logprobs[0].token for answer in (*answers, again)],
    "graph_steps": report[0]["graph_steps"],
    "pages": sum(each["pages_in_use"] for each in report),
}))
"""


@pytest.fixture(scope="module", autouse=True)
def _has_fp8(tensorrt):  # noqa: F811
    if torch.cuda.get_device_capability() < (9, 0) or not tensorrt.HAS_FP8:
        pytest.skip("needs compute capability 9.0 and cuBLAS 12.9")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    kept = os.environ.get("STAR_ATTENTION_TEST_ENGINES")
    folder = os.path.join(kept or tmp_path_factory.mktemp("engines"), "smollm2_fp8")
    if not os.path.exists(folder):
        build(folder, "--block_size", 256, "--quantization", "fp8")
    return folder


def logits(folder, model, **options):
    tokens = np.random.default_rng(1).integers(0, 49152, 3 * 256 + 5 + 2 * 40).astype(np.int32)
    return run_oracle_job(folder, 1, model, tokens, 40, [dict(CASE)], **options)[0, "tail"]


def test_projections(tmp_path, engine):
    """As near to 16 bits as the torch engine's, and nearer to these."""
    wide = logits(tmp_path, "smollm2")
    on_gpu = {"device": "cuda", "dtype": "float16", "kv_cache_gib": 1}
    theirs = logits(tmp_path, "smollm2", quantization="fp8", **on_gpu)
    ours = logits(tmp_path, engine, **on_gpu)
    of_fp8, of_ours = relative_error(theirs, wide), relative_error(ours, wide)
    between = relative_error(ours, theirs)
    print(f"FP8 from float32: torch {of_fp8:.1e}, TensorRT {of_ours:.1e}; between {between:.1e}")
    assert 1e-3 < of_ours < 1.2 * of_fp8
    assert between < of_fp8


def test_half_of_the_memory(engine):
    """Of projections, which are most of a model without its embedding."""
    plan = os.path.getsize(os.path.join(engine, "engine.plan"))
    with open(os.path.join(engine, "config.json")) as file:
        config = json.load(file)
    model = config["model"]
    embedding = 2 * model["vocab_size"] * model["hidden_size"]
    print(f"engine.plan: {plan / 2**20:.0f} MiB, the embedding {embedding / 2**20:.0f}")
    assert config["quantization"] == "fp8"
    assert plan < 2 * embedding + 125 * 2**20


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("job") / "job.py"
    path.write_text(JOB)
    return path


def answers(script, processes, model, kv_dtype):
    folder = script.parent / f"{kv_dtype} {processes}"
    run = run_job(processes, script, model, kv_dtype, folder)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def whole(script, engine):
    return answers(script, 1, engine, "auto")


@pytest.mark.parametrize(("kv_dtype", "processes"), [("fp8", 1), ("int8", 1), ("fp8", 2)])
def test_contexts(script, engine, whole, kv_dtype, processes):
    """What was loaded answers as what was read; two ranks share a GPU if there is but one."""
    found = answers(script, processes, engine, kv_dtype)
    print(f"{kv_dtype}, {processes} processes: {found}; in 16 bits: {whole}")
    assert ["7421" in text for text in found["texts"]] == [
        "7421" in text for text in whole["texts"]
    ]
    assert found["first"][3] == pytest.approx(found["first"][0], abs=0.05)
    np.testing.assert_allclose(found["first"], whole["first"], atol=0.5)
    assert found["graph_steps"] > 3
    if processes == 1:
        assert found["pages"] < 0.75 * whole["pages"]


def test_another_quantization(engine, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The sky is blue.")
    question = ["--context-file", text, "--question", "What colour is the sky?"]
    options = ["--tokens-per-block", 64, "--quantization", "none"]
    run = run_job(
        1, "-m", "star_attention", "ask", "--engine_dir", engine, *question, *options, check=False
    )
    assert run.returncode == 2, run.stderr
    assert "the engine was built with --quantization fp8: leave it away" in run.stderr
