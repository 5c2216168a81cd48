"""Making tokens that were there before less likely."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
from array_api_compat import array_namespace, device

from star_attention.engines.base import Logits
from star_attention.runtime.requests import Context, Question


class Penalties:
    """Penalises logits as vLLM and Hugging Face do: `repetition_penalty`, then `frequency_penalty`
    and `presence_penalty`.

    Which tokens a context has is found once, as a mask where the logits are, for all questions and
    answers over it.
    """

    def __init__(self) -> None:
        self._contexts: WeakKeyDictionary[Context, Logits] = WeakKeyDictionary()

    def apply(self, logits: Logits, questions: Sequence[Question]) -> Logits:
        """
        Args:
            logits: float32 [R, vocab_size], NumPy's, torch's or CuPy's; they stay as they are.
            questions: whose next token each row gives.

        Returns:
            float32 [R, vocab_size], of questions that have penalties lowered.
        """
        if not any(question.params.has_penalties for question in questions):
            return logits
        rows = [self._row(logits[row], question) for row, question in enumerate(questions)]
        return array_namespace(logits).stack(rows)

    def _row(self, row: Logits, question: Question) -> Logits:
        params = question.params
        if not params.has_penalties:
            return row
        xp = array_namespace(row)
        row = xp.asarray(row, copy=True)
        if params.repetition_penalty != 1:
            seen = xp.asarray(self._context_mask(question.context, row), copy=True)
            seen[_indices([*question.token_ids, *question.answer], row)] = True
            penalty = params.repetition_penalty
            row = xp.where(seen, xp.where(row > 0, row / penalty, row * penalty), row)
        if counts := Counter(question.answer):
            answered = _indices(list(counts), row)
            times = xp.asarray(list(counts.values()), dtype=row.dtype, device=device(row))
            lower = params.frequency_penalty * times + params.presence_penalty
            row[answered] = row[answered] - lower
        return row

    def _context_mask(self, context: Context, row: Logits) -> Logits:
        """bool [vocab_size]: the tokens of a context."""
        if context not in self._contexts:
            xp = array_namespace(row)
            mask = xp.zeros(row.shape, dtype=xp.bool, device=device(row))
            mask[_indices(context.token_ids, row)] = True
            self._contexts[context] = mask
        return self._contexts[context]


def _indices(tokens: Sequence[int] | np.ndarray, row: Logits) -> Logits:
    return array_namespace(row).asarray(np.asarray(tokens, np.int64), device=device(row))
