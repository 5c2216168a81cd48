"""Which pages of the KV cache ranks send one another in phase 1, so that each has what it keeps and
what its spans see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from star_attention.plan import Plan
from star_attention.spans import Span


class Arrival(NamedTuple):
    """Pages of the context, int64 [P] ascending, that go from one rank to another."""

    source: int
    dest: int
    pages: np.ndarray


class Arrivals:
    """Follows a context's passes: which rank has which of its pages.

    A rank has what it keeps, as far as it is computed, the anchor from when it first sees it on,
    and what it sees of a block that several ranks compute, and of those in front by a window, until
    that block is done. All ranks find the same. Nothing arrives in a plan without exchanges.

    Attributes:
        here: bool [ranks, pages of the context].
        keeper: int64 [pages of the context], the rank that keeps each.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        page = plan.tokens_per_block
        pages = -(-plan.context_len // page)
        self.keeper = np.empty(pages, np.int64)
        self.here = np.zeros((plan.num_ranks, pages), bool)
        self._left: dict[int, int] = {}  # tokens of each block that are still to be computed
        for part in plan.parts:
            own = slice(part.start // page, -(-part.end // page))
            self.keeper[own] = part.rank
            if part.start in plan.cached:
                self.here[part.rank, own] = True
            else:
                self._left[part.block] = self._left.get(part.block, 0) + part.tokens

    @property
    def finished(self) -> bool:
        """Whether all blocks are computed."""
        return not self._left

    def is_done(self, block: int) -> bool:
        """Whether all of a block, by its index, is computed."""
        return block not in self._left

    def take(self, spans: Sequence[Span]) -> list[list[Arrival]]:
        """The next pass.

        Returns:
            What arrives in each layer: what is there already, what each rank's first span gives,
            its second, and so on; some of these may be empty.
        """
        plan, page = self._plan, self._plan.tokens_per_block
        keeper, here = self.keeper, self.here
        rounds = np.zeros(len(keeper), np.int64)  # 0: there already
        source = keeper.copy()
        needed = np.zeros_like(here)
        given: Counter[tuple[int, int | None]] = Counter()  # spans so far
        for span in spans:
            window = plan.model.window
            for seen in (*span.sees, *([] if window is None else [span.window(window)])):
                needed[span.rank, seen.start // page : -(-seen.end // page)] = True
            own = slice(span.start // page, -(-span.end // page))
            if self._again(span):
                here[span.rank, own] = True
                continue
            # Of blocks that all compute, a rank's spans follow one another.
            is_alone = plan.blocks[span.block].rank is not None
            owner = span.rank, span.block if is_alone else None
            given[owner] += 1
            rounds[own], source[own] = given[owner], span.rank
            if plan.exchanges:
                here[:, own] = False
            here[span.rank, own] = True
            needed[keeper[own], np.arange(own.start, own.stop)] = True
        if not plan.exchanges:
            needed[:] = False
        missing = needed & ~here
        here |= missing
        arrivals: list[list[Arrival]] = [[] for _ in range(1 + max(given.values(), default=0))]
        for dest in np.flatnonzero(missing.any(1)).tolist():
            pages = np.flatnonzero(missing[dest])
            for index, group in enumerate(arrivals):
                of_round = pages[rounds[pages] == index]
                for rank in np.unique(source[of_round]).tolist():
                    group.append(Arrival(rank, dest, of_round[source[of_round] == rank]))
        self._finish(spans)
        return arrivals

    def _again(self, span: Span) -> bool:
        """Whether it is an anchor that a rank computes for its own blocks only."""
        block = self._plan.blocks[span.block]
        return span.end <= block.start or (block.rank is not None and block.rank != span.rank)

    def _finish(self, spans: Sequence[Span]) -> None:
        """Blocks that are done need no pages but where these are kept, and the anchor."""
        plan, page = self._plan, self._plan.tokens_per_block
        for span in spans:
            if self._again(span):
                continue
            self._left[span.block] -= span.tokens
            if not self._left[span.block]:
                del self._left[span.block]
                block = plan.blocks[span.block]
                reach = (plan.model.window or 1) - 1  # of its rows' windows in front of it
                first = max(block.start - reach, plan.anchor_size) // page
                pages = np.arange(first, -(-block.end // page))
                self.here[:, pages] = False
                self.here[self.keeper[pages], pages] = True
