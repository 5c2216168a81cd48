"""Which pages of an engine's KV pool are in use, and the tables that a step needs of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from star_attention.engines.base import ModelEngine, PagedStep
from star_attention.errors import UserError


class PagePool:
    """Hands out the engine's pages, consecutive ones where it can, and grows the pool."""

    def __init__(self, engine: ModelEngine) -> None:
        self._engine = engine
        self._num_pages = 0
        self._free: list[int] = []  # ascending

    def allocate(self, count: int) -> list[int]:
        """Raises UserError if the engine cannot hold them."""
        if self.room is not None and count > self.room:
            page = self._engine.tokens_per_block
            raise UserError(
                f"{count * page} tokens do not fit into a rank's KV cache, which has room for "
                f"{self.room * page}: use more ranks, or a larger --kv-cache-gib"
            )
        if count > len(self._free):
            missing = count - len(self._free)
            self._engine.reserve_pages(self._num_pages + missing)
            self._free.extend(range(self._num_pages, self._num_pages + missing))
            self._num_pages += missing
        first = self._first_run(count)
        pages = self._free[first : first + count]
        del self._free[first : first + count]
        return pages

    def release(self, pages: Sequence[int]) -> None:
        self._free = sorted([*self._free, *pages])

    @property
    def pages_in_use(self) -> int:
        return self._num_pages - len(self._free)

    @property
    def room(self) -> int | None:
        """Pages that can still be allocated; None: as many as memory allows."""
        most = self._engine.max_pages
        return None if most is None else most - self.pages_in_use

    def _first_run(self, count: int) -> int:
        """Where the first `count` consecutive pages stand in the free list; 0 if nowhere."""
        free, start = self._free, 0
        for index in range(len(free)):
            if index and free[index] != free[index - 1] + 1:
                start = index
            if index - start + 1 >= count:
                return start
        return 0


@dataclass(frozen=True)
class Rows:
    """One sequence of a step: its rows are the last of the `kv_len` tokens in `pages`, or, if not
    `stored` here, they only look at them."""

    pages: Sequence[int] | np.ndarray
    kv_len: int
    count: int
    stored: bool = True


def slots(rows: Rows, tokens_per_block: int) -> np.ndarray:
    """int32 [count], where the KV of the rows goes; -1 where it is not stored."""
    if not rows.stored:
        return np.full(rows.count, -1, np.int32)
    index = np.arange(rows.kv_len - rows.count, rows.kv_len)
    pages = np.asarray(rows.pages, np.int32)
    return pages[index // tokens_per_block] * np.int32(tokens_per_block) + (
        index % tokens_per_block
    ).astype(np.int32)


def page_table(lists: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    """int32 [S, P], each list in a row, filled up with 0."""
    table = np.zeros((len(lists), max(map(len, lists), default=0)), np.int32)
    for row, pages in zip(table, lists, strict=True):
        row[: len(pages)] = pages
    return table


def paged_step(
    sequences: Sequence[Rows],
    tokens_per_block: int,
    *,
    causal: bool = True,
    shared_pages: Sequence[int] | None = None,
    merge: bool = False,
) -> PagedStep:
    """The step in which each sequence's rows follow those of the one before."""
    return PagedStep(
        slot_mapping=np.concatenate(
            [np.empty(0, np.int32), *(slots(rows, tokens_per_block) for rows in sequences)]
        ),
        cu_seqlens_q=np.cumsum([0, *(rows.count for rows in sequences)], dtype=np.int32),
        kv_lens=np.array([rows.kv_len for rows in sequences], np.int32),
        page_table=page_table([rows.pages for rows in sequences]),
        causal=causal,
        shared_pages=None if shared_pages is None else np.asarray(shared_pages, np.int32),
        merge=merge,
    )
