"""A rank that fails or is killed takes the whole job down, in seconds, with its reason."""

import os
import signal
import subprocess
import sys
import time

import pytest

from helpers import HERE, run_job

SECONDS = 10


def check_job_ends(kind, moment, rank, model, *options):
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, HERE / "failing_job.py", kind, moment, str(rank), model, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert "failing at" in out, err
    failed = float(out.split("failing at ")[1].split()[0])
    assert time.monotonic() - max(failed, began) < SECONDS
    assert process.returncode not in (0, 2)
    reason = {
        "raise": f"rank {rank} failed: RuntimeError: the disk is on fire",
        "kill": f"rank {rank} was ended by signal 9",
    }
    assert reason[kind] in err
    assert "ORTE" not in err
    assert "prterun" not in err


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("moment", ["context", "decode"])
@pytest.mark.parametrize("kind", ["raise", "kill"])
def test_one_rank_fails(tiny_chat_model, kind, moment, rank):
    check_job_ends(kind, moment, rank, tiny_chat_model)


def test_ranks_that_differ(tiny_chat_model):
    code = (
        "import sys\n"
        "from star_attention import LLM, StarConfig, UserError\n"
        "from star_attention.distributed import world_rank\n"
        "size = 128 * (1 + world_rank())\n"
        "try: LLM(sys.argv[1], StarConfig(block_size=size))\n"
        "except UserError as error: print(error)\n"
    )
    job = run_job(2, "-c", code, tiny_chat_model, timeout=60)
    assert job.stdout.count("block_size is 256 on rank 1, but 128 on rank 0") == 2


def test_uncaught_exception_in_a_script():
    """A program of the user's own that fails on one rank, while the others wait for it."""
    code = (
        "from star_attention.distributed import default_communicator\n"
        "comm = default_communicator()\n"
        "if comm.rank == 1: raise KeyError('no such report')\n"
        "comm.gather_objects(None)\n"
    )
    job = run_job(3, "-c", code, timeout=60, check=False)
    assert job.returncode not in (0, 2)
    assert "KeyError: 'no such report'" in job.stderr
