"""Copies of pages between the KV pool and host memory, with torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from star_attention.engines.base import runs_of
from star_attention.engines.page_copies import PageCopies


class TorchPageCopies(PageCopies):
    """See `PageCopies`. On the CPU they are done at once."""

    def __init__(self, device: torch.device, packing: int = 1) -> None:
        super().__init__(packing)
        self._device = device
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._stream = torch.cuda.Stream(device)
            self._last = torch.cuda.Event()  # behind the last copy

    def finish(self) -> None:
        if self._on_gpu:
            self._stream.synchronize()

    def pin(self, buffer: np.ndarray) -> None:
        if self._on_gpu and buffer.nbytes:
            runtime = torch.cuda.cudart()
            with torch.cuda.device(self._device):
                error = runtime.cudaHostRegister(buffer.ctypes.data, buffer.nbytes, 0)
            if error == runtime.cudaError.success:
                self._pinned.add(buffer.ctypes.data)

    def unpin(self, buffer: np.ndarray) -> None:
        if buffer.ctypes.data in self._pinned:
            self._pinned.remove(buffer.ctypes.data)
            with torch.cuda.device(self._device):
                torch.cuda.cudart().cudaHostUnregister(buffer.ctypes.data)

    @torch.inference_mode()
    def _copy(
        self, pool: torch.Tensor, pages: Sequence[int], host: np.ndarray, *, to_pool: bool
    ) -> None:
        in_pool = pool.view(torch.uint8).flatten(1)
        in_host = torch.from_numpy(host)
        if self._on_gpu:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                self._copy_runs(in_pool, pages, in_host, to_pool)
                self._last.record()
            self._under_way.add([page // self._packing for page in pages], written=to_pool)
        else:
            self._copy_runs(in_pool, pages, in_host, to_pool)

    def _copy_runs(
        self, in_pool: torch.Tensor, pages: Sequence[int], in_host: torch.Tensor, to_pool: bool
    ) -> None:
        start = 0
        for first, count in runs_of(pages):
            sides = in_pool[first : first + count], in_host[start : start + count]
            target, source = sides if to_pool else sides[::-1]
            target.copy_(source, non_blocking=True)
            start += count

    def _are_over(self) -> bool:
        return self._last.query()

    def _steps_wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._last)
