"""Run under mpirun: decode steps by graph and without, over two contexts in turn.

    decode_job.py MODEL ENGINE_OPTIONS

ENGINE_OPTIONS are `EngineOptions`' fields as JSON. Prints, as JSON, of every process how many
steps were replays, and how far the logits of both ways are apart, relative to their norm.
"""

import json
import sys

import numpy as np

from engine_steps import NONE, step_of
from star_attention.distributed import default_communicator
from star_attention.engines.loader import load_engine, star_ranks
from star_attention.engines.options import EngineOptions
from star_attention.models.checkpoint import find_model
from star_attention.runtime.sampling import to_numpy

PAGE = 64
# Questions that take part in each step: the first steps of 1, 4, 2 and 8 run without a graph.
COUNTS = [1, 1, 3, 4, 3, 1, 2, 2, 5, 7, 8, 1]
WITHOUT = 4


def main() -> None:
    model, options = sys.argv[1:]
    options = EngineOptions(**json.loads(options))
    comm = default_communicator()
    ranks = star_ranks(comm, options.tp)
    engine = load_engine(find_model(model), ranks, PAGE, options)
    engine.reserve_pages(24)
    engine.reserve_positions(1000)
    rng = np.random.default_rng(ranks.rank)
    # Their parts on this rank: short here where they are long there.
    lengths = [5 * PAGE, PAGE] if ranks.rank % 2 else [PAGE, 4 * PAGE]
    contexts = [[2, 0, 3, 1, 4], [7, 6, 5, 9, 8]]
    for pages, length in zip(contexts, lengths, strict=True):
        tokens, places = rng.integers(0, 90, length), np.arange(length)
        step = step_of((pages, 0, length), page=PAGE)
        engine.step(tokens.astype(np.int32), places.astype(np.int32), step, NONE)

    def decode() -> np.ndarray:
        """Each question's new token is stored in a page of its own, on the last rank."""
        logits, here = [], ranks.rank == ranks.size - 1
        for turn, count in enumerate(COUNTS):
            pages, length = contexts[turn % 2], lengths[turn % 2]
            whole = pages[: length // PAGE]
            sequences = [([*whole, 10 + question], length, 1) for question in range(count)]
            if not here:
                sequences = [(whole, length, 1)] * count
            step = step_of(*sequences, page=PAGE, stored=here, merge=True)
            tokens = (7 * turn + np.arange(count)).astype(np.int32)
            positions = np.full(count, 500 + turn, np.int32)
            logits.append(to_numpy(engine.step(tokens, positions, step, np.arange(count))).copy())
        return np.concatenate(logits)

    by_graph, steps = decode(), engine.graph_steps
    engine._graphs = None
    plain = decode()
    error = float(np.linalg.norm(by_graph - plain) / np.linalg.norm(plain))
    every = comm.gather_objects((steps, error))
    if comm.rank == 0:
        print(json.dumps({"graph_steps": [s for s, _ in every], "errors": [e for _, e in every]}))


if __name__ == "__main__":
    main()
