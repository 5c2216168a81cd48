"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from star_attention.models.tokenizer import Tokenizer
from star_attention.runtime.sampling import finite
from star_attention.serve.answers import AnswerToken, Piece, Reading
from star_attention.serve.api import COMPLETION_UNSUPPORTED, CompletionRequest
from star_attention.serve.asking import ChunkMaker, ReadingChunks, answering, read_asked
from star_attention.serve.contexts import Contexts
from star_attention.serve.documents import request_schema
from star_attention.serve.errors import ApiError
from star_attention.serve.exchange import Answered, EventStream
from star_attention.serve.front import Front
from star_attention.serve.prompts import Prompt, text_behind_context, text_prompt, token_prompt


def completion_routes(front: Front, contexts: Contexts) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", openapi_extra=request_schema(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continues texts."""
        asked = await read_asked(request, front, CompletionRequest, COMPLETION_UNSUPPORTED)
        if asked.context is not None and front.tokenizer.uses_chat:
            raise ApiError(
                400,
                "context is for /v1/chat/completions: the model has a chat template",
                "context",
                "unsupported_parameter",
            )
        log = request.scope["log"]
        if asked.stream:
            return EventStream(front, lambda: _stream(front, contexts, asked, log))
        return Answered(front, lambda: _whole(front, contexts, asked, log))

    return router


def _asking(front: Front, contexts: Contexts, asked: CompletionRequest, log: dict[str, Any]):
    def prompt_of(text: str | list[int], context: np.ndarray | None) -> Prompt:
        tokenizer, block = front.tokenizer, front.options.block_tokens
        if context is not None:
            if not isinstance(text, str):
                raise ApiError(400, "behind a context, prompt is a text", "prompt", "invalid_value")
            return text_behind_context(tokenizer, context, text, block)
        if isinstance(text, str):
            return text_prompt(tokenizer, text, block)
        return token_prompt(tokenizer, text, block)

    def answer(context: np.ndarray | None):
        return answering(
            front,
            asked,
            [[prompt] if isinstance(prompt, str) else [] for prompt in asked.prompt],
            lambda: [prompt_of(text, context) for text in asked.prompt],
            asked.max_tokens,
            asked.logprobs,
            log,
        )

    return contexts.asked(asked.context, answer)


@dataclass
class _Logprobs:
    """Of one choice's tokens, in OpenAI's four lists."""

    tokenizer: Tokenizer
    offset: int = 0
    tokens: list[AnswerToken] = field(default_factory=list)

    def take(self) -> dict[str, Any]:
        """Of the tokens that came since the last time."""
        texts, logprobs, tops, offsets = [], [], [], []
        for each in self.tokens:
            text = self.tokenizer.token_text(each.token)
            texts.append(text)
            offsets.append(self.offset)
            self.offset += len(text)
            if each.logprobs is None:
                logprobs.append(None)
                tops.append(None)
                continue
            logprobs.append(finite(each.logprobs.token))
            top = {self.tokenizer.token_text(token): finite(lp) for token, lp in each.logprobs.top}
            tops.append(top | {text: finite(each.logprobs.token)})
        self.tokens.clear()
        return {
            "tokens": texts,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        }


class _Choices:
    """What each choice has of log-probabilities, where they are wanted."""

    def __init__(self, front: Front, asked: CompletionRequest) -> None:
        count = len(asked.prompt) * asked.answers
        self._wanted = asked.logprobs is not None
        self._logprobs = [_Logprobs(front.tokenizer) for _ in range(count)]

    def add(self, piece: Piece) -> None:
        if self._wanted:
            self._logprobs[piece.choice].tokens += piece.tokens

    def choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        logprobs = self._logprobs[index].take() if self._wanted else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


async def _whole(
    front: Front, contexts: Contexts, asked: CompletionRequest, log: dict[str, Any]
) -> dict[str, Any]:
    choices = _Choices(front, asked)
    count = len(asked.prompt) * asked.answers
    texts, reasons = [""] * count, [""] * count
    async with _asking(front, contexts, asked, log) as (answers, events):
        async for event in events:
            if isinstance(event, Piece):
                choices.add(event)
                texts[event.choice] += event.text
                reasons[event.choice] = event.finish_reason or ""
        usage = answers.usage.as_json()
    return ChunkMaker(front, "text_completion", "cmpl").choices(
        [choices.choice(index, texts[index], reasons[index]) for index in range(count)],
        usage=usage,
    )


async def _stream(
    front: Front, contexts: Contexts, asked: CompletionRequest, log: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    chunks = ChunkMaker(front, "text_completion", "cmpl", asked.include_usage)
    readings = ReadingChunks(chunks, asked.include_progress)
    choices = _Choices(front, asked)
    async with _asking(front, contexts, asked, log) as (answers, events):
        async for event in events:
            if isinstance(event, Reading):
                if (chunk := readings.of(event)) is not None:
                    yield chunk
                continue
            choices.add(event)
            if event.text or event.finish_reason:
                choice = choices.choice(event.choice, event.text, event.finish_reason)
                yield chunks.choices([choice])
        if asked.include_usage:
            yield chunks.choices([], usage=answers.usage.as_json())
