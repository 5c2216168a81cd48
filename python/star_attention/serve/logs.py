"""Logs as JSON, a line a record; a record a request."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from datetime import datetime, timezone
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from star_attention.serve.engine import SHUTTING_DOWN
from star_attention.serve.errors import as_api_error, internal_error, unavailable
from star_attention.serve.metrics import Metrics

logger = logging.getLogger("star_attention.serve")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_PATHS = ("/", "/openapi.json")
_METHODS = frozenset(("GET", "HEAD", "POST", "PATCH", "DELETE", "OPTIONS", "PUT"))


class JsonFormatter(logging.Formatter):
    """Writes what a record says, and its `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


LOG_CONFIG: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"json": {"()": JsonFormatter}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
    "loggers": {
        name: {"handlers": ["stderr"], "level": "INFO", "propagate": False}
        for name in ("star_attention.serve", "uvicorn", "uvicorn.error")
    }
    | {"uvicorn.error": {"level": "INFO"}, "uvicorn.access": {"propagate": False}},
}


class RequestLog:
    """Gives a request its id, a line in the log and its place in the metrics, and turns what
    nobody foresaw into an error of the API. Endpoints add to `scope["log"]`; no text of prompts
    or keys goes there."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._running: set[asyncio.Task] = set()
        self._is_over = False

    def end_all(self) -> None:
        """Requests that still run, or whose body has not come, are told that the server ends."""
        self._is_over = True
        for task in self._running:
            task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16)
        start, status, is_complete = time.monotonic(), None, False
        fields = scope["log"] = {}

        async def send_with_id(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            is_complete = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        task = asyncio.current_task()
        self._running.add(task)
        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            if not self._is_over:
                raise
            if status is None:
                told = unavailable(SHUTTING_DOWN, "draining")
                await told.response()(scope, receive, send_with_id)
        except Exception as error:
            told = as_api_error(error)
            if told is None:
                fields["exception_type"] = type(error).__name__
                logger.exception("a request failed", extra={"fields": {"id": request_id}})
            if status is None:
                await (told or internal_error()).response()(scope, receive, send_with_id)
            elif not is_complete:
                raise
        finally:
            self._running.discard(task)
            status = status or 499  # the client left before it was told anything
            path = _route(scope)
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.http.labels(method, path, str(status)).inc()
            if status >= 400 and status != 499:
                self._metrics.refused.labels(str(status)).inc()
            seconds = round(time.monotonic() - start, 4)
            line = {"id": request_id, "method": method, "path": path, "status": status}
            line |= {"seconds": seconds, **fields}
            logger.info("request", extra={"fields": line})


def _route(scope: Scope) -> str:
    """The route's path, with the names of its parts in place of what a client wrote."""
    if scope["path"] in _PATHS:
        return scope["path"]
    if scope["path"].startswith("/page/"):
        return "/page"
    return getattr(scope.get("route"), "path", "unmatched")
