"""Ends a rank that is stopped: the others would wait for it for ever."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

# Runs beside the rank, in a process of its own: a stopped process has no threads that could tell.
# A job that is stopped as a whole, launcher included, may go on later.
_WATCH = """
import ctypes, os, signal, sys, time

ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with the rank
rank, pid, launcher, patience = sys.argv[1], *map(int, sys.argv[2:])

def state(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "X"

stopped = 0
while (now := state(pid)) not in "XZ":
    stopped = stopped + 1 if now == "T" and state(launcher) != "T" else 0
    if stopped > patience:
        print(f"star-attn: rank {rank} does not run (state T, stopped): the job ends",
              file=sys.stderr, flush=True)
        os.kill(pid, signal.SIGKILL)
        break
    time.sleep(1)
"""
_PATIENCE = 3  # seconds


@functools.cache
def watch_for_stops() -> None:
    """Once this process has been stopped (SIGSTOP) for some seconds, it is killed, by which mpirun
    ends the job."""
    from star_attention.distributed import world_rank

    numbers = world_rank(), os.getpid(), os.getppid(), _PATIENCE
    subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _WATCH, *map(str, numbers)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
