"""Phase 1, context encoding: which passes turn a context into cached KV.

A rank's part is a list of sequences of tokens: its blocks, the anchor before them where the rank
computes it itself, or, in a ring, its two chunks of the context. A pass takes the next tokens of
that list, cut anywhere: what a sequence has cached stands in front of its next rows, so masks stay
bottom-right causal. `Phase1` says how many tokens each rank takes in the next pass; `ContextPart`
makes one rank's pass of them. Blocks that are cached already have no part in it.

Source: Star Attention, arXiv 2411.17116, section 2.1; anchor modes: docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from star_attention.config import StarConfig
from star_attention.engines.base import AttentionStep, Limits, RingHop, RingStep
from star_attention.plan import Plan
from star_attention.runtime.pages import Rows, page_count, page_table, paged_step, slots

# Where blocks start whose KV is cached already.
Cached = Collection[int]


@dataclass(frozen=True)
class Piece:
    """A sequence of a rank's part.

    Attributes:
        prefix: tokens of the anchor in front of it, which are cached already, or, `recomputed`,
            belong to it.
        start, end: its tokens of the context, besides.
        first_page: where its pages stand among its rank's own; None: it is the anchor, computed by
            a rank for its blocks (mode `local`).
    """

    start: int
    end: int
    first_page: int | None
    prefix: int = 0
    recomputed: bool = False

    @property
    def tokens(self) -> int:
        return self.end - self.start + self.prefix * self.recomputed


def pieces_of(plan: Plan, config: StarConfig, rank: int, cached: Cached = ()) -> list[Piece]:
    """A rank's part, in the order in which it is computed."""
    again = config.anchor_mode == "recompute" and config.attention == "star"
    pieces, page = [], 0
    for block in plan.blocks_of(rank):
        if block.start not in cached:
            prefix = block.prefix if config.attention == "star" else 0
            pieces.append(Piece(block.start, block.end, page, prefix, again))
        page += page_count(block.tokens, plan.tokens_per_block)
    if config.anchor_mode == "local" and rank and any(piece.prefix for piece in pieces):
        pieces.insert(0, Piece(0, plan.anchor_size, None))
    return pieces


def own_pages(plan: Plan, rank: int) -> int:
    """Pages that a rank's own blocks take."""
    page = plan.tokens_per_block
    return sum(page_count(block.tokens, page) for block in plan.blocks_of(rank))


def scratch_pages(plan: Plan, config: StarConfig, rank: int, cached: Cached = ()) -> int:
    """Pages that a rank takes for an anchor that is not its own, until its phase 1 is over."""
    if config.anchor_mode == "broadcast":
        takes = rank > 0 and shares_anchor(plan, config, cached)
    else:
        has_its_own = rank == 0 and config.anchor_mode == "local"
        takes = not has_its_own and needs_anchor(plan, config, rank, cached)
    return plan.anchor_size // plan.tokens_per_block if takes else 0


def needs_anchor(plan: Plan, config: StarConfig, rank: int, cached: Cached = ()) -> bool:
    """Whether a rank reads a block that has the anchor in front of it."""
    return config.attention == "star" and any(
        block.prefix and block.start not in cached for block in plan.blocks_of(rank)
    )


def shares_anchor(plan: Plan, config: StarConfig, cached: Cached = ()) -> bool:
    """Whether rank 0 sends the anchor's KV to the other ranks."""
    others = range(1, plan.num_ranks)
    return config.anchor_mode == "broadcast" and any(
        needs_anchor(plan, config, rank, cached) for rank in others
    )


