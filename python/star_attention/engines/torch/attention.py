"""The attention of one forward pass in torch: this rank's kernels plus what the ranks exchange."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from star_attention import ops
from star_attention.distributed import Communicator
from star_attention.distributed.base import Addressed, Request
from star_attention.engines.base import Exchange, Hop, PagedStep, Pages
from star_attention.engines.torch.selection import SelectedPages

_MERGE_ROWS = 4096  # of partials that are merged at a time

# Where pages are in a pool: consecutive ones are a view of it, others are copied.
PageIndex: TypeAlias = "slice | torch.Tensor"


class QuantizedKv(NamedTuple):
    """KV in 8 bits.

    Attributes:
        codes, scales: of all layers; see `ops.quantize_pages`.
        centers: float32 [num_layers, Hkv, D], what was taken off the keys of each KV head before;
            None: nothing.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    centers: torch.Tensor | None = None


@dataclass(frozen=True)
class PagedTables:
    """What `ops.paged_attention` needs besides q and the pool, on the device. `quantized`: whose
    pages are listed instead of the pool's. `starts`: of each row, where it sees fewer tokens than
    its list has."""

    page_table: torch.Tensor
    cu_seqlens_q: torch.Tensor
    kv_lens: torch.Tensor
    causal: bool
    max_q_len: int
    max_kv_len: int
    quantized: QuantizedKv | None = None
    starts: torch.Tensor | None = None

    @classmethod
    def on(
        cls,
        device: torch.device,
        page_table: np.ndarray,
        cu_seqlens_q: np.ndarray,
        kv_lens: np.ndarray,
        causal: bool = False,
        quantized: QuantizedKv | None = None,
        starts: np.ndarray | None = None,
    ) -> PagedTables:
        return cls(
            to_device(page_table, device),
            to_device(cu_seqlens_q, device),
            to_device(kv_lens, device),
            causal,
            int(np.diff(cu_seqlens_q).max(initial=0)),
            int(kv_lens.max(initial=0)),
            quantized,
            None if starts is None else to_device(starts, device),
        )

    def attend(
        self,
        q: torch.Tensor,
        layer: int,
        pool: torch.Tensor,
        scale: float,
        out: tuple[torch.Tensor, torch.Tensor] | None = None,
        cap: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scales = None
        if self.quantized:
            pool, scales = self.quantized.codes[layer], self.quantized.scales[layer]
        o, lse = ops.paged_attention(
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
            kv_scales=scales,
            starts=self.starts,
            cap=cap,
        )
        if self.quantized and self.quantized.centers is not None:
            groups = q.unflatten(1, (pool.shape[2], -1)).float()
            centers = self.quantized.centers[layer, :, None]
            lse += scale * (groups * centers).sum(-1).flatten(1)  # all scores lack as much
        return o, lse


class Attention:
    """Attention of one pass, layer by layer: a layer's pool is announced by `begin`, then written,
    `stored` being told how far, then attended to by a call, or only finished by `finish`.

    What ranks exchange travels beside the projection of later rows, and a hop's pages arrive while
    those before them are attended to. What the rows see of several lists of pages is merged list by
    list: there are two partials at a time, and two hops' pages.

    Args:
        lists: of pages of this rank, which the rows see; one for each part of `selected`.
        merge: outputs are merged over the ranks.
        exchanges, hops: as in `PagedStep`.
        selected: what the rows choose to see besides.
        window: what they see, instead of `lists`, in the layers `windowed`; not with hops, nor
            with `selected`.
        cap: of scores, as in `ops.paged_attention`.

    Attributes:
        cuts: rows at which `stored` is to be told, for exchanges to begin early.

    Source: of hops, Ring Attention, arXiv 2310.01889, section 3.
    """

    def __init__(
        self,
        lists: Sequence[PagedTables],
        comm: Communicator,
        scale: float,
        merge: bool = False,
        exchanges: Sequence[_Exchange] = (),
        hops: Sequence[_Hop] = (),
        selected: SelectedPages | None = None,
        window: PagedTables | None = None,
        windowed: Collection[int] = (),
        cap: float | None = None,
    ) -> None:
        self._lists, self._hops, self._selected = lists, hops, selected
        self._window, self._windowed, self._cap = window, windowed, cap
        self._layer = -1
        self._comm = comm
        self._scale = scale
        self._merge = merge and comm.size > 1
        self._exchanges = exchanges
        self.cuts = tuple(sorted({exchange.rows for exchange in exchanges}))
        self._to_start: deque[_Exchange] = deque()
        self._under_way: list[tuple[Request, list[tuple[PageIndex, torch.Tensor, int]]]] = []
        self._device = lists[0].kv_lens.device
        self._clock = _Clock(self._device)

    @property
    def wait_seconds(self) -> float:
        """How long the device stood still for other ranks' KV; call it when the pass is done."""
        return self._clock.seconds()

    def end(self) -> None:
        """All layers are enqueued."""
        if self._selected:
            self._selected.end()

    @property
    def reads_peers(self) -> bool:
        """Whether other ranks' memory is read, without their doing."""
        return self._selected is not None and self._selected.reads_peers

    def begin(self, pool: torch.Tensor) -> None:
        """The layer of pool [num_pages, 2, Hkv, tokens_per_block, D] is about to be written."""
        self._layer += 1
        self._to_start.extend(self._exchanges)
        self.stored(pool, 0)

    def stored(self, pool: torch.Tensor, rows: int) -> None:
        """The first `rows` rows' KV is in the pool."""
        while self._to_start and self._to_start[0].rows <= rows:
            exchange = self._to_start.popleft()
            arriving = [(index, _room(pool, index), rank) for index, rank in exchange.receives]
            receives = [(room, rank) for _, room, rank in arriving]
            self._under_way.append((self._start(pool, exchange.sends, receives), arriving))

    def finish(self, pool: torch.Tensor) -> None:
        """All that the layer's exchanges bring is in the pool."""
        for request, arriving in self._under_way:
            self._wait(request)
            for index, room, _ in arriving:
                if not isinstance(index, slice):
                    pool[index] = room
        self._under_way.clear()

    def __call__(self, q: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        """q [T, Hq, D] over what the pass sees; [T, Hq, D]."""
        self.finish(pool)
        if self._selected:
            return self._attend_selected(self._selected, q, pool)
        if not self._merge:
            return self._attend(q, pool, q.dtype)[0]
        if not q.is_cuda:
            return merge_over_ranks(self._comm, *self._attend(q, pool, q.dtype))
        merged = torch.empty_like(q)
        self._comm.merge(*self._attend(q, pool, torch.float32), merged, stream_of(self._device))
        return merged

    def _attend_selected(
        self, selected: SelectedPages, q: torch.Tensor, pool: torch.Tensor
    ) -> torch.Tensor:
        layer, stream = self._layer, stream_of(self._device)
        selected.stored(layer, stream)
        o, lse = _partials(q, 2)  # over anchor and own block, and over what is chosen
        chosen = []
        for part, tables in zip(selected.parts, self._lists, strict=True):
            rows = part.rows
            tables.attend(q[rows], layer, pool, self._scale, (o[0, rows], lse[0, rows]))
            if not chosen:
                with self._clock:
                    selected.arrived(layer, stream)
            each = selected.choose(part, q[rows], lse[0, rows], layer, self._scale, stream)
            chosen.append(each)
        for part, each in zip(selected.parts, chosen, strict=True):
            rows = part.rows
            with self._clock:
                selected.arrive(each)
            selected.attend(part, each, q[rows], layer, self._scale, (o[1, rows], lse[1, rows]))
        if not len(q):
            return q
        return ops.merge_lse(o, lse, out_dtype=q.dtype)[0]

    def _attend(
        self, q: torch.Tensor, pool: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """o in `dtype`, and lse, over what this rank sees."""
        lists = (self._window,) if self._layer in self._windowed else self._lists
        if len(lists) == 1 and not self._hops:
            out = _partials(q) if dtype != q.dtype else None
            return lists[0].attend(q, self._layer, pool, self._scale, out, self._cap)
        seen = Seen(q, self._layer, self._scale, self._cap)
        here = pool
        for hop in self._hops:
            arriving = pool.new_empty(hop.num_pages, *pool.shape[1:])
            receives = [(arriving, hop.source)] if hop.num_pages else []
            request = self._start(pool, hop.sends, receives)
            seen.add(lists, here)
            self._wait(request)
            lists, here = (hop.tables,) if hop.tables.max_kv_len else (), arriving
        seen.add(lists, here)
        return seen.merged(dtype)

    def _start(self, pool: torch.Tensor, sends: _Sends, receives: Addressed) -> Request:
        leaving = [(pool[index], ranks) for index, ranks in sends]  # one copy for all ranks
        each = [(pages, rank) for pages, ranks in leaving for rank in ranks]
        return self._comm.exchange(each, receives, stream_of(self._device))

    def _wait(self, request: Request) -> None:
        with self._clock:
            request.wait(stream_of(self._device))


def attention_on(
    step: PagedStep,
    comm: Communicator,
    scale: float,
    pool: torch.Tensor,
    peers: list[int] | None = None,
    quantized: QuantizedKv | None = None,
    windowed: Collection[int] = (),
    cap: float | None = None,
) -> Attention:
    """The attention that `step` describes, ready on the device of the pool of all layers.

    Args:
        peers: addresses of all ranks' pools, as mapped here; None: out of reach.
        quantized: in which prefixes are.
        windowed: layers with a window.
        cap: of scores.
    """
    device = pool.device
    rows = len(step.slot_mapping)
    for exchange in step.exchanges:
        if exchange.rows > rows:
            raise ValueError(f"an exchange follows {exchange.rows} rows of {rows}")
    selected, parts = None, [slice(0, len(step.kv_lens))]
    if step.selection:
        selected = SelectedPages(step.selection, step.cu_seqlens_q, pool, comm, peers)
        parts = [part.sequences for part in selected.parts]
    lists = [tables_of(step, device, sequences) for sequences in parts]
    prefix = step.prefix and PagedTables.on(
        device,
        step.prefix.page_table,
        step.prefix.cu_seqlens_q,
        step.prefix.kv_lens,
        quantized=quantized,
    )
    window = step.window and PagedTables.on(
        device,
        step.window.page_table,
        step.cu_seqlens_q,
        step.window.kv_lens,
        step.causal,
        starts=step.window.starts,
    )
    return Attention(
        [prefix, *lists] if prefix else lists,
        comm,
        scale,
        step.merge,
        [_Exchange.on(device, exchange) for exchange in step.exchanges],
        [_Hop.on(device, hop, step.cu_seqlens_q) for hop in step.hops],
        selected,
        window,
        windowed,
        cap,
    )


def tables_of(step: PagedStep, device: torch.device, sequences: slice | None = None) -> PagedTables:
    """What a step's own pages are for consecutive sequences of it, or for all."""
    sequences = sequences or slice(0, len(step.kv_lens))
    starts = step.cu_seqlens_q[sequences.start : sequences.stop + 1]
    return PagedTables.on(
        device,
        step.page_table[sequences],
        starts - starts[0],
        step.kv_lens[sequences],
        step.causal,
    )


class Seen:
    """What rows q [T, Hq, D] see of several lists of pages."""

    def __init__(self, q: torch.Tensor, layer: int, scale: float, cap: float | None = None) -> None:
        self._q, self._layer, self._scale, self._cap = q, layer, scale, cap
        self._o, self._lse = _partials(q, 2)  # of the lists so far, and of the last one
        self._lists = 0

    def add(self, lists: Iterable[PagedTables], pool: torch.Tensor) -> None:
        for tables in lists:
            if self._lists > 1:
                self._merge_into_first()
            this = min(self._lists, 1)
            out = self._o[this], self._lse[this]
            tables.attend(self._q, self._layer, pool, self._scale, out, self._cap)
            self._lists += 1

    def merged(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """o in `dtype`, and lse."""
        if self._lists > 1:
            if len(self._q) <= _MERGE_ROWS:
                return ops.merge_lse(self._o, self._lse, out_dtype=dtype)
            self._merge_into_first()
        return self._o[0].to(dtype), self._lse[0]

    def _merge_into_first(self) -> None:
        o, lse = self._o, self._lse
        for first in range(0, o.shape[1], _MERGE_ROWS):
            rows = slice(first, first + _MERGE_ROWS)
            o[0, rows], lse[0, rows] = ops.merge_lse(o[:, rows], lse[:, rows])


# Pages and the ranks that they go to; pages that go to several are there once.
_Sends: TypeAlias = "tuple[tuple[PageIndex, list[int]], ...]"


@dataclass(frozen=True)
class _Exchange:
    """An `Exchange` on the device. No pages are no transfer."""

    rows: int
    sends: _Sends
    receives: tuple[tuple[PageIndex, int], ...]

    @classmethod
    def on(cls, device: torch.device, exchange: Exchange) -> _Exchange:
        receives = tuple(
            (_index_on(device, each.pages), each.rank)
            for each in exchange.receives
            if len(each.pages)
        )
        return cls(exchange.rows, _sends_on(device, exchange.sends), receives)


@dataclass(frozen=True)
class _Hop:
    """A `Hop` on the device."""

    sends: _Sends
    source: int
    num_pages: int
    tables: PagedTables

    @classmethod
    def on(cls, device: torch.device, hop: Hop, cu_seqlens_q: np.ndarray) -> _Hop:
        tables = PagedTables.on(device, hop.page_table, cu_seqlens_q, hop.kv_lens)
        return cls(_sends_on(device, (hop.sends,)), hop.source, hop.num_pages, tables)


def _sends_on(device: torch.device, sends: Iterable[Pages]) -> _Sends:
    ranks_of: dict[tuple[int, ...], list[int]] = {}
    for each in sends:
        ranks_of.setdefault(tuple(each.pages.tolist()), []).append(each.rank)
    return tuple(
        (_index_on(device, np.array(pages)), ranks) for pages, ranks in ranks_of.items() if pages
    )


def _index_on(device: torch.device, pages: np.ndarray) -> PageIndex:
    if (np.diff(pages) == 1).all():
        return slice(int(pages[0]), int(pages[-1]) + 1)
    return to_device(pages, device)


def _room(pool: torch.Tensor, index: PageIndex) -> torch.Tensor:
    """Where pages arrive: at once in the pool if they are consecutive there."""
    if isinstance(index, slice):
        return pool[index]
    return pool.new_empty(len(index), *pool.shape[1:])


def merge_over_ranks(comm: Communicator, o: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Attention over all ranks' keys from each rank's o [T, Hq, D] and lse [T, Hq]; o's dtype."""
    partial = torch.cat((o.float(), lse[..., None]), dim=-1)
    partials = partial.new_empty(comm.size, *partial.shape)
    comm.all_gather(partial, partials)
    return ops.merge_lse(partials[..., :-1], partials[..., -1])[0].to(o.dtype)


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
