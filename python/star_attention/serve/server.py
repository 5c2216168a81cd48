"""uvicorn, set up for the front."""

from __future__ import annotations

from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from star_attention.serve.app import App
from star_attention.serve.logs import LOG_CONFIG

_KEEP_ALIVE_SECONDS = 30


class PatientProtocol(HttpToolsProtocol):
    """HTTP/1.1, but a connection whose request's head does not come in time is closed."""

    head_seconds = 60.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(self.head_seconds, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None:
            self._head_timer.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._head_timer.cancel()
        self._head_timer = self.loop.call_later(self.head_seconds, self._give_up)

    def _give_up(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def make_server(app: App, port: int) -> uvicorn.Server:
    """A server of the app at its options' address; `run()` it, or `await serve()`."""
    options = app.front.options

    class Protocol(PatientProtocol):
        head_seconds = options.body_timeout

    config = uvicorn.Config(
        app,
        host=options.host,
        port=port,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=LOG_CONFIG,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
    )
    return uvicorn.Server(config)
