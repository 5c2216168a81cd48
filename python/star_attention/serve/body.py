"""Bodies of requests: counted while they come, and read as JSON that is not too deep."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request

from star_attention.serve.errors import ApiError, validation_error
from star_attention.serve.front import Front

MAX_DEPTH = 32
# Of a body that is too large, so much is still taken, so that the client gets to read why.
_DISCARDED = 64 << 20
_DISCARD_SECONDS = 2.0

Model = TypeVar("Model", bound=BaseModel)


def parse_json(data: bytes) -> Any:
    """Raises ApiError 400. Lone surrogates, NaN and infinities are not JSON here."""
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise ApiError(400, f"the body is nested deeper than {MAX_DEPTH} levels", code="invalid_json")


async def read_json(request: Request, front: Front) -> Any:
    """The body of a request as JSON.

    Raises:
        ApiError: 400, 408, 413, 415.
    """
    kind = _content_type(request)
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"Content-Type is {kind!r}: use application/json")
    async with _counted(request, front) as counted:
        data = await counted.body()
        return await front.in_thread(parse_json, data)


async def read_model(request: Request, front: Front, model: type[Model]) -> Model:
    return await front.in_thread(validate, model, await read_json(request, front))


def validate(model: type[Model], value: Any) -> Model:
    """Raises ApiError 400."""
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise validation_error(error) from None


@asynccontextmanager
async def read_form(
    request: Request, front: Front, max_files: int, max_fields: int
) -> AsyncIterator[FormData]:
    """A multipart body; its files live as long as the block.

    Raises:
        ApiError: 400, 408, 413, 415.
    """
    async with _counted(request, front) as counted:
        try:
            async with counted.form(
                max_files=max_files,
                max_fields=max_fields,
                max_part_size=front.options.max_body_bytes,
            ) as form:
                yield form
        except HTTPException as error:
            raise ApiError(error.status_code, str(error.detail), code="invalid_form") from None


def is_form(request: Request) -> bool:
    return _content_type(request) == "multipart/form-data"


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


@asynccontextmanager
async def _counted(request: Request, front: Front) -> AsyncIterator[Request]:
    """The request, with a body that has a limit and a time."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise ApiError(415, f"Content-Encoding {encoding!r} is not read: send the body as it is")
    limit, received = front.options.max_body_bytes, 0
    until = time.monotonic() + front.options.body_timeout

    async def too_large() -> ApiError:
        with anyio.move_on_after(_DISCARD_SECONDS):
            left = _DISCARDED
            while left > 0:
                message = await request.receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body"):
                    break
        return ApiError(
            413,
            f"the body has more than {limit} bytes, which is what the server takes",
            code="body_too_large",
            headers={"Connection": "close"},
        )

    with front.body_room.enter() as share:

        async def receive() -> Any:
            nonlocal received
            try:
                with anyio.fail_after(max(0.0, until - time.monotonic())):
                    message = await request.receive()
            except TimeoutError:
                raise ApiError(
                    408,
                    f"the body did not arrive within {front.options.body_timeout:g} seconds",
                    code="body_timeout",
                    headers={"Connection": "close"},
                ) from None
            size = len(message.get("body", b""))
            received += size
            if received > limit:
                raise await too_large()
            share.take(size)
            return message

        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limit:
            raise await too_large()
        yield Request(request.scope, receive)
