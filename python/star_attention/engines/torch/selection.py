"""Selected pages in phase 1: rows also see a few pages of earlier blocks, chosen for each tile of
rows and KV head by the largest product of pooled queries with means of keys.

A tile is a page of rows. The attention over anchor and own block comes first: its LSE makes the
scores of different rows comparable. Ranks send one another the means of what they keep, and then
the pages that were chosen, each once. Then each tile and KV head attends to its list, as a sequence
with one KV head, and both are merged. Why so: docs/selection.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from star_attention import ops
from star_attention.distributed import Communicator
from star_attention.engines.base import Selection
from star_attention.ops import select_reference as select

_MEAN_KEYS = 16  # of a page, that a mean stands for
_MEAN_ROWS = 4  # of a tile, in all heads of a group


@dataclass(frozen=True)
class Tiles:
    """The tiles of a step's sequences, and the pages that each may choose from.

    Attributes:
        count: pages that a tile chooses at most.
        pages: int64 [C], in the order of the context; -1: on another rank.
        owners: int64 [C], the ranks that keep them.
        sequences: of each sequence, its rows, and how many of the first pages are before its block.
        cu_seqlens: int32 [tiles + 1], prefix sums of the tiles' rows.
    """

    count: int
    pages: torch.Tensor
    owners: torch.Tensor
    sequences: tuple[tuple[slice, int], ...]
    cu_seqlens: torch.Tensor

    @classmethod
    def on(
        cls, device: torch.device, selection: Selection, cu_seqlens_q: np.ndarray, page: int
    ) -> Tiles:
        starts = cu_seqlens_q.tolist()
        rows = [slice(a, b) for a, b in itertools.pairwise(starts)]
        tiles = [start for each in rows for start in range(each.start, each.stop, page)]
        return cls(
            selection.count,
            torch.from_numpy(selection.pages).long().to(device),
            torch.from_numpy(selection.owners).long().to(device),
            tuple(zip(rows, selection.counts.tolist(), strict=True)),
            torch.tensor([*tiles, starts[-1]], dtype=torch.int32, device=device),
        )


def attend_selected(
    q: torch.Tensor,
    pool: torch.Tensor,
    tiles: Tiles,
    own: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    comm: Communicator,
) -> torch.Tensor:
    """Attention over the pages that tiles choose, merged with what the rows see anyway. Every rank
    takes part, without rows if need be.

    Args:
        q: [T, Hq, D].
        pool: of the layer, [num_pages, 2, Hkv, tokens_per_block, D], the step's rows stored.
        own: float32 o [T, Hq, D] and lse [T, Hq], over anchor and own block.
        comm: of host memory: which pages are fetched is known on the host.

    Returns:
        [T, Hq, D], in q's dtype.
    """
    means = _gather(comm, tiles.owners, _means(pool, tiles.pages[tiles.owners == comm.rank]))
    lists, counts = choose_pages(q, means, tiles, own[1], scale, pool.shape[3])
    fetched, places = _fetch(comm, pool, tiles, lists, counts)
    if not len(q):
        return q
    o, lse = _attend_lists(q, fetched, places[lists.long()], counts, tiles, scale)
    merged = ops.merge_lse(torch.stack((own[0], o)), torch.stack((own[1], lse)), out_dtype=q.dtype)
    return merged[0]


def choose_pages(
    q: torch.Tensor, means: torch.Tensor, tiles: Tiles, lse: torch.Tensor, scale: float, page: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pages that each tile and KV head sees besides: int32 lists [Hkv, tiles, count] of indices
    into `tiles.pages`, ascending, 0 behind what holds, and int32 counts [Hkv, tiles].

    Args:
        means: [C, Hkv, c, D], of the keys of each page.
        lse: float32 [T, Hq], of the rows over anchor and own block.
    """
    means = means.transpose(0, 1)
    kv_heads = len(means)
    lists = [torch.empty(kv_heads, 0, tiles.count, dtype=torch.int32)]
    counts = [torch.empty(kv_heads, 0, dtype=torch.int32)]
    for rows, candidates in tiles.sequences:
        scores = _scores(q[rows], means[:, :candidates], lse[rows], page, scale)
        listed, count = select.choose(scores, tiles.count)
        lists.append(listed)
        counts.append(count)
    return torch.cat(lists, 1), torch.cat(counts, 1)


