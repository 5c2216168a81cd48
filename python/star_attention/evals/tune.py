"""The block and anchor size that lose little accuracy and save most time.

Time is phase 1's: sizes change little else, and answers differ in length.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from star_attention.evals.report import Row

TASKS = "niah_single_1,niah_multikey_2,vt,cwe"
BLOCKS, ANCHORS = "half,quarter,eighth", "block,half,quarter,page"


def frontier(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in time without losing accuracy, fastest first."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.context_seconds, -row.accuracy)):
        if not best or row.accuracy > best[-1].accuracy:
            best.append(row)
    return best


def choose(rows: Sequence[Row], min_retention: float) -> Row | None:
    """The fastest row that keeps `min_retention` (0 to 1) of the baseline's accuracy."""
    kept = [row for row in rows if (row.retention or 0) >= 100 * min_retention]
    return min(kept, key=lambda row: row.context_seconds, default=None)


def flags(row: Row) -> str:
    """Options of `star-attn ask` and `eval` that give a row's division."""
    sizes = f"--block-size {row.block_size} --anchor-size {row.anchor_size}"
    return f"{sizes} --selected-pages {row.selected_pages}" if row.selected_pages else sizes


def print_choice(rows: Sequence[Row], min_retention: float) -> None:
    """The frontier of accuracy and time, and the setting to use, as flags."""
    stars = [row for row in rows if row.is_star and row.timed]
    console, chosen = Console(), choose(stars, min_retention)
    table = Table("frontier of accuracy and time", box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("retention", "accuracy", "phase 1, s"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in frontier(stars):
        table.add_row(
            flags(row),
            "-" if row.retention is None else f"{row.retention:.1f} %",
            f"{row.accuracy:.1f} %",
            f"{row.context_seconds:.2f}",
        )
    console.print(table)
    if chosen is None:
        console.print(f"No setting keeps {min_retention:.0%} of the baseline's accuracy.")
    else:
        console.print(
            f"The fastest that keeps {min_retention:.0%}, on {chosen.samples} samples:\n"
            f"{flags(chosen)}",
            highlight=False,
        )
