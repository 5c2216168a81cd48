"""Run under mpirun: the logits of a text's last tokens through phase 1 and phase 2, for many cases.

    oracle_job.py MODEL TOKENS.npy NUM_QUESTION CASES.json LOGITS.npz ENGINE_OPTIONS

The text is a context, NUM_QUESTION question tokens, and generated tokens, of which there are as
many as there are question tokens. A case is `StarConfig`'s fields, but with a list of KV
placements, all of which ask the same encoded context. ENGINE_OPTIONS are `EngineOptions`' fields as
JSON.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from helpers import forced_logits
from star_attention.config import StarConfig
from star_attention.distributed import default_communicator
from star_attention.engines.loader import EngineOptions, load_engine, star_ranks
from star_attention.models.checkpoint import find_model
from star_attention.runtime.runtime import Runtime


def main() -> None:
    model, tokens, num_question, cases, output, options = sys.argv[1:]
    text, num_question = np.load(tokens), int(num_question)
    context_ids, question, answer = np.split(text, [-2 * num_question, -num_question])
    cases = json.loads(Path(cases).read_text())
    comm = default_communicator()
    page = cases[0]["tokens_per_block"]
    options = EngineOptions(**json.loads(options))
    ranks = star_ranks(comm, options.tp)
    runtime = Runtime(load_engine(find_model(model), ranks, page, options), ranks)
    results = {}
    for index, case in enumerate(cases):
        placements = case.pop("kv_placement")
        if "max_step_tokens" in case:
            runtime.engine.max_step_tokens = case.pop("max_step_tokens")
        context = runtime.encode(context_ids, StarConfig(**case))
        for placement in placements:
            context.config = replace(context.config, kv_placement=placement)
            logits = forced_logits(runtime, context, question, answer)
            for other in comm.gather_objects(logits):
                assert np.array_equal(other, logits), "ranks differ"
            results[f"{index} {placement}"] = logits
        context.release()
        assert runtime.pool.pages_in_use == 0
    if comm.rank == 0:
        np.savez(output, **results)


main()
