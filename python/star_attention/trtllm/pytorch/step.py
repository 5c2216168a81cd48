"""One forward pass, from what TensorRT-LLM schedules for all ranks to what one of them does.

The last `query_size` tokens of a prompt are its query, those before them its context. Of a context
a rank computes its own blocks, after the anchor, which every rank computes for itself. Queries and
generated tokens are computed by all ranks alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from star_attention.config import StarConfig
from star_attention.engines.base import PagedStep
from star_attention.plan import Plan, make_plan
from star_attention.runtime.pages import Rows, paged_step
from star_attention.trtllm.pytorch.shards import Shards


class Scheduled(NamedTuple):
    """A sequence of a batch: the next `new` tokens behind `cached` ones. `pages`: int64, its pages
    in TensorRT-LLM's order, as numbers of the pool. A prompt is there as a whole; what is cached of
    it is another's, which began alike."""

    cached: int
    new: int
    pages: np.ndarray
    is_prompt: bool


class Moves(NamedTuple):
    """KV that goes from slots of one pool to slots of another, int64.

    Attributes:
        sends, receives: with the rank that it goes to or comes from, one for each.
        here: from, and to, on this rank.
    """

    sends: tuple[tuple[np.ndarray, int], ...]
    receives: tuple[tuple[np.ndarray, int], ...]
    here: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class RankStep:
    """What one rank does.

    Attributes:
        rows: int64 [T], the batch's rows that it computes, sequence by sequence; the query of a
            sequence, or what is generated, comes last.
        rows_per_sequence: how many of each sequence, at least 1.
        scratch_slots: int32 [T], where the pass has their KV; scratch_pages: how many pages.
        context_rows, tail_rows: int64, places in `rows` of context, anchor included, and of the
            rest.
        context: how the context's rows attend to the scratch pages; None: there are none.
        tail: how the other rows attend to one another there; None: the last rank counts them.
        cached: how they attend to what this rank keeps of the tokens before them.
        fetch: cached KV that context sees, from the pools to scratch pages; None: none on any rank.
        keep: KV that is computed, from scratch pages to the pools.
    """

    rows: np.ndarray
    rows_per_sequence: tuple[int, ...]
    scratch_slots: np.ndarray
    scratch_pages: int
    context_rows: np.ndarray
    tail_rows: np.ndarray
    context: PagedStep | None
    tail: PagedStep | None
    cached: PagedStep
    fetch: Moves | None
    keep: Moves


def rank_step(
    batch: Sequence[Scheduled], config: StarConfig, query_size: int, shards: Shards, rank: int
) -> RankStep:
    """The part of `rank` in a pass over `batch`.

    Args:
        config: block and anchor sizes; its pages are those of `shards`.
        query_size: tokens at the end of a prompt that see all of it, at least 1.

    Raises:
        UserError: block and anchor do not fit together.
    """
    step = _Builder(shards, rank)
    for sequence in batch:
        step.begin(sequence)
        context_len = 0
        if sequence.is_prompt:
            context_len = max(sequence.cached + sequence.new - query_size, 0)
            _add_context(step, make_plan(context_len, config, shards.ranks), sequence.cached)
        step.compute_tail(max(context_len, sequence.cached))
    return step.done()


