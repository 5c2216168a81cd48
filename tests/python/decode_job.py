"""Run under mpirun: decode steps over two contexts by graph and without, each question by itself
and with its context as a prefix.

    decode_job.py MODEL ENGINE_OPTIONS

ENGINE_OPTIONS are `EngineOptions`' fields as JSON. Prints, as JSON, of every process how many
steps were replays, and how far the logits of all ways are apart, relative to their norm.
"""

import itertools
import json
import sys
from dataclasses import replace

import numpy as np

from engine_steps import NONE, step_of
from star_attention.distributed import default_communicator
from star_attention.engines.base import PagedStep, Prefix
from star_attention.engines.loader import load_engine, star_ranks
from star_attention.engines.options import EngineOptions
from star_attention.models.checkpoint import find_model
from star_attention.runtime.pages import page_table
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

    def decode(grouped: bool) -> np.ndarray:
        """Each question's new token is stored in a page of its own, on the last rank. The second
        half of a step's questions is over the other context."""
        logits, here = [], ranks.rank == ranks.size - 1
        for turn, count in enumerate(COUNTS):
            order = [turn % 2] * (count - count // 2) + [(turn + 1) % 2] * (count // 2)
            wholes = [contexts[index][: lengths[index] // PAGE] for index in order]
            sequences = [
                ([*whole, 10 + question] if here else whole, lengths[index], 1)
                for question, (index, whole) in enumerate(zip(order, wholes, strict=True))
            ]
            step = step_of(*sequences, page=PAGE, stored=here, merge=True)
            if grouped:
                step = with_prefix(step, wholes)
            tokens = (7 * turn + np.arange(count)).astype(np.int32)
            positions = np.full(count, 500 + turn, np.int32)
            logits.append(to_numpy(engine.step(tokens, positions, step, np.arange(count))).copy())
        return np.concatenate(logits)

    ways, steps = [decode(False), decode(True)], engine.graph_steps
    engine._graphs = None
    plain = decode(False)
    ways.append(decode(True))
    error = max(float(np.linalg.norm(way - plain) / np.linalg.norm(plain)) for way in ways)
    every = comm.gather_objects((steps, error))
    if comm.rank == 0:
        print(json.dumps({"graph_steps": [s for s, _ in every], "errors": [e for _, e in every]}))


def with_prefix(step: PagedStep, wholes: list[list[int]]) -> PagedStep:
    """A step whose sequences have their first pages, those of a row of equal `wholes` once."""
    groups = [list(group) for _, group in itertools.groupby(wholes)]
    starts = np.cumsum([0, *map(len, groups)]).astype(np.int32)
    own = np.array([len(whole) for whole in wholes], np.int32)
    lens = np.array([len(group[0]) * PAGE for group in groups], np.int32)
    lists = page_table([group[0] for group in groups])
    tables = [row[begin:] for row, begin in zip(step.page_table, own, strict=True)]
    prefix = Prefix(starts, lens, lists)
    return replace(
        step, kv_lens=step.kv_lens - own * PAGE, page_table=page_table(tables), prefix=prefix
    )


if __name__ == "__main__":
    main()
