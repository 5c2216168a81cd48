"""Keeps other web sites' pages from using a server through its user's browser."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from star_attention.serve.errors import ApiError

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class HostCheck:
    """On loopback, the Host must be loopback's or an allowed one (DNS rebinding); everywhere, the
    Origin, if there is one, must be the Host, an allowed one, or one of `origins`."""

    def __init__(
        self, app: ASGIApp, host: str, allowed: Sequence[str], origins: Sequence[str]
    ) -> None:
        self._app = app
        self._is_loopback = is_loopback(host)
        self._allowed = {name.lower() for name in allowed}
        self._origins = {origin.rstrip("/").lower() for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._error(Headers(scope=scope)) if scope["type"] == "http" else None
        if error is not None:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _error(self, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        name = _name(host)
        if self._is_loopback and name not in _LOOPBACK and name not in self._allowed:
            return ApiError(
                403,
                f"the host {name[:100]!r} is not allowed: use localhost, or start the server with "
                "--allowed-host",
                code="host_not_allowed",
            )
        origin = headers.get("origin", "").lower()
        if not origin or origin in self._origins or "*" in self._origins:
            return None
        netloc = urlsplit(origin).netloc if "://" in origin else ""
        if netloc and (netloc == host.lower() or _name(netloc) in self._allowed):
            return None
        return ApiError(
            403,
            f"pages of {origin[:100]!r} may not use this server: start it with --cors-origin",
            code="origin_not_allowed",
        )


def is_loopback(host: str) -> bool:
    """Whether a server bound to this address is reached from its own machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _name(host: str) -> str:
    """Without its port and brackets; what has no such form is no name."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
