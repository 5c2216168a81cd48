"""An engine without a model, for tests of the front: its answers say what they answer."""

import asyncio
import hashlib
import random

from star_attention.runtime.sampling import TokenLogprobs
from star_attention.serve.engine import EngineLostError, EngineRefusalError
from star_attention.serve.messages import (
    BlockPlace,
    NewToken,
    Opened,
    Progress,
    ReadDone,
    Ready,
    Statistics,
)


def spelled(token_ids, seed=0):
    """The answer to these tokens, context and question together."""
    digest = hashlib.sha256(bytes(str([int(token) for token in token_ids]), "ascii")).hexdigest()
    return f"{digest[:16]} seed {seed}, that is all"


class FakeEngine:
    """Attributes:
    asked: (token_ids, border, params) of all questions.
    open: generators that are not closed.
    held: contexts that are kept.
    steps: seconds between events.
    refuses: a reason to refuse everything.
    """

    def __init__(self, tokenizer, *, max_tokens=4096, block=64, step=0.0, state="ready"):
        self._tokenizer = tokenizer
        self.state, self.reason, self.restarts = state, "", 0
        self.model = Ready("cpu", "float32", 2, max_tokens, None, 16, 1024)
        self.block, self.step, self.refuses = block, step, None
        self.asked, self.cached, self.held = [], set(), []
        self.open = self.most_open = 0
        self._alive = asyncio.Event()

    @property
    def statistics(self):
        blocks, size = {"gpu": len(self.cached), "host": 0, "disk": 0}, self.model.page_bytes
        return Statistics(self.open, 0, 1, 4, blocks, {"gpu": len(self.cached) * size})

    async def start(self):
        pass

    async def stop(self, timeout):
        self.state = "lost"

    def lose(self, reason="a rank was lost"):
        """Everything in flight ends."""
        self.state, self.reason = "starting", reason
        self.cached.clear()
        self._alive.set()

    def restart(self):
        self.state, self.reason = "ready", ""
        self.restarts += 1
        self._alive = asyncio.Event()

    async def generate(self, token_ids, border, params):
        assert 1 <= border < len(token_ids)
        self.asked.append((token_ids, border, params))
        self._check(token_ids)
        with self._opened():
            async for event in self._read(token_ids[:border]):
                yield event
            text = spelled(token_ids, params.seed)
            tokens = self._tokenizer.text_tokens(text)
            tokens = tokens[len(self._tokenizer.text_tokens("")) :].tolist()
            (end,) = self._tokenizer.eos_token_ids
            for index, token in enumerate([*tokens, end]):
                await self._pause()
                reason = "stop" if token == end else None
                if index + 1 == params.max_tokens:
                    reason = reason or "length"
                logprobs = None
                if params.logprobs is not None:
                    top = ((token, -0.25), (0, float("-inf")), (1, -2.0))
                    logprobs = TokenLogprobs(-0.25, top[: params.logprobs])
                yield NewToken(1, token, reason, logprobs)
                if reason:
                    return

    async def read(self, token_ids, keep=False):
        self._check(token_ids)
        with self._opened():
            async for event in self._read(token_ids):
                yield event
            if keep:
                self.held.append(token_ids)
            try:
                yield ReadDone(1)
                if keep:
                    await self._alive.wait()
                    raise EngineLostError(self.reason)
            finally:
                if keep:
                    self.held = [each for each in self.held if each is not token_ids]

    async def _read(self, token_ids):
        blocks, keys = [], []
        for start in range(0, len(token_ids), self.block):
            end = min(start + self.block, len(token_ids))
            keys.append((start, token_ids[: self.block].tobytes(), token_ids[start:end].tobytes()))
            source = "gpu" if keys[-1] in self.cached else "new"
            rank, anchor = (start // self.block) % 2, self.block if start else 0
            blocks.append(BlockPlace(start, end, rank, source, anchor))
        await self._pause()
        yield Opened(1, tuple(blocks))
        done = [float(block.source != "new") for block in blocks]
        for index, key in enumerate(keys):
            if not done[index]:
                await self._pause()
                done[index] = 1.0
                self.cached.add(key)
                yield Progress(1, tuple(done))

    def _check(self, token_ids):
        if self.state != "ready":
            raise EngineLostError(self.reason or self.state)
        if self.refuses:
            raise EngineRefusalError(self.refuses)
        if len(token_ids) > self.model.max_tokens:
            raise EngineRefusalError("too long")

    async def _pause(self):
        alive = self._alive
        await asyncio.sleep(self.step * random.random() * 2)
        if alive.is_set() or self.state != "ready":
            raise EngineLostError(self.reason)

    def _opened(self):
        return _Open(self)


class _Open:
    def __init__(self, engine):
        self._engine = engine

    def __enter__(self):
        self._engine.open += 1
        self._engine.most_open = max(self._engine.most_open, self._engine.open)

    def __exit__(self, *_):
        self._engine.open -= 1
