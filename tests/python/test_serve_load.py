"""scripts/bench_serving.py over ranks with a tiny model: nothing is lost or crossed under load, and
its other measures run."""

import json
import socket
import sys

import pytest

from helpers import HERE, load_script

pytest.importorskip("fastapi")
SCRIPTS = HERE.parents[1] / "scripts"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield load_script("bench_serving")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def model(bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    bench.make_model("tiny", folder)
    return folder


def measure(bench, monkeypatch, tmp_path, serve, *options):
    """The result of the script with a server of its own, and its exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = f"{sys.executable} -m star_attention serve --port {port} {serve}"
    output = tmp_path / "result.json"
    command = ["bench_serving.py", "--url", f"http://127.0.0.1:{port}", "--start", start]
    command += ["--output", str(output), *options]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        bench.main()
    return json.loads(output.read_text())[-1]["result"], ended.value.code


@pytest.mark.parametrize("ranks", [1, 2])
def test_load(bench, model, monkeypatch, tmp_path, ranks):
    serve = f"--model {model} --ranks {ranks} --block-size 64 --tokens-per-block 16 --max-queue 64"
    options = (
        "--load --clients 100 --requests 400 --contexts 6 --pool-questions 4 --disconnects 0.2"
    )
    lengths = "--context-tokens 150 --question-tokens 16 --answer-tokens 4"
    result, code = measure(bench, monkeypatch, tmp_path, serve, *options.split(), *lengths.split())
    outcomes = result["outcomes"]
    assert code == 0, result["problems"]
    assert result["passed"]
    assert outcomes["answered"] + outcomes["left"] == 400
    assert outcomes["answered"] > 250
    assert outcomes["left"] > 20
    assert result["responses_by_status"].get("429", 0) > 0
    assert result["distinct"] == 1.0
    assert result["left_running"] == 0


def test_speed(bench, model, monkeypatch, tmp_path):
    options = "--context-tokens 600 --questions 4 --question-tokens 16 --answer-tokens 8 --rounds 2"
    options += " --gap --gap-tokens 32"
    result, code = measure(bench, monkeypatch, tmp_path, f"--model {model}", *options.split())
    assert code == 0
    assert abs(result["prompt_tokens"] - 616) < 60
    assert result["cold_cached_tokens"] == [0, 0]
    assert 500 < result["warm_cached_tokens"] <= result["together"]["cached_tokens"]
    assert result["together"]["tokens"] == 4 * 8
    assert result["gap"]["read_tokens"] > 500


def test_overhead(bench, model, monkeypatch, tmp_path):
    options = f"--overhead --llm {model} --context-tokens 100 --questions 2 --question-tokens 8"
    options += " --answer-tokens 8 --rounds 2"
    result, code = measure(bench, monkeypatch, tmp_path, f"--model {model}", *options.split())
    assert code == 0
    assert len(result["llm_tokens_per_s"]) == len(result["server_tokens_per_s"]) == 2
    assert set(result["cpu_ms_per_token"]) > {"LLM", "the client"}


def test_model_folders(bench, tmp_path):
    """What --make-model writes is what our models are read from."""
    from star_attention.models.checkpoint import find_model, open_checkpoint
    from star_attention.models.config import LLAMA_3_1_8B
    from star_attention.models.tokenizer import Tokenizer

    bench.make_model("8b", tmp_path)
    path = find_model(str(tmp_path), with_weights=False)
    config, tokenizer = open_checkpoint(path, with_weights=False).config, Tokenizer(path)
    assert (config.num_layers, config.head_dim) == (32, 128)
    assert config.rope == LLAMA_3_1_8B.rope
    assert tokenizer.vocab_size == config.vocab_size == LLAMA_3_1_8B.vocab_size
    assert tokenizer.uses_chat
    text = "abcd \u00fc efgh\n"
    assert tokenizer.decode(tokenizer.question_tokens(text)).startswith("abcd \u00fc efgh")
