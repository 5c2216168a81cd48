"""API keys."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from star_attention.errors import UserError
from star_attention.serve.errors import ApiError

ENVIRONMENT = "STAR_ATTENTION_API_KEYS"
# What needs no key: whether the server lives, and the page's files, which ask for one.
_OPEN = ("/health", "/version", "/")
_OPEN_FOLDER = "/page/"


def read_api_keys(path: Path | None) -> tuple[str, ...]:
    """From a file, one a line (# begins a comment), and from the environment, separated by commas.

    Raises:
        UserError: the file cannot be read, or holds no key.
    """
    keys = [key.strip() for key in os.environ.get(ENVIRONMENT, "").split(",")]
    if path is not None:
        try:
            lines = path.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UserError(f"--api-key-file {path} cannot be read: {reason}") from None
        found = [line.partition("#")[0].strip() for line in lines]
        if not any(found):
            raise UserError(f"--api-key-file {path} holds no key: write one a line")
        keys += found
    return tuple(dict.fromkeys(filter(None, keys)))


class Authentication:
    """Lets requests with one of the keys through; all, if there are no keys."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digests and not _is_open(scope["path"]):
            header = Headers(scope=scope).get("authorization", "")
            kind, _, key = header.partition(" ")
            digest = _digest(key.strip().encode())
            # All are compared, so that time tells nothing of which one was near.
            known = [hmac.compare_digest(digest, each) for each in self._digests]
            if kind.lower() != "bearer" or not any(known):
                problem = "the API key is not known" if header else "there is no API key"
                error = ApiError(
                    401,
                    f"{problem}: send `Authorization: Bearer <key>`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_open(path: str) -> bool:
    return path in _OPEN or path.startswith(_OPEN_FOLDER)
