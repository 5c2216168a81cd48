"""The web page: / and /page/..., files of the folder `page` beside this module."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent / "page"

_HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' data:",
            "connect-src 'self'",
            "form-action 'none'",
            "base-uri 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


def add_page(app: FastAPI, folder: Path | None = None) -> None:
    folder = folder or FOLDER

    async def index(_: Request) -> Response:
        path = folder / "index.html"
        if not path.is_file():
            raise HTTPException(404, "this server has no page")
        return FileResponse(path, headers=_HEADERS)

    app.router.routes.append(Route("/", index, methods=["GET"], include_in_schema=False))
    if folder.is_dir():
        app.router.routes.append(Mount("/page", _Files(directory=folder), name="page"))
