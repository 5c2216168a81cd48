"""Selected pages in plain torch: which pages of earlier blocks a tile of query rows sees.

The oracle of `select_pages`. In phase 1 a tile (some consecutive rows, in all query heads of one KV
head) sees the anchor, its own block up to itself, and up to `count` pages between the two:

1. `Division` says which pages may be chosen: those of earlier blocks, behind the anchor.
2. A page's score for a (KV head, tile) is the largest `q k scale - lse` over the tile's rows and
   the page's keys. Means of consecutive keys stand for keys (`means`), means of consecutive rows
   may stand for rows (`pool_rows`). With the lse of what a row sees anyway, anchor and own block,
   a score is the log of a key's weight beside that, and scores of different rows compare.
3. `choose` takes the best; of equal scores the lower page; lists ascend.

A tile is chosen for as a whole, by rows that come later too: a pass of phase 1 holds whole tiles.
Which score and why: docs/selection.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

# Scores that are in memory together, in elements.
_AT_ONCE = 1 << 28


@dataclass(frozen=True)
class Division:
    """A context in blocks, tiles and pages, all in tokens. Pages divide anchor and block; tiles
    divide blocks.

    Attributes:
        tokens: of the context, padded to whole pages and tiles.
    """

    tokens: int
    block: int
    anchor: int
    page: int = 128
    tile: int = 128

    def __post_init__(self) -> None:
        for name, unit in (("anchor", self.page), ("block", self.page), ("block", self.tile)):
            if getattr(self, name) % unit:
                raise ValueError(f"{name} is {getattr(self, name)}: use a multiple of {unit}")
        if self.tokens % self.page or self.tokens % self.tile:
            raise ValueError(f"{self.tokens} tokens are no whole number of pages and tiles")

    @property
    def tiles(self) -> int:
        return self.tokens // self.tile

    @property
    def pages(self) -> int:
        return self.tokens // self.page

    def earlier_pages(self, tile: int) -> int:
        """Pages of the blocks before the tile's, those of the anchor included."""
        return tile * self.tile // self.block * self.block // self.page

    def candidates(self, device: torch.device | str) -> torch.Tensor:
        """bool [tiles, pages]: those that may be chosen."""
        pages, blocks = self._edges(device)
        return (pages >= self.anchor // self.page) & (pages < blocks)

    def local(self, device: torch.device | str) -> torch.Tensor:
        """bool [tiles, pages]: of the anchor, and of the own block up to the tile's last page."""
        pages, blocks = self._edges(device)
        ends = (torch.arange(self.tiles, device=device) + 1)[:, None] * self.tile
        own = (pages >= blocks) & (pages * self.page < ends)
        return own | ((pages < self.anchor // self.page) & (pages < blocks))

    def _edges(self, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages [pages], and the first page of each tile's block [tiles, 1]."""
        begins = torch.arange(self.tiles, device=device) * self.tile // self.block * self.block
        return torch.arange(self.pages, device=device), (begins // self.page)[:, None]


def select_pages(
    q: torch.Tensor,
    summaries: torch.Tensor,
    lse: torch.Tensor,
    division: Division,
    *,
    scale: float,
    count: int,
    rows: int = 1,
    heads: bool = False,
    margin: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pages that each (KV head, tile) sees besides anchor and own block.

    Args:
        q: [T, Hq, D]. T may end within the last tile: the last row is repeated.
        summaries: [Hkv, pages, c, D], of `means`; float32 products.
        lse: float32 [T, Hq], of each row over anchor and own block.
        count, margin: see `choose`.
        rows, heads: see `pool_rows`.

    Returns:
        int32 pages [Hkv, tiles, count], ascending, 0 behind what holds, and int32 counts
        [Hkv, tiles].
    """
    kv_heads, tile = len(summaries), division.tile
    rows_q, rows_lse = (
        pool_rows(whole_tiles(x, tile), kv_heads, tile, rows, heads) for x in (q, lse)
    )
    scores = page_scores(rows_q, rows_lse, summaries, division, scale)
    return choose(scores, count, margin)


def page_keys(k: torch.Tensor, page: int) -> torch.Tensor:
    """k [T, Hkv, D] as [Hkv, pages, page, D]."""
    return k.unflatten(0, (-1, page)).permute(2, 0, 1, 3)


def means(keys: torch.Tensor, size: int) -> torch.Tensor:
    """Of `size` consecutive keys [Hkv, pages, page, D]: [Hkv, pages, page / size, D], summed in
    float32."""
    return keys.unflatten(2, (-1, size)).mean(3, dtype=torch.float32).to(keys.dtype)


def whole_tiles(x: torch.Tensor, tile: int) -> torch.Tensor:
    """x [T, ...] with its last row repeated to the end of the last tile."""
    return torch.cat((x, x[-1:].expand(-len(x) % tile, *x.shape[1:])))


def tile_rows(x: torch.Tensor, kv_heads: int, tile: int) -> torch.Tensor:
    """[T, Hq, ...] as [Hkv, tiles, group, tile, ...]."""
    split = x.unflatten(0, (-1, tile)).unflatten(2, (kv_heads, -1))
    return split.movedim((0, 1, 2), (1, 3, 0))


def pool_rows(
    x: torch.Tensor, kv_heads: int, tile: int, rows: int = 1, heads: bool = False
) -> torch.Tensor:
    """What stands for a tile's rows, of all heads of a group.

    Args:
        x: [T, Hq, ...]: queries, or what belongs to them.
        rows: consecutive rows whose mean stands for them, summed in float32.
        heads: one mean over the group's heads too.

    Returns:
        [Hkv, tiles, M, ...], M = group * tile / rows, or tile / rows.
    """
    x = tile_rows(x, kv_heads, tile).unflatten(3, (-1, rows))
    if rows > 1 or heads:
        over = (2, 4) if heads else 4
        x = x.mean(over, keepdim=True, dtype=torch.float32).to(x.dtype)
    return x.flatten(2, 4)


def page_scores(
    rows: torch.Tensor,
    lse: torch.Tensor,
    summaries: torch.Tensor,
    division: Division,
    scale: float,
    *,
    total: bool = False,
) -> torch.Tensor:
    """float32 [Hkv, tiles, pages]; -inf for pages that may not be chosen.

    Args:
        rows, lse: of `pool_rows`: [Hkv, tiles, M, E], and float32 [Hkv, tiles, M].
        summaries: [Hkv, pages, c, E].
        total: the log of the sum of exp over rows and summaries, instead of the largest.
    """
    kv_heads, tiles = rows.shape[:2]
    scores = lse.new_full((kv_heads, tiles, division.pages), -torch.inf)
    for part in _parts(rows, summaries):
        pages = division.earlier_pages(part.stop - 1)
        if not pages:
            continue
        found = tile_scores(rows[:, part], lse[:, part], summaries[:, :pages], scale, total=total)
        scores[:, part, :pages] = found
    return scores.masked_fill_(~division.candidates(rows.device), -torch.inf)


def tile_scores(
    rows: torch.Tensor,
    lse: torch.Tensor,
    summaries: torch.Tensor,
    scale: float,
    *,
    total: bool = False,
) -> torch.Tensor:
    """`page_scores` of tiles that may choose any of the pages."""
    logits = multiply(rows.flatten(1, 2), summaries).mul_(scale)
    found = logits.logsumexp(-1) if total else logits.amax(-1)
    found = found.unflatten(1, rows.shape[1:3]) - lse[..., None]
    return found.logsumexp(2) if total else found.amax(2)


def rough_lse(
    rows: torch.Tensor, summaries: torch.Tensor, division: Division, scale: float
) -> torch.Tensor:
    """The lse of rows over anchor and own block, as the summaries of these have it: in the place of
    the true one, which is known only after attention over them. A row sees all of its tile here.

    Args:
        rows: [Hkv, tiles, M, E], of `pool_rows`.
        summaries: [Hkv, pages, c, E], each of page / c keys.

    Returns:
        float32 [Hkv, tiles, M].
    """
    local = division.local(rows.device)[:, None, :, None]
    found = []
    for part in _parts(rows, summaries):
        logits = multiply(rows[:, part].flatten(1, 2), summaries).mul_(scale)
        logits = logits.unflatten(1, (-1, rows.shape[2]))
        found.append(logits.masked_fill_(~local[part], -torch.inf).flatten(3).logsumexp(-1))
    return torch.cat(found, 1) + math.log(division.page / summaries.shape[2])


def _parts(rows: torch.Tensor, summaries: torch.Tensor) -> Iterator[slice]:
    """Tiles whose products with all summaries are in memory together."""
    kv_heads, tiles, count, _ = rows.shape
    step = max(1, _AT_ONCE // (kv_heads * count * summaries.shape[1] * summaries.shape[2]))
    for begin in range(0, tiles, step):
        yield slice(begin, min(begin + step, tiles))


def multiply(q: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """q [Hkv, N, E] with vectors [Hkv, pages, c, E]: float32 [Hkv, N, pages, c]."""
    flat = vectors.flatten(1, 2).transpose(1, 2)
    products = torch.bmm(q.float(), flat.float())
    return products.unflatten(2, vectors.shape[1:3])


def choose(
    scores: torch.Tensor, count: int, margin: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best pages of each (KV head, tile); of equal ones the lower; -0 equals 0. A NaN is above
    all, so that it is seen.

    Args:
        scores: [Hkv, tiles, pages]; -inf: may not be chosen.
        count: pages at most.
        margin: only pages whose score is at least this; None: as many as there are.

    Returns:
        int32 pages [Hkv, tiles, count], ascending, 0 behind what holds, and int32 counts
        [Hkv, tiles].
    """
    values, pages = scores.sort(dim=-1, descending=True, stable=True)
    values, pages = values[..., :count], pages[..., :count]
    holds = values != -torch.inf
    if margin is not None:
        holds &= ~(values < margin)
    none = scores.shape[-1]
    listed = pages.masked_fill(~holds, none).sort(-1).values
    listed = F.pad(listed.masked_fill(listed == none, 0), (0, count - listed.shape[-1]))
    return listed.int(), holds.sum(-1, dtype=torch.int32)


def chosen_mask(pages: torch.Tensor, counts: torch.Tensor, num_pages: int) -> torch.Tensor:
    """The lists of `choose` as bool [Hkv, tiles, num_pages]."""
    holds = torch.arange(pages.shape[-1], device=pages.device) < counts[..., None]
    mask = torch.zeros(*pages.shape[:2], num_pages, dtype=torch.bool, device=pages.device)
    # Slots that do not hold repeat page 0, which may hold elsewhere in the list.
    return mask.byte().scatter_reduce(2, pages.long(), holds.byte(), "amax").bool()


# --- attention


def tile_tables(
    division: Division, pages: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each (KV head, tile) sees, as a sequence of paged attention with one KV head: anchor,
    chosen pages, own block up to the tile's end.

    Args:
        pages, counts: of `choose`.

    Returns:
        Page table int32 [Hkv * tiles, P], in pages of a pool that holds the first KV head's pages,
        then the second's; and kv_lens int32 [Hkv * tiles].
    """
    kv_heads, tiles, _ = pages.shape
    device, page = pages.device, division.page
    begins = torch.arange(tiles, device=device) * division.tile
    blocks = begins // division.block * division.block
    ends = begins + division.tile
    anchor = torch.arange(division.anchor // page, device=device).expand(tiles, -1)
    sees_anchor = (blocks > 0)[:, None].expand_as(anchor)
    own = (blocks // page)[:, None] + torch.arange(division.block // page, device=device)
    sees_own = own * page < ends[:, None]
    holds = torch.arange(pages.shape[2], device=device) < counts[..., None]

    def of_all(x: torch.Tensor) -> torch.Tensor:
        return x.expand(kv_heads, -1, -1)

    listed = torch.cat((of_all(anchor), pages, of_all(own)), dim=-1)
    valid = torch.cat((of_all(sees_anchor), holds, of_all(sees_own)), dim=-1)
    order = (~valid).int().argsort(dim=-1, stable=True)
    first = torch.arange(kv_heads, device=device)[:, None, None] * division.pages
    table = torch.where(valid, listed + first, 0).gather(-1, order)
    cut = -(-ends // page) * page - ends  # of the tile's last page, what is behind the tile
    kv_lens = valid.sum(-1) * page - cut
    return table.int().flatten(0, 1).contiguous(), kv_lens.int().flatten()
