"""How much is done between two tokens of an answer, so that their gap stays bounded."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from star_attention.runtime.orders import Ask, Chunk, Decode, Load, Order, Save
from star_attention.spans import most_tokens

_LEAST = 16  # tokens of a pass, or pages of a copy
_MOST = 1 << 24
_MARGIN = 0.8  # of the time that there is, as passes vary
_WORTH = 1.25  # times what any pass takes, at least
_MEMORY = 0.9  # of what passes took, for each later one
_SHORT = 8  # one of so many passes is
_ALIKE = 0.002  # variance of passes, by their mean squared, that says little
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

    What any pass takes, however little it does, is not cut with it: it is found by a line through
    the last passes, some of which are short for that. A pass takes a quarter more, or all time
    would go into it.

    Args:
        amount: to begin with.
    """

    amount: int
    _passes: int = 0
    _sums: np.ndarray = field(default_factory=lambda: np.zeros(5))  # of 1, a, s, a a, a s

    @property
    def next(self) -> int:
        """How much the next pass takes."""
        is_short = self._passes % _SHORT == _SHORT - 1
        return -(-self.amount // 2) if is_short else self.amount

    def took(self, amount: int, seconds: float, given: float) -> None:
        """A pass of so much took so long; `given` is the time that it should take."""
        self._passes += 1
        self._sums = _MEMORY * self._sums + [1, amount, seconds, amount**2, amount * seconds]
        if 2 * amount <= self.amount + 1 and seconds < given:
            return  # there was no more to do, or it was short
        fixed = min(self._fixed(), seconds)
        given = max(given, _WORTH * fixed)
        change = given / max(seconds, 1e-6)
        if change < 1:
            change = (given - fixed) / max(seconds - fixed, 1e-6)
        self.amount = min(max(_LEAST, int(amount * min(max(change, 0.25), 2.0))), _MOST)

    def _fixed(self) -> float:
        """Seconds, 0 while passes are too much alike to tell."""
        count, amounts, seconds, squares, products = self._sums
        amount, second = amounts / count, seconds / count
        flat = _ALIKE * amount**2  # as much says that the line goes through 0
        variance, covariance = squares / count - amount**2, products / count - amount * second
        slope = (covariance + flat * second / amount) / (variance + flat) if amount else 0.0
        return max(second - slope * amount, 0.0)


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
    _idle_copy: _Cut = field(default_factory=lambda: _Cut(64))
    _answers: bool = False

    def cuts(self, answers: bool) -> Cuts:
        """What the next pass may take; `answers`: some are under way."""
        self._answers = answers
        if not answers:
            return Cuts(self._idle.amount, self._idle.amount, self._idle_copy.amount)
        return Cuts(self._chunk.next, self._ask.next, self._copy.amount)

    def took(self, order: Order, seconds: float) -> None:
        """An order was executed."""
        given = self.idle_pass
        if self._answers:
            given = max(_MARGIN * (self.gap() - self._step()), 0.0)
        match order:
            case Decode():
                self._steps.append(seconds)
            case Chunk(spans=spans):
                cut = self._chunk if self._answers else self._idle
                cut.took(most_tokens(spans), seconds, given)
            case Ask(parts=parts) if self._answers:
                tokens = sum(len(part.token_ids) for part in parts)
                self._ask.took(tokens, seconds, given)
            case Save() | Load():
                cut = self._copy if self._answers else self._idle_copy
                cut.took(cut.amount, seconds, given)

    def gap(self) -> float:
        """Seconds that two tokens of an answer are apart at most."""
        return self.gap_factor * self._step() if self.max_gap is None else self.max_gap

    def _step(self) -> float:
        return statistics.median(self._steps) if self._steps else 0.01
