"""Phase 2, question encoding and token generation: one rank's share of contexts and questions.

Every rank runs every token through the model and attends to what it caches; the engine merges the
outputs. Of each question, a pass's KV is stored on one rank, so bottom-right causal masks suffice.

Source: Star Attention, arXiv 2411.17116, section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from star_attention.engines.base import PagedStep, Prefix
from star_attention.plan import Plan
from star_attention.runtime.pages import (
    PagePool,
    Rows,
    frames_of,
    page_count,
    page_table,
    paged_step,
)
from star_attention.spans import Range


@dataclass
class CachedContext:
    """What this rank caches of a context: tokens at the positions `runs` in `pages`, rotated as the
    model rotates long texts or not. In 8 bits, `packing` pages share the memory of one, and
    questions have pages of their own."""

    plan: Plan
    pages: list[int]
    runs: tuple[Range, ...]
    is_long: bool
    packing: int = 1

    @property
    def kv_len(self) -> int:
        return sum(run.tokens for run in self.runs)


class CachedQuestion:
    """What this rank caches of a question and its answer, behind its context's.

    The context's pages are shared; a copy of the last, partial one is made when the first token is
    stored here. Pages are taken as tokens come.

    Attributes:
        context: that it is about.
        position: of the next token in the whole text.
    """

    def __init__(self, context: CachedContext, pool: PagePool) -> None:
        self.context = context
        self.position = context.plan.context_len
        self._pool = pool
        shares = context.packing == 1
        self._kv_len = context.kv_len if shares else 0
        self._pages = np.array(context.pages if shares else [], np.int32)
        self._held = frames_of(context.pages, context.packing)
        pool.share(self._held)
        self._shares_last_page = True
        self._runs = list(context.runs)

    def append(
        self, tokens: int, stored: bool, page: int, copy_page: Callable[[int, int], None]
    ) -> tuple[np.ndarray, Rows]:
        """The positions of `tokens` new tokens and their rows."""
        positions = np.arange(self.position, self.position + tokens)
        self.position += tokens
        if stored:
            self._grow(page_count(self._kv_len + tokens, page), page, copy_page)
            self._kv_len += tokens
            self._store_run(Range(self.position - tokens, self.position))
        return positions, Rows(self._pages, self._kv_len, tokens, stored)

    def window_starts(self, tokens: int, size: int) -> np.ndarray:
        """Of the last `tokens` tokens, int64 [tokens], which of those that are cached here is the
        first that each sees where it sees `size`, itself included."""
        first = np.arange(self.position - tokens, self.position) - (size - 1)
        seen = np.zeros(tokens, np.int64)
        for start, end in reversed(self._runs):
            if end <= first[0]:
                break
            seen += np.maximum(end - np.maximum(first, start), 0)
        return self._kv_len - seen

    def _store_run(self, run: Range) -> None:
        if self._runs and self._runs[-1].end == run.start:
            run = Range(self._runs.pop().start, run.end)
        self._runs.append(run)

    def release(self) -> None:
        self._pool.release(self._held)
        self._held = []

    def _grow(self, count: int, page: int, copy_page: Callable[[int, int], None]) -> None:
        copied = self._shares_last_page and self._kv_len % page > 0
        self._shares_last_page = False
        if count == len(self._pages) and not copied:
            return
        new = self._pool.allocate(count - len(self._pages) + copied)
        self._held += new
        if copied:
            copy_page(int(self._pages[-1]), new[0])
        kept = self._pages[: len(self._pages) - copied]
        self._pages = np.concatenate([kept, np.array(new, np.int32)])


def grouped_step(
    rows: Sequence[Rows],
    questions: Sequence[CachedQuestion],
    groups: Sequence[int],
    tokens_per_block: int,
) -> PagedStep:
    """`questions_step`, in which the full pages of a context that several questions in a row have
    are a prefix of all of them; in 8 bits all pages, which are in no question's rows."""
    step = questions_step(rows, tokens_per_block)
    first = np.cumsum([0, *groups[:-1]])
    contexts = [questions[index].context for index in first]
    if any(context.packing > 1 for context in contexts):
        prefix = Prefix(
            step.cu_seqlens_q[np.cumsum([0, *groups])],
            np.array([context.kv_len for context in contexts], np.int32),
            page_table([context.pages for context in contexts]),
        )
        return replace(step, prefix=prefix)
    pages = [context.kv_len // tokens_per_block for context in contexts]
    own = np.repeat(pages, groups)
    return replace(
        step,
        kv_lens=step.kv_lens - (own * tokens_per_block).astype(np.int32),
        page_table=page_table([each.pages[begin:] for each, begin in zip(rows, own, strict=True)]),
        prefix=Prefix(
            step.cu_seqlens_q[np.cumsum([0, *groups])],
            np.array(pages, np.int32) * np.int32(tokens_per_block),
            page_table([c.pages[:count] for c, count in zip(contexts, pages, strict=True)]),
        ),
    )


def questions_step(rows: Sequence[Rows], tokens_per_block: int) -> PagedStep:
    """Rows that are not stored here come after all that is: they see every cached token. Either all
    rows of a pass are stored on one rank, or each sequence has but one row."""
    causal = any(each.stored for each in rows)
    return paged_step(rows, tokens_per_block, causal=causal, merge=True)
