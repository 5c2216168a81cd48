"""Copies of pages between the KV pool and host memory, beside the steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from star_attention.engines.base import PagedStep


class PageCopies(ABC):
    """On a GPU copies have a stream of their own. They follow what was computed when they were
    asked for, and only what concerns their pages follows them. `packing` pages of a prefix share
    the memory of one; copies name them by that."""

    def __init__(self, packing: int = 1) -> None:
        self._packing = packing
        self._under_way = PagesUnderCopy()
        self._pinned: set[int] = set()  # addresses

    def read(self, pool: Any, pages: Sequence[int], out: np.ndarray) -> None:
        """Pages of a layer's pool [num_pages, ...] into uint8 [len(pages), page bytes]."""
        self._copy(pool, pages, out, to_pool=False)

    def write(self, pool: Any, pages: Sequence[int], data: np.ndarray) -> None:
        """The reverse of `read`."""
        self._copy(pool, pages, data, to_pool=True)

    def before_step(self, step: PagedStep, tokens_per_block: int) -> None:
        """The steps' stream waits for the copies that concern the step."""
        if self._are_under_way() and self._under_way.concern_step(
            step, tokens_per_block, self._packing
        ):
            self._wait()

    def before(self, reads: Collection[int], writes: Collection[int]) -> None:
        """The steps' stream waits for the copies that concern these pages."""
        if self._are_under_way() and self._under_way.concern(reads, writes):
            self._wait()

    @abstractmethod
    def finish(self) -> None:
        """The host waits for all copies."""

    @abstractmethod
    def pin(self, buffer: np.ndarray) -> None:
        """Page-locks host memory, where that can be done."""

    @abstractmethod
    def unpin(self, buffer: np.ndarray) -> None: ...

    @abstractmethod
    def _copy(
        self, pool: Any, pages: Sequence[int], host: np.ndarray, *, to_pool: bool
    ) -> None: ...

    @abstractmethod
    def _are_over(self) -> bool:
        """Whether the last copy is."""

    @abstractmethod
    def _steps_wait(self) -> None:
        """The steps' stream waits for the last copy."""

    def _are_under_way(self) -> bool:
        if self._under_way and self._are_over():
            self._under_way.clear()
        return bool(self._under_way)

    def _wait(self) -> None:
        self._steps_wait()
        self._under_way.clear()  # what the stream gets from here on is behind them


def split_kept(host: np.ndarray, code_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Where codes of all pages are, and behind them their scales, in uint8 [P, kept page bytes]:
    [P, code_bytes] and [P, the rest]."""
    codes, scales = np.split(host.reshape(-1), [len(host) * code_bytes])
    return codes.reshape(len(host), -1), scales.reshape(len(host), -1)


class PagesUnderCopy:
    """Pages that copies beside the steps still read or write: which steps must wait for them."""

    def __init__(self) -> None:
        self._read: set[int] = set()
        self._written: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._read or self._written)

    def add(self, pages: Sequence[int], *, written: bool) -> None:
        (self._written if written else self._read).update(map(int, pages))

    def clear(self) -> None:
        """The copies are over."""
        self._read.clear()
        self._written.clear()

    def concern(self, reads: Iterable[int], writes: Iterable[int]) -> bool:
        """Whether what reads and writes these pages must come after the copies."""
        return not (
            self._written.isdisjoint(reads)
            and self._written.isdisjoint(writes)
            and self._read.isdisjoint(writes)
        )

    def concern_step(self, step: PagedStep, tokens_per_block: int, packing: int = 1) -> bool:
        slots = step.slot_mapping[step.slot_mapping >= 0]
        sent = [each.pages for exchange in step.exchanges for each in exchange.sends]
        received = [each.pages for exchange in step.exchanges for each in exchange.receives]
        passed_on = [hop.sends.pages for hop in step.hops]
        tables = [step.page_table]
        if step.prefix:
            tables.append(step.prefix.page_table // packing)
        if step.window:
            tables.append(step.window.page_table)
        return self.concern(
            _pages_in(*tables, *sent, *passed_on),
            _pages_in(slots // tokens_per_block, *received),
        )


def _pages_in(*arrays: np.ndarray) -> set[int]:
    return {page for array in arrays for page in np.unique(array).tolist()}
