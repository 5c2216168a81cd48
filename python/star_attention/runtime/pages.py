"""Which pages of an engine's KV pool are in use, and the tables that a step needs of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from star_attention.engines.base import ModelEngine, PagedStep, Window


class PagePool:
    """Hands out an engine's pages, consecutive ones where it can, and counts who holds them."""

    def __init__(self, engine: ModelEngine) -> None:
        self._engine = engine
        self._holders = np.zeros(0, np.int32)  # of each page
        self._free: list[int] = []  # ascending

    def allocate(self, count: int) -> list[int]:
        """Pages with one holder. Raises MemoryError if the engine cannot hold them: rank 0 counts
        every rank's pages and orders nothing that does not fit."""
        if count > len(self._free):
            total = len(self._holders)
            grown = total + count - len(self._free)
            if self._engine.limits.pages is not None and grown > self._engine.limits.pages:
                raise MemoryError(
                    f"{count} pages of KV cache are wanted, {self._engine.limits.pages - total} "
                    f"and {len(self._free)} that were given back are free"
                )
            self._engine.reserve_pages(grown)
            self._free.extend(range(total, grown))
            self._holders = np.concatenate([self._holders, np.zeros(grown - total, np.int32)])
        first = self._first_run(count)
        pages = self._free[first : first + count]
        del self._free[first : first + count]
        self._holders[pages] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One more holder of each."""
        self._holders[pages] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less of each; pages without any are free."""
        self._holders[pages] -= 1
        freed = [page for page in pages if not self._holders[page]]
        if freed:
            self._free = sorted([*self._free, *freed])

    @property
    def pages_in_use(self) -> int:
        return len(self._holders) - len(self._free)

    def _first_run(self, count: int) -> int:
        """Where the first `count` consecutive pages stand in the free list; 0 if nowhere."""
        free, start = self._free, 0
        for index in range(len(free)):
            if index and free[index] != free[index - 1] + 1:
                start = index
            if index - start + 1 >= count:
                return start
        return 0


def page_count(tokens: int, tokens_per_block: int) -> int:
    return -(-tokens // tokens_per_block)


def frame_count(tokens: int, tokens_per_block: int, packing: int) -> int:
    """Pages of memory that the KV of so many tokens takes where `packing` pages share one."""
    return -(-page_count(tokens, tokens_per_block) // packing)


def packed_pages(frames: Sequence[int], count: int, packing: int) -> list[int]:
    """The first `count` pages of 8 bits in the memory of these pages."""
    return [frame * packing + i for frame in frames for i in range(packing)][:count]


def frames_of(pages: Sequence[int], packing: int) -> list[int]:
    """The pages of memory that `packed_pages` are in."""
    return list(dict.fromkeys(page // packing for page in pages))


def question_pages(cached: int, kept: int, tokens_per_block: int) -> int:
    """Pages of its own that a question takes on a rank that caches `cached` tokens of its context
    and keeps `kept` of the question and its answer: the context's full pages are shared, the last,
    partial one is copied."""
    if not kept:
        return 0
    return page_count(cached + kept, tokens_per_block) - cached // tokens_per_block


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
    if rows.count == 1:  # a decode step has many of them
        page, offset = divmod(rows.kv_len - 1, tokens_per_block)
        return np.array([rows.pages[page] * tokens_per_block + offset], np.int32)
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
        merge=merge,
    )


def window_of(
    sequences: Sequence[Rows], firsts: Sequence[np.ndarray], tokens_per_block: int
) -> Window:
    """What the rows of `sequences` see in layers with a window.

    Args:
        firsts: of each sequence, int [rows], the first of the tokens in its pages that each row
            sees, ascending.
    """
    lists, kv_lens, starts = [], [], [np.empty(0, np.int32)]
    for rows, first in zip(sequences, firsts, strict=True):
        skipped = int(first[0]) // tokens_per_block if len(first) else 0
        lists.append(rows.pages[skipped : page_count(rows.kv_len, tokens_per_block)])
        kv_lens.append(rows.kv_len - skipped * tokens_per_block)
        starts.append((first - skipped * tokens_per_block).astype(np.int32))
    return Window(np.array(kv_lens, np.int32), page_table(lists), np.concatenate(starts))
