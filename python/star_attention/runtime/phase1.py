"""Phase 1, context encoding: the passes in which a rank turns its blocks into cached KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from star_attention.config import StarConfig
from star_attention.engines.base import AttentionStep, RingHop, RingStep
from star_attention.plan import Block, Plan
from star_attention.runtime.pages import Rows, page_table, paged_step, slots


@dataclass(frozen=True)
class ContextPass:
    """One forward pass. Token i of the context has position i, so `positions` also says which."""

    positions: np.ndarray
    attention: AttentionStep


def own_pages(plan: Plan, rank: int) -> int:
    """Pages that a rank's own blocks need."""
    return sum(-(-block.tokens // plan.tokens_per_block) for block in plan.blocks_of(rank))


def scratch_pages(plan: Plan, config: StarConfig, rank: int) -> int:
    """Pages that a rank needs for an anchor that is not its own, until phase 1 is over."""
    mode = config.anchor_mode
    blocks = plan.blocks if mode == "broadcast" else plan.blocks_of(rank)
    has_its_own = rank == 0 and mode != "recompute"
    if config.attention != "star" or has_its_own or not any(block.prefix for block in blocks):
        return 0
    return plan.anchor_size // plan.tokens_per_block


def longest_pass(plan: Plan, config: StarConfig, rank: int) -> int:
    """Tokens of a rank that have to go through one pass: its longest block, or, in a ring, all."""
    own = plan.blocks_of(rank)
    if config.attention == "ring":
        return sum(block.tokens for block in own)
    again = plan.anchor_size if config.anchor_mode == "recompute" else 0
    longest = max((block.tokens + bool(block.prefix) * again for block in own), default=0)
    return max(longest, plan.anchor_size) if config.anchor_mode == "local" else longest


def context_passes(
    plan: Plan,
    config: StarConfig,
    rank: int,
    pages: Sequence[int],
    scratch: Sequence[int],
    max_tokens: int | None = None,
) -> list[ContextPass]:
    """The passes of one rank.

    With `local` and `broadcast`, all its blocks take one pass, or several of at most `max_tokens`;
    the first of them leaves the anchor's KV in `scratch`.

    Args:
        pages: hold the rank's own tokens, block after block.
        scratch: `scratch_pages` of them, for the anchor.
        max_tokens: of a pass, at least `longest_pass`.

    Source: Star Attention, arXiv 2411.17116, section 2.1; anchor modes: docs/architecture.md.
    """
    if config.attention == "ring":
        return [_ring_pass(plan, rank, pages)]
    own = _pages_by_block(plan.blocks_of(rank), pages, plan.tokens_per_block)
    if config.anchor_mode == "recompute":
        return [_recompute_pass(plan, block, block_pages, scratch) for block, block_pages in own]

    page = plan.tokens_per_block
    anchor = scratch if rank else pages[: plan.anchor_size // page]
    sequences, starts = [], []
    if scratch and config.anchor_mode == "local":
        sequences.append(Rows(anchor, plan.anchor_size, plan.anchor_size))
        starts.append(0)
    for block, block_pages in own:
        seen = [*anchor, *block_pages] if block.prefix else block_pages
        sequences.append(Rows(seen, block.prefix + block.tokens, block.tokens))
        starts.append(block.start)
    shared = None
    if config.anchor_mode == "broadcast" and any(block.prefix for block in plan.blocks):
        shared = anchor
    passes = []
    for part in _parts([rows.count for rows in sequences], max_tokens):
        positions = [
            np.arange(start, start + rows.count)
            for start, rows in zip(starts[part], sequences[part], strict=True)
        ]
        step = paged_step(sequences[part], page, shared_pages=None if passes else shared)
        passes.append(ContextPass(_concatenate(positions), step))
    return passes


def _recompute_pass(
    plan: Plan, block: Block, pages: Sequence[int], scratch: Sequence[int]
) -> ContextPass:
    """The block with the anchor in front of it, whose KV lands in pages that are dropped."""
    tokens = block.prefix + block.tokens
    rows = Rows([*scratch[: block.prefix // plan.tokens_per_block], *pages], tokens, tokens)
    positions = _concatenate([np.arange(block.prefix), np.arange(block.start, block.end)])
    return ContextPass(positions, paged_step([rows], plan.tokens_per_block))


def _ring_pass(plan: Plan, rank: int, pages: Sequence[int]) -> ContextPass:
    """Both of the rank's chunks against every rank's, hop by hop.

    Of another rank's two chunks, the early one of this rank sees the early one if that rank comes
    before it; the late one sees the early one always, the late one if that rank comes after it.
    """
    page, size = plan.tokens_per_block, plan.num_ranks

    def chunks(owner: int) -> tuple[int, int]:
        early, late = plan.blocks_of(owner)
        return early.tokens, late.tokens

    early, late = chunks(rank)
    hops = []
    for hop in range(size):
        source = (rank - hop) % size
        source_early, source_late = chunks(source)
        total = source_early + source_late
        sees = (source_early if source <= rank else 0, total if source >= rank else source_early)
        num_pages = -(-source_early // page) + -(-source_late // page)
        table = page_table([range(num_pages), range(num_pages)])
        hops.append(RingHop(num_pages, table, np.array(sees, np.int32), causal=source == rank))
    own = plan.blocks_of(rank)
    step = RingStep(
        slot_mapping=slots(Rows(pages, early + late, early + late), page),
        cu_seqlens_q=np.array([0, early, early + late], np.int32),
        pages=np.asarray(pages, np.int32),
        hops=tuple(hops),
    )
    return ContextPass(_concatenate([np.arange(block.start, block.end) for block in own]), step)


def _parts(counts: Sequence[int], limit: int | None) -> list[slice]:
    """Cuts into runs whose sums are at most `limit`, at least one run."""
    parts, begin, total = [], 0, 0
    for index, count in enumerate(counts):
        if limit is not None and index > begin and total + count > limit:
            parts.append(slice(begin, index))
            begin, total = index, 0
        total += count
    return [*parts, slice(begin, len(counts))]


def _pages_by_block(
    blocks: Sequence[Block], pages: Sequence[int], tokens_per_block: int
) -> list[tuple[Block, Sequence[int]]]:
    split, taken = [], 0
    for block in blocks:
        count = -(-block.tokens // tokens_per_block)
        split.append((block, pages[taken : taken + count]))
        taken += count
    return split


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int32), *parts]).astype(np.int32)