def _add_context(step: _Builder, plan: Plan, cached: int) -> None:
    """What is not cached of a context: its blocks, and on each rank the anchor before them."""
    if cached:
        done = [block.end <= cached for block in plan.blocks]
        plan = plan.beside([i % plan.num_ranks if each else None for i, each in enumerate(done)])
    anchors: dict[int, range] = {}  # of a rank, once it has the anchor: its pages
    for block in plan.blocks:
        if block.end <= cached:
            continue
        if block.prefix and block.rank not in anchors:
            anchors[block.rank] = step.compute(block.rank, 0, block.prefix)
        seen = anchors[block.rank] if block.prefix else ()
        pages = step.compute(block.rank, block.start, block.end, seen)
        step.keep(block.rank, pages, block.start, block.end)
        if not block.start:
            anchors[block.rank] = pages[: plan.anchor_size // plan.tokens_per_block]


class _Builder:
    """Collects sequence by sequence."""

    def __init__(self, shards: Shards, rank: int) -> None:
        self._shards, self._rank = shards, rank
        self._base = 0  # the batch's row of the first token of this sequence
        self._sequence = Scheduled(0, 0, np.empty(0, np.int64), False)
        self._scratch_pages = 0
        self._rows: list[np.ndarray] = []
        self._slots: list[np.ndarray] = []
        self._counts: list[int] = []
        self._context_rows: list[np.ndarray] = []
        self._tail_rows: list[np.ndarray] = []
        self._context: list[Rows] = []
        self._tail: list[Rows] = []
        self._cached: list[Rows] = []
        self._reads_cached = False
        self._fetch = _MovesBuilder()
        self._keep = _MovesBuilder()

    def begin(self, sequence: Scheduled) -> None:
        self._base += self._sequence.cached + self._sequence.new - sequence.cached
        self._sequence = sequence
        self._counts.append(0)

    def compute(self, rank: int, start: int, end: int, prefix: Iterable[int] = ()) -> range:
        """A rank computes those of the context tokens [start, end) that are not cached. They see
        those in its pages `prefix`, and one another.

        Returns:
            The scratch pages of all of them; none if it is another rank.
        """
        fresh = max(start, min(self._sequence.cached, end))
        there = np.arange(start, fresh)
        self._reads_cached |= fresh > start
        keepers = self._shards.keepers(there)
        if rank != self._rank:
            mine = there[keepers == self._rank]
            self._fetch.send(rank, self._shards.slots(mine, self._sequence.pages))
            return range(0)
        pages = self._take_pages(end - start)
        slots = self._scratch_slots(pages, end - start)
        for keeper in range(self._shards.ranks):
            theirs = keepers == keeper
            if keeper == self._rank:
                kept = self._shards.slots(there[theirs], self._sequence.pages)
                self._fetch.here(kept, slots[: len(there)][theirs])
            else:
                self._fetch.receive(keeper, slots[: len(there)][theirs])
        if fresh < end:
            self._add_rows(fresh, end, slots[len(there) :], self._context_rows)
            prefix = list(prefix)
            seen = len(prefix) * self._shards.page + end - start
            self._context.append(Rows([*prefix, *pages], seen, end - fresh))
        return pages

    def keep(self, rank: int, pages: range, start: int, end: int) -> None:
        """What `rank` computed of [start, end) all ranks keep a share of."""
        fresh = max(start, self._sequence.cached)
        positions = np.arange(fresh, end)
        keepers = self._shards.keepers(positions)
        if rank != self._rank:
            mine = positions[keepers == self._rank]
            self._keep.receive(rank, self._shards.slots(mine, self._sequence.pages))
            return
        slots = self._scratch_slots(pages, end - start)[fresh - start :]
        for keeper in range(self._shards.ranks):
            theirs = keepers == keeper
            if keeper == self._rank:
                kept = self._shards.slots(positions[theirs], self._sequence.pages)
                self._keep.here(slots[theirs], kept)
            else:
                self._keep.send(keeper, slots[theirs])

    def compute_tail(self, start: int) -> None:
        """Tokens from `start` on, which see all before them."""
        end = self._sequence.cached + self._sequence.new
        pages = self._take_pages(end - start)
        slots = self._scratch_slots(pages, end - start)
        self._add_rows(start, end, slots, self._tail_rows)
        self._tail.append(Rows(pages, end - start, end - start))
        kept = self._shards.kept(start, self._rank)
        shared = self._sequence.pages[: max(-(-kept // self._shards.page), 1)]
        self._cached.append(Rows(shared, kept, end - start, stored=False))
        positions = np.arange(start, end)
        mine = self._shards.keepers(positions) == self._rank
        self._keep.here(slots[mine], self._shards.slots(positions[mine], self._sequence.pages))

    def done(self) -> RankStep:
        page = self._shards.page
        counts_tail = self._rank == self._shards.ranks - 1
        return RankStep(
            np.concatenate(self._rows),
            tuple(self._counts),
            np.concatenate(self._slots).astype(np.int32),
            self._scratch_pages,
            _joined(self._context_rows),
            _joined(self._tail_rows),
            paged_step(self._context, page) if self._context else None,
            paged_step(self._tail, page) if counts_tail else None,
            paged_step(self._cached, page, causal=False),
            self._fetch.done() if self._reads_cached else None,
            self._keep.done(),
        )

    def _take_pages(self, tokens: int) -> range:
        pages = range(self._scratch_pages, self._scratch_pages - (-tokens // self._shards.page))
        self._scratch_pages = pages.stop
        return pages

    def _add_rows(self, start: int, end: int, slots: np.ndarray, places: list[np.ndarray]) -> None:
        """The rows of the tokens [start, end)."""
        done = sum(map(len, self._rows))
        places.append(np.arange(done, done + end - start))
        self._rows.append(np.arange(self._base + start, self._base + end))
        self._counts[-1] += end - start
        self._slots.append(slots)

    def _scratch_slots(self, pages: range, count: int) -> np.ndarray:
        return pages.start * self._shards.page + np.arange(count)


class _MovesBuilder:
    def __init__(self) -> None:
        self._sends: dict[int, list[np.ndarray]] = {}
        self._receives: dict[int, list[np.ndarray]] = {}
        self._from: list[np.ndarray] = []
        self._to: list[np.ndarray] = []

    def send(self, rank: int, slots: np.ndarray) -> None:
        if len(slots):
            self._sends.setdefault(rank, []).append(slots)

    def receive(self, rank: int, slots: np.ndarray) -> None:
        if len(slots):
            self._receives.setdefault(rank, []).append(slots)

    def here(self, source: np.ndarray, target: np.ndarray) -> None:
        self._from.append(source)
        self._to.append(target)

    def done(self) -> Moves:
        sends, receives = (
            tuple((np.concatenate(parts), rank) for rank, parts in sorted(each.items()))
            for each in (self._sends, self._receives)
        )
        return Moves(sends, receives, (_joined(self._from), _joined(self._to)))


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *parts])
