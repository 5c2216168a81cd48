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
from star_attention.plan import make_plan
from star_attention.runtime.pages import Rows, paged_step
from star_attention.trtllm.pytorch.shards import Shards


class Scheduled(NamedTuple):
    """A sequence of a batch: the next `new` tokens behind `cached` ones. `pages`: int64, its pages
    in TensorRT-LLM's order, as numbers of the pool. A prompt is there as a whole."""

    cached: int
    new: int
    pages: np.ndarray
    is_prompt: bool


# KV that moves: from slots of the pass's scratch pages, or to slots of the pool, and the rank that
# it goes to or comes from. int64.
Moves = tuple[tuple[np.ndarray, int], ...]


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
        sends, receives: context KV that this rank computed and others keep, and the other way.
        kept: scratch slots and pool slots of KV that this rank computed and keeps.
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
    sends: Moves
    receives: Moves
    kept: tuple[np.ndarray, np.ndarray]


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
            context_len = max(sequence.new - query_size, 0)
            plan = make_plan(context_len, config, shards.ranks)
            anchor = range(0)
            for block in plan.blocks:
                if block.rank != rank:
                    step.arrive(block.rank, block.start, block.end)
                    continue
                if block.prefix and not anchor:
                    anchor = step.compute(0, block.prefix)
                pages = step.compute(block.start, block.end, anchor if block.prefix else ())
                step.leave(pages, block.start, block.end)
                if not block.start:
                    anchor = pages[: plan.anchor_size // shards.page]
        step.compute_tail(max(context_len, sequence.cached))
    return step.done()


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
        self._sends: dict[int, list[np.ndarray]] = {}
        self._receives: dict[int, list[np.ndarray]] = {}
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []

    def begin(self, sequence: Scheduled) -> None:
        self._base += self._sequence.cached + self._sequence.new - sequence.cached
        self._sequence = sequence
        self._counts.append(0)

    def compute(self, start: int, end: int, prefix: Iterable[int] = ()) -> range:
        """Context tokens [start, end), which see those in the pages `prefix` and one another; their
        scratch pages."""
        pages = self._add(start, end, self._context_rows)
        prefix = list(prefix)
        seen = len(prefix) * self._shards.page + end - start
        self._context.append(Rows([*prefix, *pages], seen, end - start))
        return pages

    def leave(self, pages: range, start: int, end: int) -> None:
        """Of [start, end), which this rank computed, every rank keeps its share."""
        positions = np.arange(start, end)
        slots = self._scratch_slots(pages, end - start)
        keepers = self._shards.keepers(positions)
        for keeper in range(self._shards.ranks):
            theirs = keepers == keeper
            if keeper == self._rank:
                self._keep(slots[theirs], positions[theirs])
            elif theirs.any():
                self._sends.setdefault(keeper, []).append(slots[theirs])

    def arrive(self, source: int, start: int, end: int) -> None:
        """`source` computes [start, end), of which this rank keeps its share."""
        positions = np.arange(start, end)
        mine = positions[self._shards.keepers(positions) == self._rank]
        if len(mine):
            slots = self._shards.slots(mine, self._sequence.pages)
            self._receives.setdefault(source, []).append(slots)

    def compute_tail(self, start: int) -> None:
        """Tokens from `start` on, which see all before them."""
        end = self._sequence.cached + self._sequence.new
        pages = self._add(start, end, self._tail_rows)
        self._tail.append(Rows(pages, end - start, end - start))
        kept = self._shards.kept(start, self._rank)
        shared = self._sequence.pages[: -(-kept // self._shards.page)]
        self._cached.append(Rows(shared, kept, end - start, stored=False))
        positions = np.arange(start, end)
        mine = self._shards.keepers(positions) == self._rank
        self._keep(self._scratch_slots(pages, end - start)[mine], positions[mine])

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
            _moves(self._sends),
            _moves(self._receives),
            (_joined([slots for slots, _ in self._kept]), _joined([to for _, to in self._kept])),
        )

    def _add(self, start: int, end: int, places: list[np.ndarray]) -> range:
        """Rows of the tokens [start, end) on scratch pages of their own."""
        done = sum(map(len, self._rows))
        count = end - start
        places.append(np.arange(done, done + count))
        self._rows.append(np.arange(self._base + start, self._base + end))
        self._counts[-1] += count
        pages = range(self._scratch_pages, self._scratch_pages - (-count // self._shards.page))
        self._scratch_pages = pages.stop
        self._slots.append(self._scratch_slots(pages, count))
        return pages

    def _keep(self, slots: np.ndarray, positions: np.ndarray) -> None:
        self._kept.append((slots, self._shards.slots(positions, self._sequence.pages)))

    def _scratch_slots(self, pages: range, count: int) -> np.ndarray:
        return pages.start * self._shards.page + np.arange(count)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *parts])


def _moves(by_rank: dict[int, list[np.ndarray]]) -> Moves:
    return tuple((np.concatenate(parts), rank) for rank, parts in sorted(by_rank.items()))
