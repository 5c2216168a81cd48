"""Runs the front until it is told to stop; what it has begun is answered then."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator

from star_attention.errors import UserError, say
from star_attention.models.tokenizer import Tokenizer
from star_attention.serve.app import App, create_app
from star_attention.serve.options import ServeOptions
from star_attention.serve.process import EngineProcess
from star_attention.serve.server import make_server

_LOOK_SECONDS = 0.05
_END_SECONDS = 1.0  # in which clients may take their last answer


def run_front(
    make_engine: Callable[[Callable[[int], None]], EngineProcess],
    tokenizer: Tokenizer,
    options: ServeOptions,
    port: int,
    shutdown_timeout: float,
) -> int:
    """Serves until SIGTERM or SIGINT; a second one ends it at once. Returns the exit code.

    Args:
        make_engine: is given what to call, with an exit code, if there is nothing to serve.

    Raises:
        UserError: the address is not to be had.
    """
    return asyncio.run(_Server(make_engine, tokenizer, options, port, shutdown_timeout).run())


class _Server:
    def __init__(
        self,
        make_engine: Callable[[Callable[[int], None]], EngineProcess],
        tokenizer: Tokenizer,
        options: ServeOptions,
        port: int,
        shutdown_timeout: float,
    ) -> None:
        self._timeout = shutdown_timeout
        self._socket = _listen(options.host, port)
        self._engine = make_engine(self._nothing_to_serve)
        self._app: App = create_app(self._engine, tokenizer, options)
        self._server = make_server(self._app, port)
        self._server.capture_signals = _signals_are_ours
        self._name = options.model_names[0]
        self._loop: asyncio.AbstractEventLoop
        self._ends_at: float | None = None
        self._code = 0

    async def run(self) -> int:
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop)
        teller = asyncio.create_task(self._tell_when_ready())
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            teller.cancel()
            left = max(0.0, (self._ends_at or 0.0) - time.monotonic())
            await self._engine.stop(left)
        return self._code if self._is_ending else 1

    @property
    def _is_ending(self) -> bool:
        return self._ends_at is not None

    def _stop(self) -> None:
        if self._is_ending:
            self._ends_at = time.monotonic()
            self._server.should_exit = self._server.force_exit = True
            self._engine.end_at_once()
            return
        self._app.drain()
        if count := self._app.in_flight:
            say(f"stopping once {count} requests are answered, in {self._timeout:g} s at most")
        self._end_in(self._timeout)

    def _end_in(self, seconds: float) -> None:
        self._ends_at = time.monotonic() + seconds
        self._ending = self._loop.create_task(self._end_when_answered())

    async def _end_when_answered(self) -> None:
        while self._app.in_flight and time.monotonic() < self._ends_at:
            await asyncio.sleep(_LOOK_SECONDS)
        if self._app.in_flight:
            self._engine.give_up()
        self._server.should_exit = True
        for next_step in (self._app.end, self._force_exit):
            await asyncio.sleep(_END_SECONDS)
            next_step()

    def _force_exit(self) -> None:
        self._server.force_exit = True

    def _nothing_to_serve(self, code: int) -> None:
        """The ranks said why."""
        self._loop.call_soon_threadsafe(self._end_with, code)

    def _end_with(self, code: int) -> None:
        if not self._is_ending:
            self._code = code
            self._end_in(0.0)

    async def _tell_when_ready(self) -> None:
        while self._engine.state != "ready":
            await asyncio.sleep(_LOOK_SECONDS)
        host, port = self._socket.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        say(f"serving {self._name} at http://{host}:{port}")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error
        raise UserError(
            f"--host {host} --port {port} cannot be served: {reason}: use another"
        ) from None


@contextlib.contextmanager
def _signals_are_ours() -> Iterator[None]:
    yield
