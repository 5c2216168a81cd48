"""Copies of pages between the KV pool and host memory, with CuPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from star_attention.engines.base import runs_of
from star_attention.engines.page_copies import PageCopies

_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind


class CupyPageCopies(PageCopies):
    """See `PageCopies`.

    Args:
        compute: the stream of the engine's steps.
    """

    def __init__(self, cupy: Any, device: int, compute: Any, packing: int = 1) -> None:
        super().__init__(packing)
        self._cupy = cupy
        self._device = device
        self._compute = compute
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._computed = cupy.cuda.Event(disable_timing=True)
        self._last = cupy.cuda.Event(disable_timing=True)  # behind the last copy

    def finish(self) -> None:
        with self._cupy.cuda.Device(self._device):
            self._stream.synchronize()

    def pin(self, buffer: np.ndarray) -> None:
        runtime = self._cupy.cuda.runtime
        with self._cupy.cuda.Device(self._device):
            try:
                runtime.hostRegister(buffer.ctypes.data, buffer.nbytes, 0)
            except runtime.CUDARuntimeError:
                return
        self._pinned.add(buffer.ctypes.data)

    def unpin(self, buffer: np.ndarray) -> None:
        if buffer.ctypes.data in self._pinned:
            self._pinned.remove(buffer.ctypes.data)
            with self._cupy.cuda.Device(self._device):
                self._cupy.cuda.runtime.hostUnregister(buffer.ctypes.data)

    def _copy(self, pool: Any, pages: Sequence[int], host: np.ndarray, *, to_pool: bool) -> None:
        if not host.flags.c_contiguous:
            raise ValueError("the host memory is not contiguous")
        self._computed.record(self._compute)
        self._stream.wait_event(self._computed)
        page_bytes = pool.nbytes // len(pool)
        in_host = host.ctypes.data
        for first, count in runs_of(pages):
            in_pool = pool.data.ptr + first * page_bytes
            target, source = (in_pool, in_host) if to_pool else (in_host, in_pool)
            kind = _TO_DEVICE if to_pool else _TO_HOST
            size = count * page_bytes
            self._cupy.cuda.runtime.memcpyAsync(target, source, size, kind, self._stream.ptr)
            in_host += size
        self._last.record(self._stream)
        self._under_way.add([page // self._packing for page in pages], written=to_pool)

    def _are_over(self) -> bool:
        return self._last.done

    def _steps_wait(self) -> None:
        self._compute.wait_event(self._last)
