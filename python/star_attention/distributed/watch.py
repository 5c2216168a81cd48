"""Says when a job does not come together, and ends a rank that is stopped: the others would wait
for it for ever."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

# Runs beside the rank, in a process of its own: a stopped process has no threads that could tell,
# and none of them runs while MPI starts. Standard input tells that the job has come together, and
# ends with the rank. Ranks that are all stopped are so by intention (Ctrl-Z), and may go on later;
# what is stopped on other machines is not seen.
_WATCH = """
import os, select, signal, sys

rank, pid, launcher, patience, slow = sys.argv[1], *map(int, sys.argv[2:])

def status(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
        return state, int(parent)
    except (OSError, ValueError):
        return "X", 0

def others_run():
    ranks = (status(name) for name in os.listdir("/proc") if name.isdecimal())
    return any(parent == launcher and state not in "TXZ" for state, parent in ranks)

stopped, alone = 0, 1
while (state := status(pid)[0]) not in "XZ":
    stopped = stopped + 1 if state == "T" else 0
    if stopped > patience and others_run():
        print(f"star-attn: rank {rank} does not run (state T, stopped): the job ends",
              file=sys.stderr, flush=True)
        os.kill(pid, signal.SIGKILL)
        break
    if select.select([0], [], [], 1)[0]:
        if not os.read(0, 1):
            break
        alone = 0
    if alone == slow and rank == "0":
        print(f"star-attn: rank 0 has waited {slow} s for the others: every rank must reach its "
              "first LLM(...)", file=sys.stderr, flush=True)
    alone += alone > 0
"""
_PATIENCE, _SLOW = 3, 20  # seconds


@functools.cache
def watch_this_rank() -> subprocess.Popen:
    """Once this process is stopped (SIGSTOP) for some seconds while others run, it is killed, by
    which mpirun ends the job. Call `job_is_complete` when all ranks are there."""
    from star_attention.distributed import world_rank

    numbers = world_rank(), os.getpid(), os.getppid(), _PATIENCE, _SLOW
    return subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _WATCH, *map(str, numbers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def job_is_complete() -> None:
    process = watch_this_rank()
    process.stdin.write(b".")
    process.stdin.flush()
