"""The attention of one forward pass in torch: this rank's kernels plus what the ranks exchange."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from star_attention import ops
from star_attention.distributed import Communicator
from star_attention.engines.base import AttentionStep, RingStep

_MERGE_ROWS = 4096  # of partials that are merged at a time


@dataclass(frozen=True)
class PagedTables:
    """What `ops.paged_attention` needs besides q and the pool, on the device."""

    page_table: torch.Tensor
    cu_seqlens_q: torch.Tensor
    kv_lens: torch.Tensor
    causal: bool
    max_q_len: int
    max_kv_len: int

    @classmethod
    def on(
        cls,
        device: torch.device,
        page_table: np.ndarray,
        cu_seqlens_q: np.ndarray,
        kv_lens: np.ndarray,
        causal: bool = False,
    ) -> PagedTables:
        return cls(
            to_device(page_table, device),
            to_device(cu_seqlens_q, device),
            to_device(kv_lens, device),
            causal,
            int(np.diff(cu_seqlens_q).max(initial=0)),
            int(kv_lens.max(initial=0)),
        )

    def attend(
        self,
        q: torch.Tensor,
        pool: torch.Tensor,
        scale: float,
        out: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.paged_attention(
            q,
            pool,
            self.page_table,
            self.cu_seqlens_q,
            self.kv_lens,
            causal=self.causal,
            scale=scale,
            max_q_len=self.max_q_len,
            max_kv_len=self.max_kv_len,
            out=out,
        )


class Attention:
    """Attention of one pass, layer by layer: a layer's pool is announced by `begin`, then written,
    `stored` being told how far, then attended to by a call. A layer that is only written is not
    announced."""

    def __init__(self, comm: Communicator, scale: float, device: torch.device) -> None:
        self._comm = comm
        self._scale = scale
        self._clock = _Clock(device)

    @property
    def wait_seconds(self) -> float:
        """How long the device stood still for other ranks' KV; call it when the pass is done."""
        return self._clock.seconds()

    def begin(self, pool: torch.Tensor) -> None:
        """The layer of pool [num_pages, 2, Hkv, tokens_per_block, D] is about to be written."""

    def stored(self, pool: torch.Tensor, rows: int) -> None:
        """The first `rows` rows' KV is in the pool."""

    def end(self) -> None:
        """The last layer is done."""

    def __call__(self, q: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        """q [T, Hq, D] over what the pass sees; [T, Hq, D]."""
        raise NotImplementedError


class PagedAttention(Attention):
    """Attention over this rank's pages.

    Pages that rank 0 shares travel while the others compute their own: they are received from
    `begin` on and awaited before attention; rank 0 sends them as soon as they are written, and its
    GPU runs ahead of the others by at most two layers, which bounds what is on its way.

    Args:
        shared_pages, shared_rows: as in `PagedStep`.
        merge: outputs are merged over the ranks.
        prefix: of the lists of pages that stand before those of `tables`.
    """

    def __init__(
        self,
        tables: PagedTables,
        comm: Communicator,
        scale: float,
        shared_pages: np.ndarray | None = None,
        shared_rows: int = 0,
        merge: bool = False,
        prefix: PagedTables | None = None,
    ) -> None:
        super().__init__(comm, scale, tables.kv_lens.device)
        alone = comm.size == 1
        self._tables, self._prefix = tables, prefix
        self._merge = merge and not alone
        self._shared = None if alone else shared_pages
        self._shared_rows = shared_rows
        self._to_send = False
        self._transfers: deque[_Transfer] = deque()  # under way, oldest first

    def begin(self, pool: torch.Tensor) -> None:
        if self._shared is None:
            return
        self._to_send = self._comm.rank == 0
        if self._to_send:
            self.stored(pool, 0)
        else:
            self._transfers.append(_Transfer(self._comm, pool, self._shared))

    def stored(self, pool: torch.Tensor, rows: int) -> None:
        if self._to_send and rows >= self._shared_rows:
            self._to_send = False
            self._finish(all_but=1)
            self._transfers.append(_Transfer(self._comm, pool, self._shared))

    def end(self) -> None:
        self._finish()  # the pages may be overwritten from here on

    def _finish(self, all_but: int = 0) -> None:
        while len(self._transfers) > all_but:
            self._transfers.popleft().finish()

    def __call__(self, q: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        if self._to_send:
            raise ValueError(f"rank 0 shares {self._shared_rows} rows of {len(q)}")
        if self._transfers and not (self._comm.rank == 0 and q.is_cuda):
            with self._clock:  # also where it is rank 0's: MPI sends while it is waited for
                self._finish()
        if not self._merge:
            return self._attend(q, pool, q.dtype)[0]
        if not q.is_cuda:
            return merge_over_ranks(self._comm, *self._attend(q, pool, q.dtype))
        merged = torch.empty_like(q)
        self._comm.merge(*self._attend(q, pool, torch.float32), merged, stream_of(q.device))
        return merged

    def _attend(
        self, q: torch.Tensor, pool: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """o in `dtype`, and lse, over this rank's pages."""
        if self._prefix is None:
            out = _partials(q) if dtype != q.dtype else None
            return self._tables.attend(q, pool, self._scale, out)
        o, lse = _partials(q, 2)
        for index, tables in enumerate((self._prefix, self._tables)):
            tables.attend(q, pool, self._scale, (o[index], lse[index]))
        return ops.merge_lse(o, lse, out_dtype=dtype)


class RingAttention(Attention):
    """Attention over every rank's pages. While this rank attends to one rank's, they travel on to
    the next rank and the previous rank's arrive.

    Source: Ring Attention, arXiv 2310.01889, section 3.
    """

    def __init__(
        self, step: RingStep, comm: Communicator, scale: float, device: torch.device
    ) -> None:
        super().__init__(comm, scale, device)
        self._pages = step.pages
        self._hops = [
            (
                hop.num_pages,
                PagedTables.on(device, hop.page_table, step.cu_seqlens_q, hop.kv_lens, hop.causal),
            )
            for hop in step.hops
        ]

    def __call__(self, q: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        comm, stream = self._comm, stream_of(q.device)
        here = select_pages(pool, self._pages)
        o, lse = _partials(q, min(2, len(self._hops)))  # of the hops so far, and of this one
        for hop, (_, tables) in enumerate(self._hops):
            request = None
            if hop + 1 < len(self._hops):
                arriving = pool.new_empty(self._hops[hop + 1][0], *pool.shape[1:])
                request = comm.exchange(
                    here, (comm.rank + 1) % comm.size, arriving, (comm.rank - 1) % comm.size, stream
                )
            this = min(hop, 1)
            tables.attend(q, here, self._scale, (o[this], lse[this]))
            if this:
                _merge_into_first(o, lse)
            if request:
                with self._clock:
                    request.wait(stream)
                here = arriving
        return o[0].to(q.dtype)


def attention_on(
    step: AttentionStep, comm: Communicator, scale: float, device: torch.device
) -> Attention:
    """The attention that `step` describes, ready on `device`."""
    if isinstance(step, RingStep):
        return RingAttention(step, comm, scale, device)
    tables = PagedTables.on(device, step.page_table, step.cu_seqlens_q, step.kv_lens, step.causal)
    prefix = step.prefix and PagedTables.on(
        device, step.prefix.page_table, step.prefix.cu_seqlens_q, step.prefix.kv_lens
    )
    shared = step.shared_pages, step.shared_rows
    return PagedAttention(tables, comm, scale, *shared, step.merge, prefix)


def merge_over_ranks(comm: Communicator, o: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Attention over all ranks' keys from each rank's o [T, Hq, D] and lse [T, Hq]; o's dtype."""
    partial = torch.cat((o.float(), lse[..., None]), dim=-1)
    partials = partial.new_empty(comm.size, *partial.shape)
    comm.all_gather(partial, partials)
    return ops.merge_lse(partials[..., :-1], partials[..., -1])[0].to(o.dtype)


def select_pages(pool: torch.Tensor, pages: np.ndarray) -> torch.Tensor:
    """The pages in order, contiguous: a view where they are consecutive, otherwise a copy."""
    if _consecutive(pages):
        return pool[int(pages[0]) : int(pages[-1]) + 1]
    return pool[to_device(pages, pool.device)]


def _consecutive(pages: np.ndarray) -> bool:
    return len(pages) > 0 and bool((np.diff(pages) == 1).all())


def _merge_into_first(o: torch.Tensor, lse: torch.Tensor) -> None:
    """Both partials' attention, o [2, T, Hq, D] and lse [2, T, Hq], in place of the first."""
    for first in range(0, o.shape[1], _MERGE_ROWS):
        rows = slice(first, first + _MERGE_ROWS)
        o[0, rows], lse[0, rows] = ops.merge_lse(o[:, rows], lse[:, rows])


def _partials(q: torch.Tensor, *shards: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 o and lse to write, for each of `shards`."""
    return (
        q.new_empty(*shards, *q.shape, dtype=torch.float32),
        q.new_empty(*shards, *q.shape[:2], dtype=torch.float32),
    )


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def stream_of(device: torch.device) -> int:
    """The handle of the current stream; 0 on the CPU."""
    # What torch.cuda.current_stream gives, without the object around it.
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


class _Transfer:
    """Rank 0's pages on their way to all other ranks."""

    def __init__(self, comm: Communicator, pool: torch.Tensor, pages: np.ndarray) -> None:
        self._pool, self._pages = pool, pages
        self._stream = stream_of(pool.device)
        self._buffer = select_pages(pool, pages)
        self._unpacks = comm.rank > 0 and not _consecutive(pages)
        self._request = comm.start_broadcast(self._buffer, 0, self._stream)

    def finish(self) -> None:
        self._request.wait(self._stream)
        if self._unpacks:
            self._pool[to_device(self._pages, self._pool.device)] = self._buffer


class _Clock:
    """Adds up the time that the device spends in `with` blocks, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def __enter__(self) -> None:
        self._mark()

    def __exit__(self, *_: object) -> None:
        self._mark()

    def _mark(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> float:
        spans = zip(self._marks[::2], self._marks[1::2], strict=True)
        if self._on_gpu:
            return sum(begin.elapsed_time(end) for begin, end in spans) / 1e3
        return sum(end - begin for begin, end in spans)
