"""Selected pages in phase 1: rows also see a few pages of earlier blocks, chosen for each tile of
rows and KV head by the largest product of pooled queries with means of keys.

A tile is a page of rows. The attention over anchor and own block comes first: its LSE makes the
scores of different rows comparable. Then each tile and KV head attends to its list, as a sequence
with one KV head, and both are merged. Why so: docs/selection.md.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from star_attention import ops
from star_attention.engines.base import Selection
from star_attention.ops import select_reference as select

_MEAN_KEYS = 16  # of a page, that a mean stands for
_MEAN_ROWS = 4  # of a tile, in all heads of a group


@dataclass(frozen=True)
class Tiles:
    """The tiles of a step's sequences, and the pages that each may choose from.

    Attributes:
        count: pages that a tile chooses at most.
        pages: int64 [C], in the order of the context.
        sequences: of each sequence, its rows, and how many of the first pages are before its block.
        cu_seqlens: int32 [tiles + 1], prefix sums of the tiles' rows.
    """

    count: int
    pages: torch.Tensor
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
            tuple(zip(rows, selection.counts.tolist(), strict=True)),
            torch.tensor([*tiles, starts[-1]], dtype=torch.int32, device=device),
        )


def attend_selected(
    q: torch.Tensor,
    pool: torch.Tensor,
    tiles: Tiles,
    own: tuple[torch.Tensor, torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """Attention over the pages that tiles choose, merged with what the rows see anyway.

    Args:
        q: [T, Hq, D].
        pool: of the layer, [num_pages, 2, Hkv, tokens_per_block, D], the step's rows stored.
        own: float32 o [T, Hq, D] and lse [T, Hq], over anchor and own block.

    Returns:
        [T, Hq, D], in q's dtype.
    """
    lists, counts = choose_pages(q, pool, tiles, own[1], scale)
    o, lse = _attend_lists(q, pool, tiles, lists, counts, scale)
    merged = ops.merge_lse(torch.stack((own[0], o)), torch.stack((own[1], lse)), out_dtype=q.dtype)
    return merged[0]


def choose_pages(
    q: torch.Tensor, pool: torch.Tensor, tiles: Tiles, lse: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pages that each tile and KV head sees besides: int32 lists [Hkv, tiles, count] of indices
    into `tiles.pages`, ascending, 0 behind what holds, and int32 counts [Hkv, tiles].

    Args:
        lse: float32 [T, Hq], of the rows over anchor and own block.
    """
    kv_heads, page = pool.shape[2:4]
    size = _MEAN_KEYS if page % _MEAN_KEYS == 0 else page
    keys = pool[tiles.pages, 0].transpose(0, 1)
    means = select.means(keys, size)
    lists, counts = [], []
    for rows, candidates in tiles.sequences:
        chosen = _choose_for(q[rows], means[:, :candidates], lse[rows], kv_heads, page, scale)
        listed, count = select.choose(chosen, tiles.count)
        lists.append(listed)
        counts.append(count)
    return torch.cat(lists, 1), torch.cat(counts, 1)


def _choose_for(
    q: torch.Tensor,
    means: torch.Tensor,
    lse: torch.Tensor,
    kv_heads: int,
    page: int,
    scale: float,
) -> torch.Tensor:
    """Scores of a sequence's tiles, float32 [Hkv, tiles, pages]; the last row of the last tile
    stands for rows that it lacks."""
    padding = -len(q) % page
    pooled = _MEAN_ROWS if page % _MEAN_ROWS == 0 else 1
    q, lse = (torch.cat((x, x[-1:].expand(padding, *x.shape[1:]))) for x in (q, lse))
    rows, rows_lse = (select.pool_rows(x, kv_heads, page, pooled, heads=True) for x in (q, lse))
    tiles, of_tile = rows.shape[1:3]
    if not means.shape[1]:
        return rows_lse.new_empty(kv_heads, tiles, 0)
    products = select.multiply(rows.flatten(1, 2), means).mul_(scale).amax(-1)
    return (products.unflatten(1, (tiles, of_tile)) - rows_lse[..., None]).amax(2)


def _attend_lists(
    q: torch.Tensor,
    pool: torch.Tensor,
    tiles: Tiles,
    lists: torch.Tensor,
    counts: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 o [T, Hq, D] and lse [T, Hq] over the lists."""
    kv_heads, page = pool.shape[2:4]
    length = len(q)
    heads = torch.arange(kv_heads, dtype=torch.int32, device=q.device)
    # A page of one KV head, counted in runs of a head's keys or values.
    table = tiles.pages[lists.long()].int() * (2 * kv_heads) + heads[:, None, None]
    starts = (tiles.cu_seqlens[:-1] + length * heads[:, None]).flatten()
    by_head = q.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(0, 1).contiguous()
    o = by_head.new_empty(by_head.shape, dtype=torch.float32)
    lse = by_head.new_empty(by_head.shape[:2], dtype=torch.float32)
    ops.paged_attention(
        by_head,
        _heads_as_pages(pool),
        table.flatten(0, 1).contiguous(),
        F.pad(starts, (0, 1), value=length * kv_heads),
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
    count = (2 * num_pages - 1) * kv_heads
    return pool.as_strided(
        (count, 2, 1, page, dim), (run, kv_heads * run, run, dim, 1), pool.storage_offset()
    )
