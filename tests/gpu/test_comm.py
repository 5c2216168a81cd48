"""Ranks on GPUs, as many as there are; ranks share them if need be. The cases are in comm_job.py,
which also measures: mpirun -n 2 python tests/gpu/comm_job.py bench (or bench_exchange)."""

from pathlib import Path

import pytest

from helpers import run_job

pytest.importorskip("star_attention.distributed.gpu", exc_type=ImportError)
pytest.importorskip("mpi4py", exc_type=ImportError)

JOB = Path(__file__).with_name("comm_job.py")


def run(ranks, case):
    out = run_job(ranks, JOB, case, timeout=300).stdout
    if out.startswith("skip: "):
        pytest.skip(out.removeprefix("skip: ").strip())


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "case",
    [
        *("merge", "nccl_merge", "host_merge", "capacity", "arguments", "replay", "lost"),
        *("transfers", "exchange"),
    ],
)
def test_ranks(case, ranks):
    run(ranks, case)


@pytest.mark.parametrize("case", ["merge", "capacity", "arguments", "transfers", "exchange"])
def test_one_rank(case):
    run(1, case)


def test_eight_ranks():
    run(8, "merge")
