"""Runs `star-attn ask` over three ranks of which one fails: KIND (raise or kill), MOMENT (context
or decode), RANK, MODEL, and options of `ask`."""

import os
import signal
import sys
import tempfile
import time

from star_attention.cli import main as cli
from star_attention.distributed import world_rank, world_size
from star_attention.distributed.launch import run_ranks
from star_attention.engines.torch.engine import TorchEngine
from test_llm import QUESTION, TEXT


def fail(kind):
    print(f"failing at {time.monotonic()} ", flush=True)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("the disk is on fire")


def main():
    kind, moment, rank, model, *more = sys.argv[1:]
    if world_size() == 1:
        sys.exit(run_ranks([sys.executable, __file__, *sys.argv[1:]], 3, oversubscribe=True))
    step, steps = TorchEngine.step, []

    def failing_step(self, *arguments, **options):
        steps.append(0)
        if world_rank() == int(rank) and len(steps) == {"context": 1, "decode": 5}[moment]:
            fail(kind)
        return step(self, *arguments, **options)

    TorchEngine.step = failing_step
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as text:
        text.write(TEXT)
        text.flush()
        options = ["--context-file", text.name, "--question", QUESTION, "--block-size", "128"]
        sys.argv[1:] = ["ask", "--model", model, *options, *more]
        cli.main()


main()
