"""Run under mpirun, with a GPU for each rank: the ranks compute a block together, in steps made by
hand, and each compares its pages with those of the whole block, which it computes by itself.

exchange_job.py ENGINE
"""

import hashlib
import random
import sys
import time
from pathlib import Path

import numpy as np

from engine_steps import NONE, ints, step_of
from star_attention.distributed import Traffic, default_communicator
from star_attention.engines.base import Exchange, Pages
from star_attention.engines.loader import load_engine
from star_attention.engines.options import EngineOptions

PAGE, BLOCK = 64, 12  # tokens of a page, pages of the block
ROUNDS = 3
NAN = 0x7E00  # in float16


def main():
    host = default_communicator()
    engine = load_engine(Path(sys.argv[1]), host, PAGE, EngineOptions(kv_cache_gib=1))
    even = np.linspace(0, BLOCK, host.size + 1).astype(int)
    idle = np.append(np.linspace(0, BLOCK, host.size).astype(int), BLOCK)
    for cuts in (even, idle):  # the last rank computes nothing of the second
        for all_receive in (True, False):
            for seed in range(ROUNDS):
                check(host, engine, cuts, all_receive, seed)
    engine.close()
    if host.rank == 0:
        print("ok")


def check(host, engine, cuts, all_receive, seed):
    """Rank r computes the block's pages cuts[r] to cuts[r + 1]. Every other rank receives them, or
    only later ones, which see them: then the first rank only sends."""
    size, rank = host.size, host.rank
    lists = [pages_of(other, seed) for other in range(size)]
    mine, begin, end = lists[rank], cuts[rank], cuts[rank + 1]
    arrive = [all_receive or other < rank for other in range(size)]
    tokens = np.random.default_rng(seed).integers(0, 49152, BLOCK * PAGE + 1).astype(np.int32)
    places = np.arange(len(tokens), dtype=np.int32)
    poison(engine)

    def exchange(first, last):
        """Of the pages between these that each rank computes, counted from its first."""

        def part(other):
            return slice(*np.clip(cuts[other] + np.array([first, last]), None, cuts[other + 1]))

        others = [other for other in range(size) if other != rank]
        sends = [Pages(to, mine[part(rank)]) for to in others if all_receive or to > rank]
        receives = [Pages(source, mine[part(source)]) for source in others if arrive[source]]
        return Exchange((end - begin) * PAGE, tuple(sends), tuple(receives))

    exchanges = exchange(0, 1), exchange(1, BLOCK)
    rows = slice(begin * PAGE, end * PAGE)
    sequences = [(mine[:end], rows.start, rows.stop - rows.start)] if end > begin else []
    step = step_of(*sequences, page=PAGE, exchanges=exchanges)
    before, waited = traffic_of(engine), engine.wait_seconds
    time.sleep(random.Random(seed * size + rank).uniform(0, 0.02))
    engine.step(tokens[rows], places[rows], step, NONE)
    counts = [
        sum(len(part.pages) for each in exchanges for part in getattr(each, way))
        for way in ("sends", "receives")
    ]
    moved = [count * engine.page_bytes * engine.config.num_layers for count in counts]
    assert traffic_of(engine) - before == Traffic(*moved)
    assert (engine.wait_seconds > waited) == (counts[1] > 0)

    whole = ints(*range(BLOCK, 2 * BLOCK))
    engine.step(tokens[:-1], places[:-1], step_of((whole, 0, BLOCK * PAGE), page=PAGE), NONE)
    have = np.repeat(np.array(arrive) | (np.arange(size) == rank), np.diff(cuts))
    kv, expected = (kv_of(engine, pages[have]) for pages in (mine, whole))
    error = np.linalg.norm(kv - expected) / np.linalg.norm(expected) if have.any() else 0.0
    assert error < 1e-2, f"rank {rank}: the pages are off by {error:.1e}"
    digests = {page: digest(kv_of(engine, mine[[page]])) for page in np.flatnonzero(have)}
    every = host.gather_objects(digests)
    assert all(len({each[p] for each in every if p in each}) == 1 for p in range(BLOCK))

    if all_receive:
        answers = [
            engine.step(
                tokens[-1:],
                places[-1:],
                step_of(([*pages, 2 * BLOCK], BLOCK * PAGE, 1), page=PAGE),
                ints(0),
            ).get()
            for pages in (mine, whole)
        ]
        error = np.linalg.norm(answers[0] - answers[1]) / np.linalg.norm(answers[1])
        assert error < 2e-2, f"rank {rank}: the logits are off by {error:.1e}"
        assert len(set(host.gather_objects(digest(answers[0])))) == 1, "ranks differ"


def pages_of(rank, seed):
    """Where a rank has the block: the first one in a row, others partly so."""
    pages = np.arange(BLOCK, dtype=np.int32).reshape(-1, 2)
    return np.random.default_rng([rank, seed]).permutation(pages).ravel() if rank else pages.ravel()


def poison(engine):
    engine._pool.fill(NAN)
    engine._cupy.cuda.Device().synchronize()


def kv_of(engine, pages):
    layers = engine.config.num_layers
    out = np.empty((layers, len(pages), engine.page_bytes), np.uint8)
    for layer in range(layers):
        engine.read_layer(layer, pages, out[layer])
    engine.finish_copies()
    return out.view(np.float16).astype(np.float32)


def digest(values):
    return hashlib.sha256(values.tobytes()).hexdigest()


def traffic_of(engine):
    return engine._comm.traffic.copy()


main()
