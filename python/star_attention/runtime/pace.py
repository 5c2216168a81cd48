"""How much is done between two tokens of an answer, so that their gap stays bounded."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from star_attention.runtime.orders import Ask, Chunk, Decode, Load, Order, Save

_LEAST = 16  # tokens of a pass, or pages of a copy
_MARGIN = 0.8  # of the time that there is, as passes vary
_STEPS = 32  # the idle gap is the median of so many


class Cuts(NamedTuple):
    """Tokens of a pass of phase 1 and of one of questions, and pages of a layer that are copied at
    a time, at most."""

    chunk_tokens: int
    question_tokens: int
    copy_pages: int


@dataclass
class _Cut:
    """Finds how much takes a given time: what took too long is cut, what was short grows."""

    tokens: int
    seconds: float

    def took(self, tokens: int, seconds: float) -> None:
        """A pass of so many tokens took so long."""
        if 2 * tokens < self.tokens and seconds < self.seconds:
            return  # there was no more to do
        change = self.seconds / max(seconds, 1e-6)
        self.tokens = max(_LEAST, int(tokens * min(max(change, 0.25), 2.0)))


@dataclass
class Pace:
    """Cuts passes of phase 1 and of questions.

    Args:
        max_gap: seconds between two tokens of an answer at most; None: `gap_factor` times what it
            is while nothing is read.
        idle_pass: seconds that a pass takes at most while nothing is answered, so that who comes
            then does not wait long.
    """

    max_gap: float | None = None
    gap_factor: float = 3.0
    idle_pass: float = 0.25
    _steps: deque[float] = field(default_factory=lambda: deque(maxlen=_STEPS))
    _chunk: _Cut = field(default_factory=lambda: _Cut(64, 0.0))
    _ask: _Cut = field(default_factory=lambda: _Cut(64, 0.0))
    _copy: _Cut = field(default_factory=lambda: _Cut(64, 0.0))
    _idle: _Cut = field(default_factory=lambda: _Cut(1024, 0.0))
    _answers: bool = False

    def cuts(self, answers: bool, questions: bool, copies: bool) -> Cuts:
        """What the next pass of each kind may take.

        Args:
            answers: some are under way.
            questions, copies: some wait, so that passes of several kinds come between two tokens.
        """
        self._answers = answers
        self._idle.seconds = self.idle_pass
        if not answers:
            self._copy.seconds = self.idle_pass
            return Cuts(self._idle.tokens, self._idle.tokens, self._copy.tokens)
        between = _MARGIN * max(self.gap() - self._step(), 0.0)
        for cut in (self._chunk, self._ask, self._copy):
            cut.seconds = between / (1 + questions + copies)
        return Cuts(self._chunk.tokens, self._ask.tokens, self._copy.tokens)

    def took(self, order: Order, seconds: float) -> None:
        """An order was executed."""
        match order:
            case Decode():
                self._steps.append(seconds)
            case Chunk(tokens=tokens) if any(tokens):
                (self._chunk if self._answers else self._idle).took(max(tokens), seconds)
            case Ask(parts=parts) if self._answers:
                self._ask.took(sum(len(part.token_ids) for part in parts), seconds)
            case Save() | Load():
                self._copy.took(self._copy.tokens, seconds)

    def gap(self) -> float:
        """Seconds that two tokens of an answer are apart at most."""
        return self.gap_factor * self._step() if self.max_gap is None else self.max_gap

    def _step(self) -> float:
        return statistics.median(self._steps) if self._steps else 0.01
