"""A server that speaks the page's part of the API over an engine that does not exist.

It reads at a fixed pace and answers with words about the question. Tests change its knobs while it
runs. Questions with "fail" are refused, with "break" end in the middle with an error, with "long"
are answered until the client goes.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles

import star_attention.serve

PAGE = Path(star_attention.serve.__file__).parent / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'"
)


@dataclass
class Knobs:
    """What a test may change.

    Attributes:
        unwell: why /health says 503, if it does.
        refusal: why contexts and questions are refused, if they are.
        steps, pause: events of a reading context, and seconds between them.
        sources: of blocks, in turn.
        gate: while it is cleared, reading stands still.
        answers: a question's answer, instead of words about it.
    """

    model: str = "Llama-3.1-8B-Instruct"
    api_key: str | None = None
    unwell: str | None = None
    refusal: str | None = None
    steps: int = 8
    pause: float = 0.02
    block_size: int = 1024
    ranks: int = 4
    tokens: int | None = None
    sources: tuple[str, ...] = ("new",)
    gate: threading.Event = field(default_factory=threading.Event)
    answers: dict[str, str] = field(default_factory=dict)
    contexts: dict[str, dict] = field(default_factory=dict)
    asked: list[dict] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)


def create_app(knobs: Knobs) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def guard(request: Request, call_next):
        needed = knobs.api_key and request.url.path.startswith("/v1/")
        if needed and request.headers.get("authorization") != f"Bearer {knobs.api_key}":
            return problem(401, "This server needs an API key.")
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    @app.get("/health")
    def health():
        return problem(503, knobs.unwell) if knobs.unwell else {"status": "ready"}

    @app.get("/v1/models")
    def models():
        return {"object": "list", "data": [{"id": knobs.model, "object": "model"}]}

    @app.get("/v1/contexts")
    def listed():
        return {"object": "list", "data": list(knobs.contexts.values())}

    @app.post("/v1/contexts")
    async def add(request: Request):
        form = await request.form()
        texts = [(file.filename, (await file.read()).decode()) for file in form.getlist("files")]
        if knobs.refusal:
            return problem(400, knobs.refusal)
        context = new_context(knobs, texts, form.get("name"), form.get("pinned") == "true")
        return StreamingResponse(reading(knobs, context), media_type="text/event-stream")

    @app.patch("/v1/contexts/{key}")
    async def pin(key: str, request: Request):
        if key not in knobs.contexts:
            return problem(404, f"There is no context {key}.")
        context = knobs.contexts[key]
        context["pinned"] = (await request.json())["pinned"]
        context["expires_at"] = None if context["pinned"] else time.time() + 3600
        return context

    @app.delete("/v1/contexts/{key}")
    def remove(key: str):
        if knobs.contexts.pop(key, None) is None:
            return problem(404, f"There is no context {key}.")
        return {"id": key, "deleted": True}

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        body = await request.json()
        question = body["messages"][-1]["content"]
        knobs.asked.append(body)
        if body["context"] not in knobs.contexts:
            return problem(404, f"There is no context {body['context']}.")
        if "fail" in question:
            return problem(400, f"This cannot be answered: {question}")
        events = answering(knobs, body, question)
        return StreamingResponse(events, media_type="text/event-stream")

    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


def problem(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "server"}}, status)


def new_context(knobs: Knobs, texts, name, pinned) -> dict:
    size = knobs.block_size
    tokens = knobs.tokens or max(1, sum(len(text) for _, text in texts) // 4)
    starts = range(0, tokens, size)
    per_rank = -(-len(starts) // knobs.ranks)
    now = time.time()
    return {
        "object": "context",
        "id": f"ctx-{abs(hash(str(texts))):x}",
        "name": name or ", ".join(file for file, _ in texts),
        "tokens": tokens,
        "bytes": sum(len(text) for _, text in texts),
        "files": [{"name": file, "bytes": len(text)} for file, text in texts],
        "status": "ready",
        "pinned": pinned,
        "ttl_seconds": 3600,
        "expires_at": None if pinned else now + 3600,
        "blocks": [
            {
                "start": start,
                "end": min(start + size, tokens),
                "rank": i // per_rank,
                "source": knobs.sources[i % len(knobs.sources)],
            }
            for i, start in enumerate(starts)
        ],
        "questions": 0,
        "last_used": now,
        "created": now,
    }


def event(data: dict) -> str:
    return f"data: {json.dumps(data)}\n\n"


async def reading(knobs: Knobs, context: dict):
    blocks, head = context["blocks"], {"object": "context.progress", "id": context["id"]}
    paces = [1 + 0.35 * (i % 3) for i in range(len(blocks))]
    try:
        for step in range(knobs.steps):
            share = step / knobs.steps
            done = [
                1.0 if block["source"] != "new" else min(1.0, share * pace)
                for block, pace in zip(blocks, paces, strict=True)
            ]
            yield event({**head, "blocks": blocks, "done": done})
            await asyncio.sleep(knobs.pause)
            while step == knobs.steps // 2 and not knobs.gate.is_set():
                await asyncio.sleep(0.02)
        yield event({**head, "blocks": blocks, "done": [1.0] * len(blocks)})
        knobs.contexts[context["id"]] = context
        yield event(context)
    except asyncio.CancelledError:
        knobs.cancelled.append(context["id"])
        raise


async def answering(knobs: Knobs, body: dict, question: str):
    context = knobs.contexts[body["context"]]
    context["questions"] += 1
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": body["model"]}

    def chunk(text="", finish=None):
        delta = {"content": text} if text else {}
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return event({**head, "choices": [choice]})

    yield event({**head, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    answer = knobs.answers.get(question, f"You asked “{question}”: naïve 🙂 {len(question)}.")
    words = answer.split(" ") if "long" not in question else ["on"] * 10000
    limit = body.get("max_tokens") or len(words)
    try:
        for i, word in enumerate(words[:limit]):
            await asyncio.sleep(knobs.pause)
            if "break" in question and i == 2:
                yield event({"error": {"message": f"A rank was lost: {question}"}})
                return
            yield chunk(word if i == 0 else f" {word}")
    except asyncio.CancelledError:
        knobs.cancelled.append(question)
        raise
    yield chunk(finish="stop" if limit >= len(words) else "length")
    usage = {
        "prompt_tokens": context["tokens"] + 20 * len(body["messages"]),
        "completion_tokens": min(limit, len(words)),
        "prompt_tokens_details": {"cached_tokens": context["tokens"]},
    }
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    yield event({**head, "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


@contextmanager
def running(knobs: Knobs) -> Iterator[str]:
    """Its address, while it serves."""
    knobs.gate.set()
    config = uvicorn.Config(create_app(knobs), port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.force_exit = server.should_exit = True
        thread.join()
