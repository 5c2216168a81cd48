"""What the command line shows of plans and runs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from star_attention.errors import counted
from star_attention.models.config import ModelConfig
from star_attention.plan import Plan

# Set for ranks whose output reaches an interactive terminal through mpirun.
INTERACTIVE = "STAR_ATTENTION_INTERACTIVE"
_MAX_ROWS = 24


def is_interactive() -> bool:
    return sys.stderr.isatty() or INTERACTIVE in os.environ


@contextmanager
def progress(shown: bool) -> Iterator[Callable[[float], None]]:
    """A bar for phase 1 on an interactive terminal; yields what takes the share that is done."""
    if not shown or not is_interactive():
        yield lambda done: None
        return
    console = Console(stderr=True, force_terminal=True)
    columns = (TextColumn("phase 1"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("phase 1", total=1.0)
        yield lambda done: bar.update(task, completed=done)
    if INTERACTIVE in os.environ:
        time.sleep(0.2)  # mpirun passes stderr and stdout on apart: the bar's end must arrive first


def plan_as_json(plan: Plan, model: ModelConfig) -> dict[str, Any]:
    return {
        **asdict(plan),
        "rank_flops": [cost.flops(model) for cost in plan.rank_costs],
        "dense_flops": plan.dense_cost.flops(model),
    }


def print_plan(plan: Plan, model: ModelConfig, model_name: str) -> None:
    """The blocks of each rank and the work of phase 1."""
    console = Console()
    console.print(
        f"{counted(plan.context_len, 'token')} in {counted(len(plan.blocks), 'block')} of "
        f"{plan.block_size:,}, anchor {plan.anchor_size:,} ({plan.anchor_mode}), "
        f"{counted(plan.num_ranks, 'rank')}",
        highlight=False,
    )
    table = Table("rank", "blocks", "own tokens", caption_justify="left")
    for title in ("tokens computed", "attention pairs", "TFLOP"):
        table.add_column(title, justify="right")
    for rank, cost in enumerate(plan.rank_costs[:_MAX_ROWS]):
        own = plan.blocks_of(rank)
        first = own[0].start // plan.block_size if own else 0
        table.add_row(
            str(rank),
            f"{first} to {first + len(own) - 1}" if len(own) > 1 else str(first) if own else "none",
            f"{own[0].start:,} to {own[-1].end - 1:,}" if own else "",
            f"{cost.tokens:,}",
            f"{cost.pairs / 1e6:,.1f} M",
            f"{cost.flops(model) / 1e12:,.1f}",
        )
    console.print(table)
    if plan.num_ranks > _MAX_ROWS:
        console.print(f"... and {counted(plan.num_ranks - _MAX_ROWS, 'more rank')}")
    for note in plan.notes:
        console.print(f"Note: {note}.", highlight=False)
    if plan.context_len:
        dense, busiest = (
            cost.flops(model) / 1e12
            for cost in (plan.dense_cost, max(plan.rank_costs, key=lambda c: c.flops(model)))
        )
        console.print(
            f"Phase 1 with {model_name}: {busiest:,.1f} TFLOP on the busiest rank; dense attention "
            f"needs {dense:,.1f} in all, {dense / busiest:.1f} times as much.",
            highlight=False,
        )


def print_run(ranks: list[dict[str, Any]]) -> None:
    """Time, traffic and memory of each rank (`LLM.report`), on stderr."""
    console = Console(stderr=True, force_terminal=is_interactive() or None)
    phases = {"context": "phase 1", "question": "question", "decode": "decode"}
    table = Table("rank", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for title in phases.values():
        table.add_column(title, justify="right", no_wrap=True)
        table.add_column("sent", justify="right", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    for report in ranks:
        cells = []
        for phase in phases:
            stats = report["phases"][phase]
            cells += [f"{stats['seconds']:.2f} s", _bytes(stats["traffic"]["sent"])]
        table.add_row(str(report["rank"]), *cells, _bytes(report["peak_memory_bytes"]))
    console.print(table)
    context, question, decode = (ranks[0]["phases"][phase]["tokens"] for phase in phases)
    console.print(
        f"{context:,} context, {question:,} question and {counted(decode, 'generated token')} "
        f"passed; the model was loaded in {max(rank['load_seconds'] for rank in ranks):.1f} s; "
        "memory: peak",
        highlight=False,
    )


def _bytes(count: int) -> str:
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"
