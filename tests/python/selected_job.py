"""Run under mpirun: a text read with selected pages, in passes of several sizes.

    selected_job.py MODEL TOKENS.npy CONTEXT CONFIG OUTPUT.pickle [PEERS]

CONTEXT: its tokens; half of the others are a question, half an answer. CONFIG: `StarConfig`'s
fields as JSON. PEERS: on GPUs, and whether ranks read each other's memory. OUTPUT has for each size
of passes the logits of the tokens behind the context, and what each page of rows chose: {(layer, KV
head, page of rows): pages of the context}.
"""

import json
import pickle
import sys
from pathlib import Path

import numpy as np

from helpers import forced_logits
from star_attention import ops
from star_attention.config import StarConfig
from star_attention.distributed import default_communicator
from star_attention.engines.base import Limits
from star_attention.engines.loader import load_engine
from star_attention.engines.options import EngineOptions
from star_attention.engines.torch.engine import TorchEngine
from star_attention.engines.torch.selection import SelectedPages
from star_attention.models.checkpoint import find_model
from star_attention.runtime.leader import lead_together

PASSES = (None, 1, 27)  # tokens of a rank, at most; at least a page


class Chosen:
    """Notes what this rank's rows choose."""

    def __init__(self, page, anchor):
        self.lists = {}
        self._page, self._first = page, anchor // page
        self._choose, self._step = ops.select_pages, TorchEngine.step
        self._stored = SelectedPages.stored
        ops.select_pages = self._choosing
        chosen = self
        TorchEngine.step = lambda engine, *arguments: chosen._stepping(engine, *arguments)
        SelectedPages.stored = lambda step, *arguments: chosen._storing(step, *arguments)

    def _stepping(self, engine, token_ids, positions, *arguments):
        self._positions = positions
        return self._step(engine, token_ids, positions, *arguments)

    def _storing(self, step, layer, stream):
        self._layer, self._row = layer, 0
        self._stored(step, layer, stream)

    def _choosing(self, q, lse, tiles, *arguments, **options):
        lists, counts = self._choose(q, lse, tiles, *arguments, **options)
        first, self._row = self._row, self._row + len(q)
        for tile, row in enumerate(tiles[:-1].tolist()):
            for head, (pages, count) in enumerate(zip(lists[tile], counts[tile], strict=True)):
                key = self._layer, head, int(self._positions[first + row]) // self._page
                assert key not in self.lists
                if count:
                    self.lists[key] = [self._first + page for page in pages[:count].tolist()]
        return lists, counts


def main():
    model, tokens, length, config, output, *peers = sys.argv[1:]
    config, comm = StarConfig(**json.loads(config)), default_communicator()
    ids, rest = np.split(np.load(tokens), [int(length)])
    question, answer = np.split(rest, 2)
    options = EngineOptions("cpu", "float32")
    if peers:
        options = EngineOptions("cuda", "float16", kv_cache_gib=0.25)
    engine = load_engine(find_model(model), comm, config.tokens_per_block, options)
    if peers and comm.size > 1:
        assert engine._peers, "peer memory is out of reach"
        if peers == ["False"]:
            engine._peers = None
    chosen, results = Chosen(config.tokens_per_block, config.anchor_size), {}
    for most in PASSES:
        chosen.lists = {}
        leader, worker = lead_together(engine, comm, Limits(selected_tokens=most))
        context = leader.encode(ids, config)
        logits = forced_logits(leader, context, question, answer)
        leader.release(context)
        assert worker.pool.pages_in_use == 0
        for other in comm.gather_objects(logits):
            assert np.array_equal(other, logits), "ranks differ"
        lists = {}
        for each in comm.gather_objects(chosen.lists):
            lists.update(each)
        results[most] = logits, lists
    if comm.rank == 0:
        Path(output).write_bytes(pickle.dumps((engine.config, results)))


main()