class Phase1:
    """How far every rank is with a context, and what each takes in the next pass.

    With `broadcast`, ranks other than 0 begin in the pass in which rank 0 completes the anchor, or
    in the first one, if it is cached.
    With `recompute`, a pass has one block of a rank, whose anchor takes the place of the last
    one's. In a ring, a pass is a run of the context's tokens: those before it are cached.

    Args:
        cached: where blocks start whose KV is there already.

    Attributes:
        done, total: tokens that each rank has computed, and has to.
    """

    def __init__(self, plan: Plan, config: StarConfig, cached: Cached = ()) -> None:
        self._plan, self._config = plan, config
        ranks = range(plan.num_ranks)
        self._pieces = [
            [piece.tokens for piece in pieces_of(plan, config, rank, cached)] for rank in ranks
        ]
        self.total = [sum(tokens) for tokens in self._pieces]
        self.done = [0] * plan.num_ranks
        self._awaits_anchor = shares_anchor(plan, config, cached) and 0 not in cached

    @property
    def finished(self) -> bool:
        return self.done == self.total

    def next(self, limits: Limits, budget: int | None = None) -> tuple[int, ...]:
        """The tokens of each rank in the next pass: at most `budget`, and what `limits` allow."""
        is_ring = self._config.attention == "ring"
        allowed = limits.ring_tokens if is_ring else limits.pass_tokens
        bounds = [each for each in (budget, allowed) if each is not None]
        most = min(bounds, default=max(self.total))
        if is_ring:
            tokens = self._next_in_ring(most)
        else:
            tokens = [self._take(0, most, limits.pass_sequences)]
            waits = self._awaits_anchor and self.done[0] + tokens[0] < self._plan.anchor_size
            for rank in range(1, self._plan.num_ranks):
                tokens.append(0 if waits else self._take(rank, most, limits.pass_sequences))
        self.done = [done + more for done, more in zip(self.done, tokens, strict=True)]
        return tuple(tokens)

    def _take(self, rank: int, most: int, sequences: int | None) -> int:
        """What a rank takes on its own: to the end of its part, unless a limit comes first."""
        if self._config.anchor_mode == "recompute" and self._config.attention == "star":
            sequences = 1
        taken, end = 0, 0
        for tokens in self._pieces[rank]:
            end += tokens
            if end <= self.done[rank]:
                continue
            if sequences == 0:
                break
            sequences = None if sequences is None else sequences - 1
            taken = min(most, end - self.done[rank])
        return taken

    def _next_in_ring(self, most: int) -> list[int]:
        tokens = [0] * self._plan.num_ranks
        begin = sum(self.done)
        for block in self._plan.blocks:
            if block.end <= begin:
                continue
            count = block.end - max(block.start, begin)
            taken = min(count, most - tokens[block.rank])
            tokens[block.rank] += taken
            if taken < count:
                break
        return tokens


@dataclass(frozen=True)
class ContextPass:
    """One forward pass. Token i of the context has position i, so `positions` also says which."""

    positions: np.ndarray
    attention: AttentionStep


