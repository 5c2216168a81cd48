"""Rank 0's loop: the scheduler says what is next, all ranks do it, tokens are sampled here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from star_attention.config import StarConfig
from star_attention.distributed import Communicator
from star_attention.engines.base import Limits, Logits, ModelEngine
from star_attention.runtime import interrupts
from star_attention.runtime.orders import Ask, Chunk, Decode, Load, Order, Saved, Wait
from star_attention.runtime.pace import Pace
from star_attention.runtime.penalties import Penalties
from star_attention.runtime.requests import Context, NewToken
from star_attention.runtime.sampling import TokenLogprobs, sample, token_logprobs
from star_attention.runtime.scheduler import Scheduler
from star_attention.runtime.store import Store
from star_attention.runtime.tiers import LoadState
from star_attention.runtime.worker import Worker

_LOAD_SECONDS = 0.002  # between looks at a load that waits for the disk
SAVES_SECONDS = 0.1  # between questions which saves have ended

# Called with a chunk and the share of its layers that is done.
OnChunk = Callable[[Chunk, float], None]


class Execute(Protocol):
    """Has all ranks execute an order; returns what rank 0's worker does."""

    def __call__(self, order: Order, on_layer: Callable[[float], None] | None = None) -> Any: ...


class Leader:
    """Runs what is added to its `scheduler`, an order at a time.

    Args:
        execute: has all ranks execute an order.
        engine: rank 0's.
        num_ranks: that contexts are divided among.
        limits: what all ranks' engines allow; by default `engine`'s.
        shares_blocks, store: as in `Scheduler`.
        pace: cuts passes so that answers go on between them.

    Attributes:
        num_ranks, limits: as given.
    """

    def __init__(
        self,
        execute: Execute,
        engine: ModelEngine,
        num_ranks: int,
        limits: Limits | None = None,
        shares_blocks: bool = False,
        store: Store | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.execute = execute
        self.num_ranks = num_ranks
        self.limits = limits or engine.limits
        self._pace = pace
        self._penalties = Penalties()
        self._asked_for_saves = 0.0
        self.scheduler = Scheduler(
            engine.config,
            self.limits,
            num_ranks,
            engine.tokens_per_block,
            engine.has_exchanges,
            engine.has_hops,
            engine.has_prefix,
            shares_blocks,
            store,
            engine.has_selection,
            engine.kv_packing,
        )

    def step(self, on_chunk: OnChunk = lambda chunk, share: None) -> list[NewToken] | None:
        """Runs the next order and returns the tokens that it gave; None: nothing is left to do.

        Raises:
            Exception: the order failed on this rank, which is the only one: what it was about is
                done again if it is still wanted.
        """
        with interrupts.held():
            scheduler = self.scheduler
            self._ask_for_saves()
            if self._pace:
                cuts = self._pace.cuts(answers=scheduler.num_running > 0)
                scheduler.chunk_tokens, scheduler.question_tokens = cuts[:2]
                scheduler.copies.pages = cuts.copy_pages
            order = scheduler.next()
            if order is None:
                return None
            begin = time.perf_counter()
            new = self._run(order, on_chunk)
            if self._pace:
                self._pace.took(order, time.perf_counter() - begin)
            return new

    def encode(self, token_ids: np.ndarray, config: StarConfig) -> Context:
        """Reads a context, int32 [n], while nothing else runs.

        Raises:
            UserError: as `Scheduler.add_context`.
        """
        context = self.scheduler.add_context(token_ids, config)
        while not context.is_ready:
            self.step()
        self.execute(Wait())
        return context

    def release(self, context: Context) -> None:
        """Frees a context's pages at once, unless questions run over it."""
        self.scheduler.release_context(context)
        self.flush()

    def flush(self) -> None:
        """Has the ranks free what is over."""
        with interrupts.held():
            if order := self.scheduler.release():
                self._run(order)

    def _run(self, order: Order, on_chunk: OnChunk = lambda chunk, share: None) -> list[NewToken]:
        try:
            if isinstance(order, Chunk):
                self.execute(order, lambda share: on_chunk(order, share))
                on_chunk(order, 1.0)
                return []
            result = self.execute(order)
            if isinstance(order, Load):
                self._take_load(order, result)
            if not isinstance(order, Ask | Decode):
                return []
            tokens = self._sample(result)
            return self.scheduler.chosen(tokens, self._logprobs(result, tokens))
        except BaseException:
            self.scheduler.failed(order)
            raise

    def _take_load(self, order: Load, states: list[LoadState]) -> None:
        self.scheduler.loaded(order, states)
        if "waiting" in states and not self.scheduler.num_running:
            time.sleep(_LOAD_SECONDS)  # the disk is slower than orders

    def _ask_for_saves(self) -> None:
        now = time.monotonic()
        if self.scheduler.copies.awaits_saves and now > self._asked_for_saves + SAVES_SECONDS:
            self._asked_for_saves = now
            for forget in self.scheduler.copies.saved(self.execute(Saved())):
                self.execute(forget)

    def _sample(self, logits: Logits) -> list[int]:
        """The next token of each question that wants one, with each its own parameters."""
        wanted = self.scheduler.wanted()
        alike: dict[tuple[float, float, int, float], list[int]] = {}
        for index, (_, question) in enumerate(wanted):
            params = question.params
            choice = params.temperature, params.min_p, params.top_k, params.top_p
            alike.setdefault(choice, []).append(index)
        tokens = np.zeros(len(wanted), np.int64)
        for indices in alike.values():
            rows = [wanted[index][0] for index in indices]
            questions = [wanted[index][1] for index in indices]
            uniforms = np.array([question.rng.random() for question in questions])
            chosen_from = logits if len(rows) == logits.shape[0] else logits[rows]
            penalised = self._penalties.apply(chosen_from, questions)
            tokens[indices] = sample(penalised, questions[0].params, uniforms)
        return tokens.tolist()

    def _logprobs(self, logits: Logits, tokens: list[int]) -> dict[int, TokenLogprobs]:
        """Of the tokens whose questions want them, by index."""
        wanted = [
            (index, row, question.params.logprobs)
            for index, (row, question) in enumerate(self.scheduler.wanted())
            if question.params.logprobs is not None
        ]
        if not wanted:
            return {}
        indices, rows, counts = zip(*wanted, strict=True)
        chosen = [tokens[index] for index in indices]
        found = token_logprobs(logits[list(rows)], chosen, counts)
        return dict(zip(indices, found, strict=True))


def lead_together(
    engine: ModelEngine, comm: Communicator, limits: Limits | None = None
) -> tuple[Leader, Worker]:
    """A leader on each rank of a program that all ranks run to its end (benchmarks, tests), and its
    worker. They decide alike; what is executed is rank 0's order, as in a job.

    Args:
        comm: of the ranks that have the same part of the model.
        limits: as in `Leader`; by default what all engines allow.
    """
    worker = Worker(engine, comm)

    def execute(order: Order, on_layer: Callable[[float], None] | None = None) -> Any:
        return worker.execute(comm.world.broadcast_object(order), on_layer)

    limits = limits or Limits.common(comm.world.gather_objects(engine.limits))
    return Leader(execute, engine, comm.size, limits), worker
