"""Ranks that are threads of the test's process, over host memory.

A transfer is a rendezvous: data goes straight from buffer to buffer when it is waited for, and the
sender's wait ends when all have it. A buffer that is touched too early therefore shows. What a lost
or a wrong call would make MPI hang at raises `RankError` here, on all ranks.
"""

import itertools
import pickle
import threading
from dataclasses import dataclass, field

import numpy as np
import torch

from star_attention.distributed import Traffic
from star_attention.errors import RankError


class ThreadRanks:
    """The communicators of a job of `size` threads.

    Args:
        timeout: seconds that a rank waits for the others.

    Attributes:
        comms: of each rank.
    """

    def __init__(self, size, timeout=60.0):
        self._job = _Job(timeout)
        group = _Group(self._job, size)
        self.comms = [ThreadCommunicator(group, rank) for rank in range(size)]

    def run(self, action):
        """What `action(communicator)` returns on each rank. If it raises on some, the others are
        ended, and what the first one raised is raised here."""
        outcomes = self.outcomes(action)
        if self._job.error is not None:
            raise self._job.error
        return outcomes

    def outcomes(self, action):
        """What `action(communicator)` returns or raises on each rank."""
        results = [None] * len(self.comms)

        def run(rank):
            try:
                results[rank] = action(self.comms[rank])
            except BaseException as error:
                results[rank] = error
                self._job.fail(f"rank {rank} failed: {error!r}", error)

        threads = [
            threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(results))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class ThreadCommunicator:
    """See `star_attention.distributed.base.Communicator`."""

    def __init__(self, group, rank, world=None):
        self.rank, self.size = rank, group.size
        self.capturable = self.size == 1
        self.traffic = Traffic()
        self.world = world or self
        self._group = group
        self._calls = itertools.count()

    def all_gather(self, buffer, gathered, stream=0):
        moved = buffer.nbytes * (self.size - 1)
        self.traffic.add(Traffic(moved, moved))
        call = self._call("all_gather", _bytes(buffer))
        whole = _bytes(gathered)
        for rank in range(self.size):
            _copy(call.value_of(rank), whole.view(self.size, -1)[rank])
        call.leave(wait=True)

    def all_reduce(self, buffer, stream=0):
        moved = 2 * buffer.nbytes * (self.size - 1) // self.size
        self.traffic.add(Traffic(moved, moved))
        summand = torch.as_tensor(buffer)
        assert summand.dtype == torch.float32, "MPI knows no 16-bit floating-point numbers"
        call = self._call("all_reduce", summand.clone())
        total = sum(call.value_of(rank) for rank in range(self.size))
        call.leave()
        summand.copy_(total)

    def exchange(self, sends, receives, stream=0):
        self.traffic.add(Traffic.of(sends, receives))
        sent = {rank: _bytes(buffer) for buffer, rank in sends}
        arriving = {rank: _bytes(buffer) for buffer, rank in receives}
        assert len(sent) == len(sends), "one buffer for each rank"
        assert len(arriving) == len(receives), "one buffer from each rank"
        call = self._call("exchange", (sent, set(arriving)))

        def finish():
            for rank in range(self.size):
                theirs, expected = call.value_of(rank)
                assert (self.rank in theirs) == (rank in arriving), f"rank {rank} sends otherwise"
                assert (self.rank in expected) == (rank in sent), f"rank {rank} expects otherwise"
                if rank in arriving:
                    _copy(theirs[self.rank], arriving[rank])
            call.leave(wait=True)

        return _Request(finish)

    def broadcast_object(self, value, root=0):
        sent = pickle.dumps(value) if self.rank == root else None
        call = self._call(f"broadcast_object from rank {root}", sent)
        value = pickle.loads(call.value_of(root))
        call.leave()
        return value

    def gather_objects(self, value):
        call = self._call("gather_objects", pickle.dumps(value))
        values = [pickle.loads(call.value_of(rank)) for rank in range(self.size)]
        call.leave()
        return values

    def split(self, color):
        call = self._call("split", color)
        mine = [rank for rank in range(self.size) if call.value_of(rank) == color]
        group = call.shared(color, lambda: _Group(self._group.job, len(mine)))
        call.leave()
        return ThreadCommunicator(group, mine.index(self.rank), self.world)

    def merge(self, o, lse, out, stream=0):
        raise TypeError("threads reach host memory only")

    def check(self):
        self._group.job.check()

    def close(self):
        pass

    def abort(self):
        self._group.job.fail(f"rank {self.world.rank} aborted")
        raise SystemExit(1)

    def _call(self, kind, value):
        return self._group.call(next(self._calls), self.rank, kind, value)


