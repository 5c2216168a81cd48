"""What results say: accuracy, what is kept of the baseline's, and time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from star_attention.evals.results import Key, Results, selected_pages

# Characters of a configuration's column in the table of tasks: `quarter` and a space.
_COLUMN = 8


@dataclass(frozen=True)
class Row:
    """One configuration at one length, over the samples that all configurations have answered.

    Attributes:
        accuracy: mean of its tasks' accuracies, in per cent.
        tasks: each task's accuracy, in per cent.
        difference: from the baseline's accuracy, in points; None without one.
        retention: share of the baseline's accuracy, in per cent.
        context_seconds: median time of phase 1 per sample; None if none was timed.
        seconds: median time per sample, whose answers may differ in length.
        speedup: the baseline's `seconds` over this one's.
        timed: how many samples all configurations have times of; medians are over these.
        records: the samples that are compared.
        failed: how many failed here, and are compared nowhere.
    """

    results: Results
    length: int | None
    accuracy: float
    tasks: dict[str, float]
    difference: float | None
    retention: float | None
    context_seconds: float | None
    seconds: float | None
    speedup: float | None
    timed: int
    records: list[dict[str, Any]]
    failed: int

    @property
    def label(self) -> str:
        return self.results.label

    @property
    def samples(self) -> int:
        return len(self.records)

    @property
    def is_star(self) -> bool:
        return self.results.configuration["attention"] == "star"

    @property
    def block_size(self) -> int:
        """Tokens; of the first sample where it depends on them."""
        return self.records[0]["block_size"]

    @property
    def anchor_size(self) -> int:
        return self.records[0]["anchor_size"]

    @property
    def selected_pages(self) -> int:
        return selected_pages(self.results.configuration)


def compare(all_results: Sequence[Results]) -> list[Row]:
    """Rows by length, then configuration; the baseline is dense attention, or ring without it."""
    rows = []
    lengths = {length for results in all_results for length, _, _ in results.records}
    for length in sorted(lengths, key=lambda length: length or 0):
        finished = [
            (results, keys)
            for results in all_results
            if (keys := {key for key in results.finished if key[0] == length})
        ]
        common = set.intersection(*(keys for _, keys in finished)) if finished else set()
        if common:
            rows += _rows(length, [results for results, _ in finished], common)
    return rows


def _rows(length: int | None, all_results: Sequence[Results], keys: set[Key]) -> list[Row]:
    rows: list[Row] = []
    baseline = None
    timed = [key for key in keys if all("seconds" in r.records[key] for r in all_results)]
    for results in all_results:
        records = [record for key, record in results.records.items() if key in keys]
        names = sorted({task for _, task, _ in keys}, key=_task_order)
        tasks = {
            name: 100 * mean(record["score"] for record in records if record["task"] == name)
            for name in names
        }
        accuracy = mean(tasks.values())
        context_seconds, seconds = (
            median(results.records[key][name] for key in timed) if timed else None
            for name in ("context_seconds", "seconds")
        )
        if not rows and results.configuration["attention"] != "star":
            baseline = accuracy, seconds
        rows.append(
            Row(
                results,
                length,
                accuracy,
                tasks,
                accuracy - baseline[0] if baseline else None,
                100 * accuracy / baseline[0] if baseline and baseline[0] else None,
                context_seconds,
                seconds,
                baseline[1] / seconds if baseline and timed else None,
                len(timed),
                records,
                sum(key[0] == length for key in results.records.keys() - results.finished.keys()),
            )
        )
    return rows


def print_report(all_results: Sequence[Results], rows: Sequence[Row]) -> None:
    """The table of rows, and each task's accuracy if there are several tasks."""
    console = Console(markup=False, highlight=False)
    about = all_results[0].configuration
    console.print(
        f"{about['benchmark']}, {about['model']}, seed {about['seed']}, {about['data']}",
        soft_wrap=True,
    )
    table = _table()
    table.add_column("attention", no_wrap=True)
    for title in ("accuracy", "diff.", "retention", "phase 1", "in all", "speedup", "n"):
        table.add_column(title, justify="right")
    length = -1
    for row in rows:
        if row.length != length:
            length = row.length
            table.add_row(_length(length))
        table.add_row(
            row.label,
            f"{row.accuracy:.1f} %",
            _number(row.difference, "+.1f"),
            _number(row.retention, ".1f", " %"),
            _number(row.context_seconds, ".2f"),
            _number(row.seconds, ".2f"),
            _number(row.speedup, ".2f"),
            str(row.samples),
        )
    console.print(table)
    console.print("star: block/anchor size; times: seconds per timed sample; n: compared samples")
    if any(row.selected_pages for row in rows):
        console.print("+: selected pages")
    if any(len(row.tasks) > 1 for row in rows):
        console.print(*_task_tables(rows, console.width), sep="")
    for results in all_results:
        errors = [record["error"] for record in results.records.values() if "error" in record]
        if errors:
            console.print(f"{results.label}: {len(errors)} failed, first: {errors[0]}")
        if results.label not in {row.label for row in rows}:
            console.print(f"{results.label}: not compared, no sample that all answered")


def _task_tables(rows: Sequence[Row], width: int) -> Iterator[Table]:
    """Each task's accuracy, a column per configuration, in as many tables as `width` asks for."""
    labels = list(dict.fromkeys(row.label for row in rows))
    names = max(len(task) for row in rows for task in row.tasks)
    beside = max(1, (width - names) // _COLUMN)
    for first in range(0, len(labels), beside):
        yield _task_table(rows, labels[first : first + beside])


def _task_table(rows: Sequence[Row], labels: Sequence[str]) -> Table:
    table = _table(padding=0)
    table.add_column("task", no_wrap=True)
    for label in labels:
        table.add_column(re.sub(r"[ /]|(?=\+)", "\n", label), justify="right", no_wrap=True)
    for length in dict.fromkeys(row.length for row in rows):
        here = {row.label: row for row in rows if row.length == length and row.label in labels}
        if not here:
            continue
        table.add_row(_length(length))
        for task in next(iter(here.values())).tasks:
            cells = [f"{here[label].tasks[task]:.1f}" if label in here else "" for label in labels]
            table.add_row(task, *cells)
    return table


def as_json(rows: Sequence[Row]) -> list[dict]:
    names = ("length", "accuracy", "tasks", "difference", "retention")
    names += ("context_seconds", "seconds", "speedup", "timed", "samples", "failed")
    return [{"attention": row.label} | {name: getattr(row, name) for name in names} for row in rows]


def _table(padding: int = 1) -> Table:
    """`padding` is in front of a column, beside the space between columns."""
    return Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, padding), pad_edge=False, show_edge=False)


def _task_order(name: str) -> tuple[int, str]:
    """Benchmarks' own order."""
    from star_attention.evals import babilong, infinitebench, ruler

    names = [*ruler.TASKS, *babilong.TASKS, *infinitebench.TASKS]
    return (names.index(name) if name in names else len(names), name)


def _length(length: int | None) -> str:
    return "whole texts" if length is None else f"{length:,} tokens"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
