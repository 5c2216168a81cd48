"""The user's own questions, in the JSON Lines form of Star Attention's reference code."""

from __future__ import annotations

from pathlib import Path

from star_attention.errors import UserError
from star_attention.evals import metrics
from star_attention.evals.sample import Sample, Task
from star_attention.evals.texts import field_of, read_rows, text_of


def load_task(path: Path, max_tokens: int) -> Task:
    """The rows of a file: `input_context`, `input_query`, `output` (or a list, `outputs`), and if
    you like `index` and `answer_prefix`. An answer's score is the share of the references that
    occur in it.

    Raises:
        UserError: the file cannot be read, or a row lacks a field.
    """
    samples = {}
    for number, row in enumerate(read_rows(path)):
        outputs = row["outputs"] if "outputs" in row else [field_of(row, "output", path)]
        if not isinstance(outputs, list) or not outputs:
            outputs = [outputs]
        if not all(isinstance(output, str) and output for output in outputs):
            raise UserError(f"{path}: row {number} needs a text, or several, as its output")
        index = row.get("index", number)
        if not isinstance(index, int | str):
            raise UserError(f"{path}: row {number} has the index {index!r}: use a number or a text")
        if index in samples:
            raise UserError(f"{path}: two rows have the index {index}")
        samples[index] = Sample(
            index,
            text_of(row, "input_context", path),
            text_of(row, "input_query", path),
            outputs,
            text_of({"answer_prefix": "", **row}, "answer_prefix", path),
            extra={key: row[key] for key in ("input_context", "input_query")},
        )
    return Task(
        path.stem,
        None,
        max_tokens,
        lambda prediction, sample: metrics.string_match_all(prediction, sample.outputs),
        samples.__getitem__,
        list(samples),
    )
