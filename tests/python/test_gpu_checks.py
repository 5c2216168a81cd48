"""scripts/gpu_checks.py without a GPU: the gate, the table, and the random shapes on the CPU."""

import json
import subprocess
import sys
import time

import pytest

from helpers import HERE, load_script
from star_attention.ops import reference

REPOSITORY = HERE.parents[1]
STORED = {
    "context 8192, 0: ours": 0.9,
    "query 131072, 1, 32: ours": 0.92,
    "merge over 2 ranks, float32, 1 tokens": 4.0,
}


@pytest.fixture(scope="module")
def script():
    return load_script("gpu_checks")


@pytest.fixture
def checks(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "STORED", tmp_path / "gate.json")
    script.STORED.write_text(json.dumps({"H100": STORED}))
    return script.Checks(tmp_path, tmp_path / "out.json", 7, time.monotonic() + 600, 1, "H100")


def measuring(monkeypatch, script, *runs):
    """What is measured, run after run; the phases that were asked for."""
    asked = []

    def measure(checks, phases):
        asked.append(phases)
        return dict(runs[len(asked) - 1])

    monkeypatch.setattr(script, "measure", measure)
    return asked


CONTEXT, QUERY, RANKS = STORED
GOOD = {CONTEXT: 0.86, QUERY: 0.93}  # not below 0.95 of what is stored


def test_the_gate_passes(script, checks, monkeypatch, capsys):
    asked = measuring(monkeypatch, script, {**GOOD, "linear 1: ours": 0.9})
    script.gate(checks)
    assert len(asked) == 1
    assert capsys.readouterr().out == "| gate | passed: 2 ok, 1 new | 0 |\n"
    report = json.loads(checks.output.read_text())
    assert report["ratios"]["linear 1: ours"]["state"] == "new"
    assert report["checks"][0]["outcome"] == "passed"


def test_the_gate_measures_what_is_low_again(script, checks, monkeypatch, capsys):
    low = {**GOOD, QUERY: 0.8}
    asked = measuring(monkeypatch, script, low, {QUERY: 0.9})
    script.gate(checks)
    assert asked[1] == ["query"]
    assert "passed: 2 ok" in capsys.readouterr().out
    measuring(monkeypatch, script, low, {QUERY: 0.87})
    script.gate(checks)
    told = "FAILED: 1 ok, 1 below: query 131072, 1, 32: ours 0.87 of 0.92"
    assert told in capsys.readouterr().out


def test_a_kernel_that_does_not_run(script, checks, monkeypatch, capsys):
    measuring(monkeypatch, script, {CONTEXT: 0.9}, {})
    script.gate(checks)
    told = "FAILED: 1 ok, 1 missing: query 131072, 1, 32: ours was not measured"
    assert told in capsys.readouterr().out


def test_an_unknown_gpu(script, checks, monkeypatch, capsys):
    checks.gpu = "B200"
    asked = measuring(monkeypatch, script, GOOD, GOOD)
    script.gate(checks)
    assert len(asked) == 1
    told = "| gate | not run: no ratios are stored for this GPU: keep these with --store | 0 |\n"
    assert capsys.readouterr().out == told
    checks.store = True
    script.gate(checks)
    assert "passed: 2 ratios stored" in capsys.readouterr().out
    assert json.loads(script.STORED.read_text()) == {"H100": STORED, "B200": GOOD}


def test_merges_over_two_gpus(script, checks, monkeypatch, capsys):
    checks.gpus = 2
    asked = measuring(monkeypatch, script, {**GOOD, RANKS: 3.0}, {RANKS: 3.9})
    script.gate(checks)
    assert asked[1] == ["merge"]
    assert "passed: 3 ok" in capsys.readouterr().out
    lines = [
        "peer  float32      1 tokens     2.50 us\n",
        "nccl  float32      1 tokens    10.0 us\n",
    ]
    assert script.rank_ratios([*lines, "peer  bfloat16     1 tokens 2.00 us\n"]) == {RANKS: 4.0}


def test_ratios_of_a_report(script):
    results = REPOSITORY / "benchmarks/results"
    context = json.loads((results / "attention_h100.json").read_text())
    found = script.ratios(context)
    assert found["context 8192, 8192: ours"] == pytest.approx(2.1949 / 2.2615, abs=1e-3)
    assert found["context 8192, 8192: ours, sm_80"] == pytest.approx(2.1949 / 4.2007, abs=1e-3)
    assert found["bytes rms_norm: ours"] == pytest.approx(2.80 / 3.19, abs=3e-3)
    assert not any(name.startswith("merge") for name in found)  # without a ceiling
    stored = json.loads((REPOSITORY / "benchmarks/gate.json").read_text())
    for gpu in ("H100", "H200"):
        assert all(0.3 < ratio < 20 for ratio in stored[gpu].values())


