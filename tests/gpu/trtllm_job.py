"""Run under mpirun: TensorRT-LLM's PyTorch backend by its stand-in, with Star Attention's models on
GPUs. Prints how far rank 0's logits are from Hugging Face's in float32, and how far Hugging Face's
own in the same dtype are: ‖logits - oracle‖ / ‖oracle‖. Ranks are compared bit by bit.

trtllm_job.py MODEL [cpu]
"""

import copy
import hashlib
import importlib
import sys

import numpy as np
import pytest
import torch
import transformers
from mpi4py import MPI

import fake_trtllm_pytorch as fake
from helpers import block_mask, hf_logits

BLOCK, ANCHOR, QUERY = 512, 256, 100
LENGTHS = {4: 2500, 9: 1100, 6: 50, 2: 1900}  # 6 is shorter than a query
SHARED = 1152  # tokens of 2 that are 4's and cached: not a whole number of blocks
ANSWER = 70


def main():
    folder, device = sys.argv[1], torch.device(*sys.argv[2:] or ["cuda"])
    patch = pytest.MonkeyPatch()
    patch.setattr(fake, "MODULES", {**fake.MODULES, "_utils": (mpi_comm,)})
    fake.install(patch)
    star = importlib.import_module("star_attention.trtllm.pytorch.model")
    rank, ranks = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    if device.type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        from star_attention.distributed.mpi import MpiCommunicator

        patch.setattr(star, "connect", lambda mapping: MpiCommunicator(mpi_comm().Dup()))
    for name, size in (("BLOCK", BLOCK), ("ANCHOR", ANCHOR), ("QUERY", QUERY)):
        patch.setenv(f"TRTLLM_STAR_{name}_SIZE", str(size))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    random = np.random.default_rng(0)
    tokens = {each: random.integers(0, 97, n + ANSWER) for each, n in LENGTHS.items()}
    tokens[2][:SHARED] = tokens[4][:SHARED]
    page = 64 * ranks
    counts = {each: -(-len(tokens[each]) // page) for each in tokens}
    numbers = random.permutation(sum(counts.values())).tolist()
    num_blocks = len(numbers)
    blocks = {each: [numbers.pop() for _ in range(count)] for each, count in counts.items()}
    blocks[2][: SHARED // page] = blocks[4][: SHARED // page]
    engine = fake.Engine(
        star.StarLlamaForCausalLM,
        model,
        fake.Mapping(ranks, rank, tp_size=ranks),
        page,
        num_blocks,
        blocks,
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
    )
    logits = run(engine, tokens)
    if rank == 0:
        oracle = expected_logits(model, tokens)
        theirs = expected_logits(copy.deepcopy(model).to(engine.manager.primary.dtype), tokens)
        error, allowed = (distance(each, oracle) for each in (logits, theirs))
        print(f"off by {error:.2e}, Hugging Face by {allowed:.2e}")
    MPI.COMM_WORLD.Barrier()


def mpi_comm():
    return MPI.COMM_WORLD


def expected_logits(model, tokens):
    """{request: of its last prompt token and of the answer's}."""
    masks = {
        each: block_mask(len(tokens[each]), max(n - QUERY, 0), BLOCK, ANCHOR)
        for each, n in LENGTHS.items()
    }
    return {
        each: hf_logits(model, tokens[each], masks[each])[n - 1 :] for each, n in LENGTHS.items()
    }


def distance(logits, oracle):
    """The worst request's."""
    return max(
        np.linalg.norm(logits[each] - oracle[each][: len(logits[each])])
        / np.linalg.norm(oracle[each][: len(logits[each])])
        for each in oracle
    )


def run(engine, tokens):
    """Two prompts together, then the others while they generate, then all generate; the logits of
    each request."""
    ends, rows = dict(LENGTHS), {each: [] for each in LENGTHS}
    engine.lengths[2] = SHARED
    schedule = [((4, 9), ()), ((6, 2), (9, 4)), *[((), (4, 9, 6, 2))] * (ANSWER - 1)]
    for prompts, generated in schedule:
        logits = engine.step(
            {each: tokens[each][engine.lengths.get(each, 0) : LENGTHS[each]] for each in prompts},
            {each: tokens[each][ends[each]] for each in generated},
        )
        digest = hashlib.sha256(logits.cpu().numpy().tobytes()).hexdigest()
        assert len(set(MPI.COMM_WORLD.allgather(digest))) == 1, "ranks differ"
        for row, each in zip(logits.cpu().numpy(), (*prompts, *generated), strict=True):
            ends[each] += each in generated
            rows[each].append(row)
    return {each: np.stack(logits) for each, logits in rows.items()}


if __name__ == "__main__":
    main()
