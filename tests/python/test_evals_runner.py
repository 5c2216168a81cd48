"""Running samples, the results folder, and what reports and plots make of made-up results."""

import json
import os
import re
import resource
import signal
import threading
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest

from helpers import save_tiny_model, train_tokenizer
from star_attention import LLM, SamplingParams, StarConfig, UserError
from star_attention.engines.base import Limits
from star_attention.errors import RankError
from star_attention.evals import custom, plots, ruler, runner, tune
from star_attention.evals import report as comparison
from star_attention.evals.prompts import PromptTokenizer
from star_attention.evals.results import load_results, open_results
from star_attention.evals.runner import Method, Run, evaluate
from star_attention.evals.sample import Sample, Task
from star_attention.models.config import LLAMA_3_1_8B
from star_attention.plan import make_plan
from star_attention.predict import predict

CONFIGURATION = {
    "benchmark": "ruler",
    "model": "tiny",
    "template": "auto",
    "device": "cpu",
    "dtype": "float32",
    "seed": 42,
    "data": "text",
    "ranks": 1,
    "attention": "dense",
    "block_size": None,
    "anchor_size": None,
    "anchor_mode": "broadcast",
    "tokens_per_block": 128,
}
STAR = {"attention": "star", "block_size": "quarter", "anchor_size": "block"}


def configuration(**changes):
    return {**CONFIGURATION, **changes}


@pytest.fixture(scope="module")
def llm(tiny_chat_model):
    return LLM(tiny_chat_model, StarConfig(tokens_per_block=32))


@pytest.fixture(scope="module")
def prompts(tiny_chat_model):
    return PromptTokenizer(tiny_chat_model)


def run_of(folder, task, method, samples=3):
    results = open_results(folder, configuration(**method.configuration))
    return Run(results, [task], samples, lambda n: method.config(n, "broadcast", 32))


def recorded(llm, prompts, run):
    """Evaluates and returns the new records."""
    new = []
    evaluate(llm, prompts, [run], lambda run, task, record: new.append(record))
    return new


@pytest.fixture
def short_task(prompts):
    """RULER's retrieval with short answers."""
    task = ruler.load_task("niah_single_1", prompts, 640, 1, None)
    return Task(task.name, task.length, 6, task.score, task.sample)


@pytest.mark.parametrize(
    ("method", "length", "sizes"),
    [
        (Method("star", "quarter", "block"), 4096, (1024, 1024)),
        (Method("star", "half", "quarter"), 4096, (2048, 512)),
        (Method("star", "quarter", "eighth"), 1000, (256, 32)),
        (Method("star", "128", "page"), 4096, (128, 32)),
        (Method("star", "whole", "0"), 1000, (1024, 0)),
        (Method("star", "half", "page", 4), 4096, (2048, 32)),
        (Method("dense"), 4096, (None, None)),
    ],
)
def test_sizes(method, length, sizes):
    config = method.config(length, "broadcast", 32)
    assert (config.block_size, config.anchor_size) == sizes
    assert config.selected_pages == method.selected_pages


