"""One rank, no communication."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from star_attention.distributed.base import Buffer, Traffic


class SingleProcess:
    """The communicator of a job of one rank."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self.traffic = Traffic()

    def broadcast(self, buffer: Buffer, root: int = 0) -> None:
        pass

    def all_gather(self, buffer: Buffer, gathered: Buffer) -> None:
        gathered[0] = buffer

    def exchange(self, send: Buffer, dest: int, receive: Buffer, source: int) -> _Done:
        receive[...] = send
        return _Done()

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def abort(self) -> NoReturn:
        sys.exit(1)


class _Done:
    def wait(self) -> None:
        pass
