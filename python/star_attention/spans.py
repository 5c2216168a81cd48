"""Phase 1 as spans: runs of tokens that one rank computes, and what they see.

A block that one rank reads is one span, as long as nothing bounds a pass. A block that all ranks
read together is cut so that everybody is equally busy: a rank takes an early slice of its rows and
a late one, since late rows see more (zig-zag). What a span sees and another rank has, arrives
(`arrivals.py`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from star_attention.models.config import ModelConfig

# Rows of a rank that keep a GPU busy: with fewer, several blocks are in one pass.
_FULL_PASS = 8192
_SWEEPS = 4  # of moving borders between ranks by a page


class Cost(NamedTuple):
    """Work of phase 1: tokens through the projections and (query, key) pairs of attention."""

    tokens: int = 0
    pairs: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.tokens + other.tokens, self.pairs + other.pairs)

    def attention_flops(self, model: ModelConfig) -> int:
        """FLOPs of attention (a multiplication and an addition are two)."""
        windows = self.tokens * model.window_flops_per_token
        return self.pairs * model.attention_flops_per_pair + windows

    def flops(self, model: ModelConfig) -> int:
        """FLOPs of all of this work in `model`."""
        return self.tokens * model.gemm_flops_per_token + self.attention_flops(model)


def causal_pairs(tokens: int, before: int = 0) -> int:
    """Pairs of `tokens` causal queries that also see `before` earlier tokens."""
    return tokens * before + tokens * (tokens + 1) // 2


class Range(NamedTuple):
    """Tokens [start, end) of a context."""

    start: int
    end: int

    @property
    def tokens(self) -> int:
        return self.end - self.start


class Span(NamedTuple):
    """Tokens [start, end) of a context that a rank computes in one pass.

    Attributes:
        block: the index of the block they are computed for.
        sees: what they attend to, ascending: all before `start` whole, and themselves causally.
    """

    start: int
    end: int
    block: int
    rank: int
    sees: tuple[Range, ...]

    @property
    def tokens(self) -> int:
        return self.end - self.start

    def window(self, size: int) -> Range:
        """What its rows attend to where one sees `size` tokens, itself included."""
        return Range(max(0, self.start - size + 1), self.end)

    @property
    def cost(self) -> Cost:
        before = sum(each.tokens for each in self.sees) - self.tokens
        return Cost(self.tokens, causal_pairs(self.tokens, before))


def most_tokens(spans: Sequence[Span]) -> int:
    """Tokens of the rank that has most."""
    tokens: dict[int, int] = {}
    for span in spans:
        tokens[span.rank] = tokens.get(span.rank, 0) + span.tokens
    return max(tokens.values(), default=0)


@dataclass(frozen=True)
class Reading:
    """What is to be computed of a block, and who does it.

    Attributes:
        rows: ascending.
        rank: that computes it; None: all together.
        sees: the tokens that every row sees besides the block's own, if it has any in front.
        start: of the block.
        alone: a pass has nothing of its rank behind it.
    """

    block: int
    rank: int | None
    start: int
    rows: tuple[Range, ...]
    sees: tuple[Range, ...] = ()
    alone: bool = False

    @property
    def tokens(self) -> int:
        return sum(each.tokens for each in self.rows)

    def span(self, rows: Range, rank: int) -> Span:
        return Span(*rows, self.block, rank, (*self.sees, Range(self.start, rows.end)))


class _Queue:
    """Rows that are computed in their order, cut anywhere."""

    def __init__(self, readings: Sequence[Reading]) -> None:
        self._readings = deque(readings)
        self._rows = deque(readings[0].rows if readings else ())  # that the first has left

    def __bool__(self) -> bool:
        return bool(self._readings)

    @property
    def first(self) -> Reading:
        return self._readings[0]

    @property
    def begin(self) -> int:
        """Where the next rows begin."""
        return self._rows[0].start

    def take(self, tokens: int) -> list[Range]:
        """The next rows of the first reading, at most so many."""
        taken: list[Range] = []
        while self._rows and tokens > 0:
            start, end = self._rows.popleft()
            taken.append(Range(start, min(end, start + tokens)))
            tokens -= taken[-1].tokens
            if taken[-1].end < end:
                self._rows.appendleft(Range(taken[-1].end, end))
        if not self._rows:
            self._readings.popleft()
            self._rows.extend(self.first.rows if self else ())
        return taken


def shared_in_a_pass(num_ranks: int) -> int:
    """Tokens at most of several blocks that ranks compute together in one pass."""
    return _FULL_PASS * num_ranks


class Passes:
    """Cuts phase 1 of a context into passes: which spans come next.

    Rows that all ranks compute together come first where others wait for them, that is, in the
    anchor, and last otherwise. A pass has rows of one such block, or several whole ones that are
    short: `shared_in_a_pass` bounds them, and with them the pages that a rank needs for what the
    others compute.

    Args:
        together: readings of all ranks, in the order of the context: without a rank, or, where rows
            see all before them, with one.
        alone: each rank's own readings.
        loads: FLOPs of these.
        anchor: what must be computed before rows that see it can be, unless they are in one pass.
        model: weighs rows.
        whole_pages: rows are cut where pages begin.
        few_blocks: of a rank's own blocks a pass has several only if these are short together, as
            `shared_in_a_pass` of one rank says.

    Attributes:
        done, total: tokens that were computed so far, and are in the end, by all ranks.
        reached: of each block the end of the rows that were computed so far.
    """

    def __init__(
        self,
        together: Sequence[Reading],
        alone: Sequence[Sequence[Reading]],
        loads: Sequence[int],
        anchor: int,
        tokens_per_block: int,
        model: ModelConfig,
        whole_pages: bool = False,
        few_blocks: bool = False,
    ) -> None:
        self._whole_pages, self._few_blocks = whole_pages, few_blocks
        self._together = _Queue(together)
        self._alone = [_Queue(each) for each in alone]
        self._anchor, self._page, self._model = anchor, tokens_per_block, model
        self._loads = np.array(loads, float)
        self._last: tuple[int, int] | None = None  # where shared rows ended, and on which rank
        self.done = 0
        self.reached: dict[int, int] = {}
        self.total = sum(each.tokens for readings in (together, *alone) for each in readings)

    @property
    def finished(self) -> bool:
        return self.done == self.total

    def all(self) -> tuple[Span, ...]:
        """The spans of all passes, as few as there are."""
        spans: list[Span] = []
        while not self.finished:
            spans += self.next()
        return tuple(spans)

    def next(self, most: int | None = None, sequences: int | None = None) -> tuple[Span, ...]:
        """The spans of the next pass.

        Args:
            most: tokens of a rank; rows computed together may be one page more, and whole pages
                are one at least.
            sequences: spans of a rank.
        """
        ranks = range(len(self._alone))
        if self._whole_pages and most is not None:
            most = max(most // self._page, 1) * self._page
        room = [self.total if most is None else most for _ in ranks]
        spans: list[Span] = []
        if self._together and self._together.first.rank is not None:
            spans = self._in_turn(room)
        elif self._together and self._together.first.start == 0:
            spans = self._share_blocks(room)
        if not spans or spans[-1].block or max(span.end for span in spans) >= self._anchor:
            taken = Counter(span.rank for span in spans)
            own = [self._own(rank, room, sequences, taken[rank]) for rank in ranks]
            if not spans and self._together:
                spans = self._share_blocks(room)
            spans += [span for each in own for span in each]
        for span in spans:
            self.done += span.tokens
            self.reached[span.block] = max(span.end, self.reached.get(span.block, 0))
        return tuple(spans)

    def _in_turn(self, room: list[int]) -> list[Span]:
        """A run of the context, whose rows see all before them, until a rank has no room."""
        spans: list[Span] = []
        while self._together:
            reading = self._together.first
            rank = reading.rank
            for rows in self._together.take(room[rank]):
                spans.append(reading.span(rows, rank))
                room[rank] -= rows.tokens
            if self._together and self._together.first is reading:
                break
        return spans

    def _own(self, rank: int, room: list[int], sequences: int | None, taken: int) -> list[Span]:
        spans: list[Span] = []
        queue, whole = self._alone[rank], 0
        while queue and room[rank] > 0 and (sequences is None or len(spans) + taken < sequences):
            reading = queue.first
            whole += reading.tokens
            if self._few_blocks and spans and whole > shared_in_a_pass(1):
                break
            for rows in queue.take(room[rank]):
                spans.append(reading.span(rows, rank))
                room[rank] -= rows.tokens
            if reading.alone:
                break
        return spans

    def _share_blocks(self, room: list[int]) -> list[Span]:
        """Rows of the first block that all ranks compute, and, if it is begun and ended here, of
        further whole ones."""
        reading = self._together.first
        is_whole = self._together.begin == reading.rows[0].start
        spans = self._share(room)
        taken = reading.tokens
        while is_whole and self._together and self._together.first is not reading:
            reading = self._together.first
            taken += reading.tokens
            fits = min(room) // self._page * self._page * len(room)
            if taken > shared_in_a_pass(len(room)) or reading.tokens > fits:
                break
            spans += self._share(room)
        return spans

    def _share(self, room: list[int]) -> list[Span]:
        """Rows of the first block that all ranks compute, as far as there is room; each rank's
        early slice first."""
        reading, page = self._together.first, self._page
        begin = self._together.begin
        most = min(room)
        if most <= 0:
            return []
        # Whole pages for each rank, or a part of one for one of them.
        tokens = most // page * page * len(room) - begin % page
        if most < page:
            tokens = min(most, page - begin % page)
        starts, ends = _pages(self._together.take(tokens), page)
        sizes = ends - starts
        before = starts - reading.start + sum(each.tokens for each in reading.sees)
        costs = Cost(1.0 * sizes, causal_pairs(1.0 * sizes, before)).flops(self._model)
        # What ranks have done besides counts in the end: no pass is longer than there is room.
        ends_here = not self._together or self._together.first is not reading
        even = ends_here or len(starts) <= len(room)
        ranks = evenly(costs, self._loads if even else np.zeros_like(self._loads))
        if self._last and self._last[0] == starts[0] and starts[0] % page:
            # The page that was begun goes on where it is.
            here, there = ranks[0], self._last[1]
            ranks = np.select([ranks == here, ranks == there], [there, here], ranks)
        np.add.at(self._loads, ranks, costs)
        self._last = int(ends[-1]), int(ranks[-1])
        goes_on = (ranks[1:] == ranks[:-1]) & (starts[1:] == ends[:-1])
        if len(starts) > len(self._loads):
            goes_on[len(starts) // 2 - 1] = False  # a late slice is one of its own
        first = np.flatnonzero(np.concatenate([[True], ~goes_on]))
        last = np.append(first[1:], len(starts)) - 1
        spans = []
        for start, end, rank in zip(
            starts[first].tolist(), ends[last].tolist(), ranks[first].tolist(), strict=True
        ):
            spans.append(reading.span(Range(start, end), rank))
            room[rank] -= end - start
        return spans


def evenly(costs: np.ndarray, loads: np.ndarray) -> np.ndarray:
    """A rank for each of some pieces, so that ranks with these loads end up with equal ones as
    nearly as may be: int64 [pieces]. Each rank gets a run of the first half and one of the second,
    there in reverse order.

    Args:
        costs, loads: float64 [pieces], [ranks].
    """
    pieces, ranks = len(costs), len(loads)
    if pieces <= ranks:
        least = np.argsort(loads, kind="stable")[:pieces]
        chosen = np.empty(pieces, np.int64)
        chosen[np.argsort(-costs, kind="stable")] = least
        return chosen
    targets = _filled(loads, costs.sum())
    half = pieces // 2
    until = np.concatenate([[0.0], np.cumsum(costs)])
    early = np.rint(np.cumsum(targets) / targets.sum() * half).astype(np.int64)
    early_costs = np.diff(until[np.concatenate([[0], early])])
    late = half + _borders(costs[half:], (targets - early_costs)[::-1])
    late_costs = np.diff(until[np.concatenate([[half], late])])[::-1]
    early = _borders(costs[:half], targets - late_costs)
    borders = np.concatenate([[0], early, late])
    owners = np.concatenate([np.arange(ranks), np.arange(ranks)[::-1]])
    _move(borders, owners, until, targets)
    return np.repeat(owners, np.diff(borders))


def _filled(loads: np.ndarray, work: float) -> np.ndarray:
    """What each rank takes of some work, so that all come to one level."""
    order = np.sort(loads)
    levels = (work + np.cumsum(order)) / np.arange(1, len(order) + 1)
    level = levels[np.flatnonzero(levels >= order)[-1]]
    return np.maximum(level - loads, 0.0)


def _borders(costs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Ends of runs whose costs are as near to the targets as may be; the last is the end."""
    targets = np.maximum(targets, 0.0)
    until = np.concatenate([[0.0], np.cumsum(costs)])
    wanted = np.cumsum(targets) * (until[-1] / max(targets.sum(), 1e-9))
    ends = np.searchsorted((until[1:] + until[:-1]) / 2, wanted)
    ends[-1] = len(costs)
    return ends


