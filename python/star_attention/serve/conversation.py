"""One conversation over some texts, for a front that is no server."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from star_attention.errors import UserError
from star_attention.runtime.sampling import SamplingParams
from star_attention.serve.answers import Answers, Piece, Reading, Usage
from star_attention.serve.api import ChatMessage
from star_attention.serve.errors import ApiError
from star_attention.serve.front import Front
from star_attention.serve.messages import Opened, ReadDone
from star_attention.serve.metrics import done_at_first, share_read
from star_attention.serve.prompts import Prompt, chat_behind_context, chat_context, chat_prompt


class File(NamedTuple):
    name: str
    text: str


@dataclass
class Turn:
    """What the last answer took, in seconds and tokens.

    Attributes:
        first: until its first token; None: there was none.
    """

    usage: Usage
    first: float | None = None
    seconds: float = 0.0


class Conversation:
    """Files, and the turns behind them. What is context and what is question, and what is found in
    the cache, is as the server does it: the files are a named context.

    Attributes:
        opened: how the context of the last question, or the files, is divided, and where it was;
            None: nothing is read.
        last: what the last answer took; None: there was none.
    """

    def __init__(
        self,
        front: Front,
        params: SamplingParams,
        files: Sequence[File] = (),
        system: str | None = None,
    ) -> None:
        self._front, self._params = front, params
        self.files = tuple(files)
        self.opened: Opened | None = None
        self.last: Turn | None = None
        tokenizer = front.tokenizer
        self._first = [_message("system", system)] if system and not files else []
        self._turns: list[ChatMessage] = []
        self._context: np.ndarray | None = None
        if files:
            self._context = chat_context(
                tokenizer, system, [_message("user", *(file.text for file in files))]
            )

    @property
    def turns(self) -> int:
        """Questions that were answered."""
        return len(self._turns) // 2

    def file_tokens(self) -> list[int]:
        """Of each file, read alone."""
        opening = len(self._front.tokenizer.text_tokens(""))
        return [len(self._front.tokenizer.text_tokens(file.text)) - opening for file in self.files]

    def clear(self) -> None:
        """Forgets the turns; what was read of the files stays."""
        self._turns, self.last = [], None

    async def read(self) -> AsyncGenerator[float, None]:
        """Reads the files; the share that is done.

        Raises:
            EngineRefusalError, EngineLostError
        """
        async with aclosing(self._front.engine.read(self._context)) as events:
            async for event in events:
                if isinstance(event, Opened):
                    self.opened = event
                    yield share_read(event, done_at_first(event))
                elif not isinstance(event, ReadDone):
                    yield share_read(self.opened, event.done)

    async def ask(self, text: str) -> AsyncGenerator[str, None]:
        """The answer to one more question, as it comes. What there is of it is a turn of the
        conversation, also when the iterator is closed early.

        Raises:
            UserError: the question is not possible here.
            EngineRefusalError, EngineLostError
        """
        question, start = _message("user", text), time.monotonic()
        try:
            prompt = self._prompt([*self._turns, question])
            room = self._front.answer_tokens(len(prompt.token_ids), None)
        except ApiError as error:
            raise UserError(error.message) from None
        params = replace(self._params, max_tokens=room, stop=())
        answers = Answers(self._front, [prompt], params, 1, self._params.stop)
        self.last = turn = Turn(answers.usage)
        answer = ""
        try:
            async with aclosing(answers.events()) as events:
                async for event in events:
                    turn.seconds = time.monotonic() - start
                    if isinstance(event, Reading):
                        self.opened = event.opened
                    elif isinstance(event, Piece):
                        turn.first = turn.first or turn.seconds
                        answer += event.text
                        yield event.text
        finally:
            if answer.strip():
                self._turns += [question, _message("assistant", answer)]

    def _prompt(self, messages: Sequence[ChatMessage]) -> Prompt:
        tokenizer, block = self._front.tokenizer, self._front.options.block_tokens
        if self._context is None:
            return chat_prompt(tokenizer, [*self._first, *messages], block)
        return chat_behind_context(tokenizer, self._context, messages, block)


def _message(role: str, *texts: str) -> ChatMessage:
    return ChatMessage(role=role, content=[{"type": "text", "text": text} for text in texts])
