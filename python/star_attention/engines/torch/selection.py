"""Selected pages in phase 1: rows also see a few pages of earlier blocks, chosen for each tile of
rows and KV head by the largest product of pooled queries with means of keys.

A tile is a page of rows. In each layer, once its rows are stored:

    means of the keys that are new since the context's last step; ranks send them one another
    own attention, over anchor and block: its LSE makes the scores of different rows comparable
    select_pages: a list for each tile and KV head
    chosen pages of other ranks, each once: read from their memory, or sent by them
    attention over the lists, merged with the own

Over several ranks a step has two parts. What one chose is read from other ranks' memory while the
other part attends:

    | own 1 | choose 1 | own 2   | choose 2 | lists 1 | lists 2 |
                       | fetch 1 |          | fetch 2 |

Why so: docs/selection.md.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from star_attention import ops
from star_attention.distributed import Communicator
from star_attention.distributed.base import Request
from star_attention.engines.base import Selection
from star_attention.ops.select_reference import chosen_mask


@dataclass
class _Known:
    """Of a context: means [num_layers, C, Hkv, c, D]; int32 pages [C], in their ranks' pools."""

    means: torch.Tensor
    pages: np.ndarray

    @classmethod
    def of(cls, pool: torch.Tensor, count: int) -> _Known:
        layers, _, _, kv_heads, page, dim = pool.shape
        means = pool.new_empty(layers, count, kv_heads, ops.means_of_page(page), dim)
        return cls(means, np.empty(0, np.int32))


@dataclass(frozen=True)
class Part:
    """Consecutive sequences of a step.

    Attributes:
        sequences, rows: of the step.
        tiles: int32 [N + 1], where its tiles begin and the last one ends, from its first row on.
        candidates: int32 [N], pages that each tile may choose from.
    """

    sequences: slice
    rows: slice
    tiles: torch.Tensor
    candidates: torch.Tensor


@dataclass(frozen=True)
class Chosen:
    """What the tiles of a part see besides, in a layer.

    Attributes:
        planes, counts: int32 [N, Hkv, count] and [N, Hkv], lists of planes and their lengths.
        fetched: the other pool that planes are in.
        ready: after which this can be read.
    """

    planes: torch.Tensor
    counts: torch.Tensor
    fetched: torch.Tensor
    ready: torch.cuda.Event | None