@pytest.mark.parametrize("template", ["auto", "none"])
@pytest.mark.parametrize("opens", [True, False])
def test_prompts_are_those_of_ask(tmp_path, template, opens):
    """Also where the tokenizer writes an opening token itself, and for texts that spell it."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    save_tiny_model(tmp_path, vocab_size=700, max_position_embeddings=2048)
    tokenizer = AutoTokenizer.from_pretrained(train_tokenizer(tmp_path, "llama3"))
    bos = tokenizer.bos_token_id
    if opens:
        opening = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
        tokenizer.backend_tokenizer.post_processor = opening
        tokenizer.save_pretrained(tmp_path)
    prompts = PromptTokenizer(tmp_path, template)
    for context in ("Some text.", "<s> Some text <|end|>"):
        sample = Sample(0, context, "A question?", ["An answer"], " Answer:")
        asked = prompts.context_tokens(context) + prompts.question_tokens(sample.query, " Answer:")
        assert prompts.count(sample) == len(asked)
        assert asked.count(bos) == (template == "auto" or opens)
        task = Task("t", None, 4, lambda *_: 0.0, {0: sample}.__getitem__, [0])
        llm = LLM(tmp_path, StarConfig(tokens_per_block=32), template=template)
        plain = llm.encode(context)
        answer = llm.ask(plain, sample.query, SamplingParams(4), " Answer:")
        folder = tmp_path / f"results of {len(context)}"
        (record,) = recorded(llm, prompts, run_of(folder, task, Method("dense")))
        assert record["pred"] == answer.text
        assert record["context_tokens"] == plain.plan.context_len


def test_one_block_is_dense(llm, prompts, short_task, tmp_path):
    """Sample by sample."""
    dense = recorded(llm, prompts, run_of(tmp_path, short_task, Method("dense")))
    star = recorded(llm, prompts, run_of(tmp_path, short_task, Method("star", "whole", "0")))
    other = recorded(llm, prompts, run_of(tmp_path, short_task, Method("star", "quarter", "0")))
    assert [r["pred"] for r in star] == [r["pred"] for r in dense]
    assert [r["score"] for r in star] == [r["score"] for r in dense]
    assert [r["pred"] for r in other] != [r["pred"] for r in dense]
    assert other[0]["block_size"] == 160
    context = short_task.sample(0).context
    assert other[0]["context_tokens"] == len(prompts.context_tokens(context))
    assert 0 < other[0]["context_seconds"] < other[0]["seconds"]


def test_resume(llm, prompts, short_task, tmp_path):
    """What is finished is not run again, in whatever way the run before ended."""
    whole = recorded(llm, prompts, run_of(tmp_path, short_task, Method("dense")))
    path = tmp_path / "dense.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    failed = json.dumps({"task": "niah_single_1", "length": 640, "index": 1, "error": "no memory"})
    path.write_bytes(lines[0] + failed.encode() + b"\n" + lines[2][:40])
    again = recorded(llm, prompts, run_of(tmp_path, short_task, Method("dense")))
    assert [record["index"] for record in again] == [1, 2]
    assert [record["pred"] for record in again] == [record["pred"] for record in whole[1:]]
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 1, 1, 2]
    assert recorded(llm, prompts, run_of(tmp_path, short_task, Method("dense"))) == []
    (more,) = recorded(llm, prompts, run_of(tmp_path, short_task, Method("dense"), samples=4))
    assert more["index"] == 3
    scores = json.loads(path.with_suffix(".json").read_text())["scores"]
    assert [(score["samples"], score["failed"]) for score in scores] == [(4, 0)]


def test_selected_pages(llm, prompts, short_task, tmp_path):
    """Other answers, beside those without, in a file of their own that a run goes on from; what is
    said of runs without them stays as it was."""
    sizes = "star", "160", "page"
    plain = recorded(llm, prompts, run_of(tmp_path, short_task, Method(*sizes)))
    some = recorded(llm, prompts, run_of(tmp_path, short_task, Method(*sizes, 2)))
    assert [record["pred"] for record in some] != [record["pred"] for record in plain]
    # All pages that there are: dense attention.
    every = recorded(llm, prompts, run_of(tmp_path, short_task, Method(*sizes, 256)))
    dense = recorded(llm, prompts, run_of(tmp_path, short_task, Method("dense")))
    assert [record["pred"] for record in every] == [record["pred"] for record in dense]
    (more,) = recorded(llm, prompts, run_of(tmp_path, short_task, Method(*sizes, 2), 4))
    assert more["index"] == 3
    found = load_results(tmp_path)
    labels = ["dense", "star 160/page", "star 160/page+2", "star 160/page+256"]
    assert [results.label for results in found] == labels
    assert [len(results.records) for results in found] == [3, 3, 4, 3]
    said = [results.configuration.get("selected_pages", "no word") for results in found]
    assert said == ["no word", "no word", 2, 256]


def test_stopping_keeps_what_is_done(llm, prompts, short_task, tmp_path):
    def stop(run, task, record):
        if record["index"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(llm, prompts, [run_of(tmp_path, short_task, Method("dense"))], stop)
    assert json.loads((tmp_path / "dense.json").read_text())["scores"][0]["samples"] == 2
    run = run_of(tmp_path, short_task, Method("dense"))
    assert run.pending(short_task) == [2]


def test_a_sample_that_fails(llm, prompts, short_task, tmp_path, monkeypatch):
    """Its error is recorded, and the run goes on; so for one that cannot be made."""
    encode = llm.encode

    def failing(text, config):
        if short_task.sample(0).outputs[0] in text:
            raise MemoryError("needs 80 GiB")
        return encode(text, config)

    def sample(index):
        if index == 1:
            raise UserError("no such text")
        return short_task.sample(index)

    monkeypatch.setattr(llm, "encode", failing)
    task = Task(short_task.name, short_task.length, 4, short_task.score, sample)
    records = {
        r["index"]: r for r in recorded(llm, prompts, run_of(tmp_path, task, Method("dense")))
    }
    assert records[0]["error"] == "needs 80 GiB"
    assert records[1]["error"] == "no such text"
    assert "pred" in records[2]
    assert llm.report()[0]["pages_in_use"] == 0


def test_a_rank_that_fails_is_no_failed_sample(llm, prompts, short_task, tmp_path, monkeypatch):
    def failing(*_):
        raise RankError("rank 1 is lost")

    monkeypatch.setattr(llm, "ask", failing)
    run = run_of(tmp_path, short_task, Method("dense"))
    with pytest.raises(RankError, match="rank 1 is lost"):
        recorded(llm, prompts, run)
    assert not run.results.records
    assert not run.results.path.exists()


def test_questions_about_one_context(llm, prompts, tmp_path, monkeypatch):
    """A context that several samples share is encoded once; answers are those of one by one."""
    rows = [
        {"input_context": text * 20, "input_query": f"Question {i}?", "output": "fox"}
        for text in ("The quick brown fox. ", "Words. ")
        for i in range(40)
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = custom.load_task(path, 5)
    encoded = []
    encode = llm.encode
    monkeypatch.setattr(llm, "encode", lambda *args: encoded.append(args) or encode(*args))
    method = Method("star", "quarter", "block")
    together = recorded(llm, prompts, run_of(tmp_path / "a", task, method, 80))
    assert len(encoded) == 2
    assert len(together) == 80
    assert together[3]["input_query"] == "Question 3?"
    one = Task(task.name, None, 5, task.score, task.sample, [43])
    (alone,) = recorded(llm, prompts, run_of(tmp_path / "b", one, method))
    assert alone["pred"] == together[43]["pred"]


def test_samples_with_contexts_of_their_own(llm, prompts, short_task, tmp_path, monkeypatch):
    """They are asked together; answers are those of one by one, and so they are where the KV cache
    has no room for several."""
    batches = []
    ask = llm.ask
    monkeypatch.setattr(llm, "ask", lambda *args: batches.append(len(args[1])) or ask(*args))
    together = recorded(llm, prompts, run_of(tmp_path / "a", short_task, Method("dense"), 40))
    assert batches == [32, 8]
    longest = max(record["context_tokens"] for record in together)
    monkeypatch.setattr(runner, "_BATCH_TOKENS", 5 * longest)
    fewer = recorded(llm, prompts, run_of(tmp_path / "b", short_task, Method("dense"), 10))
    assert batches[2:] == [5, 5]
    sample = short_task.sample(0)
    question = prompts.question_tokens(sample.query, sample.answer_prefix)
    each = longest + len(question) + 3 * 32 + short_task.max_tokens
    monkeypatch.setattr(llm._leader.scheduler._room, "limits", Limits(pages=3 * each // 32))
    cached = recorded(llm, prompts, run_of(tmp_path / "c", short_task, Method("dense"), 6))
    assert batches[4:] == [3, 3]
    for records in (fewer, cached):
        assert [r["pred"] for r in records] == [r["pred"] for r in together[: len(records)]]
    assert llm.report()[0]["pages_in_use"] == 0
    assert llm.free_tokens == 3 * each // 32 * 32


def test_answers_without_room_beside_all_contexts(llm, prompts, short_task, tmp_path, monkeypatch):
    """The last context makes room, and is read again; so for a context that is refused."""
    method, encoded = Method("dense"), []
    together = recorded(llm, prompts, run_of(tmp_path / "a", short_task, method, 4))
    pages = sum(-(-record["context_tokens"] // 32) for record in together[:3])
    monkeypatch.setattr(llm._leader.scheduler._room, "limits", Limits(pages=pages))
    monkeypatch.setattr(runner, "_is_full", lambda llm, batch: False)
    encode = llm.encode
    monkeypatch.setattr(llm, "encode", lambda *args: encoded.append(args[0]) or encode(*args))
    alone = recorded(llm, prompts, run_of(tmp_path / "b", short_task, method, 4))
    assert [r["pred"] for r in alone] == [r["pred"] for r in together]
    contexts = [short_task.sample(index).context for index in range(4)]
    assert [contexts.index(text) for text in encoded] == [0, 1, 2, 3, 2, 3]
    assert llm.report()[0]["pages_in_use"] == 0


def test_without_times(llm, prompts, short_task, tmp_path):
    run = run_of(tmp_path, short_task, Method("dense"), 1)
    (record,) = recorded(llm, prompts, replace(run, timed=False))
    assert "score" in record
    assert not record.keys() & {"seconds", "context_seconds"}


def test_results_of_another_run_are_not_mixed(tmp_path):
    open_results(tmp_path, configuration())
    open_results(tmp_path, configuration(**STAR))
    with pytest.raises(UserError, match=r"made with seed 42, not 1: use another --results"):
        open_results(tmp_path, configuration(**STAR, seed=1))
    with pytest.raises(UserError, match=r"made with ranks 1, not 4: use another --results"):
        open_results(tmp_path, configuration(**STAR, ranks=4))
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(UserError, match=r"other\.json is not of star-attn eval"):
        open_results(tmp_path, configuration())


def test_damaged_results(tmp_path):
    results = open_results(tmp_path, configuration())
    results.path.write_text('{"task"\n{"task": "vt", "length": 1, "index": 0, "error": "x"}\n')
    with pytest.raises(UserError, match=r"dense\.jsonl, line 1 is damaged"):
        load_results(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used: "):
        open_results(tmp_path / "file", configuration())
    with pytest.raises(UserError, match="holds no results"):
        load_results(tmp_path / "empty")


def record(task, length, index, score, seconds, **fields):
    """A made-up line; half of the needles of a score of 0.5 are found."""
    return {
        "task": task,
        "length": length,
        "index": index,
        "pred": "a" * (score > 0),
        "outputs": ["a", "b"] if score == 0.5 else ["a"],
        "score": score,
        "depths": [0.05, 1.0][: 1 + (score == 0.5)],
        "context_tokens": length and length - 100,
        "block_size": 1024,
        "anchor_size": 1024,
        "context_seconds": seconds / 2,
        "seconds": seconds,
        **fields,
    }


@pytest.fixture
def made_up(tmp_path):
    """Dense: vt 1, 0.5, niah 1, 1; star keeps 0.5, 0.25, 1, 1 in half the time; one fails."""
    dense = open_results(tmp_path, configuration())
    star = open_results(tmp_path, configuration(**STAR))
    small = open_results(tmp_path, configuration(**STAR | {"anchor_size": "0"}))
    for length in (4096, 8192):
        for task, kept in (("vt", 0.5), ("niah_single_1", 1)):
            for index, score in enumerate((1.0, 0.5) if task == "vt" else (1.0, 1.0)):
                dense.append(record(task, length, index, score, 4.0 + index))
                star.append(record(task, length, index, score * kept, 2.0 + index / 2))
                sizes = {"anchor_size": 0, "block_size": 1024}
                small.append(record(task, length, index, 0.0, 1.0, **sizes))
    dense.append(record("vt", 4096, 2, 1.0, 400.0))  # the others do not have it
    star.append({"task": "vt", "length": 4096, "index": 2, "error": "no memory"})
    for results in (dense, star, small):
        results.write_scores()
    return tmp_path


def test_report_numbers(made_up):
    rows = comparison.compare(load_results(made_up))
    assert [(row.length, row.label) for row in rows[:3]] == [
        (4096, "dense"),
        (4096, "star quarter/block"),
        (4096, "star quarter/0"),
    ]
    dense, star, small = rows[:3]
    assert dense.tasks == {"niah_single_1": 100, "vt": 75}
    assert star.tasks == {"niah_single_1": 100, "vt": 37.5}
    assert (dense.accuracy, star.accuracy, small.accuracy) == (87.5, 68.75, 0)
    assert (dense.difference, star.difference, small.difference) == (0, -18.75, -87.5)
    assert star.retention == pytest.approx(100 * 68.75 / 87.5)
    assert (dense.seconds, star.seconds, star.speedup) == (4.5, 2.25, 2)
    assert star.context_seconds == 1.125
    assert (star.samples, star.failed, dense.failed) == (4, 1, 0)
    assert comparison.as_json(rows)[1]["retention"] == star.retention


def test_report_table(made_up, capsys):
    found = load_results(made_up)
    comparison.print_report(found, comparison.compare(found))
    out = capsys.readouterr().out
    assert "\n4,096 tokens" in out
    line = next(line for line in out.splitlines() if "star quarter/block" in line)
    assert " ".join(line.split()) == ("star quarter/block 68.8 % -18.8 78.6 % 1.12 2.25 2.00 4")
    assert "star quarter/block: 1 failed, first: no memory" in out


def test_times_of_some_samples(made_up, capsys):
    """Medians are over samples that all have times of."""
    path = made_up / "dense.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["length"] == 8192 or record["index"] == 1:
            del record["context_seconds"], record["seconds"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = load_results(made_up)
    rows = comparison.compare(found)
    dense, star, _, untimed, *_ = rows
    assert (dense.seconds, star.seconds, star.speedup, star.timed) == (4, 2, 2, 2)
    assert (untimed.accuracy, untimed.seconds, untimed.speedup, untimed.timed) == (
        87.5,
        None,
        None,
        0,
    )
    comparison.print_report(found, rows)
    assert re.search(r"dense +87\.5 % +\+0\.0 +100\.0 % +- +- +- +4", capsys.readouterr().out)
    assert len(plots.draw(rows, made_up)) == 4
    found[0].write_scores()
    scores = json.loads((made_up / "dense.json").read_text())["scores"]
    assert [score["seconds"] for score in scores] == [202, 4, None, None]


def test_report_without_baseline(tmp_path, capsys):
    star = open_results(tmp_path, configuration(**STAR))
    star.append(record("vt", None, 0, 0.0, 1.0))
    ring = open_results(tmp_path, configuration(attention="ring"))
    ring.append({"task": "vt", "length": None, "index": 0, "error": "no memory"})
    found = load_results(tmp_path)
    (row,) = rows = comparison.compare(found)
    assert (row.accuracy, row.difference, row.retention, row.speedup) == (0, None, None, None)
    comparison.print_report(found, rows)
    assert "ring: not compared" in capsys.readouterr().out


def test_many_configurations(tmp_path, monkeypatch, capsys):
    """Tables of 80 columns, pictures of a page's width."""
    monkeypatch.setenv("COLUMNS", "80")
    tasks, sizes = list(ruler.TASKS), ["block", "half", "quarter", "page", "0"]
    stars = [(block, anchor) for block in ("half", "quarter") for anchor in sizes]
    for block, anchor in [(None, None), *stars]:
        method = {"block_size": block, "anchor_size": anchor}
        attention = "star" if block else "dense"
        results = open_results(tmp_path, configuration(attention=attention, **method))
        for length in (1024, 2048, 4096, 8192):
            for task in tasks:
                results.append(record(task, length, 0, 1.0, 100.0))
    found = load_results(tmp_path)
    rows = comparison.compare(found)
    comparison.print_report(found, rows)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert out.count("niah_multivalue") == 2 * 4
    for path in plots.draw(rows, tmp_path):
        height, width, _ = matplotlib.image.imread(path).shape
        assert width <= 14 * 130, path
        assert height <= 20 * 130, path