def _move(borders: np.ndarray, owners: np.ndarray, until: np.ndarray, targets: np.ndarray) -> None:
    """Moves borders by a piece, in place, as long as that brings ranks nearer to their targets."""
    off = -targets
    np.add.at(off, owners, np.diff(until[borders]))
    for _ in range(_SWEEPS):
        moved = False
        for index in range(1, len(borders) - 1):
            left, right = owners[index - 1], owners[index]
            if left == right:
                continue
            for step in (-1, 1):
                new = borders[index] + step
                if not borders[index - 1] <= new <= borders[index + 1]:
                    continue
                gain = until[new] - until[borders[index]]
                if max(abs(off[left] + gain), abs(off[right] - gain)) < max(
                    abs(off[left]), abs(off[right])
                ):
                    off[left] += gain
                    off[right] -= gain
                    borders[index] = new
                    moved = True
                    break
        if not moved:
            return


def _pages(rows: Sequence[Range], page: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows cut where pages begin: starts and ends, int64."""
    inner = [np.arange(r.start // page * page + page, r.end, page) for r in rows]
    starts = [np.append(r.start, cuts) for r, cuts in zip(rows, inner, strict=True)]
    ends = [np.append(cuts, r.end) for r, cuts in zip(rows, inner, strict=True)]
    return np.concatenate(starts), np.concatenate(ends)
