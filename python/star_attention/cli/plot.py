"""Draws a plan: what tokens see in phase 1 and 2, coloured by the rank that computes them, hatched
where it arrives from another rank."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from star_attention.errors import UserError, counted, reason_of
from star_attention.files import write_whole
from star_attention.plan import Plan

# At most so many blocks are drawn, have ticks, and slices of a block and ranks their own colours.
_MAX_BLOCKS, _MAX_TICKS, _MAX_SLICES, _MAX_RANKS = 24, 12, 64, 16
_GAP = 0.5  # where blocks are left out, in blocks
_ALL = "0.6"  # the colour of what more ranks compute together
_QUERY = "0.3"
_CHOICE = "0.75"  # of what pages are chosen from


class _Run(NamedTuple):
    """Tokens [start, end) of a block and the rank that computes, or keeps, them; None: many do."""

    start: int
    end: int
    rank: int | None


class _Area(NamedTuple):
    """What a rank's tokens see; `arrives`: it comes from another rank."""

    corners: list[tuple[float, float]]
    rank: int | None
    arrives: bool


def plot_plan(plan: Plan, path: str | Path) -> None:
    """Writes a picture of `plan` to `path` (PNG, PDF or SVG by its suffix). Of many blocks it shows
    the first and the last one of each rank's.

    Raises:
        UserError: matplotlib is missing, the path cannot be written, or the context is empty.
    """
    if not plan.context_len:
        raise UserError("a plan of 0 tokens has nothing to draw: use a context of 1 token or more")
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'star-attention-trt[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(7.5, 7))
    _draw(ax, plan, plt.get_cmap("tab10" if plan.num_ranks <= 10 else "tab20").colors)
    fig.tight_layout()
    picture = io.BytesIO()  # whole before any of it is written
    try:
        fig.savefig(picture, dpi=130, format=Path(path).suffix[1:] or "png")
        write_whole(Path(path), picture.getvalue())
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path} cannot be written: {reason_of(error)}") from None
    finally:
        plt.close(fig)


