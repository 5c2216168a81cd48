"""Ranks on several nodes, also run under mpirun: what they answer, and what went between them.

    nodes_job.py MODEL OUTPUT.pickle ENGINE_OPTIONS NODES

ENGINE_OPTIONS are `EngineOptions`' fields as JSON. NODES: "hosts", the ones that ranks are on, or
"nccl", each rank is one for NCCL, whatever the machine.
"""

import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np

from helpers import forced_logits, run_all
from star_attention import SamplingParams, StarConfig
from star_attention.arrivals import Arrivals
from star_attention.distributed import default_communicator
from star_attention.distributed.topology import machine
from star_attention.engines.loader import load_engine
from star_attention.engines.options import EngineOptions
from star_attention.models.checkpoint import find_model
from star_attention.runtime.leader import lead_together

PAGE, BLOCK, CONTEXT = 64, 512, 4 * 512 - 70
METHODS = {
    "broadcast": StarConfig(BLOCK, anchor_mode="broadcast", tokens_per_block=PAGE),
    "one block": StarConfig(2048, kv_placement="round_robin", tokens_per_block=PAGE),
}


def answers(comm, model, options):
    """By method: logits and tokens, and bytes of phase 1, of all ranks: payload as the plan has it,
    [from, to], as they counted it, sent and received, and what left by their nodes' links."""
    text = np.random.default_rng(3).integers(0, 97, CONTEXT + 20).astype(np.int32)
    context_ids, question, forced = np.split(text, [CONTEXT, CONTEXT + 15])
    engine = load_engine(find_model(model), comm, PAGE, options)
    leader, worker = lead_together(engine, comm)
    found = {}
    for method, config in METHODS.items():
        counted, left = comm.traffic.copy(), _left(comm)
        context = leader.encode(context_ids, config)
        left, counted = _left(comm) - left, comm.traffic - counted
        leader.scheduler.add_question(context, question, SamplingParams(max_tokens=12))
        found[method] = {
            "tokens": next(iter(run_all(leader).values())),
            "logits": forced_logits(leader, context, question, forced),
            "planned": _planned(context.plan) * engine.page_bytes * engine.config.num_layers,
            "counted": comm.gather_objects((counted.sent, counted.received)),
            "left": comm.gather_objects(left),
        }
        leader.release(context)
        logits = comm.gather_objects(found[method]["logits"])
        assert all(np.array_equal(each, logits[0]) for each in logits), "ranks differ"
        assert worker.pool.pages_in_use == 0
    return found


def _planned(plan):
    """Pages that go from rank to rank."""
    found = np.zeros((plan.num_ranks, plan.num_ranks), np.int64)
    arrivals, passes = Arrivals(plan), plan.passes()
    while not passes.finished:
        for group in arrivals.take(passes.next()):
            for each in group:
                found[each.source, each.dest] += len(each.pages)
    return found


def _left(comm):
    """Bytes that left this rank's network namespace so far; no rank goes on before all know."""
    comm.gather_objects(None)
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    devices = dict(line.split(":") for line in lines)
    left = sum(int(numbers.split()[8]) for name, numbers in devices.items() if name.strip() != "lo")
    comm.gather_objects(None)
    return left


def main():
    model, output, options, nodes = sys.argv[1:]
    comm = default_communicator()
    if nodes == "nccl":
        os.environ["NCCL_HOSTID"] = f"node{comm.rank}"
    where = comm.gather_objects(machine())
    found = answers(comm, model, EngineOptions(**json.loads(options)))
    if comm.rank == 0:
        Path(output).write_bytes(pickle.dumps((where, found)))


if __name__ == "__main__":
    main()
