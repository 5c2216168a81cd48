"""The processes of a job: rank 0 leads, the others follow.

Rank 0 sends every order to all ranks before it executes it itself. What a rank cannot do ends the
job at once, with the reason: nobody waits for a rank that is not coming.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from star_attention.distributed import Communicator, default_communicator, world_size
from star_attention.distributed.base import agree, require_same
from star_attention.distributed.watch import job_is_complete, watch_this_rank
from star_attention.engines.base import Limits
from star_attention.engines.loader import load_engine, star_ranks
from star_attention.engines.options import EngineOptions
from star_attention.errors import RankError, UserError, say
from star_attention.models.fingerprint import fingerprint
from star_attention.runtime.orders import Order
from star_attention.runtime.worker import Worker


@dataclass(frozen=True)
class Load:
    """Every rank loads a model and makes a worker of this number."""

    worker: int
    model: str
    tokens_per_block: int
    options: EngineOptions


@dataclass(frozen=True)
class Execute:
    worker: int
    order: Order


@dataclass(frozen=True)
class Unload:
    worker: int


@dataclass(frozen=True)
class Stop:
    """The job is over; followers end with this exit code."""

    code: int


Message = Load | Execute | Unload | Stop


class Job:
    """Rank 0's end. `current_job` gives the one of this process."""

    def __init__(self, comm: Communicator) -> None:
        assert comm.rank == 0, "ranks other than 0 follow"
        self.comm = comm
        self._workers: dict[int, Worker] = {}
        self._numbers = 0
        self._is_over = False
        self._is_busy = threading.Lock()
        self.dropped: deque[int] = deque()  # numbers of workers whose clients are gone
        if comm.size > 1:
            atexit.register(self.stop)

    def load(
        self, model: Path, tokens_per_block: int, options: EngineOptions
    ) -> tuple[int, Worker, Limits]:
        """Has all ranks load a model: the workers' number, rank 0's, and what all engines allow.

        Raises:
            UserError: it cannot be used, on any rank.
        """
        self.unload_dropped()
        self._numbers += 1
        path = str(model.resolve())
        message = Load(self._numbers, path, tokens_per_block, options)
        worker, limits = self._do(message, lambda: _load(message, self.comm), refusal=UserError)
        self._workers[self._numbers] = worker
        return self._numbers, worker, limits

    def execute(
        self, worker: int, order: Order, on_layer: Callable[[float], None] | None = None
    ) -> Any:
        """Has all ranks execute an order; what rank 0's worker returns.

        Raises:
            UserError: the model was unloaded.
        """
        if worker not in self._workers:
            raise UserError("the model was closed: load it again")
        self.unload_dropped()
        action = functools.partial(self._workers[worker].execute, order, on_layer)
        return self._do(Execute(worker, order), action)

    def unload_dropped(self) -> None:
        while self.dropped:
            self.unload(self.dropped.popleft())

    def unload(self, worker: int) -> None:
        """Gives a model's memory back on all ranks."""
        if worker in self._workers and not self._is_over:
            self._do(Unload(worker), lambda: self._workers.pop(worker).close())

    def stop(self, code: int = 0) -> None:
        """Lets the followers end."""
        if not self._is_over:
            self._is_over = True
            self.comm.broadcast_object(Stop(code))

    def _do(
        self,
        message: Message,
        action: Callable[[], Any],
        refusal: type[Exception] | tuple[()] = (),
    ) -> Any:
        """Sends a message and does it here; a `refusal` is one that all ranks meet alike."""
        if self._is_over:
            raise RankError("the job is over")
        if not self._is_busy.acquire(blocking=False):
            raise RuntimeError(
                "a model is at work: call it from one thread at a time, and not out of on_progress"
            )
        try:
            self.comm.broadcast_object(message)
            return action()
        except refusal:
            raise
        except BaseException as error:
            if self.comm.size > 1:
                end_job(self.comm, error)
            raise
        finally:
            self._is_busy.release()


@functools.cache
def current_job() -> Job:
    """This process's job. Under mpirun, every rank but 0 stays in here until rank 0 ends, and then
    exits."""
    if world_size() > 1:
        watch_this_rank()
    comm = default_communicator()
    if comm.size > 1:
        comm.gather_objects(None)
        job_is_complete()
    if comm.rank:
        raise SystemExit(follow(comm))
    return Job(comm)


def follow(comm: Communicator) -> int:
    """Does what rank 0 says until it stops; returns the exit code."""
    workers: dict[int, Worker] = {}
    try:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("the first LLM(...) under mpirun belongs into the main thread")
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what an interrupt means
        while True:
            match comm.broadcast_object(None):
                case Stop(code):
                    return code
                case Load() as load:
                    with contextlib.suppress(UserError):  # rank 0 has it too
                        workers[load.worker] = _load(load, comm)[0]
                case Execute(worker, order):
                    workers[worker].execute(order)
                case Unload(worker):
                    workers.pop(worker).close()
                case message:
                    raise TypeError(f"not a message: {message!r}")
    except BaseException as error:
        end_job(comm, error)


def end_job(comm: Communicator, error: BaseException) -> NoReturn:
    """Says why this rank fails and ends all ranks."""
    if isinstance(error, KeyboardInterrupt):
        comm.abort(130)
    reason = str(error) or type(error).__name__
    say(f"rank {comm.rank} failed: {type(error).__name__}: {reason}")
    comm.abort()


def _load(load: Load, comm: Communicator) -> tuple[Worker, Limits]:
    path = Path(load.model)
    require_same(comm, version=version("star-attention-trt"))
    found = agree(comm, lambda: fingerprint(path))
    require_same(comm, **{f"{path}": found})
    ranks = star_ranks(comm, load.options.tp)
    begin = time.perf_counter()
    engine = load_engine(path, ranks, load.tokens_per_block, load.options)
    seconds = time.perf_counter() - begin
    limits = Limits.common(comm.gather_objects(engine.limits))
    return Worker(engine, ranks, seconds), limits
