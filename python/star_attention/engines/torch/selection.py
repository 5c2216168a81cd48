"""Selected pages in phase 1: rows also see a few pages of earlier blocks, chosen for each tile of
rows and KV head by the largest product of pooled queries with means of keys.

A tile is a page of rows. In each layer, once its rows are stored:

    means of the keys that are new since the context's last step; ranks send them one another
    own attention, over anchor and block: its LSE makes the scores of different rows comparable
    select_pages: a list for each tile and KV head
    chosen pages of other ranks, each once: read from their memory, or sent by them
    attention over the lists, merged with the own

Why so: docs/selection.md.
"""

from __future__ import annotations

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


class SelectedPages:
    """The choice of one step, layer by layer.

    Args:
        selection: of the step.
        cu_seqlens_q: int32 [S + 1], the step's.
        pool: [num_layers, num_pages, 2, Hkv, tokens_per_block, D].
        peers: addresses of all ranks' pools, as mapped here; None: out of reach.
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
        starts = cu_seqlens_q.tolist()
        tiles = [range(begin, end, page) for begin, end in itertools.pairwise(starts)]
        candidates = selection.counts.repeat([len(each) for each in tiles])
        self._tiles = _ints([*itertools.chain(*tiles), starts[-1]], device)
        self._candidates = _ints(candidates, device)

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
        # Room for the union of what a KV head's tiles choose; the same in all steps of a context,
        # so that it is the same memory.
        self._most = min(len(candidates) * self._count, means.count)
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

    def attend(
        self,
        q: torch.Tensor,
        layer: int,
        o: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
        stream: int,
    ) -> torch.Tensor:
        """Attention over what the rows choose, merged with what they see anyway. Every rank takes
        part, without rows if need be.

        Args:
            q: [T, Hq, D].
            o, lse: float32 [2, T, Hq, D] and [2, T, Hq], the first over anchor and own block; the
                second ones are written.

        Returns:
            [T, Hq, D], in q's dtype.
        """
        means = self._known.means[layer][: len(self._pages)]
        page = self._pool.shape[4]
        lists, counts = ops.select_pages(
            q,
            lse[0],
            self._tiles,
            self._candidates,
            means,
            count=self._count,
            page=page,
            scale=scale,
        )
        planes, fetched = self._fetch(layer, lists, counts, stream)
        if not len(q):
            return q
        ops.paged_attention(
            q,
            self._pool[layer],
            planes,
            self._tiles,
            counts * page,
            causal=False,
            scale=scale,
            max_q_len=page,
            max_kv_len=self._count * page,
            out=(o[1], lse[1]),
            other_pool=fetched,
        )
        return ops.merge_lse(o, lse, out_dtype=q.dtype)[0]

    def finish(self) -> None:
        """The step is done, on this rank."""
        self._means.known = len(self._pages)
        if self._peers:  # no page is given away while another rank still reads it
            self._comm.gather_objects(None)

    def _fetch(
        self, layer: int, lists: torch.Tensor, counts: torch.Tensor, stream: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The lists as planes of the layer's pool and of another, and that."""
        pool, comm = self._pool[layer], self._comm
        if self._peers:
            from star_attention.ops.cuda import fetch_pages

            fetched = pool.new_empty(self._most, *pool.shape[1:])
            offset = pool.data_ptr() - self._pool.data_ptr()
            pools = [address + offset for address in self._peers]
            planes = fetch_pages(
                lists, counts, self._pages, self._owners, pools, comm.rank, fetched
            )
            return planes, fetched
        places, fetched = self._pages.long(), pool[:0]
        if comm.size > 1:
            places, fetched = self._send_chosen(pool, lists, counts, stream)
        kv_heads = pool.shape[2]
        heads = torch.arange(kv_heads, device=pool.device)[:, None]
        listed = lists.long()
        plane = places[listed] * (2 * kv_heads) + heads
        is_here = (self._owners == comm.rank)[listed]
        return torch.where(is_here, plane, ~plane).int(), fetched

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


def _ints(values: np.ndarray | list[int], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, np.int32)).to(device)
