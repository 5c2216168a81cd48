"""The engine as the front sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal, Protocol

import numpy as np

from star_attention.runtime.sampling import SamplingParams
from star_attention.serve.messages import NewToken, Opened, Progress, ReadDone, Ready, Statistics

# `starting`: ranks load the model, the first time or again. `lost`: they ended, and are not
# started again.
SHUTTING_DOWN = "the server is shutting down"
State = Literal["starting", "ready", "lost"]


class EngineRefusalError(Exception):
    """The engine cannot serve this request: it is too long, or does not fit. The message is for
    the client (400)."""


class EngineLostError(Exception):
    """A rank was lost while the request was in flight, or there is no engine now (503)."""


class Engine(Protocol):
    """Generators may be closed at any moment, which cancels the request.

    Attributes:
        reason: why the state is what it is, if it is not `ready`.
        model: None until it was loaded once.
        restarts: how often the ranks were started again.
    """

    state: State
    reason: str
    model: Ready | None
    statistics: Statistics | None
    restarts: int

    async def start(self) -> None:
        """Begins to load the model; returns at once."""

    async def stop(self, timeout: float) -> None:
        """Lets requests in flight end, for `timeout` seconds at most, then ends the ranks."""

    def generate(
        self, token_ids: np.ndarray, border: int, params: SamplingParams
    ) -> AsyncIterator[Opened | Progress | NewToken]:
        """See `messages.Generate`. Ends with the token that has a finish_reason.

        Raises:
            EngineRefusalError, EngineLostError
        """

    def read(
        self, token_ids: np.ndarray, keep: bool = False
    ) -> AsyncIterator[Opened | Progress | ReadDone]:
        """See `messages.Read`. With `keep` the generator does not end: `ReadDone` is the last it
        yields, and the context is held until the generator is closed.

        Raises:
            EngineRefusalError, EngineLostError
        """
