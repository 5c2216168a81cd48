"""Runs `star-attn ask` over three ranks of which one fails.

    failing_job.py KIND MOMENT RANK MODEL [OPTION ...]

KIND is raise, refuse, kill, stop or hang, MOMENT the name of an order, RANK the rank that fails
when it gets the second such order, or the only one; OPTIONs are `ask`'s.
"""

import os
import signal
import sys
import tempfile
import time

from star_attention.cli import main as cli
from star_attention.distributed import world_rank, world_size
from star_attention.distributed.launch import run_ranks
from star_attention.errors import UserError
from star_attention.runtime.worker import Worker
from test_llm import QUESTION, TEXT


def fail(kind):
    print(f"failing at {time.monotonic()} ", flush=True)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "hang":
        time.sleep(1000)
    raise (UserError if kind == "refuse" else RuntimeError)("the disk is on fire")


def main():
    kind, moment, rank, model, *more = sys.argv[1:]
    if world_size() == 1:
        sys.exit(run_ranks([sys.executable, __file__, *sys.argv[1:]], 3, oversubscribe=True))
    execute, seen = Worker.execute, []

    def failing(self, order, on_layer=None):
        seen.append(type(order).__name__)
        due = seen.count(moment) == (2 if moment == "Decode" else 1)
        if world_rank() == int(rank) and seen[-1] == moment and due:
            fail(kind)
        return execute(self, order, on_layer)

    Worker.execute = failing
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as text:
        text.write(TEXT)
        text.flush()
        options = ["--context-file", text.name, "--question", QUESTION, "--block-size", "128"]
        sys.argv[1:] = ["ask", "--model", model, *options, *more]
        cli.main()


main()
