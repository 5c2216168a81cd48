"""The server's HTTP front as an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from star_attention.errors import UserError
from star_attention.models.tokenizer import Tokenizer
from star_attention.serve.auth import Authentication
from star_attention.serve.chat import chat_routes
from star_attention.serve.completions import completion_routes
from star_attention.serve.context_routes import context_routes
from star_attention.serve.contexts import Contexts
from star_attention.serve.engine import Engine, EngineLostError, EngineRefusalError
from star_attention.serve.errors import ApiError, as_api_error, internal_error
from star_attention.serve.front import Front
from star_attention.serve.health_routes import health_routes, package_version
from star_attention.serve.hosts import HostCheck
from star_attention.serve.logs import RequestLog
from star_attention.serve.model_routes import model_routes
from star_attention.serve.options import ServeOptions
from star_attention.serve.page import add_page
from star_attention.serve.token_routes import token_routes

_CLIENT_LEFT = 499


class App:
    """The ASGI application. Its start starts the engine; who stops the server calls `drain`, waits
    for what is in flight, calls `end`, and stops the engine.

    Attributes:
        front: the engine, the tokenizer and what is counted.
        contexts: the named contexts.
    """

    def __init__(self, front: Front, contexts: Contexts, app: RequestLog) -> None:
        self.front = front
        self.contexts = contexts
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    @property
    def in_flight(self) -> int:
        """Answers and contexts that are waited for."""
        return self.front.admission.count

    def drain(self) -> None:
        """New requests are refused from now on (503); those in flight are answered."""
        self.front.draining = True

    def end(self) -> None:
        """Requests that are still there are told so."""
        self._app.end_all()


def create_app(engine: Engine, tokenizer: Tokenizer, options: ServeOptions) -> App:
    """The HTTP front of an engine."""
    front = Front(engine, tokenizer, options)
    contexts = Contexts(front)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        await contexts.start()
        try:
            yield
        finally:
            await contexts.stop()
            front.close()

    api = FastAPI(
        title="Star Attention",
        version=package_version(),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    api.include_router(chat_routes(front, contexts))
    api.include_router(completion_routes(front, contexts))
    api.include_router(context_routes(front, contexts))
    api.include_router(model_routes(front))
    api.include_router(token_routes(front))
    api.include_router(health_routes(front))
    add_page(api)
    for kind in (ApiError, UserError, EngineRefusalError, EngineLostError):
        api.add_exception_handler(kind, _tell)
    api.add_exception_handler(HTTPException, _tell_http)
    api.add_exception_handler(ClientDisconnect, _tell_nobody)
    api.add_exception_handler(Exception, _tell_little)

    # The first to see a request is the last of these.
    app: ASGIApp = Authentication(api, options.api_keys)
    if options.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=options.cors_origins,
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app = HostCheck(app, options.host, options.allowed_hosts, options.cors_origins)
    return App(front, contexts, RequestLog(app, front.metrics))


async def _tell(request: Request, error: Exception) -> Response:
    told = as_api_error(error)
    request.scope["log"]["error"] = told.code
    return told.response()


async def _tell_http(_: Request, error: HTTPException) -> Response:
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


async def _tell_nobody(_: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_LEFT)


async def _tell_little(_: Request, error: Exception) -> Response:
    return internal_error().response()
