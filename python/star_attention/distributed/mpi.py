"""Ranks as MPI processes, buffers in host memory."""

from __future__ import annotations

import os
import pickle
import struct
import sys
import time
from typing import Any, NoReturn

import numpy as np
from mpi4py import MPI

from star_attention.distributed.base import Addressed, Buffer, Traffic

# A rank that waits spins at first, longer for objects, which are few and start what all ranks do
# together, then sleeps for a share of what it has waited so far.
_SPIN_SECONDS, _OBJECT_SPIN_SECONDS = 100e-6, 1e-3
_SLEEP_SHARE = 0.02
_SLEEP_SECONDS = 50e-6, 5e-3  # least, most
# Objects that fit into this take one message, larger ones two.
_SMALL_BYTES = 1024
_HEADER = struct.Struct("q")


class MpiCommunicator:
    """MPI's world, or some of its ranks. A rank that waits yields its core, so ranks may share
    cores. An exception that nothing catches on one rank ends all of them, instead of leaving the
    others to wait for it."""

    def __init__(
        self, ranks: MPI.Comm = MPI.COMM_WORLD, world: MpiCommunicator | None = None
    ) -> None:
        self._ranks = ranks
        self.rank = ranks.Get_rank()
        self.size = ranks.Get_size()
        self.capturable = self.size == 1  # alone, it does nothing with buffers
        self.traffic = Traffic()
        self.world = world or self
        if world:
            return
        report_exception = sys.excepthook

        def abort_on_exception(*exception: Any) -> None:
            report_exception(*exception)
            sys.stderr.flush()
            self.abort()

        sys.excepthook = abort_on_exception

    def all_gather(self, buffer: Buffer, gathered: Buffer, stream: int = 0) -> None:
        # The receive count of an all-gather is what one rank contributes.
        receive = [gathered, buffer.nbytes, MPI.BYTE]
        _wait(self._ranks.Iallgather(_bytes(buffer), receive))
        self.traffic.sent += buffer.nbytes * (self.size - 1)
        self.traffic.received += buffer.nbytes * (self.size - 1)

    def exchange(self, sends: Addressed, receives: Addressed, stream: int = 0) -> _Transfer:
        self.traffic.add(Traffic.of(sends, receives))
        requests = [self._ranks.Irecv(_bytes(buffer), rank) for buffer, rank in receives]
        requests += [self._ranks.Isend(_bytes(buffer), rank) for buffer, rank in sends]
        return _Transfer(requests, [buffer for buffer, _ in (*sends, *receives)])

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        is_root, room = self.rank == root, _SMALL_BYTES - _HEADER.size
        first = np.empty(_SMALL_BYTES, np.uint8)
        if is_root:
            data = np.frombuffer(pickle.dumps(value, pickle.HIGHEST_PROTOCOL), np.uint8)
            _HEADER.pack_into(first, 0, len(data))
            first[_HEADER.size :][: len(data)] = data[:room]
        _wait(self._ranks.Ibcast(_bytes(first), root=root), _OBJECT_SPIN_SECONDS)
        (size,) = _HEADER.unpack_from(first)
        whole = first[_HEADER.size :]
        if size > room:
            rest = data[room:].copy() if is_root else np.empty(size - room, np.uint8)
            _wait(self._ranks.Ibcast(_bytes(rest), root=root))
            whole = np.concatenate([whole, rest])
        return value if is_root else pickle.loads(whole[:size])

    def gather_objects(self, value: Any) -> list[Any]:
        return [self.broadcast_object(value, root) for root in range(self.size)]

    def all_reduce(self, buffer: Buffer, stream: int = 0) -> None:
        # MPI knows no 16-bit floating-point numbers.
        self._ranks.Allreduce(MPI.IN_PLACE, [buffer, buffer.nbytes // 4, MPI.FLOAT])
        moved = 2 * buffer.nbytes * (self.size - 1) // self.size
        self.traffic.sent += moved
        self.traffic.received += moved

    def split(self, color: int) -> MpiCommunicator:
        return MpiCommunicator(self._ranks.Split(color), self.world)

    def merge(self, o: Buffer, lse: Buffer, out: Buffer, stream: int = 0) -> None:
        raise TypeError("MPI reaches host memory only")

    def check(self) -> None:
        pass

    def close(self) -> None:
        if self.world is not self:
            self._ranks.Free()

    def abort(self, code: int = 1) -> NoReturn:
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(code)
        raise AssertionError("unreachable")


class _Transfer:
    def __init__(self, requests: list[MPI.Request], buffers: list[Buffer]) -> None:
        self._requests = requests
        self._buffers = buffers  # MPI needs them until the transfer is done

    def wait(self, stream: int = 0) -> None:
        for request in self._requests:
            _wait(request)
        self._buffers.clear()


def _bytes(buffer: Buffer) -> list[Any]:
    return [buffer, buffer.nbytes, MPI.BYTE]


def _wait(request: MPI.Request, spin: float = _SPIN_SECONDS) -> None:
    began = time.monotonic()
    least, most = _SLEEP_SECONDS
    while not request.Test():
        waited = time.monotonic() - began
        if waited < spin:
            os.sched_yield()
        else:
            time.sleep(min(max(least, _SLEEP_SHARE * waited), most))
