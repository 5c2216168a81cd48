"""/v1/contexts: texts that are read once and asked by name."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from star_attention.serve.answers import blocks_as_json
from star_attention.serve.api import ContextPatch, ContextRequest
from star_attention.serve.body import is_form, read_json, read_model, validate
from star_attention.serve.context_files import context_text, read_context_form
from star_attention.serve.contexts import Context, Contexts
from star_attention.serve.documents import request_schema
from star_attention.serve.exchange import Answered, EventStream
from star_attention.serve.front import Front


def context_routes(front: Front, contexts: Contexts) -> APIRouter:
    router = APIRouter(prefix="/v1/contexts")

    async def changes(asked: ContextRequest, files: list[dict[str, Any]]) -> AsyncIterator[Context]:
        """A new context, each time that its reading got on."""
        front.ready()
        contexts.check_new(asked.name)
        with front.admission.enter():
            texts = [part.text for message in asked.messages or () for part in message.content]
            texts.append(asked.text or "")
            text = await front.tokenise(texts, context_text, front, asked, files)
            context = contexts.add(
                asked.name,
                text.token_ids,
                text.bytes,
                text.files,
                asked.pinned,
                asked.ttl_seconds,
            )
            async with aclosing(contexts.changes(context)) as states:
                async for state in states:
                    yield state

    async def whole(asked: ContextRequest, files: list[dict[str, Any]]) -> dict[str, Any]:
        async with aclosing(changes(asked, files)) as states:
            context = [state async for state in states][-1]
        return context.as_json()

    async def stream(
        asked: ContextRequest, files: list[dict[str, Any]]
    ) -> AsyncGenerator[dict[str, Any], None]:
        context = None
        async with aclosing(changes(asked, files)) as states:
            async for context in states:
                yield {
                    "object": "context.progress",
                    "id": context.name,
                    "blocks": blocks_as_json(context.opened.blocks) if context.opened else [],
                    "done": list(context.done),
                }
        yield context.as_json()

    @router.post("", openapi_extra=request_schema(ContextRequest), status_code=201)
    async def create(request: Request) -> Response:
        """Reads a text: JSON, or multipart/form-data with `files`. With `stream`, server-sent
        events tell how far it is."""
        front.admission.check()  # before a body is read for nothing
        files: list[dict[str, Any]] = []
        if is_form(request):
            asked, files = await read_context_form(request, front)
        else:
            asked = await front.in_thread(validate, ContextRequest, await read_json(request, front))
        front.check_model(asked.model)
        if asked.stream:
            return EventStream(front, lambda: stream(asked, files))
        return Answered(front, lambda: whole(asked, files), 201)

    @router.get("")
    async def list_all() -> Response:
        """All contexts, in the order in which they were made."""
        data = [context.as_json() for context in contexts]
        return JSONResponse({"object": "list", "data": data})

    @router.get("/{name}")
    async def get(name: str) -> Response:
        """One context."""
        return JSONResponse(contexts.get(name).as_json())

    @router.patch("/{name}", openapi_extra=request_schema(ContextPatch))
    async def change(name: str, request: Request) -> Response:
        """Pins or unpins it, and sets its time to live, which begins anew."""
        contexts.get(name)
        patch = await read_model(request, front, ContextPatch)
        context = contexts.get(name)  # it may be gone, as the body took its time
        await contexts.change(context, patch)
        return JSONResponse(context.as_json())

    @router.delete("/{name}")
    async def delete(name: str) -> Response:
        """Forgets it. What is being answered over it is answered to its end."""
        await contexts.remove(contexts.get(name))
        return JSONResponse({"id": name, "object": "context", "deleted": True})

    return router
