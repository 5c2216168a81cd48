"""Ranks as MPI processes, buffers in host memory."""

from __future__ import annotations

import sys
import time
from typing import Any, NoReturn

from mpi4py import MPI

from star_attention.distributed.base import Buffer, Traffic

_SPIN_SECONDS = 100e-6
_SLEEP_SECONDS = 50e-6


class MpiCommunicator:
    """MPI's world. A rank that waits yields its core, so ranks may share cores. An exception that
    nothing catches on one rank ends all of them, instead of leaving the others to wait for it."""

    def __init__(self) -> None:
        self._world = MPI.COMM_WORLD
        self.rank = self._world.Get_rank()
        self.size = self._world.Get_size()
        self.traffic = Traffic()
        report_exception = sys.excepthook

        def abort_on_exception(*exception: Any) -> None:
            report_exception(*exception)
            sys.stderr.flush()
            self.abort()

        sys.excepthook = abort_on_exception

    def broadcast(self, buffer: Buffer, root: int = 0) -> None:
        _wait(self._world.Ibcast(_bytes(buffer), root=root))
        if self.rank == root:
            self.traffic.sent += buffer.nbytes * (self.size - 1)
        else:
            self.traffic.received += buffer.nbytes

    def all_gather(self, buffer: Buffer, gathered: Buffer) -> None:
        # The receive count of an all-gather is what one rank contributes.
        receive = [gathered, buffer.nbytes, MPI.BYTE]
        _wait(self._world.Iallgather(_bytes(buffer), receive))
        self.traffic.sent += buffer.nbytes * (self.size - 1)
        self.traffic.received += buffer.nbytes * (self.size - 1)

    def exchange(self, send: Buffer, dest: int, receive: Buffer, source: int) -> _Exchange:
        self.traffic.sent += send.nbytes
        self.traffic.received += receive.nbytes
        return _Exchange(
            [self._world.Irecv(_bytes(receive), source), self._world.Isend(_bytes(send), dest)],
            (send, receive),
        )

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        return self._world.bcast(value, root)

    def gather_objects(self, value: Any) -> list[Any]:
        return self._world.allgather(value)

    def abort(self) -> NoReturn:
        self._world.Abort(1)
        raise AssertionError("unreachable")


class _Exchange:
    def __init__(self, requests: list[MPI.Request], buffers: tuple[Buffer, Buffer]) -> None:
        self._requests = requests
        self._buffers = buffers  # MPI needs them until the transfer is done

    def wait(self) -> None:
        for request in self._requests:
            _wait(request)


def _bytes(buffer: Buffer) -> list[Any]:
    return [buffer, buffer.nbytes, MPI.BYTE]


def _wait(request: MPI.Request) -> None:
    patience = time.monotonic() + _SPIN_SECONDS
    while not request.Test():
        if time.monotonic() > patience:
            time.sleep(_SLEEP_SECONDS)
