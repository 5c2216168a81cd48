"""The server behind the page's tests: the real front over an engine without a model."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

from fake_engine import FakeEngine
from fake_tokenizer import ByteTokenizer
from serving import Running, serving
from star_attention.serve.engine import EngineLostError, EngineRefusalError
from star_attention.serve.messages import BlockPlace, NewToken, Opened, Progress

MODEL = "example-model"


class PageEngine(FakeEngine):
    """Reads at a pace, and answers with words about the question, a byte a token.

    Questions with "fail" are refused, with "break" end in the middle with an error, with "long" are
    answered until the client goes.

    Attributes:
        sources: of blocks, in turn.
        ranks: whose blocks they are, in runs.
        steps: in which contexts are read.
        gate: while it is cleared, reading stands still in the middle.
        answers: a question's answer, instead of words about it.
    """

    def __init__(self, tokenizer, **options):
        super().__init__(tokenizer, **{"max_tokens": 1 << 20, "block": 4096, **options})
        self.sources, self.ranks, self.steps = ("new",), 4, 8
        self.gate = threading.Event()
        self.gate.set()
        self.answers = {}

    async def generate(self, token_ids, border, params):
        self._check(token_ids)
        words = self._tokenizer.decode(token_ids[border:])
        question = words.rpartition("assistant")[0].strip()
        if "fail" in question:
            raise EngineRefusalError(f"This cannot be answered: {question}")
        with self._opened():
            yield Opened(1, self._blocks(border, ("gpu",)))
            answer = self.answers.get(question, f"You asked “{question}”: naïve 🙂.")
            tokens = list(answer.encode()) if "long" not in question else [*b"on "] * 10000
            for index, token in enumerate(tokens[: params.max_tokens]):
                await self._pause()
                if "break" in question and index == 9:
                    raise EngineLostError(f"A rank was lost: {question}")
                length = index + 1 == params.max_tokens
                yield NewToken(1, token, "length" if length else None)
            if len(tokens) < params.max_tokens:
                yield NewToken(1, self._tokenizer.eos_token_ids[0], "stop")

    async def _read(self, token_ids):
        blocks = self._blocks(len(token_ids), self.sources)
        await self._pause()
        yield Opened(1, blocks)
        for step in range(self.steps + 1):
            paces = [1 + 0.35 * (i % 3) for i in range(len(blocks))]
            share = step / self.steps
            yield Progress(
                1,
                tuple(
                    min(1.0, share * pace) if block.source == "new" else 1.0
                    for block, pace in zip(blocks, paces, strict=True)
                ),
            )
            await asyncio.sleep(10 * self.step)
            while step == self.steps // 2 and not self.gate.is_set():
                await asyncio.sleep(0.02)

    def _blocks(self, tokens, sources):
        starts = range(0, tokens, self.block)
        run = -(-len(starts) // self.ranks)
        return tuple(
            BlockPlace(
                start,
                min(start + self.block, tokens),
                i // run,
                sources[i % len(sources)],
                self.block if start else 0,
            )
            for i, start in enumerate(starts)
        )


@contextlib.contextmanager
def running(**options) -> Iterator[Running]:
    """A server with such an engine; options of the front."""
    tokenizer = ByteTokenizer()
    engine = PageEngine(tokenizer, step=0.002)
    with serving(tokenizer, engine, model_names=(MODEL,), **options) as server:
        yield server
