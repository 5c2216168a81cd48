"""How a front and its rank 0 come together, whichever of them started the other.

Rank 0 listens on a socket in a folder that only this user reaches, and each shows that it knows the
other's secret.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Protocol

_SOCKET = "STAR_ATTENTION_FRONT_SOCKET"
_SECRET = "STAR_ATTENTION_FRONT_SECRET"
_OUTER = "STAR_ATTENTION_OUTER_RANK0"
_LISTEN_SECONDS = 0.05
_LONGEST_FOLDER = 70  # a socket's whole path has 107 bytes at most


class Job(Protocol):
    """Ranks that run, as `RankJob`."""

    last_words: str

    def wait(self) -> int: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def is_running(self) -> bool: ...
    def is_stopped(self) -> bool: ...


@dataclass(frozen=True)
class Meeting:
    """Where rank 0 listens for its front, and the secret that each shows the other."""

    address: str
    secret: str

    @classmethod
    def somewhere(cls) -> Meeting:
        """In a folder of its own, which is gone once they have met."""
        folder = tempfile.gettempdir()
        if len(os.fsencode(folder)) > _LONGEST_FOLDER:
            folder = "/tmp"
        folder = Path(tempfile.mkdtemp(prefix="star-attention-", dir=folder))
        return cls(str(folder / "socket"), os.urandom(32).hex())

    def variables(self) -> dict[str, str]:
        """For rank 0's environment."""
        return {_SOCKET: self.address, _SECRET: self.secret}

    def wait_for_front(self, comes: Callable[[], bool] = lambda: True) -> Connection | None:
        """Rank 0's end; None: the front does not come any more."""
        secret = bytes.fromhex(self.secret)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.address)
            listener.listen(1)
            listener.settimeout(_LISTEN_SECONDS)
            accepted = None
            while accepted is None:
                if not comes():
                    return None
                with suppress(TimeoutError):
                    accepted, _ = listener.accept()
        self.is_over()
        connection = Connection(accepted.detach())
        deliver_challenge(connection, secret)
        answer_challenge(connection, secret)
        return connection

    def call_rank0(self) -> Connection | None:
        """The front's end; None: it does not listen yet, or any more."""
        try:
            return Client(self.address, "AF_UNIX", authkey=bytes.fromhex(self.secret))
        except (FileNotFoundError, ConnectionError, EOFError):
            return None

    def is_over(self) -> None:
        """Nobody comes any more."""
        shutil.rmtree(Path(self.address).parent, ignore_errors=True)


def meeting_of_rank0() -> Meeting | None:
    """In the processes that a front started as its ranks."""
    if _SOCKET not in os.environ or _OUTER in os.environ:
        return None
    return Meeting(os.environ[_SOCKET], os.environ[_SECRET])


class OwnRanks:
    """Starts ranks.

    Args:
        start: does it, with these variables in their environment.
    """

    can_start_again = True

    def __init__(self, start: Callable[[dict[str, str]], Job]) -> None:
        self._start = start

    def start(self) -> tuple[Job, Meeting]:
        meeting = Meeting.somewhere()
        try:
            return self._start(meeting.variables()), meeting
        except BaseException:
            meeting.is_over()
            raise


class OuterRanks:
    """Ranks whose rank 0 started this front: somebody else's mpirun started them."""

    can_start_again = False

    @staticmethod
    def variables(meeting: Meeting) -> dict[str, str]:
        """For the environment of a front that is started by rank 0."""
        return {**meeting.variables(), _OUTER: str(os.getpid())}

    @staticmethod
    def are_here() -> bool:
        return _OUTER in os.environ

    def start(self) -> tuple[Job, Meeting]:
        job = _OuterJob(int(os.environ[_OUTER]))
        return job, Meeting(os.environ[_SOCKET], os.environ[_SECRET])


class _OuterJob:
    last_words = ""

    def __init__(self, process: int) -> None:
        self._process = process

    def wait(self) -> int:
        """At once: rank 0 waits for its front, whose connection tells when it ends."""
        return 1

    def is_running(self) -> bool:
        return os.getppid() == self._process

    def is_stopped(self) -> bool:
        with suppress(OSError):
            status = Path(f"/proc/{self._process}/stat").read_text()
            return status.rpartition(")")[2].split()[0] == "T"
        return False

    def terminate(self) -> None:
        """Rank 0 ends once it is told to stop, or its front is gone."""

    def kill(self) -> None:
        if self.is_running():
            os.kill(self._process, signal.SIGKILL)
