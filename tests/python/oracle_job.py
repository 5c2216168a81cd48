"""Run under mpirun: the logits of a text's last tokens through phase 1 and phase 2, for many cases.

    oracle_job.py MODEL TOKENS.npy NUM_QUESTION CASES.json LOGITS.npz ENGINE_OPTIONS

The text is a context, NUM_QUESTION question tokens, and generated tokens, of which there are as
many as there are question tokens. A case is `StarConfig`'s fields, but with a list of KV
placements, all of which ask the same encoded context, and some of `Limits`'. ENGINE_OPTIONS are
`EngineOptions`' fields as JSON.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from helpers import forced_logits
from star_attention.config import StarConfig
from star_attention.distributed import default_communicator
from star_attention.engines.base import Limits
from star_attention.engines.loader import load_engine, star_ranks
from star_attention.engines.options import EngineOptions
from star_attention.models.checkpoint import find_model
from star_attention.runtime.leader import lead_together

LIMITS = {"pass_tokens", "ring_tokens", "pass_sequences"}


def main() -> None:
    model, tokens, num_question, cases, output, options = sys.argv[1:]
    text, num_question = np.load(tokens), int(num_question)
    context_ids, question, answer = np.split(text, [-2 * num_question, -num_question])
    cases = json.loads(Path(cases).read_text())
    comm = default_communicator()
    page = cases[0]["tokens_per_block"]
    options = EngineOptions(**json.loads(options))
    ranks = star_ranks(comm, options.tp)
    engine = load_engine(find_model(model), ranks, page, options)
    common = Limits.common(comm.gather_objects(engine.limits))
    results = {}
    for index, case in enumerate(cases):
        placements = case.pop("kv_placement")
        limits = replace(common, **{name: case.pop(name) for name in LIMITS & case.keys()})
        leader, worker = lead_together(engine, ranks, limits)
        context = leader.encode(context_ids, StarConfig(**case))
        for placement in placements:
            logits = forced_logits(leader, context, question, answer, placement)
            for other in comm.gather_objects(logits):
                assert np.array_equal(other, logits), "ranks differ"
            results[f"{index} {placement}"] = logits
        leader.release(context)
        assert worker.pool.pages_in_use == 0
        assert not leader.scheduler.pages_in_use.any()
    if comm.rank == 0:
        np.savez(output, **results)


main()
