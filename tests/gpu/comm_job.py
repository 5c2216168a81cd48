"""One rank of a communication test: CASE, under mpirun. `bench` prints the merge's latency,
`bench_exchange` the rate of exchanges and what GEMMs lose to them.

Ranks take the GPUs in turn. A case that needs more GPUs than there are prints "skip: " and why.
"""

import hashlib
import itertools
import random
import re
import sys
import time

import pytest
import torch

from star_attention import _C
from star_attention.distributed import Traffic, default_communicator
from star_attention.distributed.gpu import GpuCommunicator
from star_attention.distributed.topology import local_device
from star_attention.errors import RankError, UserError
from star_attention.ops import cuda

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
DTYPES = tuple(TOLERANCE)


def stream():
    return torch.cuda.current_stream().cuda_stream


def partials(size, shape, dtype, seed=0):
    """Every rank's o [size, T, H, D] and lse [size, T, H], the same on all ranks. Some are empty,
    and one row is so on every rank; what an empty one's o holds counts for nothing."""
    generator = torch.Generator().manual_seed(seed)
    o = torch.randn(size, *shape, generator=generator).to(dtype)
    lse = 10 * torch.randn(size, *shape[:2], generator=generator)
    lse[-1, 0] = -torch.inf
    lse[:, -1, 0] = -torch.inf
    o[lse == -torch.inf] = torch.nan
    return o.cuda(), lse.cuda()


def merged(o, lse):
    total = lse.double().logsumexp(0)
    weights = (lse.double() - total).exp().nan_to_num(nan=0.0)[..., None]
    return torch.where(weights > 0, weights * o.double(), 0.0).sum(0)