def test_names_of_gpus(script):
    known = ("H100", "H200")
    assert script.short_name("NVIDIA H100 80GB HBM3", known) == "H100"
    assert script.short_name("NVIDIA H200", known) == "H200"
    assert script.short_name("NVIDIA A100-SXM4-80GB", known) == "A100_SXM4_80GB"


LINES = """\
============================= test session starts ==============================
collecting ... collected 4 items

tests/gpu/test_one.py::test_a[16 rows-True] PASSED                       [ 25%]
tests/gpu/test_one.py::test_bandwidth
save: 1 GB/s
PASSED                                                                   [ 50%]
tests/gpu/test_two.py::test_b SKIPPED (NCCL needs 2 GPUs)                [ 75%]
tests/gpu/test_three.py::test_c FAILED                                   [100%]

SKIPPED [1] tests/gpu/test_four.py:10: could not import 'mpi4py': no MPI
SKIPPED [1] tests/gpu/test_two.py:30: NCCL needs 2 GPUs
"""


def test_files_of_tests(script, checks, capsys):
    files = script.FileResults(checks)
    for line in LINES.splitlines(keepends=True):
        files.line(line)
    files.end(script.Run(1, [], 3.0))
    outcomes = {result.check[15:-3]: result.outcome for result in checks.results}
    assert outcomes == {"one": "passed", "two": "skipped", "three": "FAILED", "four": "skipped"}
    details = [result.detail for result in checks.results]
    assert details == ["2 passed", "1 skipped", "1 failed", "could not import 'mpi4py': no MPI"]
    assert capsys.readouterr().out.startswith("| tests/gpu/test_one.py | passed: 2 passed | 0 |\n")


def test_tests_without_an_end(script, checks):
    files = script.FileResults(checks)
    files.line("tests/gpu/test_one.py::test_a PASSED [ 50%]")
    files.line("tests/gpu/test_one.py::test_b ")
    files.end(script.Run(None, [], 3.0))
    [result] = checks.results
    assert result.outcome == "FAILED"
    assert result.detail == "1 passed; no time left in tests/gpu/test_one.py::test_b"
    script.FileResults(checks).end(script.Run(4, ["ERROR: no such file\n"], 1.0))
    assert checks.results[-1].detail == "ERROR: no such file"


def test_a_command_that_does_not_end(checks, capfd):
    code = "import time; print('| on it'); time.sleep(60)"
    run = checks.run("slow", [sys.executable, "-c", code], 2)
    assert run.seconds < 10
    assert run.result("slow").line().startswith("| slow | FAILED: no end after 2 s; / on it")
    assert (checks.logs / "slow.log").read_text() == "| on it\n"


def test_without_compute_sanitizer(script, checks, monkeypatch, capsys):
    monkeypatch.setattr(script.shutil, "which", lambda *_, **__: None)
    script.memcheck(checks)
    told = "| memcheck | not run: no compute-sanitizer, which CUDA's toolkit has | 0 |\n"
    assert capsys.readouterr().out == told


def test_what_the_command_refuses():
    command = [sys.executable, REPOSITORY / "scripts/gpu_checks.py", "fuss"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert "no part fuss: there are fuzz, memcheck, racecheck, gate, peer, tests" in run.stderr


def test_random_shapes_find_a_fault(monkeypatch, capsys):
    """On the CPU the operators in torch are right, and what is wrong in one of them is found."""
    monkeypatch.syspath_prepend(REPOSITORY / "tests/gpu")
    import fuzz_shapes

    names = [name for name in fuzz_shapes.OPERATORS if name != "fetch_pages"]
    options = {"small": True, "device": "cpu"}
    assert set(fuzz_shapes.fuzz(names, 1, cases=45, **options).values()) == {5}

    right = reference.merge_lse

    def wrong(o, lse, **options):
        """Loses the last shard of many."""
        return right(o[:16], lse[:16], **options)

    monkeypatch.setattr(reference, "merge_lse", wrong)
    assert fuzz_shapes.fuzz(["merge_lse"], 1, cases=60, **options) == {"merge_lse": -1}
    again = capsys.readouterr().out.split("again: ")[1].split()
    assert again[:2] == ["--only", "merge_lse"]
    assert fuzz_shapes.fuzz(["merge_lse"], int(again[3]), cases=1, **options)["merge_lse"] == -1