class _Job:
    """What all groups of ranks share.

    Attributes:
        error: the first that a rank raised.
    """

    def __init__(self, timeout):
        self.timeout = timeout
        self.changed = threading.Condition()
        self.error = None
        self._reason = None

    def fail(self, reason, error=None):
        with self.changed:
            self._reason = self._reason or reason
            self.error = self.error or error
            self.changed.notify_all()

    def check(self):
        if self._reason is not None:
            raise RankError(self._reason)

    def wait_for(self, condition, what):
        """With the lock held."""
        if not self.changed.wait_for(lambda: self._reason or condition(), self.timeout):
            self.fail(f"{what} took more than {self.timeout} s")
        self.check()


class _Group:
    """Ranks that make the same calls in the same order: each call's number says which it is."""

    def __init__(self, job, size):
        self.job, self.size = job, size
        self._calls = {}

    def call(self, number, rank, kind, value):
        with self.job.changed:
            self.job.check()
            state = self._calls.setdefault(number, _State(kind, rank))
            if state.kind != kind:
                self.job.fail(
                    f"call {number}: rank {rank} calls {kind}, "
                    f"rank {state.first_rank} calls {state.kind}"
                )
                self.job.check()
            state.values[rank] = value
            self.job.changed.notify_all()
        return _Call(self, state, number)

    def forget(self, number):
        del self._calls[number]


@dataclass
class _State:
    kind: str
    first_rank: int
    values: dict = field(default_factory=dict)  # by rank
    shared: dict = field(default_factory=dict)
    left: int = 0


class _Call:
    """A rank's part in a call."""

    def __init__(self, group, state, number):
        self._group, self._state, self._number = group, state, number

    def value_of(self, rank):
        state, job = self._state, self._group.job
        with job.changed:
            job.wait_for(lambda: rank in state.values, f"{state.kind}: waiting for rank {rank}")
            return state.values[rank]

    def shared(self, key, make):
        """What the first rank that asks for it makes."""
        with self._group.job.changed:
            if key not in self._state.shared:
                self._state.shared[key] = make()
            return self._state.shared[key]

    def leave(self, wait=False):
        """This rank has what it wants; `wait`: until all have."""
        state, group = self._state, self._group
        with group.job.changed:
            state.left += 1
            if state.left == group.size:
                group.forget(self._number)
            group.job.changed.notify_all()
            if wait:
                group.job.wait_for(
                    lambda: state.left == group.size, f"{state.kind}: waiting for the others"
                )


class _Request:
    def __init__(self, finish):
        self._finish = finish

    def wait(self, stream=0):
        if self._finish:
            self._finish()
        self._finish = None


def _bytes(buffer):
    """A contiguous array's memory as uint8 [nbytes]."""
    tensor = torch.from_numpy(buffer) if isinstance(buffer, np.ndarray) else buffer
    assert tensor.is_contiguous(), "buffers are contiguous"
    return tensor.view(-1).view(torch.uint8)


def _copy(source, target):
    assert len(source) == len(target), f"{len(source)} bytes arrive, {len(target)} are expected"
    target.copy_(source)
