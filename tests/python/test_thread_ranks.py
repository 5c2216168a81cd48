"""The communicator of other tests does what MPI does, and tells what MPI would hang at."""

from pathlib import Path

import numpy as np
import pytest
import torch

import exchange_job
from exchange_job import check_exchanges
from helpers import run_job
from star_attention.errors import RankError
from thread_ranks import ThreadRanks


def test_collectives():
    def work(comm):
        gathered = torch.empty(3, 2, dtype=torch.bfloat16)
        comm.all_gather(torch.full((2,), comm.rank, dtype=torch.bfloat16), gathered)
        total = torch.full((2,), 1.0 + comm.rank)
        comm.all_reduce(total)
        objects = comm.gather_objects({"rank": comm.rank}), comm.broadcast_object(comm.rank, 1)
        return gathered.tolist(), total.tolist(), *objects

    for result in ThreadRanks(3).run(work):
        assert result == (
            [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]],
            [6.0, 6.0],
            [{"rank": 0}, {"rank": 1}, {"rank": 2}],
            1,
        )


@pytest.mark.parametrize("size", [2, 3])
def test_exchanges(size):
    ThreadRanks(size).run(check_exchanges)
    run_job(size, Path(exchange_job.__file__))


def test_split():
    def work(comm):
        part = comm.split(comm.rank % 2)
        assert part.world is comm
        whole = part.split(0)
        return part.rank, part.size, part.gather_objects(comm.rank), whole.world is comm

    assert ThreadRanks(4).run(work) == [
        (0, 2, [0, 2], True),
        (0, 2, [1, 3], True),
        (1, 2, [0, 2], True),
        (1, 2, [1, 3], True),
    ]


def test_traffic():
    def work(comm):
        sends, receives = [(np.zeros(5, np.uint8), 1)], [(np.zeros(5, np.uint8), 0)]
        comm.exchange(*([], receives) if comm.rank else (sends, [])).wait()
        comm.all_gather(np.zeros(3, np.uint8), np.zeros((2, 3), np.uint8))
        comm.gather_objects("is not counted")
        return comm.traffic.sent, comm.traffic.received

    assert ThreadRanks(2).run(work) == [(8, 3), (3, 8)]


def test_an_error_ends_all():
    def work(comm):
        if comm.rank == 1:
            raise KeyError("mine")
        comm.gather_objects(0)

    with pytest.raises(KeyError, match="mine"):
        ThreadRanks(3).run(work)
    outcomes = ThreadRanks(3).outcomes(work)
    assert [type(outcome) for outcome in outcomes] == [RankError, KeyError, RankError]
    assert "rank 1 failed: KeyError('mine')" in str(outcomes[0])


def test_abort_ends_all():
    outcomes = ThreadRanks(2).outcomes(
        lambda comm: comm.abort() if comm.rank else comm.split(0).broadcast_object(1)
    )
    assert isinstance(outcomes[1], SystemExit)
    assert isinstance(outcomes[0], RankError)


def test_what_would_hang():
    def different(comm):
        comm.gather_objects(0) if comm.rank else comm.broadcast_object(0)

    with pytest.raises(RankError, match=r"call 0: rank . calls .*object.*, rank . calls"):
        ThreadRanks(2).run(different)

    def missing(comm):
        if comm.rank:
            comm.exchange([], [(np.zeros(1), 0)]).wait()

    with pytest.raises(RankError, match=r"waiting for rank 0 took more than 0\.1 s"):
        ThreadRanks(2, timeout=0.1).run(missing)

    def sizes(comm):
        other = 1 - comm.rank
        comm.exchange([(np.zeros(1), other)], [(np.zeros(1 + comm.rank), other)]).wait()

    with pytest.raises(AssertionError, match="8 bytes arrive, 16 are expected"):
        ThreadRanks(2).run(sizes)

    def nobody_sends(comm):
        comm.exchange([], [(np.zeros(1), 0)] if comm.rank else []).wait()

    with pytest.raises(AssertionError, match=r"rank . (sends|expects) otherwise"):
        ThreadRanks(2).run(nobody_sends)
