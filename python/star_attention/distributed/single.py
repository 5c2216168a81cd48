"""One rank, no communication."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from star_attention.distributed.base import Addressed, Buffer, Done, Request, Traffic


class SingleProcess:
    """The communicator of a job of one rank."""

    rank = 0
    size = 1
    capturable = True

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.world = self

    def all_gather(self, buffer: Buffer, gathered: Buffer, stream: int = 0) -> None:
        gathered[0] = buffer

    def exchange(self, sends: Addressed, receives: Addressed, stream: int = 0) -> Request:
        return Done()

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def all_reduce(self, buffer: Buffer, stream: int = 0) -> None:
        pass

    def split(self, color: int) -> SingleProcess:
        return self

    def merge(self, o: Buffer, lse: Buffer, out: Buffer, stream: int = 0) -> None:
        out[...] = o

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self, code: int = 1) -> NoReturn:
        sys.exit(code)