def test_plots(made_up, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plots")
    drawn = plots.draw(comparison.compare(load_results(made_up)), folder)
    assert [path.name for path in drawn] == [
        "accuracy.png",
        "retention.png",
        "depth.png",
        "ablation.png",
    ]
    for path in drawn:
        pixels = matplotlib.image.imread(path)[..., :3]
        assert pixels.shape[0] > 200
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
        assert (pixels != 1).any(axis=-1).mean() > 0.01


def test_report_of_selected_pages(made_up, capsys):
    """In the table, beside the same sizes without, and in pictures."""
    assert "selected pages" not in _printed(made_up, capsys)
    before = [path.read_bytes() for path in plots.draw(_rows(made_up), made_up)]
    chosen = open_results(made_up, configuration(**STAR, selected_pages=16))
    for length in (4096, 8192):
        for task in ("vt", "niah_single_1"):
            for index in range(2):
                chosen.append(record(task, length, index, 1.0, 3.0))
    chosen.write_scores()
    out = _printed(made_up, capsys)
    labels = re.findall(r"^(star \S+) +\d", out, re.MULTILINE)[:3]
    assert labels == ["star quarter/block", "star quarter/block+16", "star quarter/0"]
    assert "\n+: selected pages\n" in out
    assert re.search(r"^task +dense +block +\+16 +0 *$", out, re.MULTILINE)
    rows = _rows(made_up)
    assert [row.selected_pages for row in rows[:4]] == [0, 0, 16, 0]
    assert [plots._ablation_name(row) for row in rows[1:3]] == [
        "1,024\n1,024",
        "1,024\n1,024\n+16",
    ]
    after = [path.read_bytes() for path in plots.draw(rows, made_up)]
    assert all(a != b for a, b in zip(after, before, strict=True))
    assert comparison.as_json(rows)[2]["attention"] == "star quarter/block+16"
    assert tune.flags(rows[2]) == "--block-size 1024 --anchor-size 1024 --selected-pages 16"
    assert "pages" not in tune.flags(rows[1])


def _rows(folder):
    return comparison.compare(load_results(folder))


def _printed(folder, capsys):
    comparison.print_report(load_results(folder), _rows(folder))
    return capsys.readouterr().out


def test_tune(made_up, capsys):
    rows = [row for row in comparison.compare(load_results(made_up)) if row.length == 4096]
    stars = rows[1:]
    assert [row.label for row in tune.frontier(stars)] == ["star quarter/0", "star quarter/block"]
    assert tune.choose(stars, 0.7).label == "star quarter/block"
    assert tune.choose(stars, 0.97) is None
    tune.print_choice(rows, 0.7, LLAMA_3_1_8B)
    assert "--block-size 1024 --anchor-size 1024\n" in capsys.readouterr().out
    tune.print_choice(rows, 0.97, LLAMA_3_1_8B)
    assert "No setting keeps 97%" in capsys.readouterr().out


def test_tune_chooses_selected_pages(tmp_path, capsys):
    """The cheapest that keeps accuracy: here they took long, a plan predicts that they do not."""
    length, tokens = 1 << 17, (1 << 17) - 100
    for method, score, seconds, sizes in (
        (Method("dense"), 1.0, 60.0, (tokens, 0)),
        (Method("star", "quarter", "block"), 0.98, 30.0, (32768, 32768)),
        (Method("star", "8192", "512"), 0.5, 10.0, (8192, 512)),
        (Method("star", "8192", "512", 16), 0.99, 50.0, (8192, 512)),
        (Method("star", "8192", "512", 256), 0.99, 55.0, (8192, 512)),
    ):
        results = open_results(tmp_path, configuration(**method.configuration))
        fields = {"block_size": sizes[0], "anchor_size": sizes[1], "context_tokens": tokens}
        results.append(record("vt", length, 0, score, 2 * seconds, **fields))
        results.write_scores()
    rows = comparison.compare(load_results(tmp_path))
    by_label = {row.label: row for row in rows}

    def predicted(row):
        return tune.predicted_seconds(row, LLAMA_3_1_8B)

    for label, config in (
        ("star 8192/512", StarConfig(8192, 512)),
        ("star 8192/512+16", StarConfig(8192, 512, selected_pages=16)),
    ):
        expected = predict(make_plan(tokens, config)).seconds
        assert predicted(by_label[label]) == pytest.approx(expected)
    stars = rows[1:]
    assert [row.label for row in tune.frontier(stars, predicted)] == [
        "star 8192/512",
        "star 8192/512+16",
    ]
    assert tune.choose(stars, 0.97).label == "star quarter/block"
    assert tune.choose(stars, 0.97, predicted).label == "star 8192/512+16"
    for cost, flags in (
        ("measured", "--block-size 32768 --anchor-size 32768"),
        ("predicted", "--block-size 8192 --anchor-size 512 --selected-pages 16"),
    ):
        tune.print_choice(rows, 0.97, LLAMA_3_1_8B, cost)
        out = capsys.readouterr().out
        assert f"The fastest, as {cost}, that keeps 97%, on 1 samples:\n{flags}\n" in out


@pytest.mark.parametrize("kept", [0, 20])
def test_full_disk(tmp_path, kept):
    """A record is written whole or not at all, and the run says what is wrong."""
    results = open_results(tmp_path, configuration())
    record = {"task": "t", "length": None, "index": 0, "score": 1.0}
    results.append(record)
    before = results.path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + kept, limit[1]))
    try:
        with pytest.raises(UserError, match=r"--results .* cannot be used: (No space|File too)"):
            results.append({**record, "index": 1})
        with pytest.raises(UserError, match=r"--results .* cannot be used: File too large"):
            results.write_scores()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert results.path.read_bytes() == before
    assert len(json.loads(results.path.with_suffix(".json").read_text())["scores"]) == 0


@pytest.mark.parametrize("line", ["[]", "3", "{}", '{"length": [], "task": "t", "index": 0}'])
def test_records_of_the_wrong_shape(tmp_path, line):
    path = open_results(tmp_path, configuration()).path
    path.write_text(line + "\n")
    with pytest.raises(UserError, match="line 1 is damaged: remove the line"):
        load_results(tmp_path)


def test_samples_are_made_together_and_not_beside_answers(monkeypatch):
    """As many as there are cores, in order; one that cannot be made holds none of the others up."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    together, calls = threading.Barrier(3, timeout=10), []

    def sample(index):
        calls.append(index)
        together.wait()
        if index == 4:
            raise UserError("no such sample")
        return index * 10

    made = runner._made(Task("some", None, 1, None, sample, range(6)), range(6))
    first = next(made)
    assert (first[0], first[1].result(), sorted(calls)) == (0, 0, [0, 1, 2])
    rest = list(made)
    assert [index for index, _ in rest] == [1, 2, 3, 4, 5]
    assert [future.exception() is not None for _, future in rest] == [False] * 3 + [True, False]
