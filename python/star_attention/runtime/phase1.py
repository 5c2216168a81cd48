"""Phase 1, context encoding, on one rank: its spans of a pass become a forward pass of the engine.

Masks stay bottom-right causal, however spans are cut: what a span sees before itself stands in
front of its rows in its list of pages. Which spans there are: `spans.py`; which pages come from
other ranks: `arrivals.py`.

Source: Star Attention, arXiv 2411.17116, section 2.1; anchor modes: docs/architecture.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from star_attention.arrivals import Arrival, Arrivals
from star_attention.engines.base import (
    Exchange,
    Hop,
    PagedStep,
    PageMeans,
    Pages,
    Selection,
    Window,
)
from star_attention.plan import Part, Plan
from star_attention.runtime.pages import (
    Rows,
    frame_count,
    page_count,
    page_table,
    paged_step,
    window_of,
)
from star_attention.spans import Span, shared_in_a_pass


def scratch_pages(plan: Plan, rank: int, packing: int = 1) -> int:
    """Pages that a rank takes, until phase 1 is over, for what it sees and does not keep: of the
    anchor, of the blocks that all ranks compute in one pass, and of what is cached elsewhere of the
    blocks that it computes alone.

    Args:
        packing: pages that share the memory of one in the end. Above 1, what is kept takes more
            until it is quantised, and what is cached in 8 bits and seen is there twice.
    """
    return _unquantized(plan, rank, packing) if packing > 1 else _missing(plan, rank)


def _unquantized(plan: Plan, rank: int, packing: int) -> int:
    """Pages beyond those of the quantised KV. Rows that are computed see the anchor until all is
    over, and so all others where blocks do not end by themselves; blocks of a pass until then."""
    page = plan.tokens_per_block
    reads = {part.block for part in plan.parts if part.start not in plan.cached}
    sees_anchor = any(plan.blocks[index].prefix for index in reads)
    again = plan.anchor_mode == "recompute"
    in_front = plan.anchor_size // page if sees_anchor else 0
    by_block = plan.ends_by_block
    lasting = np.zeros(page_count(plan.context_len, page), bool)
    if by_block and not again:
        lasting[:in_front] = True
    frames = 0  # in the end, of what lasts
    frames_of_block: Counter[int] = Counter()
    seen = {part.start for part in plan.seen_parts}
    for part in plan.parts_of(rank):
        is_read, own = part.start not in plan.cached, frame_count(part.tokens, page, packing)
        lasts = not by_block or (not again and part.start < in_front * page)
        if part.start in seen or (is_read and lasts):
            lasting[part.start // page : page_count(part.end, page)] = True
            frames += own * is_read
        elif is_read:
            frames_of_block[part.block] += own
    extra = int(lasting.sum()) - frames
    if not by_block:
        return extra + _missing(plan, rank)
    together: list[tuple[int, int, int]] = []
    alone: list[tuple[int, int, int]] = []
    for index in sorted(reads):
        block = plan.blocks[index]
        if block.rank in (None, rank):
            pages = int((~lasting[block.start // page : page_count(block.end, page)]).sum())
            blocks = together if block.rank is None else alone
            blocks.append((block.tokens, max(0, pages - frames_of_block[index]), 0))
    return (
        extra
        + (plan.anchor_size // page if again and reads else 0)
        + _most_in_a_pass(together, plan.num_ranks)
        + _most_in_a_pass(alone, 1)
    )


def _missing(plan: Plan, rank: int) -> int:
    page, anchor = plan.tokens_per_block, plan.anchor_size // plan.tokens_per_block
    reads = {part.block for part in plan.parts if part.start not in plan.cached}
    sees = {index for index in reads if plan.blocks[index].prefix}
    if not plan.exchanges:
        reads_it = any(plan.blocks[index].rank == rank for index in sees)
        keeps_it = plan.anchor_mode != "recompute" and plan.parts[0].rank == rank
        return anchor if reads_it and not keeps_it else 0
    in_front = anchor if sees else 0
    missing = ~_kept(plan, rank)
    # Tokens that are read of a block, pages, and those that its windows reach in front of it.
    together: list[tuple[int, int, int]] = []
    alone = 0
    reach = (plan.model.window or 1) - 1
    tokens: Counter[int] = Counter()
    for part in plan.parts:
        if part.start not in plan.cached:
            tokens[part.block] += part.tokens
    for index in sorted(reads):
        block = plan.blocks[index]
        pages = slice(max(block.start // page, in_front), page_count(block.end, page))
        count = int(missing[pages].sum())
        if block.rank is None:
            seen = slice(max((block.start - reach) // page, in_front), pages.start)
            ahead = int(missing[seen].sum())
            if index - 1 not in reads:
                count, ahead = count + ahead, 0
            together.append((tokens[index], count, ahead))
        elif block.rank == rank:
            alone += count
    return int(missing[:in_front].sum()) + _most_in_a_pass(together, plan.num_ranks) + alone


def _most_in_a_pass(blocks: Sequence[tuple[int, int, int]], num_ranks: int) -> int:
    """The most pages of consecutive blocks that may be in one pass: blocks' tokens, pages, and
    pages beside these if it is the first of a pass."""
    most, first, tokens, pages = 0, 0, 0, 0
    for last, (more_tokens, more_pages, _) in enumerate(blocks):
        tokens, pages = tokens + more_tokens, pages + more_pages
        while first < last and tokens > shared_in_a_pass(num_ranks):
            tokens, pages = tokens - blocks[first][0], pages - blocks[first][1]
            first += 1
        most = max(most, pages + blocks[first][2])
    return most


def _kept(plan: Plan, rank: int) -> np.ndarray:
    """bool [pages of the context]: what a rank keeps."""
    page = plan.tokens_per_block
    kept = np.zeros(page_count(plan.context_len, page), bool)
    for part in plan.parts_of(rank):
        kept[part.start // page : page_count(part.end, page)] = True
    return kept


@dataclass(frozen=True)
class ContextPass:
    """One forward pass. Token i of the context has position i, so `positions` also says which."""

    positions: np.ndarray
    attention: PagedStep


class ContextPart:
    """One rank's part of a context's phase 1.

    Args:
        pages: for what the rank keeps, part after part; none where that is quantised.
        scratch: `scratch_pages` of them; where the KV is quantised, and besides those that this
            takes in the end.
        packing: as in `scratch_pages`.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        pages: Sequence[int],
        scratch: Sequence[int],
        packing: int = 1,
    ) -> None:
        self._plan, self._rank, self._page = plan, rank, plan.tokens_per_block
        self._arrivals = Arrivals(plan)
        self._means = PageMeans(max(map(plan.candidates, plan.blocks), default=0))
        self._kept = _kept(plan, rank)
        self._done = [0] * plan.num_ranks  # tokens, for a ring
        # Where each page of the context is; -1: nowhere.
        self._where = np.full(len(self._kept), -1, np.int32)
        self._packing = packing
        self._held = set(scratch)
        self._unquantized: list[Part] = []
        # With `recompute` the first are for the anchor in front of a block.
        self._scratch = np.asarray(scratch, np.int32)
        again = plan.anchor_mode == "recompute"
        self._free = list(scratch[plan.anchor_size // self._page if again else 0 :])[::-1]
        if packing > 1:
            own = plan.parts_of(rank)
            self._unquantized = [part for part in own if part.start not in plan.cached]
            if plan.attention == "ring":
                pages = [self._free.pop() for _ in range(int(self._kept.sum()))]
        if len(pages):
            self._where[self._kept] = pages
        self._own = np.asarray(pages, np.int32)

    @property
    def finished(self) -> bool:
        """Whether the ranks have computed all of the context."""
        return self._arrivals.finished

    @property
    def held(self) -> list[int]:
        """Of the scratch pages, those that are no quantised part's."""
        return sorted(self._held)

    def restore(self, cached: Mapping[int, Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Before the first pass, where the KV is quantised: pages of 8 bits that are seen here or
        sent from here, and where they are wanted as pages, int32 [N] each.

        Args:
            cached: pages of the parts that were there before, by where these start.
        """
        sources: list[int] = []
        targets: list[int] = []
        for part in self._plan.seen_parts:
            if part.rank == self._rank:
                pages = cached[part.start]
                frames = [self._free.pop() for _ in pages]
                self._where[self._pages_of(part)] = frames
                sources += pages
                targets += frames
        return np.array(sources, np.int32), np.array(targets, np.int32)

    def settle(self) -> Iterator[tuple[Part, np.ndarray, np.ndarray]]:
        """After a pass, where the KV is quantised: parts that no row is to see any more, their
        pages, which are to be quantised now, and how many tokens each has. Every `packing`th of
        these is the part's then, from the first on."""
        in_front = 0 if self._plan.anchor_mode == "recompute" else self._plan.anchor_size
        for part in list(self._unquantized):
            ends_early = self._plan.ends_by_block and part.start >= in_front
            if not (self.finished or (ends_early and self._arrivals.is_done(part.block))):
                continue
            self._unquantized.remove(part)
            where = self._pages_of(part)
            frames = self._where[where].copy()
            self._where[where] = -1
            kept = frames[:: self._packing].tolist()
            self._held.difference_update(kept)
            self._free += [frame for frame in frames.tolist()[::-1] if frame not in kept]
            tokens = np.full(len(frames), self._page, np.int32)
            tokens[-1] = part.tokens - (len(frames) - 1) * self._page
            yield part, frames, tokens

    def _pages_of(self, part: Part) -> slice:
        return slice(part.start // self._page, page_count(part.end, self._page))

    def take(self, spans: Sequence[Span]) -> ContextPass | None:
        """The pass of these spans, of all ranks; None: nothing to do here. In one with exchanges
        every rank takes part."""
        own = [span for span in spans if span.rank == self._rank]
        arrivals = self._arrivals.take(spans)
        positions = [np.arange(span.start, span.end) for span in own]
        if self._plan.attention == "ring":
            step = self._ring_step(spans, own)
        else:
            self._find_room(own, arrivals)
            exchanges = [
                self._exchange(group, self._rows_before(own, index))
                for index, group in enumerate(arrivals)
                if group
            ]
            step = paged_step([self._rows(span) for span in own], self._page)
            selection = self._selection(spans, own)
            step = replace(
                step,
                exchanges=tuple(exchanges),
                selection=selection,
                window=self._window(own),
            )
            self._give_room_back()
            if not own and not exchanges and not selection:
                return None
        return ContextPass(_concatenate(positions), step)

    def _selection(self, spans: Sequence[Span], own: Sequence[Span]) -> Selection | None:
        """What this rank's of a pass's spans choose from, if any choose; the blocks in front of
        theirs are where they are kept."""
        plan = self._plan
        counts = {span: plan.candidates(plan.blocks[span.block]) for span in spans}
        most, first = max(counts.values(), default=0), plan.anchor_size // self._page
        if not most:
            return None
        keepers = self._arrivals.keeper[first : first + most]
        pages = np.where(keepers == self._rank, self._where[first : first + most], -1)
        return Selection(
            plan.selected_pages,
            pages.astype(np.int32),
            keepers.astype(np.int32),
            np.array([counts[span] for span in own], np.int32),
            self._means,
        )

    def _find_room(self, own: Sequence[Span], arrivals: Sequence[Sequence[Arrival]]) -> None:
        """Pages for what is computed or arrives here, and is kept elsewhere."""
        wanted = [each.pages for group in arrivals for each in group if each.dest == self._rank]
        for span in own:
            if not self._is_in_front(span, span.start):
                wanted.append(np.arange(span.start // self._page, page_count(span.end, self._page)))
        for page in np.unique(_concatenate(wanted)).tolist():
            if self._where[page] < 0:
                self._where[page] = self._free.pop()

    def _give_room_back(self) -> None:
        gone = (self._where >= 0) & ~self._kept & ~self._arrivals.here[self._rank]
        self._free += self._where[gone].tolist()[::-1]
        self._where[gone] = -1

    def _rows(self, span: Span) -> Rows:
        """What a span sees, in this rank's pages."""
        lists = [
            self._scratch[: page_count(seen.end, self._page)]
            if self._is_in_front(span, seen.start)
            else self._where[seen.start // self._page : page_count(seen.end, self._page)]
            for seen in span.sees
        ]
        return Rows(np.concatenate(lists), sum(seen.tokens for seen in span.sees), span.tokens)

    def _window(self, own: Sequence[Span]) -> Window | None:
        size = self._plan.model.window
        if size is None:
            return None
        rows = [Rows(self._where, span.end, span.tokens) for span in own]
        firsts = [np.maximum(np.arange(s.start, s.end) - (size - 1), 0) for s in own]
        return window_of(rows, firsts, self._page)

    def _is_in_front(self, span: Span, start: int) -> bool:
        """Whether tokens from `start` on are an anchor that is computed again for each block."""
        again = self._plan.anchor_mode == "recompute"
        return again and start < self._plan.blocks[span.block].start

    def _rows_before(self, own: Sequence[Span], index: int) -> int:
        """Of this rank's first rows, those that come before it takes part in an exchange."""
        together = [span for span in own if self._plan.blocks[span.block].rank is None]
        return sum(span.tokens for span in together[:index])

    def _exchange(self, group: Sequence[Arrival], rows: int) -> Exchange:
        rank, where = self._rank, self._where
        return Exchange(
            rows,
            tuple(Pages(each.dest, where[each.pages]) for each in group if each.source == rank),
            tuple(Pages(each.source, where[each.pages]) for each in group if each.dest == rank),
        )

    def _ring_step(self, spans: Sequence[Span], own: Sequence[Span]) -> PagedStep:
        """This rank's rows against what every rank has by then, hop by hop. Of another rank's
        tokens a row sees whole chunks; of its own rank's also those before it in its chunk."""
        plan, rank, size = self._plan, self._rank, self._plan.num_ranks
        for span in spans:
            self._done[span.rank] += span.tokens

        def seen(source: int, until: int) -> int:
            parts = plan.parts_of(source)
            return sum(max(0, min(part.end, until) - part.start) for part in parts)

        here = self._own[: page_count(self._done[rank], self._page)]
        step = paged_step(
            [Rows(here, seen(rank, span.end), span.tokens) for span in own], self._page
        )
        hops = []
        for hop in range(1, size):
            source = (rank - hop) % size
            count = page_count(self._done[source], self._page)
            sees = np.array([seen(source, span.start) for span in own], np.int32)
            table = page_table([range(count)] * len(own))
            hops.append(Hop(Pages((rank + hop) % size, here), source, count, sees, table))
        return replace(step, hops=tuple(hops))


def _concatenate(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int32), *parts]).astype(np.int32)