class ContextPart:
    """One rank's part of a context, as passes.

    Args:
        pages: hold the rank's own tokens, block after block.
        scratch: `scratch_pages` of them, for the anchor.
        cached: as in `Phase1`.
    """

    def __init__(
        self,
        plan: Plan,
        config: StarConfig,
        rank: int,
        pages: Sequence[int],
        scratch: Sequence[int],
        cached: Cached = (),
    ) -> None:
        self._plan, self._config, self._rank = plan, config, rank
        self._pages = list(pages)
        self._done = [0] * plan.num_ranks
        self._pieces = pieces_of(plan, config, rank, cached)
        anchor = plan.anchor_size // plan.tokens_per_block
        self._anchor = list(scratch) if scratch else self._pages[:anchor]
        self._anchor_is_cached = 0 in cached
        # Tokens of the anchor that rank 0 has not sent yet.
        self._to_share = plan.anchor_size if shares_anchor(plan, config, cached) else 0

    @property
    def finished(self) -> bool:
        """Whether this rank has no part in later passes."""
        if self._config.attention == "ring":
            return sum(self._done) == self._plan.context_len
        own = self._done[self._rank] == sum(piece.tokens for piece in self._pieces)
        return own and not self._to_share

    def take(self, tokens: Sequence[int]) -> ContextPass | None:
        """The pass in which each rank computes so many of its tokens; None: nothing to do here."""
        before = self._done
        self._done = [done + more for done, more in zip(before, tokens, strict=True)]
        if not any(tokens):
            return None
        if self._config.attention == "ring":
            return self._ring_pass(before)
        shared, shared_rows = self._shared(before[0])
        if shared is None and not tokens[self._rank]:
            return None
        sequences, positions = [], []
        for piece, first, last in self._cut(before[self._rank], self._done[self._rank]):
            seen, pages = 0 if piece.recomputed else piece.prefix, self._anchor
            if piece.first_page is not None:
                count = page_count(piece.end - piece.start, self._plan.tokens_per_block)
                pages = self._anchor[: piece.prefix // self._plan.tokens_per_block]
                pages = pages + self._pages[piece.first_page : piece.first_page + count]
            sequences.append(Rows(pages, seen + last, last - first))
            positions.append(_positions(piece)[first:last])
        step = paged_step(
            sequences,
            self._plan.tokens_per_block,
            shared_pages=shared,
            shared_rows=shared_rows,
        )
        return ContextPass(_concatenate(positions), step)

    def _shared(self, begin: int) -> tuple[list[int] | None, int]:
        """The anchor's pages that this pass brings from rank 0, which had done `begin` tokens, and
        how many rows of rank 0 write them."""
        page, anchor = self._plan.tokens_per_block, self._plan.anchor_size
        if not self._to_share:
            return None, 0
        if self._anchor_is_cached:
            self._to_share = 0
            return self._anchor, 0
        end = min(self._done[0], anchor)
        self._to_share = anchor - end
        if begin >= end:
            return None, 0
        return self._anchor[begin // page : page_count(end, page)], end - begin

    def _cut(self, begin: int, end: int) -> Iterator[tuple[Piece, int, int]]:
        """The pieces that have the part's tokens [begin, end), and which of theirs those are."""
        before = 0
        for piece in self._pieces:
            first, last = max(begin - before, 0), min(end - before, piece.tokens)
            if first < last:
                yield piece, first, last
            before += piece.tokens

    def _ring_pass(self, before: Sequence[int]) -> ContextPass:
        """This rank's rows against what every rank has cached by then, hop by hop.

        Of another rank's tokens a row sees those before its own chunk, which are whole chunks; of
        its own rank's also those before it in its chunk.
        """
        plan, rank, page = self._plan, self._rank, self._plan.tokens_per_block
        rows = [
            (piece.start + first, piece.start + last)
            for piece, first, last in self._cut(before[rank], self._done[rank])
        ]
        hops = []
        for hop in range(plan.num_ranks):
            source = (rank - hop) % plan.num_ranks
            blocks = plan.blocks_of(source)
            num_pages = page_count(self._done[source], page)
            sees = [
                sum(
                    max(0, min(block.end, end if source == rank else start) - block.start)
                    for block in blocks
                )
                for start, end in rows
            ]
            table = page_table([range(num_pages)] * len(rows))
            hops.append(RingHop(num_pages, table, np.array(sees, np.int32), causal=source == rank))
        counts = [end - start for start, end in rows]
        own = Rows(self._pages, self._done[rank], sum(counts))
        step = RingStep(
            slot_mapping=slots(own, page),
            cu_seqlens_q=np.cumsum([0, *counts], dtype=np.int32),
            pages=np.asarray(self._pages[: page_count(self._done[rank], page)], np.int32),
            hops=tuple(hops),
        )
        return ContextPass(_concatenate([np.arange(*each) for each in rows]), step)


def _positions(piece: Piece) -> np.ndarray:
    own = np.arange(piece.start, piece.end)
    return np.concatenate([np.arange(piece.prefix), own]) if piece.recomputed else own


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int32), *parts]).astype(np.int32)
