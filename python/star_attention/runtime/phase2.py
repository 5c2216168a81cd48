"""Phase 2, query encoding and token generation, over encoded contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from star_attention.config import KvPlacement
from star_attention.distributed import Communicator
from star_attention.distributed.base import agree
from star_attention.engines.base import Logits, ModelEngine
from star_attention.errors import UserError
from star_attention.runtime.pages import PagePool, Rows, paged_step

if TYPE_CHECKING:
    from star_attention.runtime.runtime import EncodedContext


@dataclass
class _Sequence:
    """A question and its answer so far: what this rank keeps of it, and where the text stands."""

    pages: np.ndarray
    kv_len: int
    position: int
    placement: KvPlacement
    generated: int = 0


class QuestionBatch:
    """Several questions, each over an encoded context; all ranks step together.

    Every rank runs every token through the model and attends to what it caches; the engine merges
    the outputs. The question's KV is kept on the query rank, the last one. A generated token's goes
    there too (`tail`), or page by page to all ranks in turn (`round_robin`).

    Source: Star Attention, arXiv 2411.17116, section 2.2.
    """

    def __init__(self, engine: ModelEngine, pool: PagePool, comm: Communicator) -> None:
        self._engine = engine
        self._pool = pool
        self._comm = comm
        self._rank = comm.rank
        self._num_ranks = comm.size
        self._allocated: list[int] = []
        self._sequences: list[_Sequence] = []

    def ask(
        self,
        contexts: Sequence[EncodedContext],
        questions: Sequence[np.ndarray],
        max_tokens: int,
        all_rows: bool = False,
    ) -> Logits:
        """Encodes the questions in one pass.

        Args:
            contexts: of each question; they stay as they are.
            questions: int32 token ids of each.
            max_tokens: room that is kept for each answer.
            all_rows: return the logits of all question tokens, not only the last of each.

        Returns:
            float32 [len(questions), vocab_size], or [all question tokens, vocab_size]; valid until
            the engine's next step.

        Raises:
            UserError: on every rank, if a context was released, or a rank has no room for questions
                and answers.
        """
        if any(context.released for context in contexts):
            raise UserError("the context was released: encode the text again")
        here = self._rank == self._num_ranks - 1

        def open_all() -> list[_Sequence]:
            return [
                self._open(context, here * len(question), max_tokens)
                for context, question in zip(contexts, questions, strict=True)
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
        stored = [
            self._owner(sequence.generated, sequence.placement) == self._rank
            for sequence in self._sequences
        ]
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

    def _owner(self, generated: int, placement: KvPlacement) -> int:
        """The rank that keeps the KV of the generated token of this index."""
        query_rank = self._num_ranks - 1
        if placement == "tail":
            return query_rank
        page = generated // self._engine.tokens_per_block
        return (query_rank + 1 + page) % self._num_ranks

    def _open(self, context: EncodedContext, question: int, max_tokens: int) -> _Sequence:
        """A sequence that shares the context's full pages and has a copy of the last, partial one,
        with room for what is kept here of `question` tokens and the answer."""
        page, cached = self._engine.tokens_per_block, context.kv_len
        placement = context.config.kv_placement
        owners = [self._owner(generated, placement) for generated in range(max_tokens)]
        kept = question + owners.count(self._rank)
        shared = context.pages[: cached // page]
        count = -(-(cached + kept) // page) - len(shared) if kept else 0
        own = self._pool.allocate(count)
        self._allocated += own
        if own and cached % page:
            self._engine.copy_page(context.pages[len(shared)], own[0])
        pages = shared + own if kept else context.pages
        return _Sequence(np.array(pages, np.int32), cached, context.plan.context_len, placement)

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
