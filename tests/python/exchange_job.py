"""Run under mpirun, or by ranks that are threads: what an exchange brings, and counts."""

import numpy as np

from star_attention.distributed import Traffic, default_communicator


def check_exchanges(comm):
    """Two that overlap and one of nothing; of each pair's ranks one sends more, or nothing."""
    rank, size = comm.rank, comm.size
    others = [other for other in range(size) if other != rank]

    def content(source, dest, call):
        count = (source * size + dest) % 4 * (1 << 18 if call else 1)  # no request waits for all
        return np.arange(count, dtype=np.int32) + 100 * source + 10 * dest + call

    requests, before, moved = [], comm.traffic.copy(), Traffic()
    for call in range(2):
        sends = [(content(rank, other, call), other) for other in others]
        receives = [(np.zeros_like(content(other, rank, call)), other) for other in others]
        sends, receives = ([each for each in side if each[0].size] for side in (sends, receives))
        requests.append((call, comm.exchange(sends, receives), receives))
        moved.add(Traffic(*(sum(b.nbytes for b, _ in side) for side in (sends, receives))))
    nothing = comm.exchange([], [])
    assert comm.gather_objects(rank) == list(range(size))
    for call, request, receives in requests:
        request.wait()
        for buffer, other in receives:
            assert np.array_equal(buffer, content(other, rank, call)), (call, other)
    nothing.wait()
    assert comm.traffic - before == moved


if __name__ == "__main__":
    check_exchanges(default_communicator())
