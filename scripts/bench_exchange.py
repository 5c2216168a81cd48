#!/usr/bin/env python3
"""What carries KV from rank to rank in phase 1: NCCL, or the copy engines out of mapped memory?

    mpirun -n 4 --bind-to none python scripts/bench_exchange.py [--mib 33]

Every rank takes so much from each other one (33 MiB: a layer's KV of 8K tokens of Llama-3.1-8B),
alone and beside GEMMs of [8192, 4096] by [4096, 28672] in bf16. Prints milliseconds of rank 0 until
both are done: medians of 12.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from star_attention.distributed import default_communicator
from star_attention.distributed.gpu import GpuCommunicator

DEFAULT = 4  # cudaMemcpyKind


class Exchange:
    """All ranks' regions of `size` bytes, of which each takes the first one of every other."""

    def __init__(self, comm: GpuCommunicator, size: int) -> None:
        self.comm, self.size = comm, size
        self.others = [rank for rank in range(comm.size) if rank != comm.rank]
        self.pool = torch.empty(comm.size * size, dtype=torch.uint8, device="cuda")
        self.peers = comm.map_peers(self.pool)
        if self.peers is None:
            raise SystemExit("the GPUs do not reach each other's memory")
        self.streams = [torch.cuda.Stream() for _ in self.others]
        mapped = Path("/proc/self/maps").read_text().split()
        self.cudart = ctypes.CDLL(next(each for each in mapped if "libcudart" in each))

    def room(self, place: int) -> torch.Tensor:
        return self.pool[place * self.size : (place + 1) * self.size]

    def nothing(self) -> Callable[[], None]:
        return lambda: None

    def nccl(self) -> Callable[[], None]:
        stream = torch.cuda.current_stream().cuda_stream
        sends = [(self.room(0), rank) for rank in self.others]
        receives = [(self.room(1 + i), rank) for i, rank in enumerate(self.others)]
        request = self.comm.exchange(sends, receives, stream)
        return lambda: request.wait(stream)

    def copies(self) -> Callable[[], None]:
        current = torch.cuda.current_stream()
        for i, (rank, stream) in enumerate(zip(self.others, self.streams, strict=True)):
            stream.wait_stream(current)
            error = self.cudart.cudaMemcpyAsync(
                ctypes.c_void_p(self.room(1 + i).data_ptr()),
                ctypes.c_void_p(self.peers.addresses[rank]),
                ctypes.c_size_t(self.size),
                DEFAULT,
                ctypes.c_void_p(stream.cuda_stream),
            )
            assert error == 0, f"cudaMemcpyAsync: {error}"
        return lambda: [current.wait_stream(stream) for stream in self.streams]


def milliseconds(comm: GpuCommunicator, start: Callable, gemms: int) -> float:
    a = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(4096, 28672, device="cuda", dtype=torch.bfloat16)
    times = []
    for _ in range(12):
        torch.cuda.synchronize()
        comm.gather_objects(None)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        finish = start()
        for _ in range(gemms):
            a @ b
        finish()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=33, help="that a rank takes from each other one")
    options = parser.parse_args()
    comm = GpuCommunicator(default_communicator())
    torch.cuda.set_device(comm.device)
    exchange = Exchange(comm, options.mib << 20)
    ways = {"nothing": exchange.nothing, "NCCL": exchange.nccl, "copy engines": exchange.copies}
    if comm.rank == 0:
        print(
            f"{comm.size} x {torch.cuda.get_device_name()}, ms\n\n| beside | {' | '.join(ways)} |"
        )
        print("|---" * (1 + len(ways)) + "|")
    for gemms in range(3):
        times = [milliseconds(comm, start, gemms) for start in ways.values()]
        if comm.rank == 0:
            cells = " | ".join(f"{each:.3f}" for each in times)
            print(f"| {gemms} GEMMs | {cells} |", flush=True)


if __name__ == "__main__":
    main()
