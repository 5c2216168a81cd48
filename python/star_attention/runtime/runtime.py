"""Both phases at the level of tokens: what `LLM` runs, and what tests and evaluations may."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from star_attention.config import StarConfig
from star_attention.distributed import Communicator, Traffic
from star_attention.engines.base import ModelEngine
from star_attention.errors import UserError
from star_attention.plan import Plan, make_plan
from star_attention.runtime.pages import PagePool
from star_attention.runtime.phase1 import (
    context_passes,
    longest_pass,
    own_pages,
    scratch_pages,
)
from star_attention.runtime.phase2 import QuestionBatch
from star_attention.runtime.sampling import SamplingParams, sample, to_numpy


@dataclass
class PhaseStats:
    """What a phase took on this rank: wall time, how much of it the engine stood still for other
    ranks' KV, tokens of the whole job, payload bytes."""

    seconds: float = 0.0
    wait_seconds: float = 0.0
    tokens: int = 0
    traffic: Traffic = field(default_factory=Traffic)


@dataclass
class EncodedContext:
    """A context whose KV is cached, this rank's share of it here. Ask it as often as you like.

    Attributes:
        plan: how it is divided.
        pages: this rank's pages, `kv_len` tokens in them.
    """

    plan: Plan
    config: StarConfig
    pages: list[int]
    kv_len: int
    _pool: PagePool
    released: bool = False

    def release(self) -> None:
        """Frees its pages; it cannot be asked any more."""
        if not self.released:
            self._pool.release(self.pages)
        self.released = True


FinishReason = Literal["stop", "length"]
_REASONS: tuple[FinishReason | None, ...] = (None, "stop", "length")
# Up to so many ranks are tried for what would fit.
_MOST_RANKS = 256


@dataclass(frozen=True)
class NewTokens:
    """One step's tokens by question index, and why the questions that end with it do."""

    tokens: dict[int, int]
    finished: dict[int, FinishReason]


