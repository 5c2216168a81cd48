"""Errors as OpenAI's API words them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from star_attention.errors import UserError
from star_attention.serve.engine import EngineLostError, EngineRefusalError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
# Seconds after which a client may try again.
RETRY_QUEUE = 1
RETRY_ENGINE = 5


class ApiError(Exception):
    """What a client is told.

    Attributes:
        param: the field of the request that is wrong.
        code: for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


class ClientGoneError(Exception):
    """Nobody reads the response any more."""


def unavailable(message: str, code: str) -> ApiError:
    return ApiError(503, message, code=code, headers={"Retry-After": str(RETRY_ENGINE)})


def internal_error() -> ApiError:
    return ApiError(500, "the server failed at this request; its log says more", code="internal")


def as_api_error(error: BaseException) -> ApiError | None:
    """What a client is told of an error that has a meaning; None: it has none."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineRefusalError | UserError):
        return ApiError(400, str(error), code="refused")
    if isinstance(error, EngineLostError):
        return unavailable(str(error) or "the engine was lost", "engine_lost")
    return None


def validation_error(error: ValidationError) -> ApiError:
    """The first thing that is wrong, in a line."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    problem = first["msg"].removeprefix("Value error, ")
    message = f"{param}: {problem}" if param else problem
    return ApiError(400, message, param, "invalid_value")
