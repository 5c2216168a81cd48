"""Phase 2, query encoding and token generation, over one encoded context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from star_attention.config import KvPlacement
from star_attention.distributed import Communicator
from star_attention.distributed.base import agree
from star_attention.engines.base import Logits, ModelEngine
from star_attention.runtime.pages import PagePool, Rows, paged_step


@dataclass
class _Sequence:
    """A question and its answer so far: what this rank keeps of it, and where the text stands."""

    pages: np.ndarray
    kv_len: int
    position: int
    generated: int = 0


class QuestionBatch:
    """Several questions over one encoded context; all ranks step together.

    Every rank runs every token through the model and attends to what it caches; the engine merges
    the outputs. The question's KV is kept on the query rank, the last one. A generated token's goes
    there too (`tail`), or page by page to all ranks in turn (`round_robin`).

    Source: Star Attention, arXiv 2411.17116, section 2.2.
    """

    def __init__(
        self,
        engine: ModelEngine,
        pool: PagePool,
        comm: Communicator,
        placement: KvPlacement,
    ) -> None:
        self._engine = engine
        self._pool = pool
        self._comm = comm
        self._rank = comm.rank
        self._num_ranks = comm.size
        self._placement = placement
        self._allocated: list[int] = []
        self._sequences: list[_Sequence] = []

    def ask(
        self,
        context_pages: Sequence[int],
        context_kv_len: int,
        context_len: int,
        questions: Sequence[np.ndarray],
        max_tokens: int,
        all_rows: bool = False,
    ) -> Logits:
        """Encodes the questions in one pass.

        Args:
            context_pages: this rank's pages of the context; they stay as they are.
            context_kv_len: tokens in them.
            context_len: tokens of the whole context.
            questions: int32 token ids of each.
            max_tokens: room that is kept for each answer.
            all_rows: return the logits of all question tokens, not only the last of each.

        Returns:
            float32 [len(questions), vocab_size], or [all question tokens, vocab_size]; valid until
            the engine's next step.

        Raises:
            UserError: on every rank, if a rank has no room for questions and answers.
        """
        here = self._rank == self._num_ranks - 1

        def open_all() -> list[_Sequence]:
            answer = self._kept_here(max_tokens)
            return [
                self._open(
                    context_pages, context_kv_len, context_len, answer + here * len(question)
                )
                for question in questions
            ]

        self._sequences = agree(self._comm, open_all)
        lengths = [len(question) for question in questions]
        rows = np.arange(sum(lengths)) if all_rows else np.cumsum(lengths) - 1
        return self._step(list(questions), [here] * len(questions), rows)

    def step(self, active: Sequence[int], tokens: Sequence[int]) -> Logits:
        """Appends one generated token to each of the `active` questions (their indices).

        Returns:
            float32 [len(active), vocab_size], the logits of what follows; valid as `ask`'s.
        """
        every = self._sequences
        self._sequences = [every[index] for index in active]
        stored = [self._owner(sequence.generated) == self._rank for sequence in self._sequences]
        inputs = [np.array([token], np.int32) for token in tokens]
        logits = self._step(inputs, stored, np.arange(len(active)))
        for sequence in self._sequences:
            sequence.generated += 1
        self._sequences = every
        return logits

    def release(self) -> None:
        """Gives the pages of questions and answers back."""
        self._pool.release(self._allocated)
        self._allocated = []

    def _owner(self, generated: int) -> int:
        """The rank that keeps the KV of the generated token of this index."""
        query_rank = self._num_ranks - 1
        if self._placement == "tail":
            return query_rank
        page = generated // self._engine.tokens_per_block
        return (query_rank + 1 + page) % self._num_ranks

    def _kept_here(self, max_tokens: int) -> int:
        owners = (self._owner(generated) for generated in range(max_tokens))
        return sum(owner == self._rank for owner in owners)

    def _open(
        self, context_pages: Sequence[int], context_kv_len: int, context_len: int, kept: int
    ) -> _Sequence:
        """A sequence that shares the context's full pages and has a copy of the last, partial one,
        with room for `kept` tokens."""
        page = self._engine.tokens_per_block
        shared = list(context_pages[: context_kv_len // page])
        count = -(-(context_kv_len + kept) // page) - len(shared) if kept else 0
        own = self._pool.allocate(count)
        self._allocated += own
        if own and context_kv_len % page:
            self._engine.copy_page(context_pages[len(shared)], own[0])
        pages = shared + own if kept else list(context_pages)
        return _Sequence(np.array(pages, np.int32), context_kv_len, context_len)

    def _step(
        self, inputs: Sequence[np.ndarray], stored: Sequence[bool], logit_rows: np.ndarray
    ) -> Logits:
        sequences, positions = [], []
        for sequence, tokens, here in zip(self._sequences, inputs, stored, strict=True):
            positions.append(np.arange(sequence.position, sequence.position + len(tokens)))
            sequence.position += len(tokens)
            sequence.kv_len += len(tokens) if here else 0
            sequences.append(Rows(sequence.pages, sequence.kv_len, len(tokens), here))
        # Rows that are not stored here come after all that is: they see every cached token. Either
        # all rows of a pass are stored on one rank, or each sequence has but one row.
        step = paged_step(sequences, self._engine.tokens_per_block, causal=any(stored), merge=True)
        return self._engine.step(
            np.concatenate(inputs).astype(np.int32),
            np.concatenate(positions).astype(np.int32),
            step,
            logit_rows.astype(np.int32),
        )
