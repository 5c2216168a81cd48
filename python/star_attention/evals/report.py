"""What results say: accuracy, what is kept of the baseline's, and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from star_attention.evals.results import Key, Results


@dataclass(frozen=True)
class Row:
    """One configuration at one length, over the samples that all configurations have answered.

    Attributes:
        accuracy: mean of its tasks' accuracies, in per cent.
        tasks: each task's accuracy, in per cent.
        difference: from the baseline's accuracy, in points; None without one.
        retention: share of the baseline's accuracy, in per cent.
        context_seconds: median time of phase 1 per sample.
        seconds: median time per sample, whose answers may differ in length.
        speedup: the baseline's `seconds` over this one's.
        records: the samples that are compared.
        failed: how many failed here, and are compared nowhere.
    """

    results: Results
    length: int | None
    accuracy: float
    tasks: dict[str, float]
    difference: float | None
    retention: float | None
    context_seconds: float
    seconds: float
    speedup: float | None
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
    for results in all_results:
        records = [record for key, record in results.records.items() if key in keys]
        names = sorted({task for _, task, _ in keys}, key=_task_order)
        tasks = {
            name: 100 * mean(record["score"] for record in records if record["task"] == name)
            for name in names
        }
        accuracy = mean(tasks.values())
        context_seconds, seconds = (
            median(record[name] for record in records) for name in ("context_seconds", "seconds")
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
                baseline[1] / seconds if baseline else None,
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
    for title in ("accuracy", "diff.", "retention", "phase 1", "in all", "speed-up", "n"):
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
            f"{row.context_seconds:.2f}",
            f"{row.seconds:.2f}",
            _number(row.speedup, ".2f"),
            str(row.samples),
        )
    console.print(table)
    console.print(
        "star: block/anchor size; times: seconds per sample; n: samples that all answered"
    )
    if any(len(row.tasks) > 1 for row in rows):
        console.print(_task_table(rows))
    for results in all_results:
        errors = [record["error"] for record in results.records.values() if "error" in record]
        if errors:
            console.print(f"{results.label}: {len(errors)} failed, first: {errors[0]}")
        if results.label not in {row.label for row in rows}:
            console.print(f"{results.label}: not compared, no sample that all answered")


def _task_table(rows: Sequence[Row]) -> Table:
    labels = list(dict.fromkeys(row.label for row in rows))
    table = _table()
    table.add_column("task")
    for label in labels:
        table.add_column(label, justify="right")
    for length in dict.fromkeys(row.length for row in rows):
        here = {row.label: row for row in rows if row.length == length}
        table.add_row(_length(length))
        for task in next(iter(here.values())).tasks:
            cells = [f"{here[label].tasks[task]:.1f}" if label in here else "" for label in labels]
            table.add_row(task, *cells)
    return table


def as_json(rows: Sequence[Row]) -> list[dict]:
    names = ("length", "accuracy", "tasks", "difference", "retention")
    names += ("context_seconds", "seconds", "speedup", "samples", "failed")
    return [{"attention": row.label} | {name: getattr(row, name) for name in names} for row in rows]


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)


def _task_order(name: str) -> tuple[int, str]:
    """Benchmarks' own order."""
    from star_attention.evals import babilong, infinitebench, ruler

    names = [*ruler.TASKS, *babilong.TASKS, *infinitebench.TASKS]
    return (names.index(name) if name in names else len(names), name)


def _length(length: int | None) -> str:
    return "whole texts" if length is None else f"{length:,} tokens"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
