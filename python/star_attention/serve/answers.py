"""Runs questions on the engine and turns their tokens into text."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from star_attention.models.tokenizer import TextStream
from star_attention.runtime.requests import FinishReason
from star_attention.runtime.sampling import SamplingParams, TokenLogprobs
from star_attention.serve.engine import EngineLostError
from star_attention.serve.front import Front
from star_attention.serve.messages import BlockPlace, NewToken, Opened, Progress
from star_attention.serve.metrics import AnswerTimes, done_at_first
from star_attention.serve.prompts import Prompt

# Events of a request that wait for a client who reads slowly; the engine's generators wait then.
_WAITING_EVENTS = 64


@dataclass(frozen=True)
class Reading:
    """How far the context of an answer is read, 0 to 1 for each block; the first of an answer
    says how its context is divided."""

    choice: int
    opened: Opened
    done: tuple[float, ...]
    is_first: bool = False

    def as_json(self) -> dict[str, Any]:
        return {"blocks": blocks_as_json(self.opened.blocks), "done": list(self.done)}


@dataclass(frozen=True)
class AnswerToken:
    token: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class Piece:
    """What an answer grew by. Its text may be empty while a character is incomplete.

    Attributes:
        tokens: those that are part of the answer, which the model's end token is not.
        count: all tokens.
    """

    choice: int
    text: str
    tokens: tuple[AnswerToken, ...]
    finish_reason: FinishReason | None
    count: int = 1

    def __add__(self, later: Piece) -> Piece:
        return Piece(
            self.choice,
            self.text + later.text,
            self.tokens + later.tokens,
            later.finish_reason,
            self.count + later.count,
        )


@dataclass
class Usage:
    """Tokens of a request; what several answers share counts once."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Answers:
    """The answers to one request: `n` to each prompt; choice `i` is of prompt `i // n`.

    Args:
        params: without stop strings, which are found in the text, here.
    """

    def __init__(
        self,
        front: Front,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        n: int,
        stop: Sequence[str] = (),
    ) -> None:
        self._front = front
        self._prompts = prompts
        self._params = params
        self._n = n
        self._stop = stop
        self._start = time.monotonic()
        self._cached: dict[int, int] = {}
        self.usage = Usage(prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts))

    async def events(self) -> AsyncGenerator[Reading | Piece, None]:
        """Of all answers, as they come. Closing it ends them all.

        Raises:
            EngineRefusalError, EngineLostError
        """
        metrics, events = self._front.metrics, asyncio.Queue(_WAITING_EVENTS)
        left = len(self._prompts) * self._n
        pumps = [asyncio.create_task(self._pump(choice, events)) for choice in range(left)]
        try:
            while left:
                for event in _joined([await events.get(), *_waiting(events)]):
                    if isinstance(event, BaseException):
                        raise event
                    self._count(event)
                    if isinstance(event, Piece) and event.finish_reason:
                        left -= 1
                    yield event
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            metrics.prompt_tokens.inc(self.usage.prompt_tokens)
            metrics.cached_prompt_tokens.inc(self.usage.cached_tokens)

    def _count(self, event: Reading | Piece) -> None:
        if isinstance(event, Piece):
            self.usage.completion_tokens += event.count
        elif event.choice % self._n == 0:  # it is opened anew if a cached block is damaged
            self._cached[event.choice] = event.opened.cached_tokens
            self.usage.cached_tokens = sum(self._cached.values())

    async def _pump(self, choice: int, events: asyncio.Queue) -> None:
        try:
            async with contextlib.aclosing(self._answer(choice)) as answer:
                async for event in answer:
                    await events.put(event)
        except Exception as error:
            await events.put(error)

    async def _answer(self, choice: int) -> AsyncGenerator[Reading | Piece, None]:
        prompt = self._prompts[choice // self._n]
        params = replace(self._params, seed=self._params.seed + choice % self._n)
        text = TextStream(self._front.tokenizer, self._stop)
        times, opened = AnswerTimes(self._front.metrics, self._start), None
        generator = self._front.engine.generate(prompt.token_ids, prompt.border, params)
        try:
            async with contextlib.aclosing(generator) as tokens:
                async for event in tokens:
                    if isinstance(event, Opened):
                        is_first, opened = opened is None, event
                        if is_first:
                            times.opened(event)
                        yield Reading(choice, event, done_at_first(event), is_first)
                    elif isinstance(event, Progress):
                        times.progress(opened, event)
                        yield Reading(choice, opened, event.done)
                    else:
                        times.token()
                        piece = _piece(choice, event, text)
                        if piece.finish_reason:
                            times.finished(piece.finish_reason)
                        yield piece
                        if piece.finish_reason:
                            return
        finally:
            times.close()
        raise EngineLostError("the engine gave up an answer")


def _waiting(events: asyncio.Queue) -> list[Any]:
    return [events.get_nowait() for _ in range(events.qsize())]


def _joined(events: Sequence[Any]) -> list[Any]:
    """Pieces of one answer that follow one another become one: who lags behind says more at a
    time, and so catches up."""
    joined: list[Any] = []
    for event in events:
        last = joined[-1] if joined else None
        pieces = isinstance(event, Piece) and isinstance(last, Piece)
        if pieces and event.choice == last.choice:
            joined[-1] = last + event
        else:
            joined.append(event)
    return joined


def _piece(choice: int, new: NewToken, text: TextStream) -> Piece:
    if new.finish_reason == "stop":
        return Piece(choice, text.finish(), (), "stop")
    tokens = (AnswerToken(new.token, new.logprobs),)
    grown = text.add(new.token)
    if text.stopped:
        return Piece(choice, grown, tokens, "stop")
    if new.finish_reason:
        grown += text.finish()
    return Piece(choice, grown, tokens, new.finish_reason)


def blocks_as_json(blocks: Sequence[BlockPlace]) -> list[dict[str, Any]]:
    return [
        {
            "start": block.start,
            "end": block.end,
            "rank": block.rank,
            "source": block.source,
            "anchor": block.anchor,
        }
        for block in blocks
    ]
