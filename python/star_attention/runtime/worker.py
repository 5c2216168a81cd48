"""One rank's side of a job: executes rank 0's orders with an engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from star_attention.distributed import Communicator, Traffic
from star_attention.engines.base import Logits, ModelEngine
from star_attention.plan import make_plan
from star_attention.runtime import interrupts
from star_attention.runtime.orders import (
    Ask,
    Chunk,
    Decode,
    Open,
    Order,
    QuestionPart,
    Release,
    Report,
    Wait,
)
from star_attention.runtime.pages import PagePool, Rows
from star_attention.runtime.phase1 import ContextPart, own_pages, scratch_pages
from star_attention.runtime.phase2 import CachedContext, CachedQuestion, questions_step

NO_ROWS = np.empty(0, np.int32)


@dataclass
class PhaseStats:
    """What a phase took on this rank: wall time, how much of it the engine stood still for other
    ranks' KV, tokens of the whole job, payload bytes."""

    seconds: float = 0.0
    wait_seconds: float = 0.0
    tokens: int = 0
    traffic: Traffic = field(default_factory=Traffic)


class Worker:
    """Owns what a rank has of contexts, questions and pages.

    Args:
        engine: the model.
        comm: connects the ranks that have the same part of the model; their number is the plans'.

    Attributes:
        stats: time, tokens and traffic of the phases `context`, `question` and `decode`.
    """

    def __init__(self, engine: ModelEngine, comm: Communicator) -> None:
        self.engine = engine
        self.comm = comm
        self.pool = PagePool(engine)
        self._reading: dict[int, _Reading] = {}
        self._contexts: dict[int, CachedContext] = {}
        self._questions: dict[int, CachedQuestion] = {}
        self._reset_stats()

    def execute(
        self, order: Order, on_layer: Callable[[float], None] | None = None
    ) -> Logits | list[dict[str, Any]] | None:
        """Does an order's part on this rank.

        Args:
            on_layer: called in a `Chunk` with the share of its pass's layers that is done.

        Returns:
            For `Ask` and `Decode` the logits, float32 [rows, vocab_size], valid until the next
            order: of the last token, or all, of each part. For `Report` every rank's statistics.

        Raises:
            Exception: this rank failed; the job cannot go on.
        """
        match order:
            case Open():
                return self._open(order)
            case Chunk():
                return self._chunk(order, on_layer)
            case Ask():
                return self._ask(order)
            case Decode():
                return self._decode(order)
            case Release():
                return self._release(order)
            case Wait():
                self.comm.world.gather_objects(None)
                return None
            case Report():
                return self._report(order)
        raise TypeError(f"not an order: {order!r}")

    def close(self) -> None:
        """Gives the engine's memory back, on all ranks."""
        self.engine.close()

    def _open(self, order: Open) -> None:
        rank = self.comm.rank
        plan = make_plan(len(order.token_ids), order.config, self.comm.size, self.engine.config)
        self.engine.reserve_positions(plan.context_len)
        pages = self.pool.allocate(own_pages(plan, rank))
        scratch = self.pool.allocate(scratch_pages(plan, order.config, rank))
        part = ContextPart(plan, order.config, rank, pages, scratch)
        kv_len = sum(block.tokens for block in plan.blocks_of(rank))
        self._contexts[order.context] = CachedContext(plan, pages, kv_len)
        self._reading[order.context] = _Reading(order.token_ids, part, scratch)
        self.stats["context"].tokens += plan.context_len

    def _chunk(self, order: Chunk, on_layer: Callable[[float], None] | None) -> None:
        reading = self._reading.get(order.context)
        if reading is None:  # this rank's part is done
            return
        with self._timed("context"):
            context_pass = reading.part.take(order.tokens)
            if context_pass is not None:
                positions = context_pass.positions
                with interrupts.allowed():
                    self.engine.step(
                        reading.token_ids[positions],
                        positions,
                        context_pass.attention,
                        NO_ROWS,
                        on_layer,
                    )
        if reading.part.finished:
            self._end_reading(order.context)

    def _ask(self, order: Ask) -> Logits:
        questions = [self._question(part) for part in order.parts]
        counts = [len(part.token_ids) for part in order.parts]
        ends = np.cumsum(counts)
        wanted = [
            np.arange(end - count, end) if part.all_rows else np.array([end - 1])
            for part, count, end in zip(order.parts, counts, ends, strict=True)
        ]
        with self._timed("question", int(ends[-1])):
            return self._step(
                questions,
                [part.token_ids for part in order.parts],
                [part.rank == self.comm.rank for part in order.parts],
                np.concatenate(wanted).astype(np.int32),
            )

    def _decode(self, order: Decode) -> Logits:
        questions = [self._questions[number] for number in order.questions]
        with self._timed("decode", len(questions)):
            return self._step(
                questions,
                np.array(order.tokens, np.int32)[:, None],
                [rank == self.comm.rank for rank in order.ranks],
                np.arange(len(questions), dtype=np.int32),
            )

    def _step(
        self,
        questions: list[CachedQuestion],
        inputs: Any,
        stored: list[bool],
        logit_rows: np.ndarray,
    ) -> Logits:
        page, engine = self.engine.tokens_per_block, self.engine
        positions: list[np.ndarray] = []
        rows: list[Rows] = []
        for question, tokens, here in zip(questions, inputs, stored, strict=True):
            places, row = question.append(len(tokens), here, page, engine.copy_page)
            positions.append(places)
            rows.append(row)
        engine.reserve_positions(max(question.position for question in questions))
        token_ids = np.concatenate(inputs).astype(np.int32)
        places = np.concatenate(positions).astype(np.int32)
        step = questions_step(rows, page)
        with interrupts.allowed():
            return engine.step(token_ids, places, step, logit_rows)

    def _question(self, part: QuestionPart) -> CachedQuestion:
        if part.question not in self._questions:
            context = self._contexts[part.context]
            self._questions[part.question] = CachedQuestion(context, self.pool)
        return self._questions[part.question]

    def _release(self, order: Release) -> None:
        for number in order.questions:
            if question := self._questions.pop(number, None):
                question.release()
        for number in order.contexts:
            if number in self._reading:
                self._end_reading(number)
            if context := self._contexts.pop(number, None):
                self.pool.release(context.pages)

    def _end_reading(self, context: int) -> None:
        self.pool.release(self._reading.pop(context).scratch)

    def _report(self, order: Report) -> list[dict[str, Any]]:
        phases = {name: asdict(stats) for name, stats in self.stats.items()}
        mine = {
            "rank": self.comm.world.rank,
            "peak_memory_bytes": self.engine.peak_memory_bytes,
            "pages_in_use": self.pool.pages_in_use,
            "graph_steps": self.engine.graph_steps,
            "phases": phases,
        }
        if order.reset:
            self._reset_stats()
        return self.comm.world.gather_objects(mine)

    def _reset_stats(self) -> None:
        self.stats = {name: PhaseStats() for name in ("context", "question", "decode")}

    @contextmanager
    def _timed(self, phase: str, tokens: int = 0) -> Iterator[None]:
        before, waited = self.comm.traffic.copy(), self.engine.wait_seconds
        start = time.perf_counter()
        yield
        stats = self.stats[phase]
        stats.seconds += time.perf_counter() - start
        stats.wait_seconds += self.engine.wait_seconds - waited
        stats.tokens += tokens
        stats.traffic += self.comm.traffic - before


@dataclass(frozen=True)
class _Reading:
    """A context in phase 1."""

    token_ids: np.ndarray
    part: ContextPart
    scratch: list[int]
