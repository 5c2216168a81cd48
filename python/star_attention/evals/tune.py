"""The block and anchor size, and number of selected pages, that lose little accuracy and save most
time.

Time is phase 1's: sizes change little else, and answers differ in length. It is what was measured,
or what a plan's prediction says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from star_attention.config import StarConfig
from star_attention.evals.report import Row
from star_attention.models.config import ModelConfig
from star_attention.plan import make_plan
from star_attention.predict import predict

Cost = Literal["measured", "predicted"]

COSTS: tuple[Cost, ...] = ("measured", "predicted")
TASKS = "niah_single_1,niah_multikey_2,vt,cwe"
BLOCKS, ANCHORS = "half,quarter,eighth", "block,half,quarter,page"


def measured_seconds(row: Row) -> float:
    return row.context_seconds


def predicted_seconds(row: Row, model: ModelConfig) -> float:
    """Phase 1 of a star row's median context on its ranks, by `predict` at its default rates."""
    said = row.results.configuration
    config = StarConfig(
        row.block_size,
        row.anchor_size,
        said["anchor_mode"],
        tokens_per_block=said["tokens_per_block"],
        selected_pages=row.selected_pages,
    )
    length = round(median(record["context_tokens"] for record in row.records))
    return predict(make_plan(length, config, said["ranks"], model)).seconds


def frontier(rows: Sequence[Row], seconds: Callable[[Row], float] = measured_seconds) -> list[Row]:
    """The rows that no other beats in `seconds` without losing accuracy, fastest first."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (seconds(row), -row.accuracy)):
        if not best or row.accuracy > best[-1].accuracy:
            best.append(row)
    return best


def choose(
    rows: Sequence[Row],
    min_retention: float,
    seconds: Callable[[Row], float] = measured_seconds,
) -> Row | None:
    """The fastest row, by `seconds`, that keeps `min_retention` (0 to 1) of the baseline's
    accuracy."""
    kept = [row for row in rows if (row.retention or 0) >= 100 * min_retention]
    return min(kept, key=seconds, default=None)


def flags(row: Row) -> str:
    """Options of `star-attn ask` and `eval` that give a row's division."""
    sizes = f"--block-size {row.block_size} --anchor-size {row.anchor_size}"
    return f"{sizes} --selected-pages {row.selected_pages}" if row.selected_pages else sizes


def print_choice(
    rows: Sequence[Row], min_retention: float, model: ModelConfig, cost: Cost = "measured"
) -> None:
    """The frontier of accuracy and time, and the setting to use, as flags.

    Args:
        min_retention: share of the baseline's accuracy to keep, 0 to 1.
        model: the one that answered; weighs predictions.
        cost: the time that counts.
    """
    stars = [row for row in rows if row.is_star and row.timed]
    predicted = partial(predicted_seconds, model=model)
    seconds = measured_seconds if cost == "measured" else predicted
    console, chosen = Console(), choose(stars, min_retention, seconds)
    table = Table("frontier of accuracy and time", box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("retention", "accuracy", "phase 1, s", "predicted, ms"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in frontier(stars, seconds):
        table.add_row(
            flags(row),
            "-" if row.retention is None else f"{row.retention:.1f} %",
            f"{row.accuracy:.1f} %",
            f"{row.context_seconds:.2f}",
            f"{1e3 * predicted(row):,.3g}",
        )
    console.print(table)
    console.print("predicted: at the rates of star-attn plan, an H200's")
    if chosen is None:
        console.print(f"No setting keeps {min_retention:.0%} of the baseline's accuracy.")
    else:
        console.print(
            f"The fastest, as {cost}, that keeps {min_retention:.0%}, on {chosen.samples} "
            "samples:\n"
            f"{flags(chosen)}",
            highlight=False,
        )
