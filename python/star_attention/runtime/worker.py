"""One rank's side of a job: executes rank 0's orders with an engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from star_attention.distributed import Communicator, Traffic
from star_attention.engines.base import Logits, ModelEngine
from star_attention.errors import UserError
from star_attention.plan import Part, make_plan
from star_attention.runtime import interrupts
from star_attention.runtime.orders import (
    Ask,
    BlockPart,
    Chunk,
    Decode,
    Forget,
    Load,
    Open,
    OpenStore,
    Order,
    QuestionPart,
    Release,
    Report,
    Save,
    Saved,
    Wait,
)
from star_attention.runtime.pages import (
    PagePool,
    Rows,
    frame_count,
    frames_of,
    packed_pages,
    page_count,
    window_of,
)
from star_attention.runtime.phase1 import ContextPart, scratch_pages
from star_attention.runtime.phase2 import (
    CachedContext,
    CachedQuestion,
    grouped_step,
    questions_step,
)
from star_attention.runtime.tiers import LoadState, StoreDescription, Tier, Tiers
from star_attention.spans import Range

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
        load_seconds: what loading the engine took.

    Attributes:
        stats: time, tokens and traffic of the phases `context`, `question` and `decode`.
    """

    def __init__(self, engine: ModelEngine, comm: Communicator, load_seconds: float = 0.0) -> None:
        self.engine = engine
        self.comm = comm
        self._load_seconds = load_seconds
        self.pool = PagePool(engine)
        self._reading: dict[int, _Reading] = {}
        self._packing = engine.kv_packing
        self._blocks: dict[int, list[int]] = {}  # pages of those that this rank holds
        self._contexts: dict[int, CachedContext] = {}
        self._numbers: dict[int, list[int]] = {}  # of contexts' blocks here
        self._questions: dict[int, CachedQuestion] = {}
        self._tiers: Tiers | None = None
        self._loads: dict[int, bytes] = {}  # keys of the blocks that are being loaded
        self._reset_stats()

    def execute(
        self, order: Order, on_layer: Callable[[float], None] | None = None
    ) -> Logits | list[Any] | None:
        """Does an order's part on this rank.

        Args:
            on_layer: called in a `Chunk` with the share of its pass's layers that is done.

        Returns:
            For `Ask` and `Decode` the logits, float32 [rows, vocab_size], valid until the next
            order: of the last token, or all, of each part. For `Report` every process's statistics,
            for `OpenStore` what its tiers have, or why they cannot be opened, for `Load` its state,
            for `Saved` its saves that ended.

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
            case OpenStore():
                return self._open_store(order)
            case Save():
                return self._save(order)
            case Load():
                return self._load(order)
            case Forget():
                return self._forget(order)
            case Saved():
                return self.comm.world.gather_objects(self._tiers.ended())
            case Wait():
                self.engine.finish_steps()
                self.comm.world.gather_objects(None)
                return None
            case Report():
                return self._report(order)
        raise TypeError(f"not an order: {order!r}")

    def close(self) -> None:
        """Gives the engine's memory back, on all ranks; the host tier is over."""
        if self._tiers:
            self._tiers.close()
            self._tiers.delete_host()
        self.engine.close()

    def _open(self, order: Open) -> None:
        rank = self.comm.rank
        plan = make_plan(len(order.token_ids), order.config, self.comm.size, self.engine.config)
        plan = plan.beside([None if part.read else part.rank for part in order.blocks])
        self.engine.reserve_positions(plan.context_len)
        parts = list(zip(plan.parts, order.blocks, strict=True))
        own = [each for each in parts if each[0].rank == rank]
        packing = self._packing
        scratch_size = scratch_pages(plan, rank, packing)
        if packing > 1:  # what is read has pages of 8 bits when it is quantised
            page = self.engine.tokens_per_block
            read = [each for each in own if each[1].read]
            scratch_size += sum(frame_count(block.tokens, page, packing) for block, _ in read)
            own = [each for each in own if not each[1].read]
        self._allocate_blocks(own)
        numbers = [part.number for each, part in parts if each.rank == rank]
        pages: list[int] = []
        if packing == 1:
            pages = [page for number in numbers for page in self._blocks[number]]
            self.pool.share(pages)
        runs = tuple(Range(part.start, part.end) for part in plan.parts_of(rank))
        context = CachedContext(plan, pages, runs, order.is_long, packing)
        self._contexts[order.context] = context
        self._numbers[order.context] = numbers
        scratch = self.pool.allocate(scratch_size)
        part = ContextPart(plan, rank, pages, scratch, packing)
        if not part.finished:
            starts = {each.start: number.number for each, number in parts}
            self._reading[order.context] = _Reading(order.token_ids, part, starts)
        read = (part for part in plan.parts if part.start not in plan.cached)
        self.stats["context"].tokens += sum(part.tokens for part in read)

    def _allocate_blocks(self, parts: Sequence[tuple[Part, BlockPart]]) -> None:
        """Pages for blocks that are new here, together, so that they are consecutive."""
        page, packing = self.engine.tokens_per_block, self._packing
        new = [
            (part.number, block.tokens) for block, part in parts if part.number not in self._blocks
        ]
        frames = self.pool.allocate(sum(frame_count(tokens, page, packing) for _, tokens in new))
        for number, tokens in new:
            count = frame_count(tokens, page, packing)
            self._blocks[number] = packed_pages(frames[:count], page_count(tokens, page), packing)
            frames = frames[count:]

    def _chunk(self, order: Chunk, on_layer: Callable[[float], None] | None) -> None:
        reading = self._reading[order.context]
        with self._timed("context"):
            if self._packing > 1 and not reading.restored:
                reading.restored = True
                self._restore(reading)
            context_pass = reading.part.take(order.spans)
            if context_pass is not None:
                positions = context_pass.positions
                rope, is_long = self.engine.config.rope, self._contexts[order.context].is_long
                with interrupts.allowed():
                    self.engine.step(
                        reading.token_ids[positions],
                        rope.rows(positions, is_long),
                        context_pass.attention,
                        NO_ROWS,
                        on_layer,
                    )
            if reading.part.finished:
                self.engine.finish_steps()
            if self._packing > 1:
                self._quantize(reading)
        if reading.part.finished:
            self._end_reading(order.context)

    def _restore(self, reading: _Reading) -> None:
        """Cached blocks that the context's rows see are in 8 bits."""
        cached = {start: self._blocks.get(number, []) for start, number in reading.blocks.items()}
        sources, targets = reading.part.restore(cached)
        if len(sources):
            self.engine.dequantize_pages(sources, targets)

    def _quantize(self, reading: _Reading) -> None:
        """What no row of the context is to see any more."""
        for part, frames, tokens in reading.part.settle():
            self.engine.quantize_pages(frames, tokens)
            kept = frames[:: self._packing].tolist()
            pages = packed_pages(kept, len(frames), self._packing)
            self._blocks[reading.blocks[part.start]] = pages

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
                order.groups,
            )

    def _step(
        self,
        questions: list[CachedQuestion],
        inputs: Any,
        stored: list[bool],
        logit_rows: np.ndarray,
        groups: Sequence[int] = (),
    ) -> Logits:
        page, engine = self.engine.tokens_per_block, self.engine
        positions: list[np.ndarray] = []
        rows: list[Rows] = []
        for question, tokens, here in zip(questions, inputs, stored, strict=True):
            places, row = question.append(len(tokens), here, page, engine.copy_page)
            positions.append(engine.config.rope.rows(places, question.context.is_long))
            rows.append(row)
        engine.reserve_positions(max(question.position for question in questions))
        token_ids = np.concatenate(inputs).astype(np.int32)
        places = np.concatenate(positions).astype(np.int32)
        if self._packing > 1 and not groups:
            groups = [1] * len(rows)
        step = grouped_step(rows, questions, groups, page) if groups else questions_step(rows, page)
        if (size := engine.config.window) is not None:
            pairs = zip(questions, rows, strict=True)
            firsts = [question.window_starts(row.count, size) for question, row in pairs]
            step = replace(step, window=window_of(rows, firsts, page))
        with interrupts.allowed():
            return engine.step(token_ids, places, step, logit_rows)

    def _question(self, part: QuestionPart) -> CachedQuestion:
        if part.question not in self._questions:
            context = self._contexts[part.context]
            if self._packing > 1:  # they are all there by now
                numbers = self._numbers[part.context]
                context.pages = [page for number in numbers for page in self._blocks[number]]
            self._questions[part.question] = CachedQuestion(context, self.pool)
        return self._questions[part.question]

    def _release(self, order: Release) -> None:
        for number in order.questions:
            if question := self._questions.pop(number, None):
                question.release()
        for number in order.contexts:
            if number in self._reading:
                self.engine.finish_steps()
                self._end_reading(number)
            self._numbers.pop(number, None)
            context = self._contexts.pop(number, None)
            if context and self._packing == 1:
                self.pool.release(context.pages)
        for number in order.blocks:
            if key := self._loads.pop(number, None):
                self._tiers.cancel(key)
            self.pool.release(frames_of(self._blocks.pop(number, []), self._packing))

    def _end_reading(self, context: int) -> None:
        self.pool.release(self._reading.pop(context).part.held)

    def _open_store(self, order: OpenStore) -> list[dict[Tier, dict[bytes, int]] | str]:
        engine, world = self.engine, self.comm.world
        config, tp = engine.config, world.size // self.comm.size
        description = StoreDescription(
            model=order.model,
            fingerprint=order.fingerprint,
            dtype=engine.kept_dtype,
            num_layers=config.num_layers,
            num_kv_heads=config.shard(tp).num_kv_heads,
            head_dim=config.head_dim,
            tokens_per_block=engine.tokens_per_block,
            page_bytes=engine.kept_page_bytes,
            rank=world.rank,
            num_ranks=self.comm.size,
            tp=tp,
            quantization=engine.quantization,
        )
        folders = (folder and Path(folder) for folder in (order.host_folder, order.disk_folder))
        try:
            self._tiers = Tiers(engine, description, *folders, order.disk_option)
        except UserError as error:
            return world.gather_objects(str(error))
        return world.gather_objects(self._tiers.stored())

    def _save(self, order: Save) -> None:
        if order.rank == self.comm.rank:
            layers = range(order.first, order.last)
            self._tiers.save(order.key, self._blocks[order.block], layers, order.tiers)

    def _load(self, order: Load) -> list[LoadState]:
        state: LoadState = "done"
        if order.rank == self.comm.rank:
            self._loads[order.block] = order.key
            pages, layers = self._blocks[order.block], range(order.first, order.last)
            state = self._tiers.load(order.key, pages, layers)
            if state == "done" and order.last == self.engine.config.num_layers:
                del self._loads[order.block]
        return self.comm.world.gather_objects(state)

    def _forget(self, order: Forget) -> None:
        if order.rank == self.comm.rank:
            for key in order.keys:
                self._tiers.forget(key, order.tier)

    def _report(self, order: Report) -> list[dict[str, Any]]:
        phases = {name: asdict(stats) for name, stats in self.stats.items()}
        mine = {
            "rank": self.comm.world.rank,
            "load_seconds": self._load_seconds,
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


@dataclass
class _Reading:
    """A context in phase 1; the numbers of its blocks by where they start."""

    token_ids: np.ndarray
    part: ContextPart
    blocks: dict[int, int]
    restored: bool = False  # what is cached in 8 bits and seen
