"""What a GpuCommunicator decides before a GPU is needed: on ranks that are threads, with stand-ins
for the CUDA classes."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

import star_attention
from star_attention.distributed import SingleProcess, Traffic, topology
from star_attention.errors import UserError
from thread_ranks import ThreadRanks

gpu = pytest.importorskip("star_attention.distributed.gpu", exc_type=ImportError)

_C = gpu._C


class Threads:
    """Host communicators of ranks that are threads."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size, timeout=10)
        self.values = [None] * size


class Host:
    def __init__(self, threads, rank):
        self.rank, self.size, self.traffic = rank, len(threads.values), Traffic()
        self._threads, self.world = threads, self

    def gather_objects(self, value):
        self._threads.values[self.rank] = value
        self._threads.barrier.wait()
        values = list(self._threads.values)
        self._threads.barrier.wait()
        return values

    def broadcast_object(self, value, root=0):
        return self.gather_objects(value)[root]


def connect(monkeypatch, size, merge, num_gpus=8, broken=None, machines=1, **missing):
    """The communicators of all ranks, or the errors that they raised."""

    class Peers:
        def __init__(self, rank, *_arguments):
            self.rank = rank

        def handle(self):
            return b"handle"

        def open(self, handles):
            assert len(handles) == size
            if self.rank == broken:
                raise RuntimeError("no peer access")

    def load_nccl(_path):
        if missing:
            raise RuntimeError(missing["nccl"])

    stand_ins = SimpleNamespace(
        PeerMerge=Peers,
        NcclCommunicator=lambda *_arguments: SimpleNamespace(check=lambda: None),
        DeviceMemory=lambda *_arguments: "memory",
        RankMerge=lambda *_arguments: "merge",
        Stream=lambda _device: None,
        Event=lambda _device: None,
        load_nccl=load_nccl,
        make_nccl_id=lambda: b"id",
        device_count=lambda: num_gpus,
        device_id=lambda device: f"GPU {device}",
    )
    names = threading.local()
    for module in (gpu, star_attention):
        monkeypatch.setattr(module, "_C", stand_ins)
    for module in (gpu, topology):
        monkeypatch.setattr(module, "machine", lambda: names.machine)
    threads, results = Threads(size), [None] * size

    def run(rank):
        names.machine = f"machine {rank * machines // size}"
        try:
            results[rank] = gpu.GpuCommunicator(Host(threads, rank), merge=merge)
        except UserError as error:
            results[rank] = str(error)

    ranks = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return results


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"size": 2, "merge": "auto"}, "peer"),
        ({"size": 2, "merge": "nccl"}, "nccl"),
        ({"size": 3, "merge": "auto", "broken": 1}, "nccl"),
        ({"size": 4, "merge": "auto", "machines": 2}, "nccl"),
        ({"size": 9, "merge": "auto", "num_gpus": 16}, "nccl"),
        ({"size": 4, "merge": "auto", "num_gpus": 2}, "peer"),
        ({"size": 4, "merge": "auto", "num_gpus": 2, "broken": 0}, "host"),
        ({"size": 1, "merge": "nccl"}, "peer"),
    ],
)
def test_merge_path(monkeypatch, options, path):
    assert [comm.merge_path for comm in connect(monkeypatch, **options)] == [path] * options["size"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"size": 3, "merge": "peer", "broken": 1},
            "--merge is peer, but on rank 1, no peer access: use auto or nccl",
        ),
        (
            {"size": 4, "merge": "peer", "machines": 2},
            "--merge is peer, but the ranks are on several nodes: use auto or nccl",
        ),
        (
            {"size": 9, "merge": "peer", "num_gpus": 16},
            "--merge is peer, but there are 9 ranks, more than 8: use auto or nccl",
        ),
        (
            {"size": 4, "merge": "nccl", "num_gpus": 2},
            "--merge is nccl, but 4 ranks share 2 GPUs: use auto or peer, or at most 2 ranks",
        ),
        ({"size": 2, "merge": "fast"}, "--merge is fast: use auto, peer, nccl"),
        (
            {"size": 2, "merge": "auto", "nccl": "not found"},
            "not found: pip install nvidia-nccl-cu",
        ),
    ],
)
def test_merge_not_possible(monkeypatch, options, message):
    for error in connect(monkeypatch, **options):
        assert message in error