class Runtime:
    """Runs phase 1 and phase 2 with an engine, on every rank of a job alike.

    Attributes:
        stats: time, tokens and traffic of the phases `context`, `query` and `decode` since
            `reset_stats`.
    """

    def __init__(self, engine: ModelEngine, comm: Communicator) -> None:
        self.engine = engine
        self.comm = comm
        self.pool = PagePool(engine)
        self.reset_stats()

    def reset_stats(self) -> None:
        self.stats = {name: PhaseStats() for name in ("context", "query", "decode")}

    def encode(
        self,
        token_ids: np.ndarray,
        config: StarConfig,
        on_progress: Callable[[float], None] = lambda done: None,
    ) -> EncodedContext:
        """Phase 1.

        Args:
            token_ids: int32 [n], the whole context, the same on every rank.
            config: how it is divided.
            on_progress: called with the share of the work that is done on this rank.

        Raises:
            UserError: on every rank, if the plan is not possible or does not fit a rank's KV cache.
        """
        comm, engine = self.comm, self.engine
        if config.attention == "ring" and not engine.has_ring:
            raise UserError(
                "TensorRT engines have no ring attention: use --attention star or dense"
            )
        plan = make_plan(len(token_ids), config, comm.size, engine.config)
        blocks = plan.blocks_of(comm.rank)
        self._check_room(plan, config)
        pages = self.pool.allocate(own_pages(plan, comm.rank))
        scratch = self.pool.allocate(scratch_pages(plan, config, comm.rank))
        try:
            with self._timed("context", len(token_ids)):
                passes = context_passes(
                    plan, config, comm.rank, pages, scratch, engine.max_step_tokens
                )
                for index, context_pass in enumerate(passes):
                    engine.step(
                        token_ids[context_pass.positions],
                        context_pass.positions,
                        context_pass.attention,
                        np.empty(0, np.int32),
                        lambda done, index=index: on_progress((index + done) / len(passes)),
                    )
        except BaseException:
            self.pool.release(pages)
            raise
        finally:
            self.pool.release(scratch)
        return EncodedContext(plan, config, pages, sum(b.tokens for b in blocks), self.pool)

    def _check_room(self, plan: Plan, config: StarConfig) -> None:
        """Raises UserError, on all ranks, with what would fit, if the plan does not fit one."""
        page, engine = plan.tokens_per_block, self.engine
        limits = self.comm.gather_objects((self.pool.room, engine.max_step_tokens))
        room, step = (
            min((limit for limit in each if limit is not None), default=None)
            for each in zip(*limits, strict=True)
        )

        def needs(plan: Plan) -> tuple[int, int]:
            """Tokens of KV cache, and of a pass, of the ranks that need most."""
            ranks = range(plan.num_ranks)
            pages = max(own_pages(plan, rank) + scratch_pages(plan, config, rank) for rank in ranks)
            return pages * page, max(longest_pass(plan, config, rank) for rank in ranks)

        def fits(plan: Plan) -> bool:
            cached, at_once = needs(plan)
            return (room is None or cached <= room * page) and (step is None or at_once <= step)

        if fits(plan):
            return
        advice = "use a smaller block size"
        more_ranks = range(plan.num_ranks + 1, _MOST_RANKS + 1)
        if config.attention == "dense":
            exact = "ring or " if engine.has_ring else ""
            advice, more_ranks = f"use {exact}star over several ranks", range(0)
        for ranks in more_ranks:
            if fits(make_plan(plan.context_len, config, ranks, engine.config)):
                advice = f"use {ranks} ranks or more"
                break
        cached, at_once = needs(plan)
        if room is not None and cached > room * page:
            problem = f"{cached} tokens of KV cache on a rank, there is room for {room * page}"
            advice += ", or a larger --kv-cache-gib"
        else:
            problem = f"{at_once} tokens in one pass, there is room for {step}"
            advice += f", or {engine.step_limit}"
        raise UserError(f"the context needs {problem}: {advice}")

    def logits(self, context: EncodedContext, question: np.ndarray) -> np.ndarray:
        """Logits of every token of a question, int32 [n], behind the context: [n, vocab_size]."""
        batch = self.questions()
        try:
            return to_numpy(batch.ask([context], [question], 1, all_rows=True))
        finally:
            batch.release()

    def generate(
        self,
        contexts: Sequence[EncodedContext],
        questions: Sequence[np.ndarray],
        params: SamplingParams,
        ends: Callable[[int, int], bool],
    ) -> Iterator[NewTokens]:
        """Phase 2: the answers' tokens, step by step.

        Rank 0 chooses the tokens and tells the others, which therefore cannot come apart.

        Args:
            contexts: of each question.
            questions: int32 token ids of each.
            params: how tokens are chosen, and how many at most.
            ends: called on rank 0 with (question index, token): whether the answer ends with it.
        """
        batch = self.questions()
        rngs = [np.random.default_rng(params.seed) for _ in questions]
        active = list(range(len(questions)))
        try:
            with self._timed("query", sum(map(len, questions))):
                logits = batch.ask(contexts, questions, params.max_tokens)
            for count in range(1, params.max_tokens + 1):
                chosen = np.empty((len(active), 2), np.int32)
                if self.comm.rank == 0:
                    uniforms = np.array([rngs[index].random() for index in active])
                    out_of_room = 2 * (count == params.max_tokens)
                    for row, token in enumerate(sample(logits, params, uniforms).tolist()):
                        chosen[row] = token, 1 if ends(active[row], token) else out_of_room
                self.comm.broadcast(chosen)
                tokens = dict(zip(active, chosen[:, 0].tolist(), strict=True))
                finished = {
                    index: _REASONS[reason]
                    for index, reason in zip(active, chosen[:, 1], strict=True)
                    if reason
                }
                yield NewTokens(tokens, finished)
                active = [index for index in active if index not in finished]
                if not active:
                    return
                with self._timed("decode", len(active)):
                    logits = batch.step(active, [tokens[index] for index in active])
        finally:
            batch.release()

    def rank_report(self) -> list[dict[str, Any]]:
        """Of every rank: peak memory, and `stats`; the same list on every rank."""
        peak = self.engine.peak_memory_bytes
        stats = {name: asdict(phase) for name, phase in self.stats.items()}
        return self.comm.gather_objects(
            {"rank": self.comm.rank, "peak_memory_bytes": peak, "phases": stats}
        )

    def questions(self) -> QuestionBatch:
        """A batch of questions, to be stepped by hand. Release it when done."""
        return QuestionBatch(self.engine, self.pool, self.comm)

    @contextmanager
    def _timed(self, phase: str, tokens: int) -> Iterator[None]:
        before, waited = self.comm.traffic.copy(), self.engine.wait_seconds
        start = time.perf_counter()
        yield
        stats = self.stats[phase]
        stats.seconds += time.perf_counter() - start
        stats.wait_seconds += self.engine.wait_seconds - waited
        stats.tokens += tokens
        stats.traffic += self.comm.traffic - before
