"""How much is done between two tokens of an answer, so that their gap stays bounded."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from star_attention.runtime.orders import Ask, Chunk, Decode, Load, Order, Save
from star_attention.spans import most_tokens

_LEAST = 16  # tokens of a pass, or pages of a copy
_MOST = 1 << 24
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
    """Finds how much takes a given time: what took too long is cut, what was short grows.

    Args:
        amount: to begin with.
    """

    amount: int

    def took(self, amount: int, seconds: float, given: float, fixed: float) -> None:
        """A pass of so much took so long; `given` is the time that it should take, `fixed` what any
        pass takes, however little it does."""
        if 2 * amount < self.amount and seconds < given:
            return  # there was no more to do
        change = given / max(seconds, 1e-6)
        if change < 1:  # what is fixed is not cut with it
            change = max(given - fixed, 0.0) / max(seconds - fixed, 1e-6)
        self.amount = min(max(_LEAST, int(amount * min(max(change, 0.25), 2.0))), _MOST)


@dataclass
class Pace:
    """Cuts passes of phase 1 and of questions, one of which comes between two tokens.

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
    _chunk: _Cut = field(default_factory=lambda: _Cut(64))
    _ask: _Cut = field(default_factory=lambda: _Cut(64))
    _copy: _Cut = field(default_factory=lambda: _Cut(64))
    _idle: _Cut = field(default_factory=lambda: _Cut(1024))
    _answers: bool = False

    def cuts(self, answers: bool) -> Cuts:
        """What the next pass may take; `answers`: some are under way."""
        self._answers = answers
        if not answers:
            return Cuts(self._idle.amount, self._idle.amount, self._copy.amount)
        return Cuts(self._chunk.amount, self._ask.amount, self._copy.amount)

    def took(self, order: Order, seconds: float) -> None:
        """An order was executed."""
        given, fixed = self.idle_pass, 0.0
        if self._answers:
            # A pass reads the weights, as a step of one token does.
            given, fixed = _MARGIN * (self.gap() - self._step()), min(self._steps, default=0.0)
        match order:
            case Decode():
                self._steps.append(seconds)
            case Chunk(spans=spans):
                cut = self._chunk if self._answers else self._idle
                cut.took(most_tokens(spans), seconds, given, fixed)
            case Ask(parts=parts) if self._answers:
                tokens = sum(len(part.token_ids) for part in parts)
                self._ask.took(tokens, seconds, given, fixed)
            case Save() | Load():
                self._copy.took(self._copy.amount, seconds, given, 0.0)

    def gap(self) -> float:
        """Seconds that two tokens of an answer are apart at most."""
        return self.gap_factor * self._step() if self.max_gap is None else self.max_gap

    def _step(self) -> float:
        return statistics.median(self._steps) if self._steps else 0.01