def test_local_device(monkeypatch):
    comms = connect(monkeypatch, 6, "auto", num_gpus=2, machines=2)
    assert [comm.device for comm in comms] == [0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("bound", [1, 2])
def test_a_single_core_is_left(monkeypatch, bound):
    """Which mpirun binds two ranks to by itself; what leaves more than one is somebody's choice."""
    cores = set(range(bound))
    monkeypatch.setattr(topology.os, "sched_getaffinity", lambda pid: cores)
    monkeypatch.setattr(topology.os, "cpu_count", lambda: 4)
    widened = []
    monkeypatch.setattr(topology.os, "sched_setaffinity", lambda *to: widened.append(to))
    connect(monkeypatch, 2, "auto", num_gpus=2)
    assert widened == [(0, range(4))] * (2 if bound == 1 else 0)


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(gpu._C, "device_count", lambda: 0)
    with pytest.raises(UserError, match="rank 0 sees no GPU: use --device cpu"):
        topology.local_device(SingleProcess())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 9, 1024, 1.0, 0), "size: got 9, expected 1 to 8"),
        ((2, 2, 1024, 1.0, 0), "rank: got 2, expected 0 to 1"),
        ((0, 2, 0, 1.0, 0), "capacity: got 0, expected 1 to 2"),
        ((0, 2, 1024, 0.0, 0), "timeout: got 0, expected more than 0"),
    ],
)
def test_peer_merge_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        _C.PeerMerge(*arguments)


def test_nccl_arguments():
    with pytest.raises(ValueError, match="unique_id: got 3 bytes, expected 128"):
        _C.NcclCommunicator(b"abc", 0, 2, 0)
    with pytest.raises(ValueError, match="rank: got 2, expected 0 to 1"):
        _C.NcclCommunicator(bytes(128), 2, 2, 0)
    with pytest.raises(ValueError, match=r"bytes: got 0, expected more than 0"):
        _C.DeviceMemory(0, 0)


def test_copy_arguments():
    four, five = np.zeros(4, np.float32), np.zeros(5, np.float32)
    with pytest.raises(ValueError, match=r"target.nbytes: got 20, expected 16, the source's"):
        _C.copy(four, five, 0, 0)
    with pytest.raises(ValueError, match=r"source.dtype: got int64, expected float16 or bfloat16"):
        _C.copy(np.zeros(4, np.int64), four, 0, 0)


def test_host_buffers_stay_on_the_host():
    assert not gpu._on_device(np.zeros(3))


def test_an_exchange_is_one_group_beside_the_stream(monkeypatch):
    """Behind what the stream holds, in one call to NCCL; another stream waits for its end."""
    (comm, _), calls = connect(monkeypatch, 2, "auto"), []

    class Nccl:
        def __enter__(self):
            calls.append("group")

        def __exit__(self, *_):
            calls.append("end")

        def send(self, buffer, rank, stream):
            calls.append((buffer.tolist(), "to", rank, stream))

        def receive(self, buffer, rank, stream):
            calls.append((buffer.tolist(), "from", rank, stream))

    class Event:
        def __init__(self, name):
            self.name = name

        def record(self, stream):
            calls.append(f"{self.name} behind {stream}")

        def block(self, stream):
            calls.append(f"{stream} behind {self.name}")

    monkeypatch.setattr(gpu, "_on_device", lambda _buffer: True)
    monkeypatch.setattr(gpu._C, "Event", lambda _device: Event("done"))
    comm.nccl, comm._ready = Nccl(), Event("ready")
    comm._side_stream = SimpleNamespace(handle="side")
    first, second = np.arange(2), np.arange(3)
    request = comm.exchange([(first, 1)], [(second, 1)], "main")
    assert calls == [
        *("ready behind main", "side behind ready"),
        *("group", ([0, 1], "to", 1, "side"), ([0, 1, 2], "from", 1, "side"), "end"),
        "done behind side",
    ]
    assert comm.traffic == Traffic(first.nbytes, second.nbytes)
    request.wait("other")
    assert calls[-1] == "other behind done"


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_an_exchange_by_way_of_the_host(monkeypatch, num_gpus):
    """Where ranks share a GPU, and of host memory."""
    comms = connect(monkeypatch, 2, "auto", num_gpus=num_gpus)
    ranks = ThreadRanks(2)
    if num_gpus == 1:
        monkeypatch.setattr(gpu, "_on_device", lambda _buffer: True)

        def copy(source, target, *_):
            target.view(np.uint8)[:] = source.view(np.uint8)

        monkeypatch.setattr(gpu._C, "copy", copy, raising=False)

    def work(host):
        comm, other = comms[host.rank], 1 - host.rank
        comm._host = host
        mine, theirs = np.full(4 + host.rank, host.rank), np.empty(4 + other, int)
        comm.exchange([(mine, other)], [(theirs, other)]).wait()
        assert theirs.tolist() == [other] * len(theirs)
        return host.traffic

    assert ranks.run(work) == [Traffic(32, 40), Traffic(40, 32)]


def test_a_broken_connection_ends_the_job(monkeypatch, capsys):
    """Although the GPU, and the host with it, wait for what does not come."""
    monkeypatch.setattr(gpu, "_WATCH_SECONDS", 0.01)
    aborted, is_over = threading.Event(), threading.Event()

    def check():
        raise RuntimeError("NCCL, connection: remote process exited")

    host = SimpleNamespace(world=SimpleNamespace(rank=3), abort=aborted.set)
    gpu._watch(SimpleNamespace(check=check), host, is_over)
    assert aborted.wait(5)
    is_over.set()
    assert "rank 3 failed: NCCL, connection: remote process exited" in capsys.readouterr().err
