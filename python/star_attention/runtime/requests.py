"""Contexts and questions as rank 0 knows them: tokens, plans and counts, no tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from star_attention.config import StarConfig
from star_attention.plan import Plan
from star_attention.runtime.blocks import Block
from star_attention.runtime.sampling import SamplingParams, TokenLogprobs
from star_attention.runtime.store import Stored
from star_attention.spans import Passes

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Division:
    """How ranks hold a context: some of its blocks are there already.

    Attributes:
        known: of each part of the plan the block that is there, or which tier has it, or None.
        pages, scratch: taken on each rank, int64 [ranks]; scratch until phase 1 is over.
        new: of the pages, those of blocks that are not in pages yet.
        tokens: that each rank caches of it in pages whose last one a question goes on in.
    """

    plan: Plan
    known: tuple[Block | Stored | None, ...]
    pages: np.ndarray
    new: np.ndarray
    scratch: np.ndarray
    tokens: list[int]


@dataclass(eq=False)
class Context:
    """A context as rank 0 knows it.

    Attributes:
        keys: of its parts, None for those that are nobody else's.
        is_long: it is rotated as the model rotates long texts.
        is_kept: it stays until it is released, whoever else waits for room.
        division: until it is open, as if it were read anew; then how it is held.
        blocks: once it is open, those of its parts; which of them its phase 1 reads, and which it
            awaits, because what it reads sees them.
        questions: that are being answered over it; with them it stays, also when it is released.
    """

    number: int
    token_ids: np.ndarray
    config: StarConfig
    keys: Sequence[bytes | None]
    is_long: bool
    is_kept: bool
    division: Division
    phase1: Passes
    blocks: list[Block] = field(default_factory=list)
    reads: set[Block] = field(default_factory=set)
    awaits: list[Block] = field(default_factory=list)
    is_open: bool = False
    is_released: bool = False
    questions: int = 0

    @property
    def plan(self) -> Plan:
        return self.division.plan

    @property
    def is_ready(self) -> bool:
        return self.is_open and all(block.is_ready for block in self.blocks)


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
    logprobs: TokenLogprobs | None = None
