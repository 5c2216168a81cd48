"""What chat and completions have in common: prompts that are answered."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import Request

from star_attention.serve.answers import Answers, Piece, Reading
from star_attention.serve.api import ChatRequest, CompletionRequest, refuse_unsupported
from star_attention.serve.body import read_json, validate
from star_attention.serve.exchange import KEEP_ALIVE, Pulse
from star_attention.serve.front import Front
from star_attention.serve.prompts import Prompt

Asked = TypeVar("Asked", ChatRequest, CompletionRequest)


async def read_asked(
    request: Request, front: Front, kind: type[Asked], unsupported: Mapping[str, tuple[Any, ...]]
) -> Asked:
    """A request's body.

    Raises:
        ApiError: it is not right, asks for another model, or too many wait already.
    """
    front.admission.check()  # before a body is read for nothing
    body = await read_json(request, front)
    refuse_unsupported(body, unsupported)
    asked = await front.in_thread(validate, kind, body)
    front.check_model(asked.model)
    return asked


@asynccontextmanager
async def answering(
    front: Front,
    asked: ChatRequest | CompletionRequest,
    texts: Sequence[Sequence[str]],
    make_prompts: Callable[[], Sequence[Prompt]],
    wanted_tokens: int | None,
    logprobs: int | None,
    log: dict[str, Any],
) -> AsyncIterator[tuple[Answers, AsyncIterator[Reading | Piece]]]:
    """Admits a request, makes its prompts in a thread, and answers them.

    Args:
        texts: of each prompt, none where it is tokens.

    Raises:
        ApiError, UserError, EngineRefusalError, EngineLostError
    """
    front.ready()
    with front.admission.enter(len(texts) * asked.answers):
        every = [text for prompt in texts for text in prompt]
        prompts = await front.tokenise(every, _checked_prompts, front, texts, make_prompts)
        lengths = []
        for prompt in prompts:
            front.check_context_length(prompt.border)
            lengths.append(front.answer_tokens(len(prompt.token_ids), wanted_tokens))
        params = asked.sampling(min(lengths), secrets.randbits(62), logprobs)
        answers = Answers(front, prompts, params, asked.answers, asked.stop)
        try:
            async with aclosing(answers.events()) as events:
                yield answers, events
        finally:
            usage = answers.usage
            log |= {
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "completion_tokens": usage.completion_tokens,
            }


def _checked_prompts(
    front: Front, texts: Sequence[Sequence[str]], make_prompts: Callable[[], Sequence[Prompt]]
) -> Sequence[Prompt]:
    for each in texts:
        front.check_text(*each)
    return make_prompts()


class ChunkMaker:
    """Makes the objects of one response, streamed or whole."""

    def __init__(self, front: Front, kind: str, prefix: str, usage_wanted: bool = False) -> None:
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": front.options.model_names[0],
        }
        self._usage_wanted = usage_wanted

    def choices(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        if self._usage_wanted:
            more.setdefault("usage", None)
        return {**self._head, "choices": choices, **more}


class ReadingChunks:
    """What a stream says while the context is read: how far it is, or signs of life."""

    def __init__(self, chunks: ChunkMaker, include_progress: bool) -> None:
        self._chunks = chunks
        self._include_progress = include_progress
        self._pulse = Pulse()

    def of(self, reading: Reading) -> dict[str, Any] | None:
        """None: nothing now."""
        if reading.choice == 0 and self._include_progress:
            return self._chunks.choices([], star_attention=reading.as_json())
        return dict(KEEP_ALIVE) if self._pulse.is_due() else None