def _means(pool: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """[pages, Hkv, c, D], of their keys."""
    page = pool.shape[3]
    size = _MEAN_KEYS if page % _MEAN_KEYS == 0 else page
    return select.means(pool[pages, 0], size)


def _scores(
    q: torch.Tensor, means: torch.Tensor, lse: torch.Tensor, page: int, scale: float
) -> torch.Tensor:
    """Of a sequence's tiles, float32 [Hkv, tiles, pages]; the last row of the last tile stands for
    rows that it lacks."""
    pooled = _MEAN_ROWS if page % _MEAN_ROWS == 0 else 1
    rows, rows_lse = (
        select.pool_rows(select.whole_tiles(x, page), len(means), page, pooled, heads=True)
        for x in (q, lse)
    )
    return select.tile_scores(rows, rows_lse, means, scale)


def _gather(comm: Communicator, owners: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """What all ranks have of the candidates, in their order, from this rank's part."""
    if comm.size == 1:
        return own
    whole = own.new_empty(len(owners), *own.shape[1:])
    whole[owners == comm.rank] = own

    def arriving(rank: int) -> torch.Tensor:
        return own.new_empty(int((owners == rank).sum()), *own.shape[1:])

    for rank, part in _swap(comm, lambda rank: own, arriving):
        whole[owners == rank] = part
    return whole


def _fetch(
    comm: Communicator,
    pool: torch.Tensor,
    tiles: Tiles,
    lists: torch.Tensor,
    counts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the pages of the lists are: a pool, and int64 [C], the page of each candidate there."""
    if comm.size == 1:
        return pool, tiles.pages
    chosen = select.chosen_mask(lists, counts, len(tiles.pages)).flatten(0, 1).any(0)
    wanted = dict(_swap(comm, lambda rank: chosen, lambda rank: torch.empty_like(chosen)))
    is_mine = tiles.owners == comm.rank
    places = chosen.long().cumsum(0) - 1
    fetched = pool.new_empty(int(chosen.sum()), *pool.shape[1:])
    fetched[places[chosen & is_mine]] = pool[tiles.pages[chosen & is_mine]]

    def leaving(rank: int) -> torch.Tensor:
        return pool[tiles.pages[wanted[rank] & is_mine]]

    def arriving(rank: int) -> torch.Tensor:
        return pool.new_empty(int((chosen & (tiles.owners == rank)).sum()), *pool.shape[1:])

    for rank, pages in _swap(comm, leaving, arriving):
        fetched[places[chosen & (tiles.owners == rank)]] = pages
    return fetched, places


def _swap(
    comm: Communicator,
    leaving: Callable[[int], torch.Tensor],
    arriving: Callable[[int], torch.Tensor],
) -> list[tuple[int, torch.Tensor]]:
    """Sends each other rank a tensor, and receives one; no elements are no transfer."""
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    sends = [(leaving(rank).contiguous(), rank) for rank in others]
    receives = [(arriving(rank), rank) for rank in others]
    moved = ([each for each in way if each[0].numel()] for way in (sends, receives))
    comm.exchange(*moved).wait()
    return [(rank, tensor) for tensor, rank in receives]


def _attend_lists(
    q: torch.Tensor,
    pool: torch.Tensor,
    lists: torch.Tensor,
    counts: torch.Tensor,
    tiles: Tiles,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 o [T, Hq, D] and lse [T, Hq] over lists of the pool's pages, [Hkv, tiles, count]."""
    kv_heads, page = pool.shape[2:4]
    length = len(q)
    heads = torch.arange(kv_heads, device=q.device)
    # A page of one KV head, counted in runs of a head's keys or values.
    table = lists * (2 * kv_heads) + heads[:, None, None]
    starts = (tiles.cu_seqlens[:-1] + length * heads[:, None]).flatten()
    by_head = q.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(0, 1).contiguous()
    o = by_head.new_empty(by_head.shape, dtype=torch.float32)
    lse = by_head.new_empty(by_head.shape[:2], dtype=torch.float32)
    ops.paged_attention(
        by_head,
        _heads_as_pages(pool),
        table.flatten(0, 1).int(),
        F.pad(starts, (0, 1), value=length * kv_heads).int(),
        (counts * page).flatten(),
        causal=False,
        scale=scale,
        max_q_len=page,
        max_kv_len=tiles.count * page,
        out=(o, lse),
    )
    return tuple(x.unflatten(0, (kv_heads, length)).transpose(0, 1).flatten(1, 2) for x in (o, lse))


def _heads_as_pages(pool: torch.Tensor) -> torch.Tensor:
    """The pool as one of a single KV head: page p of head h is page 2 p Hkv + h of this view."""
    num_pages, _, kv_heads, page, dim = pool.shape
    run = page * dim
    count = max(2 * num_pages - 1, 0) * kv_heads
    return pool.as_strided(
        (count, 2, 1, page, dim), (run, kv_heads * run, run, dim, 1), pool.storage_offset()
    )
