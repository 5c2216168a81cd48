"""Ranks on GPUs: NCCL for bulk data, peer memory over NVLink for the merge of a token."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from star_attention import _C
from star_attention.config import MERGE_PATHS, MergePath
from star_attention.distributed.base import (
    Addressed,
    Buffer,
    Communicator,
    Done,
    Request,
    Traffic,
    agree,
)
from star_attention.distributed.topology import local_device, machine
from star_attention.errors import RankError, UserError, say

# A contiguous tensor with __dlpack__ and nbytes: torch, CuPy.
DeviceBuffer = Any

# Bytes of o that go through the merge at once: 512 tokens of 32 heads of 128 in float32.
MERGE_CAPACITY = 8 << 20

_CUDA = 2  # DLPack's device type
_WATCH_SECONDS = 1.0  # between looks at NCCL's connections


class GpuCommunicator:
    """A rank's GPU, beside a communicator for host memory, which keeps its own part.

    Buffers in host memory and objects go to `host`, as does `abort`. Device buffers are contiguous,
    of dtype float16, bfloat16, float32, int32 or uint8, on `device`; their operations follow what
    `stream` (a CUDA stream's handle, 0: the default stream) holds, return at once, and can be
    captured in CUDA graphs, which need this object to stay alive. Every rank makes the same calls
    in the same order; over NCCL, all of them run in that order too, whatever their stream.

    Ranks that share a GPU cannot use NCCL. They merge through peer memory all the same, and stage
    everything else through host memory: blocking, slow, not for graphs.

    Attributes:
        rank, size, world, traffic: of `host`; traffic counts device buffers too, by calls: what is
            captured in a graph counts once.
        device: this rank's GPU.
        shares_gpu: some ranks share a GPU; ranks_here: how many have this one.
        capturable: `merge` works in CUDA graphs.
        merge_path: "peer", "nccl" or "host", how `merge` works.
        nccl, rank_merge: `_C`'s, what merges by NCCL and by peer memory or NCCL; None where ranks
            share a GPU, or merge by way of the host.
    """

    def __init__(
        self,
        host: Communicator,
        device: int | None = None,
        *,
        merge: MergePath = "auto",
        merge_capacity: int = MERGE_CAPACITY,
        timeout: float = 10.0,
    ) -> None:
        """Connects all ranks.

        Args:
            device: this rank's GPU; by default `local_device` of the whole job's.
            merge: "peer" takes peer memory, which all ranks' GPUs must reach and which is for up to
                8 ranks of one node; "nccl" works anywhere; "auto" takes what is there, peer first.
            merge_capacity: bytes of o that a merge sends at once; larger ones go in pieces. Peer
                memory takes 4.5 (size - 1) times as much of the GPU, NCCL 1.25 size times.
            timeout: seconds that a merge over peer memory waits for another rank.

        Raises:
            UserError: `merge` is not possible here, there is no GPU, or NCCL cannot be loaded.
        """
        if merge not in MERGE_PATHS:
            raise UserError(f"--merge is {merge}: use {', '.join(MERGE_PATHS)}")
        self._host = host
        self.rank, self.size, self.traffic = host.rank, host.size, host.traffic
        self.world = host.world
        self.device = local_device(host.world) if device is None else device
        self._capacity = merge_capacity

        gpus = host.gather_objects((machine(), _C.device_id(self.device)))
        self._num_gpus = len(set(gpus))
        self.shares_gpu = self._num_gpus < self.size
        self.ranks_here = gpus.count(gpus[self.rank])
        self.nccl = None
        if self.size > 1 and not self.shares_gpu:
            self.nccl = self._connect_nccl()

        self._peer, why_not = None, "--merge is nccl"
        if merge != "nccl" or self.size == 1:
            one_node = len({where for where, _ in gpus}) == 1
            self._peer, why_not = self._connect_peers(one_node, timeout)
        if merge == "peer" and self._peer is None:
            raise UserError(f"--merge is peer, but {why_not}: use auto or nccl")
        if merge == "nccl" and self.shares_gpu:
            raise UserError(
                f"--merge is nccl, but {self.size} ranks share {self._num_gpus} GPUs: "
                f"use auto or peer, or at most {self._num_gpus} ranks"
            )
        self.merge_path = "peer" if self._peer else "nccl" if self.nccl else "host"
        self.capturable = self.merge_path != "host"

        self._workspace = None
        if not self._peer:
            # lse is at most a quarter of o: head_dim 8 in 16 bits.
            self._workspace = _C.DeviceMemory(self.size * merge_capacity * 5 // 4, self.device)
        self.rank_merge = self._connect_merge()
        self._is_over = threading.Event()
        if self.nccl:
            _watch(self.nccl, host, self._is_over)
        self._side_stream = _C.Stream(self.device)
        self._ready = _C.Event(self.device)

    def exchange(self, sends: Addressed, receives: Addressed, stream: int = 0) -> Request:
        """Starts sending each of `sends` to a rank while each of `receives` is filled by a rank,
        all in host or all in device memory; for the latter beside what `stream` does from here on.
        Until `wait(stream)` of the result, which makes a stream, not the host, wait for it, the
        buffers belong to the transfer."""
        buffers = [buffer for buffer, _ in (*sends, *receives)]
        if not all(map(_on_device, buffers)):
            return self._host.exchange(sends, receives)
        if self.nccl is None:
            return self._exchange_staged(sends, receives, stream)
        self.traffic.add(Traffic.of(sends, receives))
        side = self._side_stream.handle
        self._ready.record(stream)
        self._ready.block(side)
        with self.nccl:
            for buffer, rank in sends:
                self.nccl.send(buffer, rank, side)
            for buffer, rank in receives:
                self.nccl.receive(buffer, rank, side)
        done = _C.Event(self.device)
        done.record(side)
        return _Transfer(done, buffers)

    def all_gather(
        self, buffer: Buffer | DeviceBuffer, gathered: Buffer | DeviceBuffer, stream: int = 0
    ) -> None:
        """Fills `gathered` [size, *buffer.shape] with every rank's `buffer`, in rank order."""
        if _on_device(buffer):
            self._all_gather(buffer, gathered, stream)
        else:
            self._host.all_gather(buffer, gathered)

    def all_reduce(self, buffer: DeviceBuffer, stream: int = 0) -> None:
        """Overwrites `buffer` (float16, bfloat16 or float32) with its sum over ranks. Counts as a
        ring's traffic: 2 (size - 1) / size times the buffer.

        Raises:
            UserError: ranks share a GPU.
        """
        if self.size == 1:
            return
        if self.nccl is None:
            raise UserError(
                f"sums over ranks (--tp) need a GPU for each rank: {self.size} ranks share "
                f"{self._num_gpus} GPUs"
            )
        moved = 2 * buffer.nbytes * (self.size - 1) // self.size
        self.traffic.sent += moved
        self.traffic.received += moved
        self.nccl.all_reduce(buffer, stream)

    def merge(self, o: DeviceBuffer, lse: DeviceBuffer, out: DeviceBuffer, stream: int = 0) -> None:
        """Attention over all ranks' keys from each rank's own; the same bits on all ranks.

        Args:
            o: [T, Hq, D] float16, bfloat16 or float32, this rank's attention; shape and dtype are
                the same on all ranks. D: a multiple of 8 from 16 to 256.
            lse: float32 [T, Hq], log-sum-exp of this rank's scores; -inf: o counts for nothing.
            out: [T, Hq, D] in any of the three dtypes, written; 0 where lse is -inf on every rank,
                NaN if a rank is lost, see `check`.

        Raises:
            ValueError: an argument is wrong.

        Source: Star Attention, arXiv 2411.17116, section 2.2 (phase 2).
        """
        tokens = o.shape[0]
        if tokens == 0:
            return
        if self.rank_merge:
            self.rank_merge.merge(o, lse, out, stream)
            self._count(o.nbytes + lse.nbytes)
        else:
            at_once = max(1, self._capacity * tokens // o.nbytes)
            for first in range(0, tokens, at_once):
                part = slice(first, first + at_once)
                self._merge_staged(o[part], lse[part], out[part], stream)

    def map_peers(self, buffer: DeviceBuffer) -> Any:
        """`buffer`, which all ranks have and keep, on every rank, as `addresses` of what is mapped
        here; None: their memory is out of reach. Every rank calls it."""
        if self._peer is None:
            return None
        return self._open(lambda: _C.PeerMemory(self.rank, self.size, buffer, self.device))[0]

    def check(self) -> None:
        """Call it after waiting for the GPU, before what it computed is used.

        Raises:
            RankError: names the rank that a merge waited for in vain, or tells of NCCL's broken
                connection. This communicator is of no use from then on.
        """
        for part in (self._peer, self.nccl):
            try:
                if part:
                    part.check()
            except RuntimeError as error:
                raise RankError(str(error)) from error

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """The root's `value`, on every rank. Not counted as traffic."""
        return self._host.broadcast_object(value, root)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank. Not counted as traffic."""
        return self._host.gather_objects(value)

    def split(self, color: int) -> Communicator:
        """The host communicator's."""
        return self._host.split(color)

    def close(self) -> None:
        """Gives up the connections, on all ranks, when no graph is left that captured calls."""
        self._is_over.set()
        self._peer = self.rank_merge = None
        if self.nccl:
            self.nccl.close()

    def abort(self, code: int = 1) -> NoReturn:
        """Ends all ranks at once."""
        self._host.abort(code)

    def _connect_nccl(self) -> Any:
        def load() -> None:
            try:
                _C.load_nccl(_nccl_path())
            except RuntimeError as error:
                raise UserError(f"{error}: pip install nvidia-nccl-cu13") from error

        agree(self._host, load)
        unique_id = self._host.broadcast_object(_C.make_nccl_id() if self.rank == 0 else None)
        return _C.NcclCommunicator(unique_id, self.rank, self.size, self.device)

    def _connect_peers(self, one_node: bool, timeout: float) -> tuple[Any, str]:
        """A PeerMerge whose peers are open on all ranks, or why there is none."""
        if not one_node:
            return None, "the ranks are on several nodes"
        if self.size > 8:
            return None, f"there are {self.size} ranks, more than 8"

        def make() -> Any:
            return _C.PeerMerge(self.rank, self.size, self._capacity, timeout, self.device)

        return self._open(make)

    def _open(self, make: Callable[[], Any]) -> tuple[Any, str]:
        """What `make` makes, with the peers' memory open on all ranks, or why there is none."""
        peer, handle, failure = None, b"", None
        try:
            peer = make()
            handle = peer.handle() if self.size > 1 else b""
        except RuntimeError as error:
            failure = str(error)
        handles = self._host.gather_objects(handle)
        if all(handles):
            try:
                peer.open(handles)
            except RuntimeError as error:
                failure = str(error)
        for rank, reason in enumerate(self._host.gather_objects(failure)):
            if reason is not None:
                return None, f"on rank {rank}, {reason}"
        return peer, ""

    def _connect_merge(self) -> Any:
        if self._peer:
            return _C.RankMerge(self._peer)
        return _C.RankMerge(self.nccl, self._workspace) if self.nccl else None

    def _merge_staged(
        self, o: DeviceBuffer, lse: DeviceBuffer, out: DeviceBuffer, stream: int
    ) -> None:
        split, end = self.size * o.nbytes, self.size * (o.nbytes + lse.nbytes)
        self._all_gather(o, _Bytes(self._workspace, 0, split), stream)
        self._all_gather(lse, _Bytes(self._workspace, split, end), stream)
        gathered = _Bytes(self._workspace, 0, end)
        _C.merge_gathered(gathered, self.size, o, lse, out, self.device, stream)

    def _all_gather(self, buffer: DeviceBuffer, gathered: DeviceBuffer, stream: int) -> None:
        if self.nccl:
            self._count(buffer.nbytes)
            self.nccl.all_gather(buffer, gathered, stream)
            return
        arrived = np.empty((self.size, buffer.nbytes), np.uint8)
        self._host.all_gather(self._to_host(buffer, stream), arrived)
        _C.copy(arrived, gathered, self.device, stream)

    def _exchange_staged(self, sends: Addressed, receives: Addressed, stream: int) -> Request:
        leaving = [(self._to_host(buffer, stream), rank) for buffer, rank in sends]
        arriving = [(np.empty(buffer.nbytes, np.uint8), rank) for buffer, rank in receives]
        self._host.exchange(leaving, arriving).wait()
        for (arrived, _), (buffer, _) in zip(arriving, receives, strict=True):
            _C.copy(arrived, buffer, self.device, stream)
        return Done()

    def _to_host(self, buffer: DeviceBuffer, stream: int) -> np.ndarray:
        staged = np.empty(buffer.nbytes, np.uint8)
        _C.copy(buffer, staged, self.device, stream)
        return staged

    def _count(self, nbytes: int) -> None:
        self.traffic.sent += nbytes * (self.size - 1)
        self.traffic.received += nbytes * (self.size - 1)


def _nccl_path() -> str:
    """The library of the package nvidia-nccl-cu*, or nothing: the system's."""
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        return ""
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = (Path(folder) / "lib" / "libnccl.so.2" for folder in folders)
    return next((str(path) for path in found if path.exists()), "")


def _on_device(buffer: Any) -> bool:
    return buffer.__dlpack_device__()[0] == _CUDA


def _watch(nccl: Any, host: Communicator, is_over: threading.Event) -> None:
    """Ends the job once a connection breaks: the GPU, and the host with it, would wait for ever."""

    def run() -> None:
        while not is_over.wait(_WATCH_SECONDS):
            try:
                nccl.check()
            except RuntimeError as error:
                if not is_over.is_set():
                    say(f"rank {host.world.rank} failed: {error}")
                    host.abort()

    threading.Thread(target=run, name="NCCL watch", daemon=True).start()


class _Transfer:
    def __init__(self, done: Any, buffers: list[DeviceBuffer]) -> None:
        self._done = done
        self._buffers = buffers  # the transfer needs them until a stream has waited

    def wait(self, stream: int = 0) -> None:
        self._done.block(stream)
        self._buffers.clear()


class _Bytes:
    """A part of device memory that takes part in a call."""

    def __init__(self, memory: Any, begin: int, end: int) -> None:
        self.__cuda_array_interface__ = memory.array_interface(begin, end)
