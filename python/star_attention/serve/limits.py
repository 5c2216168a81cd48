"""How many may wait at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from star_attention.serve.errors import RETRY_QUEUE, ApiError


class Admission:
    """Counts what is waited for, answers and contexts, and refuses what would be too many."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.count = 0

    def check(self, answers: int = 1) -> None:
        """Raises ApiError 429 if so many more are too many now."""
        if self.count + answers > self._limit:
            raise ApiError(
                429,
                f"{self.count} answers are waited for, the server takes {self._limit}: "
                "try again later",
                code="queue_full",
                headers={"Retry-After": str(RETRY_QUEUE)},
            )

    @contextlib.contextmanager
    def enter(self, answers: int = 1) -> Iterator[None]:
        """Raises ApiError 429, or 400 if it would never fit."""
        if answers > self._limit:
            raise ApiError(
                400,
                f"the request asks for {answers} answers, the server gives at most {self._limit} "
                "at once",
                "n",
                "too_many_answers",
            )
        self.check(answers)
        self.count += answers
        try:
            yield
        finally:
            self.count -= answers


class BodyRoom:
    """Bounds the memory of bodies that are on their way, of all requests together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0

    @contextlib.contextmanager
    def enter(self) -> Iterator[BodyShare]:
        share = BodyShare(self)
        try:
            yield share
        finally:
            self._used -= share.used

    def _take(self, size: int) -> None:
        if self._used + size > self._limit:
            raise ApiError(
                429,
                "too many large requests arrive at once: try again later",
                code="queue_full",
                headers={"Retry-After": str(RETRY_QUEUE), "Connection": "close"},
            )
        self._used += size


class BodyShare:
    """What one request takes of a `BodyRoom`."""

    def __init__(self, room: BodyRoom) -> None:
        self._room = room
        self.used = 0

    def take(self, size: int) -> None:
        self._room._take(size)
        self.used += size
