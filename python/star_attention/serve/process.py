"""The ranks as the front has them: processes of their own, started, watched, and started again.

A thread starts the ranks, connects, and passes on what rank 0 says; another passes requests to it,
so that the event loop never waits for the engine.
"""

from __future__ import annotations

import asyncio
import os
import queue
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from star_attention.errors import UserError, say
from star_attention.runtime.sampling import SamplingParams
from star_attention.serve.engine import SHUTTING_DOWN, EngineLostError, EngineRefusalError, State
from star_attention.serve.meeting import Job, Meeting, OuterRanks, OwnRanks
from star_attention.serve.messages import (
    Cancel,
    Event,
    Generate,
    NewToken,
    Opened,
    Progress,
    Read,
    ReadDone,
    Ready,
    Refused,
    Request,
    Statistics,
    Stop,
    Tokens,
)

_LOOK_SECONDS = 0.05
_WATCH_SECONDS = 1.0
_STEADY = 600.0  # seconds after which earlier restarts are forgotten


class EngineProcess:
    """An `Engine` whose ranks are processes.

    Args:
        ranks: starts them.
        restarts: how often ranks that were lost are started again.
        patience: seconds after which ranks that say nothing, or, as they start, are stopped, are
            given up.
        on_end: called with an exit code if there is nothing to serve any more: the ranks refused
            the model (2), or are lost and cannot be started again by this front (1).
        end_tokens: the tokenizer's, that end answers as the model's own do.
    """

    def __init__(
        self,
        ranks: OwnRanks | OuterRanks,
        restarts: int = 3,
        patience: float = 12.0,
        on_end: Callable[[int], None] = lambda code: None,
        end_tokens: frozenset[int] = frozenset(),
    ) -> None:
        self.state: State = "starting"
        self.reason = "the model is being loaded"
        self.model: Ready | None = None
        self.statistics: Statistics | None = None
        self.restarts = 0
        self._ranks = ranks
        self._restarts_left = self._restarts_allowed = restarts
        self._patience = patience
        self._on_end = on_end
        self._end_tokens = end_tokens
        self._loop: asyncio.AbstractEventLoop | None = None
        # Requests, and to which start of the ranks they go.
        self._outgoing: queue.SimpleQueue[tuple[int, Request] | None] = queue.SimpleQueue()
        self._waiting: dict[int, asyncio.Queue[object]] = {}
        self._numbers = 0
        self._job: Job | None = None
        self._connection: Connection | None = None
        self._sending = threading.Lock()
        self._is_stopping = False
        self._supervisor = threading.Thread(target=self._supervise, name="engine", daemon=True)
        self._sender = threading.Thread(target=self._send, name="engine-sender", daemon=True)

    # The Engine protocol

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._supervisor.start()
        self._sender.start()

    async def stop(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while self._waiting and self.state == "ready" and time.monotonic() < end:
            await asyncio.sleep(_LOOK_SECONDS)
        is_at_work = bool(self._waiting) or self.state != "ready"
        self._is_stopping = True
        self._post(Stop())
        self.give_up()
        if self._supervisor.ident is None:
            return  # it was never started
        if is_at_work:
            self._terminate()
            if connection := self._connection:
                _shut(connection)
        await asyncio.to_thread(self._supervisor.join, max(1.0, end - time.monotonic()))
        if self._supervisor.is_alive():
            self._terminate(kill=True)
            await asyncio.to_thread(self._supervisor.join, 10.0)
        self._outgoing.put(None)

    def give_up(self) -> None:
        """Requests in flight are told that the server shuts down, and others are refused."""
        self._lose("lost", SHUTTING_DOWN)

    def end_at_once(self) -> None:
        """What `stop` waits for is over then."""
        self._is_stopping = True
        self._terminate(kill=True)

    async def generate(
        self, token_ids: np.ndarray, border: int, params: SamplingParams
    ) -> AsyncIterator[Opened | Progress | NewToken]:
        self._numbers += 1
        request = Generate(self._numbers, token_ids, border, params, self._end_tokens)
        async with aclosing(self._events(request)) as events:
            async for event in events:
                yield event
                if isinstance(event, NewToken) and event.finish_reason:
                    return

    async def read(
        self, token_ids: np.ndarray, keep: bool = False
    ) -> AsyncIterator[Opened | Progress | ReadDone]:
        self._numbers += 1
        async with aclosing(self._events(Read(self._numbers, token_ids, keep))) as events:
            async for event in events:
                yield event
                if isinstance(event, ReadDone) and not keep:
                    return

    async def _events(self, request: Generate | Read) -> AsyncGenerator[Any, None]:
        """What the engine says about a request, which is cancelled when nobody listens any more."""
        if self.state != "ready":
            raise EngineLostError(self.reason)
        incoming = self._waiting[request.request] = asyncio.Queue()
        self._post(request)
        is_over = False
        try:
            while True:
                event = await incoming.get()
                is_over = _is_last(event)
                if isinstance(event, Exception):
                    is_over = True
                    raise event
                if isinstance(event, Refused):
                    is_over = True
                    raise EngineRefusalError(event.reason)
                yield event
        finally:
            if self._waiting.pop(request.request, None) is incoming and not is_over:
                self._post(Cancel(request.request))

    def _post(self, request: Request) -> None:
        self._outgoing.put((self.restarts, request))

    # In the event loop

    def _take(self, event: Event) -> None:
        match event:
            case Ready():
                self.model, self.state, self.reason = event, "ready", ""
            case Statistics():
                self.statistics = event
            case Tokens(tokens):
                for token in tokens:
                    self._deliver(token)
            case _:
                self._deliver(event)

    def _deliver(self, event: NewToken | Opened | Progress | ReadDone | Refused) -> None:
        if incoming := self._waiting.get(event.request):
            incoming.put_nowait(event)

    def _lose(self, state: State, reason: str) -> None:
        self.state, self.reason, self.statistics = state, reason, None
        waiting, self._waiting = self._waiting, {}
        for incoming in waiting.values():
            incoming.put_nowait(EngineLostError(reason))

    # In threads

    def _supervise(self) -> None:
        while not self._is_stopping:
            began = time.monotonic()
            code, reason = self._run_once()
            if self._is_stopping:
                break
            is_refused = self.model is None and code == 2
            if is_refused or not self._ranks.can_start_again:
                self._call(self._lose, "lost", reason)
                self._on_end(code)
                return
            if time.monotonic() - began > _STEADY:
                self._restarts_left = self._restarts_allowed
            if not self._restarts_left:
                self._call(self._lose, "lost", reason)
                say("the ranks are not started again: they were lost too often")
                return
            self._restarts_left -= 1
            self.restarts += 1
            self._call(self._lose, "starting", f"{reason}; the ranks are started again")
            say("the ranks are started again")
        self._call(self._lose, "lost", SHUTTING_DOWN)

    def _run_once(self) -> tuple[int, str]:
        """Starts the ranks and passes on what they say until they end: the exit code and why."""
        try:
            job, meeting = self._ranks.start()
        except (UserError, OSError) as error:
            return 1, f"the ranks cannot be started: {error}"
        self._job = job
        if self._is_stopping:
            self._terminate()
        listener = threading.Thread(target=self._listen, args=(job, meeting), daemon=True)
        listener.start()
        threading.Thread(target=self._watch_start, args=(job,), daemon=True).start()
        code = job.wait()
        listener.join()
        meeting.is_over()
        return code, job.last_words or f"the ranks ended with exit code {code}"

    def _listen(self, job: Job, meeting: Meeting) -> None:
        while (connection := meeting.call_rank0()) is None:
            if not job.is_running():
                return
            time.sleep(_LOOK_SECONDS)
        self._connection = connection
        is_ready = False
        try:
            while True:
                if not connection.poll(self._patience if is_ready else None):
                    self._end_stuck(job, f"the ranks have said nothing for {self._patience:g} s")
                    return
                event = connection.recv()
                is_ready = is_ready or isinstance(event, Ready)
                self._call(self._take, event)
        except (EOFError, OSError):
            pass
        finally:
            # Nobody waits for what does not come, however long the ranks take to end.
            if not self._is_stopping:
                self._call(self._lose, "starting", "the ranks were lost")
            self._hang_up(connection)

    def _watch_start(self, job: Job) -> None:
        """Ends ranks of which one is stopped before they serve, when they need not say anything."""
        ran = time.monotonic()
        while job.is_running() and self.state != "ready":
            time.sleep(min(_WATCH_SECONDS, self._patience / 2))
            if not job.is_stopped():
                ran = time.monotonic()
            elif time.monotonic() > ran + self._patience:
                self._end_stuck(job, f"ranks were stopped for {self._patience:g} s as they started")
                return

    def _end_stuck(self, job: Job, reason: str) -> None:
        job.last_words = reason
        say(f"{reason}: they are ended")
        job.kill()

    def _hang_up(self, connection: Connection) -> None:
        self._connection = None
        _shut(connection)
        with self._sending:
            connection.close()

    def _send(self) -> None:
        while (posted := self._outgoing.get()) is not None:
            start, request = posted
            with self._sending:
                connection = self._connection
                if connection is not None and start == self.restarts:
                    with suppress(OSError):
                        connection.send(request)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the event loop is over
            self._loop.call_soon_threadsafe(function, *arguments)

    def _terminate(self, kill: bool = False) -> None:
        if self._job:
            self._job.kill() if kill else self._job.terminate()


def _shut(connection: Connection) -> None:
    """Whoever sends or receives there ends."""
    with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)


def _is_last(event: object) -> bool:
    return isinstance(event, NewToken) and event.finish_reason is not None