def _draw(ax: Any, plan: Plan, colors: Sequence[Any]) -> None:
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Polygon

    def color(rank: int | None) -> Any:
        return _ALL if rank is None else colors[rank % len(colors)]

    shown = _shown(plan)
    at = _Scale(plan, shown)
    end, below = at.end, 1.08 * at.end
    computed, kept = _computed(plan, shown), _kept(plan, shown)
    areas = list(_areas(plan, computed, at))
    for arrives, style in ((False, {}), (True, {"alpha": 0.5, "hatch": "////"})):
        these = [area for area in areas if area.arrives == arrives]
        corners, faces = [area.corners for area in these], [color(area.rank) for area in these]
        ax.add_collection(PolyCollection(corners, fc=faces, ec="white", lw=0, **style))
    choices = PolyCollection(list(_choices(plan, shown, at)), fc="none", ec=_CHOICE, lw=0)
    choices.set_hatch("..")
    ax.add_collection(choices)
    for index, runs in kept.items():
        for run in runs:
            x = at(index, run.start), at(index, run.end)
            ax.fill_between(x, end, below, color=color(run.rank), alpha=0.7, lw=0)
    for begin, stop in at.gaps:
        ax.axvspan(begin, stop, color="0.93", lw=0, zorder=0)
        ax.axhspan(begin, stop, color="0.93", lw=0, zorder=0)
        ax.text((begin + stop) / 2, (begin + stop) / 2, "⋱", ha="center", va="center")
    starts = {index: plan.blocks[index].start for index in shown}
    ax.hlines([at(*each) for each in starts.items()], 0, below, color="0.85", lw=0.5, zorder=0)
    ax.add_patch(Polygon([(end, end), (end, below), (below, below)], color=_QUERY, lw=0))
    ax.axhline(end, color="0.2", lw=1)
    if plan.blocks[-1].prefix:
        ax.axvline(at(0, plan.anchor_size), color="0.2", lw=0.8, ls="--")

    ax.set_xlim(0, below)
    ax.set_ylim(below, 0)
    ax.set_aspect("equal")
    ticks = {at(*each): each[1] for each in list(starts.items())[:: -(-len(shown) // _MAX_TICKS)]}
    if plan.blocks[-1].prefix:
        ticks[at(0, plan.anchor_size)] = plan.anchor_size
    # The end needs its room more than what is in front of it.
    ticks = {x: tokens for x, tokens in ticks.items() if x < 0.97 * end} | {end: plan.context_len}
    labels = [f"{tokens:,}" for tokens in ticks.values()]
    ax.set_xticks(list(ticks), labels, rotation=60, fontsize=8)
    ax.set_yticks([*ticks, (end + below) / 2], [*labels, "query"], fontsize=8)
    ax.set_xlabel("token that is seen")
    ax.set_ylabel("token that attends")
    sizes = f"blocks of {plan.block_size:,}, anchor {plan.anchor_size:,}"
    if plan.selected_pages:
        sizes += f", {counted(plan.selected_pages, 'selected page')}"
    some = f"\n{len(shown)} of the {len(plan.blocks):,} blocks" if at.gaps else ""
    ax.set_title(f"{plan.context_len:,} tokens, {sizes}{some}", fontsize=11)
    ax.legend(handles=_legend(plan, color, areas), loc="upper right", fontsize=7.5)


def _legend(plan: Plan, color: Any, areas: Sequence[_Area]) -> list[Any]:
    from matplotlib.patches import Patch

    keeps: Counter[int] = Counter()
    for part in plan.parts:
        keeps[part.rank] += part.tokens
    handles = [
        Patch(fc=color(rank), label=f"rank {rank} computes {cost.tokens:,}, keeps {keeps[rank]:,}")
        for rank, cost in enumerate(plan.rank_costs[:_MAX_RANKS])
    ]
    if plan.num_ranks > _MAX_RANKS:
        handles.append(Patch(fc="white", label=f"and {plan.num_ranks - _MAX_RANKS:,} more"))
    if any(area.rank is None for area in areas):
        handles.append(Patch(fc=_ALL, label="all ranks, in slices"))
    if any(area.arrives for area in areas):
        handles.append(Patch(fc="0.7", ec="white", hatch="////", label="from another rank"))
    if any(map(plan.candidates, plan.blocks)):
        label = f"each page of rows sees {plan.selected_pages:,} of these"
        handles.append(Patch(fc="none", ec=_CHOICE, hatch="..", lw=0, label=label))
    return [*handles, Patch(fc=_QUERY, label="query and new tokens")]


def _shown(plan: Plan) -> list[int]:
    """Blocks to draw, by their index."""
    if len(plan.blocks) <= _MAX_BLOCKS:
        return list(range(len(plan.blocks)))
    ends: list[int] = []
    for _, run in groupby(range(len(plan.blocks)), lambda index: plan.blocks[index].rank):
        indices = list(run)
        ends += sorted({indices[0], indices[-1]})
    half = _MAX_BLOCKS // 2
    return ends if len(ends) <= _MAX_BLOCKS else ends[:half] + ends[-half:]


class _Scale:
    """Where tokens of the blocks that are shown are on both axes: to scale, between gaps."""

    def __init__(self, plan: Plan, shown: Sequence[int]) -> None:
        self._plan = plan
        self._starts: dict[int, float] = {}
        self.gaps: list[tuple[float, float]] = []
        self.end = 0.0
        for before, index in pairwise([-1, *shown]):
            if index > before + 1:
                self.gaps.append((self.end, self.end + _GAP))
                self.end += _GAP
            self._starts[index] = self.end
            self.end += plan.blocks[index].tokens / plan.block_size

    def __call__(self, index: int, token: int) -> float:
        """The place of a token, or the end, of a block."""
        return (
            self._starts[index] + (token - self._plan.blocks[index].start) / self._plan.block_size
        )


def _computed(plan: Plan, shown: Sequence[int]) -> dict[int, list[_Run]]:
    """Of each block, who computes what."""
    runs = {index: [] for index in shown}
    for span in plan.slices:
        if span.block in runs:
            runs[span.block].append(_Run(span.start, span.end, span.rank))
    return _legible(plan, runs)


def _kept(plan: Plan, shown: Sequence[int]) -> dict[int, list[_Run]]:
    """Of each block, who keeps what."""
    runs = {index: [] for index in shown}
    for part in plan.parts:
        if part.block in runs:
            runs[part.block].append(_Run(part.start, part.end, part.rank))
    return _legible(plan, runs)


def _legible(plan: Plan, runs: dict[int, list[_Run]]) -> dict[int, list[_Run]]:
    """Ascending; those of a block are one if they are too many, or are not cut at all."""
    for index, own in runs.items():
        block = plan.blocks[index]
        if not 0 < len(own) <= _MAX_SLICES:
            own[:] = [_Run(block.start, block.end, block.rank)]
        own.sort()
    return runs


def _choices(plan: Plan, shown: Sequence[int], at: _Scale) -> Iterator[list[tuple[float, float]]]:
    """Corners of what the rows of each block choose pages from."""
    for index in shown:
        block = plan.blocks[index]
        if plan.candidates(block):
            left, right = at(0, plan.anchor_size), at(index, block.start)
            bottom = at(index, block.end)
            yield [(left, right), (right, right), (right, bottom), (left, bottom)]


def _areas(plan: Plan, computed: dict[int, list[_Run]], at: _Scale) -> Iterator[_Area]:
    """What tokens of each run see: the anchor, their block in front of them, and themselves."""
    travels = plan.exchanges or plan.attention == "ring"
    for index, runs in computed.items():
        block = plan.blocks[index]
        for run in runs:
            top, bottom = at(index, run.start), at(index, run.end)
            yield _Area([(top, top), (top, bottom), (bottom, bottom)], run.rank, False)
            for place, until in ((0, block.prefix), (index, run.start)):
                for seen in computed[place]:
                    if seen.start >= until:
                        break
                    left, right = at(place, seen.start), at(place, min(seen.end, until))
                    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
                    yield _Area(corners, run.rank, travels and seen.rank != run.rank)
