"""Contexts and questions as rank 0 knows them: tokens, plans and counts, no tensors."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from star_attention.config import StarConfig
from star_attention.plan import Plan
from star_attention.runtime.phase1 import Phase1
from star_attention.runtime.sampling import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(eq=False)
class Context:
    """A context as rank 0 knows it.

    Attributes:
        cached: tokens that each rank caches of it in the end.
        pages, scratch: taken on each rank, int64 [ranks]; scratch until phase 1 is over.
        questions: that are being answered over it; with them it stays, also when it is released.
    """

    number: int
    token_ids: np.ndarray
    config: StarConfig
    plan: Plan
    phase1: Phase1
    cached: list[int]
    pages: np.ndarray
    scratch: np.ndarray
    is_open: bool = False
    is_released: bool = False
    questions: int = 0

    @property
    def is_ready(self) -> bool:
        return self.is_open and self.phase1.finished

    @property
    def held(self) -> np.ndarray:
        return self.pages if self.phase1.finished else self.pages + self.scratch


@dataclass(eq=False)
class Question:
    """A question and its answer so far.

    Attributes:
        end_tokens: that end the answer.
        pending: tokens that are still to be encoded, in order, by the rank that keeps them.
        kept: tokens of question and answer that each rank caches.
        most_pages: that it takes on each rank if the answer is longest, int64 [ranks].
    """

    number: int
    context: Context
    token_ids: np.ndarray
    params: SamplingParams
    end_tokens: frozenset[int]
    most_pages: np.ndarray
    rng: np.random.Generator
    kept: list[int]
    pending: deque[tuple[int, np.ndarray]] = field(default_factory=deque)
    answer: list[int] = field(default_factory=list)
    is_over: bool = False


@dataclass(frozen=True)
class NewToken:
    """A token of a question's answer, and why the answer ends with it, if it does."""

    question: Question
    token: int
    finish_reason: FinishReason | None