def check_close(out, expected):
    error = float((out.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    assert error <= TOLERANCE[out.dtype], f"off by {error:.2e}"


def check_same_bits(host, *tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    assert len(set(host.gather_objects(digest.hexdigest()))) == 1, "ranks differ"


def check_merge(host, comm, shape, dtype, out_dtype, seed=0):
    o, lse = partials(host.size, shape, dtype, seed)
    out = torch.full(shape, torch.nan, dtype=out_dtype, device="cuda")
    comm.merge(o[host.rank], lse[host.rank], out, stream())
    torch.cuda.synchronize()
    comm.check()
    check_close(out, merged(o, lse))
    assert (out[-1, 0] == 0).all()
    check_same_bits(host, out)


def check_merges(host, comm):
    seed = 0
    for tokens in (1, 3, 17, 512):
        for heads, head_dim in ((32, 128), (5, 64)):
            for dtype in DTYPES:
                for out_dtype in dict.fromkeys((dtype, torch.bfloat16)):
                    seed += 1
                    check_merge(host, comm, (tokens, heads, head_dim), dtype, out_dtype, seed)


def check_nan(host, comm):
    """One rank's NaN reaches all ranks, in its rows."""
    for dtype in DTYPES:
        o, lse = partials(host.size, (3, 8, 64), dtype)
        lse[0, 0, 1] = torch.nan
        lse[:, 1, 2] = torch.nan
        lse[0, 1, 3] = torch.inf
        o[0, 2, 4, 5] = torch.nan
        out = torch.zeros(3, 8, 64, device="cuda")
        comm.merge(o[host.rank], lse[host.rank], out, stream())
        torch.cuda.synchronize()
        comm.check()
        expected = torch.zeros_like(out, dtype=torch.bool)
        expected[0, 1] = expected[1, 2] = expected[1, 3] = expected[2, 4, 5] = True
        assert torch.equal(out.isnan(), expected)


def check_nan_page(host, comm):
    """A NaN in a page of the first rank reaches all ranks, in the heads that read it."""
    torch.manual_seed(host.rank)
    pool = torch.randn(9, 2, 2, 128, 128, dtype=torch.bfloat16, device="cuda")
    if host.rank == 0:
        pool[3, 0, 1, 5] = torch.nan
    q = torch.randn(2, 8, 128, dtype=torch.bfloat16, device="cuda")
    o, lse, out = q.float(), q.new_empty(2, 8, dtype=torch.float32), q.float()
    cuda.paged_attention(
        q,
        pool,
        torch.arange(9, dtype=torch.int32, device="cuda")[None],
        torch.tensor([0, 2], dtype=torch.int32, device="cuda"),
        torch.tensor([9 * 128], dtype=torch.int32, device="cuda"),
        causal=True,
        scale=128**-0.5,
        max_q_len=2,
        max_kv_len=9 * 128,
        out=(o, lse),
    )
    comm.merge(o, lse, out, stream())
    torch.cuda.synchronize()
    comm.check()
    assert out[:, 4:].isnan().all()
    assert out[:, :4].isfinite().all()


def merge(host, device):
    comm = GpuCommunicator(host, device, merge="peer", timeout=60)
    assert comm.merge_path == "peer"
    before = comm.traffic.copy()
    check_merge(host, comm, (2, 8, 128), torch.float16, torch.float32)
    sent = 2 * 8 * (128 * 2 + 4) * (host.size - 1)
    traffic = comm.traffic - before
    assert (traffic.sent, traffic.received) == (sent, sent), traffic
    check_merges(host, comm)
    check_nan(host, comm)
    check_nan_page(host, comm)


def nccl_merge(host, device):
    comm = GpuCommunicator(host, device, merge="nccl")
    check_merges(host, comm)
    check_nan(host, comm)
    check_nan_page(host, comm)
    in_pieces = GpuCommunicator(host, device, merge="nccl", merge_capacity=64 << 10)
    check_merge(host, in_pieces, (50, 8, 128), torch.bfloat16, torch.bfloat16)


def capacity(host, device):
    """What is more than its capacity goes through peer memory in pieces, unless it is one token."""
    comm = GpuCommunicator(host, device, merge="peer", merge_capacity=64 << 10, timeout=60)
    for tokens in (16, 17, 50, 1, 33):
        check_merge(host, comm, (tokens, 8, 128), torch.float32, torch.bfloat16)
    o, lse = (x[0] for x in partials(1, (17, 8, 128), torch.float32))
    one = [x.view(1, 136, *x.shape[2:]) for x in (o, lse, o)]
    expect(ValueError, "o: got 69632 bytes a token", comm.merge, *one)


def arguments(host, device):
    """Bad arguments are refused before anything is sent."""
    comm = GpuCommunicator(host, device, merge="peer", timeout=60)
    o, lse = (x[0] for x in partials(1, (3, 4, 64), torch.float32))
    merge = comm.merge
    expect(ValueError, "lse.dtype: got float16, expected float32", merge, o, lse.half(), o)
    expect(ValueError, r"lse.shape: got [3, 2], expected [3, 4]", merge, o, lse[:, :2], o)
    expect(ValueError, "o.dtype: got int32", merge, o.int(), lse, o)
    expect(ValueError, "head_dim: got 8, expected a multiple", merge, *narrow(o, lse, 8))
    expect(ValueError, "out.shape: got [2, 4, 64]", merge, o, lse, o[:2])
    expect(ValueError, "lse.device: got host memory", merge, o, lse.cpu(), o)
    misplaced = torch.zeros(o.numel() + 1, device="cuda")[1:].view_as(o)
    expect(ValueError, "an address aligned to 8 bytes", merge, misplaced, lse, o)
    check_merge(host, comm, (3, 4, 64), torch.float16, torch.float16)
    if host.size > 1 and not comm.shares_gpu:
        expect(ValueError, "dest: got 9", comm.exchange, [(o, 9)], [], stream())
        expect(ValueError, "source: got 9", comm.exchange, [], [(o, 9)], stream())
        expect(ValueError, "buffer.dtype: got int64", comm.exchange, [(o.long(), 0)], [], stream())
        expect(ValueError, "gathered.nbytes", comm.all_gather, o, o, stream())
        expect(ValueError, "buffer.dtype: got int32", comm.all_reduce, o.int(), stream())


def narrow(o, lse, head_dim):
    return o[..., :head_dim].contiguous(), lse, o[..., :head_dim].contiguous()


def expect(kind, message, call, *arguments):
    with pytest.raises(kind, match=re.escape(message)):
        call(*arguments)


def replay(host, device):
    """A graph of merges, replayed by ranks that are late at random, on the host and on the GPU.
    Inputs change with every replay, so that an old value would show in the sum of the outputs."""
    comm = GpuCommunicator(host, device, merge="peer", timeout=60)
    check_merge(host, comm, (1, 32, 128), torch.float32, torch.float32)  # loads the kernel
    every_o, every_lse, o, lse, out, total = [], [], [], [], [], []
    for shape in ((1, 32, 128), (17, 32, 128), (3, 4, 64), (1, 32, 128)):
        all_o, all_lse = partials(host.size, shape, torch.float32, len(o))
        every_o.append(all_o)
        every_lse.append(all_lse)
        o.append(all_o[host.rank].clone())
        lse.append(all_lse[host.rank].clone())
        out.append(torch.empty_like(o[-1]))
        total.append(torch.zeros_like(o[-1], dtype=torch.float64))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(len(o)):
            o[i].add_(1)
            comm.merge(o[i], lse[i], out[i], stream())
            total[i].add_(out[i])

    delays = random.Random(host.rank)
    for i in range(200):
        if delays.random() < 0.15:
            time.sleep(delays.uniform(0, 0.01))
        if delays.random() < 0.15:
            torch.cuda._sleep(delays.randrange(10_000_000))
        graph.replay()
        if i % 50 == 49:
            torch.cuda.synchronize()
            comm.check()
    for i in range(len(o)):
        expected = torch.zeros_like(total[i])
        for _ in range(200):
            every_o[i].add_(1)
            expected += merged(every_o[i], every_lse[i])
        assert (total[i] - expected).abs().max() <= 1e-6 * expected.abs().max()
    check_same_bits(host, *total)


def lost(host, device):
    """The last rank takes no part: the others learn it, by name, and do not wait again."""
    comm = GpuCommunicator(host, device, merge="peer", timeout=2)
    shape = (40, 32, 128)
    check_merge(host, comm, shape, torch.float32, torch.float32)
    if host.rank == host.size - 1:
        host.gather_objects(None)
        return
    o, lse = (x[0] for x in partials(1, shape, torch.float32))
    for low, high in ((1.9, 4), (0, 0.5)):
        out = torch.zeros_like(o)
        torch.cuda.synchronize()
        began = time.monotonic()
        comm.merge(o, lse, out, stream())
        torch.cuda.synchronize()
        assert low < time.monotonic() - began < high, time.monotonic() - began
        assert out.isnan().all()
        expect(RankError, f"rank {host.size - 1} is lost", comm.check)
    host.gather_objects(None)


def transfers(host, device):
    """Contents of everything else, in the order of the stream that asked for it."""
    comm = GpuCommunicator(host, device, timeout=60)
    rank, size = host.rank, host.size
    before, moved = comm.traffic.copy(), 0
    for dtype in (*DTYPES, torch.int32, torch.uint8):
        for count in (1, 1000, 4 << 20):
            mine = torch.arange(count, device="cuda").remainder(50).add(rank).to(dtype)
            gathered = mine.new_empty(size, count)
            comm.all_gather(mine, gathered, stream())
            for other in range(size):
                assert torch.equal(gathered[other] + rank, mine + other)
            moved += mine.nbytes * (size - 1)
    traffic = comm.traffic - before
    assert (traffic.sent, traffic.received) == (moved, moved), (traffic, moved)

    for dtype in DTYPES:
        buffer = torch.arange(1000, device="cuda").remainder(50).add(rank).to(dtype)
        expected = size * (buffer - rank) + sum(range(size))
        if comm.shares_gpu:
            expect(UserError, "need a GPU for each rank", comm.all_reduce, buffer, stream())
        else:
            comm.all_reduce(buffer, stream())
            assert torch.equal(buffer, expected)
            check_same_bits(host, buffer)


def exchange(host, device):
    """Bits that ranks send one another, of other sizes each way, from pages of a pool into others'.
    They are read once they are written, however late, and may be overwritten behind `wait`; two
    exchanges are under way at a time, beside merges."""
    comm = GpuCommunicator(host, device, timeout=60)
    rank, size = host.rank, host.size
    others = [other for other in range(size) if other != rank]

    def content(source, dest, call):
        count = (3 * source + dest + call) % 4 * (7 if call % 2 else 1 << 20)  # or nothing
        generator = torch.Generator().manual_seed(97 * call + 10 * source + dest)
        bits = torch.randint(-(1 << 15), 1 << 15, (count,), generator=generator)
        return bits.to(torch.int16).view(torch.bfloat16)  # NaNs too

    before, sent, received = comm.traffic.copy(), 0, 0
    side = torch.cuda.Stream()
    for turn in range(20):
        with torch.cuda.stream(side if turn % 4 == 3 else torch.cuda.current_stream()):
            pool = torch.zeros(2, 2 * size, 4 << 20, dtype=torch.bfloat16, device="cuda")
            requests = []
            for call in (2 * turn, 2 * turn + 1):
                sends, receives, expected = [], [], []
                for other in others:
                    leaves, arrives = content(rank, other, call), content(other, rank, call)
                    buffer = pool[call % 2, other, : len(leaves)]
                    room = pool[call % 2, size + other, : len(arrives)]
                    source = leaves.cuda()
                    torch.cuda._sleep(2_000_000)  # written long after the call below
                    buffer.copy_(source)
                    if len(leaves):
                        sends.append((buffer, other))
                    if len(arrives):
                        receives.append((room, other))
                        expected.append(arrives)
                    sent, received = sent + leaves.nbytes, received + arrives.nbytes
                requests.append((comm.exchange(sends, receives, stream()), receives, expected))
            if turn % 2:  # it waits for the GPU
                check_merge(host, comm, (3, 8, 128), torch.float32, torch.float32, turn)
            arrived = []
            for request, receives, _ in requests:
                request.wait(stream())
                arrived.append([room.clone() for room, _ in receives])
            pool.fill_(1)
            for (_, _, expected), rooms in zip(requests, arrived, strict=True):
                for room, bits in zip(rooms, expected, strict=True):
                    assert torch.equal(room.cpu().view(torch.int16), bits.view(torch.int16)), turn
    comm.check()
    traffic = comm.traffic - before
    merged = 10 * 3 * 8 * (128 * 4 + 4) * (size - 1)
    assert traffic == Traffic(sent + merged, received + merged), (traffic, sent, received)
    comm.exchange([], [], stream()).wait(stream())
    if not comm.shares_gpu and size > 1:
        check_beside(host, comm)


def check_beside(host, comm):
    """What its stream does behind the call does not hold an exchange up."""
    buffers = [torch.zeros(1 << 20, device="cuda") for _ in range(2)]
    after, before = (host.rank + 1) % host.size, (host.rank - 1) % host.size
    other = torch.cuda.Stream()
    for _ in range(3):
        host.gather_objects(None)
        request = comm.exchange([(buffers[0], after)], [(buffers[1], before)], stream())
        torch.cuda._sleep(2_000_000_000)  # about a second
        busy = torch.cuda.Event()
        busy.record()
        request.wait(other.cuda_stream)
        other.synchronize()
        assert not busy.query()
        torch.cuda.synchronize()


def host_merge(host, device):
    """Without NCCL and peer memory: through host memory."""
    _C.PeerMerge, original = _no_peers, _C.PeerMerge
    comm = GpuCommunicator(host, device)
    _C.PeerMerge = original
    assert comm.merge_path == ("host" if comm.shares_gpu else "nccl")
    check_merge(host, comm, (17, 32, 128), torch.bfloat16, torch.bfloat16)
    check_nan(host, comm)
    check_nan_page(host, comm)


def _no_peers(*_arguments):
    raise RuntimeError("no peer memory today")


def bench(host, device, merges=50, replays=40):
    """Median time of a merge in a graph of 50, and of a call on its own stream outside a graph."""
    paths = ["peer"] if _shares_gpu(host, device) else ["peer", "nccl"]
    for path in paths:
        comm = GpuCommunicator(host, device, merge=path)
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in (1, 16, 128, 512):
                o, lse = partials(host.size, (tokens, 32, 128), dtype)
                o, lse = o[host.rank], lse[host.rank]
                out = torch.empty_like(o, dtype=torch.bfloat16)
                comm.merge(o, lse, out, stream())
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    for _ in range(merges):
                        comm.merge(o, lse, out, stream())
                host.gather_objects(None)
                events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
                events[0].record()
                for event in events[1:]:
                    graph.replay()
                    event.record()
                torch.cuda.synchronize()
                comm.check()
                times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events[5:]))
                micros = 1e3 * times[len(times) // 2] / merges
                name = str(dtype).removeprefix("torch.")
                if host.rank == 0:
                    print(f"{path:5} {name:9} {tokens:4} tokens {micros:8.2f} us", flush=True)


def bench_exchange(host, device, repeats=20):
    """Every rank's pages to every other, alone and beside GEMMs: what either takes of the other."""
    comm = GpuCommunicator(host, device)
    rank, size = host.rank, host.size
    others = [other for other in range(size) if other != rank]
    x = torch.randn(16384, 4096, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(6144, 4096, dtype=torch.bfloat16, device="cuda")
    out = x.new_empty(16384, 6144)

    def project():
        torch.mm(x, weight.t(), out=out)

    def timed(begin, gemms):
        """Milliseconds until the GEMMs are done, and until all is."""
        times = []
        for _ in range(repeats + 3):
            host.gather_objects(None)
            torch.cuda.synchronize()
            start, computed, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            start.record()
            request = begin()
            for _ in range(gemms):
                project()
            computed.record()
            if request:
                request.wait(stream())
            end.record()
            torch.cuda.synchronize()
            times.append((start.elapsed_time(computed), start.elapsed_time(end)))
        times = sorted(times[3:], key=lambda each: each[1])
        return times[len(times) // 2]

    for megabytes in (1, 4, 16, 64):
        pages = torch.zeros(size, megabytes << 20, dtype=torch.uint8, device="cuda")

        def begin(pages=pages):
            sends = [(pages[rank], other) for other in others]
            return comm.exchange(sends, [(pages[other], other) for other in others], stream())

        (_, alone), (gemm, _) = timed(begin, 0), timed(lambda: None, 4)
        computed, both = timed(begin, 4)
        rate = (size - 1) * pages[0].nbytes / alone / 1e6
        if rank == 0:
            print(
                f"{megabytes:3} MiB a rank: {alone:.3f} ms, {rate:.0f} GB/s each way; 4 GEMMs "
                f"{gemm:.3f} ms; beside one another {computed:.3f} ms GEMMs, {both:.3f} ms all",
                flush=True,
            )


def _shares_gpu(host, device):
    return len(set(host.gather_objects(_C.device_id(device)))) < host.size


NEED_OWN_GPUS = (nccl_merge, bench_exchange)
CASES = (
    *(merge, nccl_merge, host_merge, capacity, arguments, replay, lost, transfers, exchange),
    *(bench, bench_exchange),
)


def main():
    case = {case.__name__: case for case in CASES}[sys.argv[1]]
    host = default_communicator()
    device = local_device(host)
    torch.cuda.set_device(device)
    if case in NEED_OWN_GPUS and _shares_gpu(host, device):
        if host.rank == 0:
            print(f"skip: {host.size} ranks share {torch.cuda.device_count()} GPUs")
        return
    case(host, device)


main()
