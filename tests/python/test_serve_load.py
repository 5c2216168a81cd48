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
