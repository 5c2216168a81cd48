"""The engine process: requests of the front become contexts and questions, tokens become events."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from star_attention.config import StarConfig
from star_attention.errors import UserError
from star_attention.runtime import requests
from star_attention.runtime.blocks import Block
from star_attention.runtime.leader import SAVES_SECONDS, Leader
from star_attention.runtime.orders import Chunk
from star_attention.runtime.requests import Context, Question
from star_attention.serve.known import KnownContexts
from star_attention.serve.messages import (
    BlockPlace,
    Cancel,
    Event,
    Generate,
    NewToken,
    Opened,
    Progress,
    Read,
    ReadDone,
    Refused,
    Request,
    Statistics,
    Stop,
    Tokens,
)

_PROGRESS_SECONDS = 0.1
_STATISTICS_SECONDS = 1.0


@dataclass(eq=False)
class _Job:
    """A request in the works."""

    number: int
    context: Context
    question: Question | None = None
    keep: bool = False
    blocks: list[Block] | None = None  # that the front knows of


class ServerLoop:
    """Rank 0's loop of a server.

    Args:
        leader: whose scheduler shares blocks.
        connection: to the front.
        division: of a context of so many tokens.
        end_tokens: the model's.
        pages: of a rank's KV cache.
        page_bytes: of one of them, in all layers.
    """

    def __init__(
        self,
        leader: Leader,
        connection: Connection,
        division: Callable[[int], StarConfig],
        end_tokens: frozenset[int],
        pages: int,
        page_bytes: int,
    ) -> None:
        self._leader = leader
        self._scheduler = leader.scheduler
        self._connection = connection
        self._division = division
        self._end_tokens = end_tokens
        self._pages, self._page_bytes = pages, page_bytes
        self._known = KnownContexts(self._scheduler.is_cached)
        self._jobs: dict[int, _Job] = {}
        self._asked: dict[Question, _Job] = {}
        self._reading: list[_Job] = []  # whose context is not ready
        self._events: list[Event] = []
        self._is_stopping = False
        self._told_progress = self._told_statistics = 0.0

    def run(self) -> None:
        """Until the front says stop and nothing is left to do or to save, or is gone."""
        try:
            is_idle = False
            while not self._is_stopping or self._jobs or self._scheduler.copies.is_saving:
                self._receive(wait=is_idle)
                new = self._leader.step(self._on_chunk)
                is_idle = new is None
                if new:
                    self._take(new)
                self._look_at_contexts()
                self._tell_statistics(is_idle)
                self._send()
        except (EOFError, ConnectionError):
            pass  # nobody is there to serve

    def _receive(self, wait: bool) -> None:
        # Copies wait for those before them, of which `step` asks.
        is_saving = self._scheduler.copies.awaits_saves
        seconds = SAVES_SECONDS if is_saving else _STATISTICS_SECONDS
        while self._connection.poll(seconds if wait else 0):
            wait = False
            self._accept(self._connection.recv())

    def _accept(self, request: Request) -> None:
        match request:
            case Generate() | Read():
                try:
                    self._add(request)
                except UserError as error:
                    self._events.append(Refused(request.request, str(error)))
            case Cancel(number):
                if job := self._jobs.get(number):
                    self._end(job)
            case Stop():
                self._is_stopping = True
            case _:
                raise TypeError(f"not a request: {request!r}")

    def _add(self, request: Generate | Read) -> None:
        token_ids, scheduler = request.token_ids, self._scheduler
        if isinstance(request, Read):
            context = self._add_context(token_ids, request.keep)
            job = _Job(request.request, context, keep=request.keep)
        else:
            border = self._known.longest(token_ids, request.border)
            asked = token_ids[border:]
            lengths = len(asked), request.params.max_tokens
            context = self._add_context(token_ids[:border], False, lengths)
            end_tokens = self._end_tokens | request.end_tokens
            question = scheduler.add_question(context, asked, request.params, end_tokens)
            scheduler.release_context(context)  # it stays for the question
            job = _Job(request.request, context, question)
            self._asked[question] = job
        self._jobs[request.request] = job
        self._reading.append(job)

    def _add_context(
        self, token_ids: np.ndarray, keep: bool, *questions: tuple[int, int]
    ) -> Context:
        return self._scheduler.add_context(
            token_ids, self._division(len(token_ids)), questions, keep=keep
        )

    def _take(self, new: Sequence[requests.NewToken]) -> None:
        """What one pass gave."""
        jobs = [self._asked[each.question] for each in new]
        tokens = (
            NewToken(job.number, each.token, each.finish_reason, each.logprobs)
            for job, each in zip(jobs, new, strict=True)
        )
        self._events.append(Tokens(tuple(tokens)))
        for job, each in zip(jobs, new, strict=True):
            if each.finish_reason:
                self._end(job)

    def _end(self, job: _Job) -> None:
        del self._jobs[job.number]
        if job in self._reading:
            self._reading.remove(job)
        if job.question:
            del self._asked[job.question]
            self._scheduler.finish(job.question)
        else:
            self._scheduler.release_context(job.context)

    def _look_at_contexts(self) -> None:
        """Tells of contexts that were opened or are ready since the last look."""
        now = time.monotonic()
        tells_progress = now > self._told_progress + _PROGRESS_SECONDS
        if tells_progress:
            self._told_progress = now
        for job in list(self._reading):
            if not job.context.is_open:
                continue
            if job.blocks is not job.context.blocks:  # it may be opened anew
                job.blocks = job.context.blocks
                self._events.append(Opened(job.number, places_of(job.context)))
            if job.context.is_ready:
                self._is_ready(job)
            elif tells_progress:
                self._events.append(Progress(job.number, self._done(job.context)))

    def _is_ready(self, job: _Job) -> None:
        context = job.context
        self._reading.remove(job)
        self._events.append(Progress(job.number, (1.0,) * len(context.blocks)))
        self._known.add(context.token_ids, context.plan.block_size, context.keys)
        if job.question is None:
            self._events.append(ReadDone(job.number))
            if not job.keep:
                self._end(job)

    def _on_chunk(self, chunk: Chunk, share: float) -> None:
        """The front hears of the engine also within a long pass."""
        self._tell_statistics(is_idle=False)
        self._send()

    def _done(self, context: Context) -> tuple[float, ...]:
        """The share of each block that is there."""
        readers = {block: job.context for job in self._reading for block in job.context.reads}
        shares = []
        for block, part in zip(context.blocks, context.plan.parts, strict=True):
            share = float(block.is_ready)
            if not share and (reader := readers.get(block)):
                reached = reader.phase1.reached.get(part.block, 0)
                share = min(max((reached - part.start) / part.tokens, 0.0), 1.0)
            shares.append(share)
        return tuple(shares)

    def _tell_statistics(self, is_idle: bool) -> None:
        now = time.monotonic()
        if not is_idle and now < self._told_statistics + _STATISTICS_SECONDS:
            return
        self._told_statistics = now
        scheduler = self._scheduler
        running, cached = scheduler.num_running, scheduler.cached()
        gpu_blocks, gpu_pages = cached.pop("gpu")
        self._events.append(
            Statistics(
                running=running,
                waiting=len(self._jobs) - running,
                pages_used=int(scheduler.pages_held.max()),
                pages=self._pages,
                cached_blocks={"gpu": gpu_blocks, **{t: n for t, (n, _) in cached.items()}},
                cached_bytes={
                    "gpu": gpu_pages * self._page_bytes,
                    **{tier: size for tier, (_, size) in cached.items()},
                },
            )
        )

    def _send(self) -> None:
        for event in self._events:
            self._connection.send(event)
        self._events.clear()


def places_of(context: Context) -> tuple[BlockPlace, ...]:
    """The blocks of an open context."""
    pairs = zip(context.plan.parts, context.blocks, strict=True)
    return tuple(
        BlockPlace(
            each.start,
            each.end,
            each.rank,
            "new" if block in context.reads else block.source or "gpu",
            context.plan.blocks[each.block].prefix,
        )
        for each, block in pairs
    )