class SelectedPages:
    """The choice of one step, layer by layer.

    Args:
        selection: of the step.
        cu_seqlens_q: int32 [S + 1], the step's.
        pool: [num_layers, num_pages, 2, Hkv, tokens_per_block, D].
        peers: addresses of all ranks' pools, as mapped here; None: out of reach.

    Attributes:
        parts: of the step; every rank has as many, if need be without rows.
    """

    def __init__(
        self,
        selection: Selection,
        cu_seqlens_q: np.ndarray,
        pool: torch.Tensor,
        comm: Communicator,
        peers: list[int] | None = None,
    ) -> None:
        device, page = pool.device, pool.shape[4]
        self._comm, self._pool, self._peers = comm, pool, peers
        self._count, self._means = selection.count, selection.means
        self.parts = [
            _part(sequences, cu_seqlens_q, selection.counts, page, device)
            for sequences in _cut(cu_seqlens_q, 2 if comm.size > 1 else 1)
        ]

        known, means = selection.means.known, selection.means
        if means.data is None:
            means.data = _Known.of(pool, means.count)
        self._known = means.data
        # Each rank knows the numbers of its own pages.
        new_pages = np.max(comm.gather_objects(selection.pages[known:]), axis=0)
        self._known.pages = np.concatenate((self._known.pages[:known], new_pages))
        self._pages = _ints(self._known.pages, device)
        self._owners = _ints(selection.owners, device)
        new = np.arange(known, len(selection.pages))
        owners = selection.owners[known:]
        self._new = {rank: _ints(new[owners == rank], device) for rank in range(comm.size)}
        self._new_here = _ints(new_pages[owners == comm.rank], device)
        self._under_way: tuple[Request, list[tuple[torch.Tensor, int]]] | None = None

    def stored(self, layer: int, stream: int) -> None:
        """The step's rows are in the layer's pages."""
        means, comm = self._known.means[layer], self._comm
        own = self._new[comm.rank]
        ops.page_means(self._pool[layer], self._new_here, own, means)
        if comm.size > 1:
            leaving = means[own.long()]
            self._under_way = self._swap(
                lambda rank: leaving,
                lambda rank: means.new_empty(len(self._new[rank]), *means.shape[1:]),
                stream,
            )

    def arrived(self, layer: int, stream: int) -> None:
        """Waits for the other ranks' means."""
        if self._under_way:
            request, receives = self._under_way
            request.wait(stream)
            for means, rank in receives:
                self._known.means[layer][self._new[rank].long()] = means
            self._under_way = None

    def choose(
        self,
        part: Part,
        q: torch.Tensor,
        lse: torch.Tensor,
        layer: int,
        scale: float,
        stream: int,
    ) -> Chosen:
        """Chooses for a part's rows, and begins to bring what they chose. Every rank takes part.

        Args:
            q: [T, Hq, D], the part's.
            lse: float32 [T, Hq], of their attention over anchor and own block.
        """
        lists, counts = ops.select_pages(
            q,
            lse,
            part.tiles,
            part.candidates,
            self._known.means[layer][: len(self._pages)],
            count=self._count,
            page=self._pool.shape[4],
            scale=scale,
        )
        if self._peers:
            return self._fetch(layer, lists, counts)
        pool = self._pool[layer]
        places, sent = self._pages.long(), pool[:0]
        if self._comm.size > 1:
            places, sent = self._send_chosen(pool, lists, counts, stream)
        kv_heads = pool.shape[2]
        heads = torch.arange(kv_heads, device=pool.device)[:, None]
        listed = lists.long()
        plane = places[listed] * (2 * kv_heads) + heads
        is_here = (self._owners == self._comm.rank)[listed]
        return Chosen(torch.where(is_here, plane, ~plane).int(), counts, sent, None)

    def arrive(self, chosen: Chosen) -> None:
        """Waits for what was chosen."""
        if chosen.ready:
            torch.cuda.current_stream().wait_event(chosen.ready)

    def attend(
        self,
        part: Part,
        chosen: Chosen,
        q: torch.Tensor,
        layer: int,
        scale: float,
        out: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Attention of a part's rows over what they chose and has arrived.

        Args:
            q: [T, Hq, D], the part's.
            out: float32 o [T, Hq, D] and lse [T, Hq], written.
        """
        if not len(q):
            return
        page = self._pool.shape[4]
        ops.paged_attention(
            q,
            self._pool[layer],
            chosen.planes,
            part.tiles,
            chosen.counts * page,
            causal=False,
            scale=scale,
            max_q_len=page,
            max_kv_len=self._count * page,
            out=out,
            other_pool=chosen.fetched,
        )

    def end(self) -> None:
        """All layers are enqueued."""
        self._means.known = len(self._pages)

    @property
    def reads_peers(self) -> bool:
        """Whether chosen pages are read out of other ranks' memory."""
        return bool(self._peers)

    def _fetch(self, layer: int, lists: torch.Tensor, counts: torch.Tensor) -> Chosen:
        """Begins to read the chosen pages of other ranks, each KV head's part of a page once."""
        from star_attention.ops.cuda import fetch_pages

        pool = self._pool[layer]
        # Room for all that a KV head's tiles may choose: its size must not depend on the choice.
        most = min(len(lists) * self._count, self._means.count)
        fetched = pool.new_empty(most, *pool.shape[1:])
        offset = pool.data_ptr() - self._pool.data_ptr()
        pools = [address + offset for address in self._peers]
        side = _side_stream(pool.device)
        # Also for what was read into the same memory earlier.
        side.wait_stream(torch.cuda.current_stream())
        lists.record_stream(side)  # read there after its memory is given away here
        with torch.cuda.stream(side):
            planes = fetch_pages(
                lists, counts, self._pages, self._owners, pools, self._comm.rank, fetched
            )
            return Chosen(planes, counts, fetched, side.record_event())

    def _send_chosen(
        self, pool: torch.Tensor, lists: torch.Tensor, counts: torch.Tensor, stream: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ranks tell one another which pages they chose, and send them. Here the host waits for the
        device: how many there are is known there.

        Returns:
            int64 [C], where each page is, in the pool or in what arrived; and that, a pool.
        """
        rank, pages = self._comm.rank, self._pages.long()
        chosen = chosen_mask(lists, counts, len(pages)).flatten(0, 1).any(0)
        told, masks = self._swap(
            lambda rank: chosen.byte(),
            lambda rank: torch.empty_like(chosen, dtype=torch.uint8),
            stream,
        )
        told.wait(stream)
        owners = self._owners
        is_here = owners == rank
        leaving = {other: pages[(mask > 0) & is_here] for mask, other in masks}
        is_missing = chosen & ~is_here
        places = torch.where(is_here, pages, is_missing.cumsum(0) - 1)
        fetched = pool.new_empty(int(is_missing.sum()), *pool.shape[1:])
        moved, receives = self._swap(
            lambda rank: pool[leaving[rank]],
            lambda rank: pool.new_empty(
                int((is_missing & (owners == rank)).sum()), *pool.shape[1:]
            ),
            stream,
        )
        moved.wait(stream)
        for arrived, other in receives:
            fetched[places[is_missing & (owners == other)]] = arrived
        return places, fetched

    def _swap(
        self,
        leaving: Callable[[int], torch.Tensor],
        arriving: Callable[[int], torch.Tensor],
        stream: int,
    ) -> tuple[Request, list[tuple[torch.Tensor, int]]]:
        """Begins to send each other rank a tensor, and to receive one; no elements are no
        transfer."""
        others = [rank for rank in range(self._comm.size) if rank != self._comm.rank]
        sends = [(leaving(rank).contiguous(), rank) for rank in others]
        receives = [(arriving(rank), rank) for rank in others]
        moved = ([each for each in way if each[0].numel()] for way in (sends, receives))
        return self._comm.exchange(*moved, stream), receives


def _cut(cu_seqlens_q: np.ndarray, parts: int) -> list[slice]:
    """The sequences in consecutive parts of about as many rows; some may be empty."""
    rows = cu_seqlens_q[-1] * np.arange(parts + 1) / parts
    cuts = [int(np.abs(cu_seqlens_q - row).argmin()) for row in rows]
    return [slice(*each) for each in itertools.pairwise(cuts)]


def _part(
    sequences: slice,
    cu_seqlens_q: np.ndarray,
    counts: np.ndarray,
    page: int,
    device: torch.device,
) -> Part:
    starts = cu_seqlens_q[sequences.start : sequences.stop + 1].tolist()
    tiles = [range(begin, end, page) for begin, end in itertools.pairwise(starts)]
    bounds = np.array([*itertools.chain(*tiles), starts[-1]]) - starts[0]
    candidates = counts[sequences].repeat([len(each) for each in tiles])
    rows = slice(starts[0], starts[-1])
    return Part(sequences, rows, _ints(bounds, device), _ints(candidates, device))


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Goes before what the current stream has started."""
    return torch.cuda.Stream(device, priority=-1)


def _ints(values: np.ndarray | list[int], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, np.int32)).to(device)
