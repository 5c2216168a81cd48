"""What all endpoints share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from star_attention.models.apart import end_all
from star_attention.models.tokenizer import Tokenizer
from star_attention.serve.engine import SHUTTING_DOWN, Engine
from star_attention.serve.errors import ApiError, unavailable
from star_attention.serve.limits import Admission, BodyRoom
from star_attention.serve.messages import Ready
from star_attention.serve.metrics import Metrics
from star_attention.serve.options import ServeOptions

_THREADS = 4
# Long texts are tokenised in threads of their own, which hold short ones up no more.
_LONG_THREADS = 2
_LONG = 1 << 18  # characters
# Bodies that may be on their way at once, each as large as allowed.
_BODIES = 8

Result = TypeVar("Result")


class Front:
    """The engine, the tokenizer, and what is counted.

    Attributes:
        draining: new requests are refused, those in flight end.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, options: ServeOptions) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.options = options
        self.admission = Admission(options.max_queue)
        self.body_room = BodyRoom(_BODIES * options.max_body_bytes)
        self.metrics = Metrics(engine)
        self.draining = False
        self._threads = ThreadPoolExecutor(_THREADS, "front")
        self._long_threads = ThreadPoolExecutor(_LONG_THREADS, "front-long")

    async def in_thread(self, function: Callable[..., Result], *args: object) -> Result:
        """What would hold the event loop up: parsing, tokenising, files."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def tokenise(
        self, texts: Sequence[str], function: Callable[..., Result], *args: object
    ) -> Result:
        """What a function that tokenises these texts gives, in a thread."""
        threads = self._long_threads if sum(map(len, texts)) >= _LONG else self._threads
        return await asyncio.get_running_loop().run_in_executor(threads, function, *args)

    def ready(self) -> Ready:
        """The model that answers. Raises ApiError 503 if none does now."""
        if self.draining:
            raise unavailable(SHUTTING_DOWN, "draining")
        if self.engine.state != "ready" or self.engine.model is None:
            reason = f": {self.engine.reason}" if self.engine.reason else ""
            raise unavailable(f"the engine is {self.engine.state}{reason}", self.engine.state)
        return self.engine.model

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404."""
        if name is not None and name not in self.options.model_names:
            known = ", ".join(self.options.model_names)
            raise ApiError(
                404,
                f"the model {name[:100]!r} is not served here: use {known}",
                "model",
                "model_not_found",
            )

    def check_context_length(self, tokens: int) -> None:
        """Raises ApiError 400 if a context is longer than the server takes."""
        limit = self.options.max_context_tokens
        if limit is not None and tokens > limit:
            raise ApiError(
                400,
                f"the context has {tokens} tokens, the server takes {limit}",
                "messages",
                "context_length_exceeded",
            )

    def check_text(self, *texts: str, is_context: bool = False) -> None:
        """Raises ApiError 400 if texts that are one prompt, or a context, cannot but be too long,
        which is known before they are tokenised."""
        model = self.ready()
        limit = min(model.max_tokens, model.kv_tokens or model.max_tokens)
        if is_context:
            limit = min(limit, self.options.max_context_tokens or limit)
        if sum(map(len, texts)) <= limit:
            return
        least = sum(map(self.tokenizer.least_tokens, texts))
        if least > limit:
            kind = "context" if is_context else "prompt"
            raise ApiError(
                400,
                f"the {kind} has at least {least} tokens, the server takes {limit}",
                "messages",
                "context_length_exceeded",
            )

    def answer_tokens(self, prompt_tokens: int, wanted: int | None) -> int:
        """How long an answer may get. Raises ApiError 400 if it does not fit."""
        limit = self.ready().max_tokens
        room = limit - prompt_tokens
        if room < 1 or (wanted or 1) > room:
            answer = f" and an answer of {wanted}" if wanted else ""
            raise ApiError(
                400,
                f"the prompt has {prompt_tokens} tokens{answer}: prompt and answer may have "
                f"{limit} tokens together",
                "messages" if room < 1 else "max_tokens",
                "context_length_exceeded",
            )
        return wanted or min(room, self.options.max_tokens)

    def close(self) -> None:
        for threads in (self._threads, self._long_threads):
            threads.shutdown(wait=False, cancel_futures=True)
        end_all()
