"""What the runtime and the engines ask of a communicator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from star_attention.errors import UserError

# A contiguous array in memory that the communicator reaches: a NumPy array or a tensor. What is
# done with one on a GPU follows the work of a CUDA stream, given by its handle; for host memory
# `stream` means nothing.
Buffer = Any
# Buffers, each with the rank that it goes to or comes from.
Addressed = Sequence[tuple[Buffer, int]]


@dataclass
class Traffic:
    """Payload bytes that this rank sent and received, counted per peer."""

    sent: int = 0
    received: int = 0

    @classmethod
    def of(cls, sends: Addressed, receives: Addressed) -> Traffic:
        """An exchange's."""
        return cls(*(sum(buffer.nbytes for buffer, _ in each) for each in (sends, receives)))

    def __add__(self, later: Traffic) -> Traffic:
        return Traffic(self.sent + later.sent, self.received + later.received)

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(self.sent - earlier.sent, self.received - earlier.received)

    def add(self, more: Traffic) -> None:
        self.sent += more.sent
        self.received += more.received

    def copy(self) -> Traffic:
        return Traffic(self.sent, self.received)


class Request(Protocol):
    """A transfer under way."""

    def wait(self, stream: int = 0) -> None:
        """The host waits, or, for buffers on a GPU, the stream."""


class Done:
    """A request of nothing, or of what is over."""

    def wait(self, stream: int = 0) -> None:
        pass


class Communicator(Protocol):
    """Collectives over the ranks of one job; every rank makes the same calls in the same order."""

    rank: int
    size: int
    traffic: Traffic
    world: Communicator  # of the whole job, if this one is for some of its ranks
    # What is done with buffers on a GPU can be captured in CUDA graphs; nothing is, with one rank.
    capturable: bool

    def all_gather(self, buffer: Buffer, gathered: Buffer, stream: int = 0) -> None:
        """Fills `gathered` [size, *buffer.shape] with every rank's `buffer`, in rank order."""

    def exchange(self, sends: Addressed, receives: Addressed, stream: int = 0) -> Request:
        """Starts sending each of `sends` to a rank while each of `receives` is filled by a rank, at
        most one each way for a pair of ranks. Until the request was waited for the buffers belong
        to the transfer. Every rank calls it, with nothing to send or receive if need be."""

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """The root's `value`, on every rank. Not counted as traffic."""

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank. Not counted as traffic."""

    def all_reduce(self, buffer: Buffer, stream: int = 0) -> None:
        """Overwrites `buffer`, float32 in host memory, any on a GPU, with its sum over ranks."""

    def split(self, color: int) -> Communicator:
        """One for the ranks that give the same color, in their order. For host memory only."""

    def merge(self, o: Buffer, lse: Buffer, out: Buffer, stream: int = 0) -> None:
        """Attention over all ranks' keys from each rank's own, o [T, Hq, D] and lse [T, Hq], into
        out [T, Hq, D]; only for buffers on a GPU."""

    def check(self) -> None:
        """Raises RankError if a rank was lost in what a GPU has done so far."""

    def close(self) -> None:
        """Gives up what connects the ranks, on all of them. The whole job's stays."""

    def abort(self, code: int = 1) -> NoReturn:
        """Ends all ranks at once, with this exit code."""


def agree(comm: Communicator, action: Callable[[], Any]) -> Any:
    """Runs `action` on this rank; if it raises UserError on any rank, raises that on all of them,
    so that no rank goes on into a collective that the others never reach. What not all ranks meet
    alike names the rank."""
    value, error = None, None
    try:
        value = action()
    except UserError as raised:
        error = str(raised)
    errors = comm.gather_objects(error)
    for rank, other in enumerate(errors):
        if other is not None:
            raise UserError(other if set(errors) == {other} else f"on rank {rank}, {other}")
    return value


def require_same(comm: Communicator, **values: Any) -> None:
    """Raises UserError, on every rank, if a value is not the same on all of them."""
    every = comm.gather_objects(values)
    for name, first in every[0].items():
        for rank, theirs in enumerate(every):
            if theirs[name] != first:
                raise UserError(
                    f"{name} is {theirs[name]!r} on rank {rank}, but {first!r} on rank 0: "
                    "start all ranks alike"
                )
