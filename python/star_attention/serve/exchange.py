"""Responses that are worked on while the client waits, and end when it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import anyio
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from star_attention.serve.errors import (
    ApiError,
    ClientGoneError,
    as_api_error,
    internal_error,
)
from star_attention.serve.front import Front

logger = logging.getLogger("star_attention.serve")

Result = TypeVar("Result")

# Yielded by a stream that has nothing to say for long, so that proxies do not close it.
KEEP_ALIVE: Mapping[str, Any] = {}


class Answered(Response):
    """JSON that `work` gives: a value, or its bytes."""

    def __init__(
        self, front: Front, work: Callable[[], Awaitable[Any]], status_code: int = 200
    ) -> None:
        super().__init__(status_code=status_code)
        self._front = front
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def work() -> Response:
            answer = await self._work()
            if isinstance(answer, bytes):
                return Response(answer, self.status_code, media_type="application/json")
            return await self._front.in_thread(JSONResponse, answer, self.status_code)

        try:
            response = await while_connected(receive, work(), self._front.options.request_timeout)
        except ClientGoneError:
            _abort(self._front, scope)
            return
        except ApiError as error:
            if error.status == 504:
                _abort(self._front, scope)
            raise
        with (
            contextlib.suppress(TimeoutError),
            anyio.fail_after(self._front.options.client_timeout),
        ):
            await response(scope, receive, send)


class EventStream(Response):
    """Server-sent events. An error before the first becomes the response, a later one an event."""

    def __init__(
        self, front: Front, events: Callable[[], AsyncGenerator[Mapping[str, Any], None]]
    ) -> None:
        super().__init__()
        self._front = front
        self._events = events
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._run(send), self._front.options.request_timeout)
        except ClientGoneError:
            _abort(self._front, scope)
        except Exception as error:
            told = as_api_error(error)
            if told is not None and told.status == 504:
                _abort(self._front, scope)
            if not self._begun:
                raise
            if told is None:
                logger.exception("a stream failed")
            told = told or internal_error()
            self._front.metrics.refused.labels(str(told.status)).inc()
            scope.get("log", {})["error"] = told.code
            with contextlib.suppress(ClientGoneError):
                await self._send(send, _event(told.body()), more=False)

    async def _run(self, send: Send) -> None:
        async with contextlib.aclosing(self._events()) as events:
            async for event in events:
                if not self._begun:
                    self._begun = True
                    await send(
                        {
                            "type": "http.response.start",
                            "status": 200,
                            "headers": [
                                (b"content-type", b"text/event-stream; charset=utf-8"),
                                (b"cache-control", b"no-store"),
                                (b"x-accel-buffering", b"no"),
                            ],
                        }
                    )
                await self._send(send, _event(event) if event else b": reading\n\n")
        await self._send(send, b"data: [DONE]\n\n", more=False)

    async def _send(self, send: Send, data: bytes, more: bool = True) -> None:
        """Raises ClientGoneError if the client does not read."""
        try:
            with anyio.fail_after(self._front.options.client_timeout):
                await send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            raise ClientGoneError from None


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def _abort(front: Front, scope: Scope) -> None:
    front.metrics.aborted.inc()
    scope.get("log", {})["aborted"] = True


async def while_connected(
    receive: Receive, work: Coroutine[Any, Any, Result], timeout: float
) -> Result:
    """Ends `work` when the client leaves or the time is over.

    Raises:
        ClientGoneError
        ApiError: 504.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if watch.done():
            raise ClientGoneError
        raise ApiError(
            504, f"the request took longer than {timeout:g} seconds", code="request_timeout"
        )
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Pulse:
    """Says when a stream has been silent for so many seconds."""

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds = seconds
        self._last = time.monotonic()

    def is_due(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True
