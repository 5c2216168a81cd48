"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from star_attention.models.tokenizer import Tokenizer
from star_attention.runtime.sampling import finite
from star_attention.serve.answers import AnswerToken, Piece, Reading
from star_attention.serve.api import CHAT_UNSUPPORTED, ChatRequest
from star_attention.serve.asking import ChunkMaker, ReadingChunks, answering, read_asked
from star_attention.serve.contexts import Contexts
from star_attention.serve.documents import request_schema
from star_attention.serve.exchange import Answered, EventStream
from star_attention.serve.front import Front
from star_attention.serve.prompts import Prompt, chat_behind_context, chat_prompt


def chat_routes(front: Front, contexts: Contexts) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=request_schema(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Answers a conversation."""
        asked = await read_asked(request, front, ChatRequest, CHAT_UNSUPPORTED)
        log = request.scope["log"]
        if asked.stream:
            return EventStream(front, lambda: _stream(front, contexts, asked, log))
        return Answered(front, lambda: _whole(front, contexts, asked, log))

    return router


def _asking(front: Front, contexts: Contexts, asked: ChatRequest, log: dict[str, Any]):
    def prompts(context: np.ndarray | None) -> list[Prompt]:
        tokenizer, block = front.tokenizer, front.options.block_tokens
        if context is None:
            return [chat_prompt(tokenizer, asked.messages, block)]
        return [chat_behind_context(tokenizer, context, asked.messages, block)]

    def answer(context: np.ndarray | None):
        return answering(
            front,
            asked,
            [[part.text.strip() for message in asked.messages for part in message.content]],
            lambda: prompts(context),
            asked.wanted_tokens,
            asked.wanted_logprobs,
            log,
        )

    return contexts.asked(asked.context, answer)


async def _whole(
    front: Front, contexts: Contexts, asked: ChatRequest, log: dict[str, Any]
) -> dict[str, Any]:
    texts = [""] * asked.answers
    tokens: list[list[AnswerToken]] = [[] for _ in texts]
    reasons = [""] * asked.answers
    async with _asking(front, contexts, asked, log) as (answers, events):
        async for event in events:
            if isinstance(event, Piece):
                texts[event.choice] += event.text
                reasons[event.choice] = event.finish_reason or ""
                tokens[event.choice] += event.tokens
        usage = answers.usage.as_json()
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": texts[index]},
            "logprobs": _logprobs(front.tokenizer, asked, tokens[index]),
            "finish_reason": reasons[index],
        }
        for index in range(asked.answers)
    ]
    return ChunkMaker(front, "chat.completion", "chatcmpl").choices(choices, usage=usage)


async def _stream(
    front: Front, contexts: Contexts, asked: ChatRequest, log: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    chunks = ChunkMaker(front, "chat.completion.chunk", "chatcmpl", asked.include_usage)
    readings = ReadingChunks(chunks, asked.include_progress)
    async with _asking(front, contexts, asked, log) as (answers, events):
        async for event in events:
            if isinstance(event, Reading):
                if event.is_first:
                    delta = {"role": "assistant", "content": ""}
                    yield chunks.choices([_choice(event.choice, delta, None, None)])
                if (chunk := readings.of(event)) is not None:
                    yield chunk
            elif event.text or event.finish_reason or (asked.logprobs and event.tokens):
                logprobs = _logprobs(front.tokenizer, asked, event.tokens)
                delta = {"content": event.text} if event.text or event.tokens else {}
                choice = _choice(event.choice, delta, logprobs, event.finish_reason)
                yield chunks.choices([choice])
        if asked.include_usage:
            yield chunks.choices([], usage=answers.usage.as_json())


def _choice(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(
    tokenizer: Tokenizer, asked: ChatRequest, tokens: Sequence[AnswerToken]
) -> dict[str, Any] | None:
    if not asked.logprobs:
        return None

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token),
            "logprob": finite(logprob),
            "bytes": list(tokenizer.token_bytes(token)),
        }

    return {
        "content": [
            {
                **entry(each.token, each.logprobs.token),
                "top_logprobs": [entry(*top) for top in each.logprobs.top],
            }
            for each in tokens
            if each.logprobs is not None
        ]
    }
