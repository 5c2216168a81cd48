"""What the command line shows of plans and runs."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from star_attention.config import StarConfig
from star_attention.errors import counted, say
from star_attention.plan import Plan, make_plan
from star_attention.predict import Prediction, Rates, predict

# Set for ranks whose output reaches an interactive terminal through mpirun.
INTERACTIVE = "STAR_ATTENTION_INTERACTIVE"
_MAX_ROWS = 24
_LINE_SECONDS = 5.0


def is_interactive() -> bool:
    return sys.stderr.isatty() or INTERACTIVE in os.environ


@contextmanager
def progress(shown: bool) -> Iterator[Callable[[float], None]]:
    """A bar for phase 1 on an interactive terminal, a line every few seconds elsewhere; yields what
    takes the share that is done."""
    if not shown or not is_interactive():
        yield _ProgressLines() if shown else lambda done: None
        return
    console = Console(stderr=True, force_terminal=True)
    columns = (TextColumn("phase 1"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("phase 1", total=1.0)
        yield lambda done: bar.update(task, completed=done)
    if INTERACTIVE in os.environ:
        time.sleep(0.2)  # mpirun passes stderr and stdout on apart: the bar's end must arrive first


class _ProgressLines:
    def __init__(self) -> None:
        self._next = time.monotonic() + _LINE_SECONDS

    def __call__(self, done: float) -> None:
        if (now := time.monotonic()) >= self._next:
            self._next = now + _LINE_SECONDS
            say(f"phase 1: {done:.0%}")


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """A plan, its spans, and what each rank computes, keeps and receives (bytes; what
    arrives is of 16 bits, and None if the plan is too large to say)."""
    sizes = ("context_len", "block_size", "anchor_size", "selected_pages", "tokens_per_block")
    names = (*sizes, "num_ranks", "attention", "anchor_mode", "kv_dtype", "notes")
    received, kept = predict(plan).received_bytes, _kept_tokens(plan)
    return {
        **{name: getattr(plan, name) for name in names},
        "model": asdict(plan.model),
        "blocks": [asdict(block) for block in plan.blocks],
        "parts": [asdict(part) for part in plan.parts],
        "spans": [span._asdict() for span in plan.spans],  # sees: [start, end] of each run
        "ranks": [
            {
                **cost._asdict(),
                "flops": cost.flops(plan.model),
                "kept_tokens": kept[rank],
                "kept_bytes": kept_bytes(plan, kept[rank]),
                "received_bytes": received and received[rank],
            }
            for rank, cost in enumerate(plan.rank_costs)
        ],
        "dense_flops": plan.dense_cost.flops(plan.model),
    }


def kept_bytes(plan: Plan, tokens: int) -> int:
    """Of the KV of so many tokens, in 16 bits or in 8 with scales."""
    if not plan.is_quantized:
        return plan.model.kv_bytes(tokens, 2)
    pages = -(-tokens // plan.tokens_per_block)
    return pages * plan.model.kept_kv_bytes(plan.tokens_per_block)


def predictions_as_json(plan: Plan, rates: Rates) -> dict[str, Any]:
    """Seconds of phase 1 of a plan, and of the exact methods on as many ranks."""
    predictions = _predictions(plan, rates)
    return {
        "rates": asdict(rates),
        "predicted": {name: asdict(each) for name, each in predictions.items()},
    }


def print_plan(plan: Plan, model_name: str, rates: Rates) -> None:
    """What each rank computes in phase 1, keeps and waits for, and how long that would take."""
    console = Console()
    chosen = f"{counted(plan.selected_pages, 'selected page')}, " if plan.selected_pages else ""
    console.print(
        f"{counted(plan.context_len, 'token')} in {counted(len(plan.blocks), 'block')} of "
        f"{plan.block_size:,}, anchor {plan.anchor_size:,} ({plan.anchor_mode}), {chosen}"
        f"{counted(plan.num_ranks, 'rank')}",
        highlight=False,
    )
    predictions = _predictions(plan, rates)
    fullest = max(_kept_tokens(plan), default=0)
    what = plan.kv_dtype if plan.is_quantized else "16 bits"
    console.print(f"KV cache: {size(kept_bytes(plan, fullest))} on the fullest rank, in {what}.")
    predicted, blocks = predictions[plan.attention], _blocks_by_rank(plan)
    console.print(_table_of_ranks(plan, blocks, predicted.received_bytes))
    if plan.num_ranks > _MAX_ROWS:
        console.print(f"... and {counted(plan.num_ranks - _MAX_ROWS, 'more rank')}")
    for note in _notes(plan, blocks.get(None), predicted.received_bytes is not None):
        console.print(f"Note: {note}.", highlight=False)
    if not plan.context_len:
        return
    dense, busiest = (
        cost.flops(plan.model) / 1e12
        for cost in (plan.dense_cost, max(plan.rank_costs, key=lambda c: c.flops(plan.model)))
    )
    console.print(
        f"Phase 1 with {model_name}: {busiest:,.1f} TFLOP on the busiest rank; dense attention "
        f"needs {dense:,.1f} in all, {dense / busiest:.1f} times as much.",
        highlight=False,
    )
    times = [f"{name} {_seconds(each.seconds)}" for name, each in predictions.items()]
    waits = predicted.exposed_seconds
    console.print(
        f"Predicted: {', '.join(times)}"
        + (f" ({_seconds(waits)} of the first for what arrives)" if waits >= 1e-4 else "")
        + f", at {rates.gemm_tflops:g} TFLOP/s of GEMMs, {rates.attention_tflops:g} of attention "
        f"and {rates.link_gbs:g} GB/s.",
        highlight=False,
    )


def _predictions(plan: Plan, rates: Rates) -> dict[str, Prediction]:
    """Of the plan, and of the exact methods on as many ranks."""
    plans = {plan.attention: plan}
    for attention in ("ring", "dense") if plan.num_ranks > 1 else ("dense",):
        config = StarConfig(attention=attention, tokens_per_block=plan.tokens_per_block)
        if attention not in plans:
            plans[attention] = make_plan(plan.context_len, config, plan.num_ranks, plan.model)
    return {attention: predict(each, rates) for attention, each in plans.items()}


def _table_of_ranks(
    plan: Plan, blocks: dict[int | None, str], received: tuple[int, ...] | None
) -> Table:
    table = Table("rank", "blocks", box=box.SIMPLE_HEAD, collapse_padding=True, show_edge=False)
    for title in ("slices", "tokens", "G pairs", "TFLOP", "keeps", "receives"):
        table.add_column(title, justify="right", no_wrap=True)
    kept = _kept_tokens(plan)
    slices = Counter(span.rank for span in plan.slices)
    for rank, cost in enumerate(plan.rank_costs[:_MAX_ROWS]):
        table.add_row(
            str(rank),
            blocks.get(rank, "none"),
            str(slices[rank]),
            f"{cost.tokens:,}",
            f"{cost.pairs / 1e9:,.2f}",
            f"{cost.flops(plan.model) / 1e12:,.1f}",
            f"{kept[rank]:,}",
            "?" if received is None else size(received[rank]),
        )
    return table


def _blocks_by_rank(plan: Plan) -> dict[int | None, str]:
    """Which blocks a rank computes alone; None: which ones all do."""
    runs: dict[int | None, list[str]] = {}
    for rank, indices in groupby(range(len(plan.blocks)), lambda index: plan.blocks[index].rank):
        first, *rest = indices
        runs.setdefault(rank, []).append(f"{first} to {rest[-1]}" if rest else str(first))
    return {rank: ", ".join(each) for rank, each in runs.items()}


def _kept_tokens(plan: Plan) -> list[int]:
    kept = [0] * plan.num_ranks
    for part in plan.parts:
        kept[part.rank] += part.tokens
    return kept


def _notes(plan: Plan, together: str | None, can_follow: bool) -> Iterator[str]:
    yield from plan.notes
    if together:
        yield f"all ranks compute block{'' if together.isdigit() else 's'} {together} in slices"
    if idle := sum(not cost.tokens for cost in plan.rank_costs):
        yield f"{idle} of {plan.num_ranks} ranks have nothing to compute"
    if not can_follow:
        yield "the plan is too large to say what arrives; predictions leave transfers out"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


def print_run(ranks: list[dict[str, Any]]) -> None:
    """Time, traffic and memory of each rank (`LLM.report`), on stderr."""
    console = Console(stderr=True, force_terminal=is_interactive() or None)
    phases = {"context": "phase 1", "question": "question", "decode": "decode"}
    table = small_table("rank")
    for title in phases.values():
        table.add_column(title, justify="right", no_wrap=True)
        table.add_column("sent", justify="right", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    for report in ranks:
        cells = []
        for phase in phases:
            stats = report["phases"][phase]
            cells += [f"{stats['seconds']:.2f} s", size(stats["traffic"]["sent"])]
        table.add_row(str(report["rank"]), *cells, size(report["peak_memory_bytes"]))
    console.print(table)
    context, question, decode = (ranks[0]["phases"][phase]["tokens"] for phase in phases)
    console.print(
        f"{context:,} context, {question:,} question and {counted(decode, 'generated token')} "
        f"passed; the model was loaded in {max(rank['load_seconds'] for rank in ranks):.1f} s; "
        "memory: peak",
        highlight=False,
    )


def small_table(*titles: str) -> Table:
    return Table(*titles, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)


def size(count: int) -> str:
    """Bytes, for people."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"
