"""Draws a plan: the block-sparse mask of phase 1 and 2, coloured by the rank that computes it."""

from __future__ import annotations

import io
from pathlib import Path

from star_attention.errors import UserError, reason_of
from star_attention.files import write_whole
from star_attention.plan import Plan

_MAX_AREAS, _MAX_LINES, _MAX_TICKS = 1024, 128, 16
_EDGE, _TICK = 1.5, 0.02  # points; the share of the axis that a label takes


def plot_plan(plan: Plan, path: str | Path) -> None:
    """Writes a picture of `plan` to `path` (PNG, PDF or SVG by its suffix).

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
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch, Polygon

    n = plan.context_len
    query = n * 0.08
    colors = plt.get_cmap("tab10" if plan.num_ranks <= 10 else "tab20").colors
    fig, ax = plt.subplots(figsize=(7.5, 7))
    # Blocks that are narrower than a pixel are drawn with those behind them.
    shown = plan.blocks[:: -(-len(plan.blocks) // _MAX_AREAS)]
    anchors, own, queries = [], [], []
    for block, end in zip(shown, [*(block.start for block in shown[1:]), n], strict=True):
        start, prefix = block.start, block.prefix
        anchors.append([(0, start), (prefix, start), (prefix, end), (0, end)])
        own.append([(start, start), (start, end), (end, end)])
        queries.append([(start, n), (end, n), (end, n + query), (start, n + query)])
    of_blocks = [colors[block.rank % len(colors)] for block in shown]
    # What is narrower than a pixel has an edge, or nothing would be seen of it.
    edge = _EDGE if len(plan.blocks) > _MAX_LINES else 0
    for shapes, alpha, lw in ((anchors, 0.45, edge), (own, None, edge), (queries, 0.7, 0)):
        areas = PolyCollection(shapes, facecolors=of_blocks, edgecolors=of_blocks, lw=lw)
        areas.set_alpha(alpha)
        ax.add_collection(areas)
    if len(plan.blocks) <= _MAX_LINES:
        ax.hlines([block.start for block in shown], 0, n + query, color="0.85", lw=0.5, zorder=0)
    ax.add_patch(Polygon([(n, n), (n, n + query), (n + query, n + query)], color="0.3", lw=0))
    ax.axhline(n, color="0.2", lw=1)
    if plan.anchor_size and len(plan.blocks) > 1:
        ax.axvline(plan.anchor_size, color="0.2", lw=0.8, ls="--")

    ax.set_xlim(0, n + query)
    ax.set_ylim(n + query, 0)
    ax.set_aspect("equal")
    starts = {block.start for block in plan.blocks} if len(plan.blocks) <= _MAX_TICKS else set()
    wanted = sorted({0, min(plan.anchor_size, n)} | starts)
    ticks = [*(t for t in wanted if not t or _TICK * n < t < (1 - _TICK) * n), n]
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=60, fontsize=8)
    ax.set_yticks([*ticks, n + query / 2], [*(f"{tick:,}" for tick in ticks), "query"], fontsize=8)
    ax.set_xlabel("token that is seen")
    ax.set_ylabel("token that attends")
    ax.set_title(
        f"{n:,} tokens, blocks of {plan.block_size:,}, anchor {plan.anchor_size:,}", fontsize=11
    )
    owners = sorted({block.rank for block in plan.blocks})
    handles = [
        Patch(
            color=colors[rank % len(colors)],
            label=f"rank {rank}: {sum(b.tokens for b in plan.blocks_of(rank)):,} tokens",
        )
        for rank in owners[:16]
    ]
    handles.append(Patch(color="0.3", label="query and new tokens"))
    ax.legend(handles=handles, loc="upper right", fontsize=8)
    fig.tight_layout()
    picture = io.BytesIO()  # whole before any of it is written
    try:
        fig.savefig(picture, dpi=130, format=Path(path).suffix[1:] or "png")
        write_whole(Path(path), picture.getvalue())
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path} cannot be written: {reason_of(error)}") from None
    finally:
        plt.close(fig)
