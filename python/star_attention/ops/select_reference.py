"""Selected pages in plain torch: which pages of earlier blocks a tile of query rows sees.

In phase 1 a tile (some consecutive rows of the query heads of one KV head) sees the anchor, its own
block up to itself, and `count` pages between the two. They are chosen in three steps:

1. `Division` says which pages may be chosen: those of earlier blocks behind the anchor.
2. A score for each (KV head, tile, page): the largest, or the sum, over the tile's rows and the
   page's keys of an estimate of `q k scale - lse`. Rows may be fewer than the tile has
   (`pool_rows`), keys may be summarised (`Summary`), and lse makes scores of different rows
   comparable: with that of the local part (anchor and block), a score is the log of a key's weight
   beside what the row sees anyway.
3. `choose` takes the best; equal scores go to the lower page; lists are ascending.

Source of the question: XAttention, arXiv 2503.16428; Quest, arXiv 2406.10774; MInference, arXiv
2407.02490; Prism, arXiv 2602.08426, choose blocks for dense models. Here the pages are added to
Star Attention's phase 1, and phase 2 stays exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

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

    def candidates(self, device: torch.device) -> torch.Tensor:
        """bool [tiles, pages]: those that may be chosen."""
        pages = torch.arange(self.pages, device=device)
        begins = torch.arange(self.tiles, device=device) * self.tile // self.block * self.block
        return (pages >= self.anchor // self.page) & (pages < (begins // self.page)[:, None])


def tile_rows(x: torch.Tensor, kv_heads: int, tile: int) -> torch.Tensor:
    """[T, Hq, ...] as [Hkv, tiles, group, tile, ...]."""
    split = x.unflatten(0, (-1, tile)).unflatten(2, (kv_heads, -1))
    return split.movedim((0, 1, 2), (1, 3, 0))


def page_keys(k: torch.Tensor, page: int) -> torch.Tensor:
    """k [T, Hkv, D] as [Hkv, pages, page, D]."""
    return k.unflatten(0, (-1, page)).permute(2, 0, 1, 3)


# --- rows: fewer queries than the tile has


def pool_rows(
    q: torch.Tensor, lse: torch.Tensor, kv_heads: int, tile: int, rows: str = "all"
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tile's rows of all heads of a group, or fewer that stand for them.

    Args:
        q: [T, Hq, D].
        lse: float32 [T, Hq], to be subtracted from a row's scores.
        rows: `all`; `mean:N`, means of N consecutive rows; `heads:N`, means of N rows and of the
            group's heads; `last:N`, the last N; `every:N`, one of N; `need:N`, the N rows (over all
            heads) whose largest possible score, |q| times a constant, is largest beside their lse.

    Returns:
        [Hkv, tiles, M, D] and lse [Hkv, tiles, M].
    """
    kind, _, number = rows.partition(":")
    n = int(number or 1)
    q, lse = tile_rows(q, kv_heads, tile), tile_rows(lse, kv_heads, tile)
    if kind == "mean":
        q, lse = q.unflatten(3, (-1, n)).mean(4), lse.unflatten(3, (-1, n)).mean(4)
    elif kind == "heads":
        q = q.unflatten(3, (-1, n)).mean((2, 4), keepdim=True)[..., 0, :]
        lse = lse.unflatten(3, (-1, n)).mean((2, 4), keepdim=True)[..., 0]
    elif kind == "last":
        q, lse = q[:, :, :, -n:], lse[:, :, :, -n:]
    elif kind == "every":
        q, lse = q[:, :, :, n - 1 :: n], lse[:, :, :, n - 1 :: n]
    elif kind not in ("all", "need"):
        raise ValueError(f"rows: {rows!r} is not all, mean:N, heads:N, last:N, every:N or need:N")
    q, lse = q.flatten(2, 3), lse.flatten(2, 3)
    if kind == "need":
        norms = q.float().norm(dim=-1)
        reach = lse.clamp(min=0).amax() / norms.amax()  # of a key: scores are of lse's size
        best = (norms * reach - lse).topk(n, dim=2).indices
        lse = lse.gather(2, best)
        q = q.gather(2, best[..., None].expand(-1, -1, -1, q.shape[-1]))
    return q, lse


# --- summaries of a page's keys


class Summary(Protocol):
    """What stands for the keys of a page.

    Attributes:
        cost: multiplications for a row and a page, as a share of those with all keys.
    """

    cost: float

    def logits(self, q: torch.Tensor, pages: int) -> torch.Tensor:
        """float32 [Hkv, N, pages, c]: what the c summaries of the first `pages` pages say of the
        products with q [Hkv, N, D]; unscaled."""


class Keys:
    """Vectors in the place of the keys [Hkv, pages, page, D]: themselves, or representatives.

    Args:
        project: applied to queries before they are multiplied; None: nothing.
    """

    def __init__(self, vectors: torch.Tensor, cost: float) -> None:
        self.vectors, self.cost = vectors, cost

    def logits(self, q: torch.Tensor, pages: int) -> torch.Tensor:
        return multiply(q, self.vectors[:, :pages])


def all_keys(keys: torch.Tensor) -> Summary:
    return Keys(keys, 1.0)


def means(keys: torch.Tensor, size: int) -> Summary:
    """Of `size` consecutive keys."""
    return Keys(keys.unflatten(2, (-1, size)).float().mean(3).to(keys.dtype), 1 / size)


def representatives(keys: torch.Tensor, count: int) -> Summary:
    """`count` keys that are far from one another: the one farthest from the page's mean, then
    each time the one farthest from those taken (Gonzalez, 1985)."""
    wide = keys.float()
    distances = (wide - wide.mean(2, keepdim=True)).square().sum(-1)
    taken = []
    for step in range(count):
        best = distances.argmax(2, keepdim=True)
        taken.append(best)
        chosen = wide.gather(2, best[..., None].expand(-1, -1, -1, wide.shape[-1]))
        new = (wide - chosen).square().sum(-1)
        distances = new if step == 0 else distances.minimum(new)
    index = torch.cat(taken, 2)[..., None].expand(-1, -1, -1, keys.shape[-1])
    return Keys(keys.gather(2, index), count / keys.shape[2])


def clusters(keys: torch.Tensor, count: int, steps: int = 4) -> Summary:
    """The centres of `count` clusters of a page's keys (k-means, begun with consecutive keys)."""
    wide = keys.float()
    centres = wide.unflatten(2, (count, -1)).mean(3)
    for _ in range(steps):
        nearest = torch.cdist(wide, centres).argmin(3)
        members = torch.nn.functional.one_hot(nearest, count).float()
        sums = members.transpose(2, 3) @ wide
        sizes = members.sum(2)[..., None]
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return Keys(centres.to(keys.dtype), count / keys.shape[2])


class Bounds:
    """The largest product that a key within the smallest and largest elements of `size` keys could
    have. Source: Quest, arXiv 2406.10774, section 3.3."""

    def __init__(self, keys: torch.Tensor, size: int) -> None:
        parts = keys.unflatten(2, (-1, size))
        self._ends = torch.cat((parts.amax(3), parts.amin(3)), dim=-1)
        self.cost = 2 / size

    def logits(self, q: torch.Tensor, pages: int) -> torch.Tensor:
        return multiply(torch.cat((q.clamp(min=0), q.clamp(max=0)), dim=-1), self._ends[:, :pages])


class Peaks:
    """Mean and `deviations` standard deviations of the products with `size` keys, whose elements
    are taken to be independent: sum_d q_d mean_d + deviations sqrt(sum_d q_d^2 var_d)."""

    def __init__(self, keys: torch.Tensor, size: int, deviations: float) -> None:
        parts = keys.unflatten(2, (-1, size)).float()
        self._mean = parts.mean(3).to(keys.dtype)
        self._variance = parts.var(3, correction=0).to(keys.dtype)
        self._deviations = deviations
        self.cost = 2 / size

    def logits(self, q: torch.Tensor, pages: int) -> torch.Tensor:
        spread = multiply(q.square(), self._variance[:, :pages]).clamp_(min=0).sqrt_()
        return multiply(q, self._mean[:, :pages]).add_(spread, alpha=self._deviations)


class Sketch:
    """All keys in fewer dimensions, and the mean key in all.

    Args:
        to_q, to_k: [Hkv, D, r], of `sketch_maps`.
        centre: [Hkv, D], the mean key.
    """

    def __init__(
        self,
        keys: torch.Tensor,
        to_q: torch.Tensor,
        to_k: torch.Tensor,
        centre: torch.Tensor,
    ) -> None:
        shifted = keys - centre[:, None, None]
        self._low = torch.einsum("hpkd,hdr->hpkr", shifted, to_k.to(keys.dtype))
        self._to_q, self._centre = to_q.to(keys.dtype), centre
        self.cost = to_k.shape[-1] / keys.shape[-1]

    def logits(self, q: torch.Tensor, pages: int) -> torch.Tensor:
        products = multiply(q @ self._to_q, self._low[:, :pages])
        return products.add_((q @ self._centre[..., None]).float()[..., None])


def sketch_maps(q: torch.Tensor, k: torch.Tensor, rank: int) -> tuple[torch.Tensor, ...]:
    """The maps to `rank` dimensions that keep products of queries and keys best in the mean square,
    for the second moments of q [T, Hq, D] and of k [T, Hkv, D] around its mean: with both whitened,
    the largest singular directions of their product.

    Returns:
        to_q, to_k [Hkv, D, rank], and the mean key [Hkv, D].
    """
    kv_heads, dim = k.shape[1:]
    centre = k.float().mean(0)
    rows = q.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2).float()
    keys = k.float().transpose(0, 1) - centre[:, None]

    def root(x: torch.Tensor) -> torch.Tensor:
        moment = (x.transpose(1, 2) @ x / x.shape[1]).double()
        ridge = 1e-6 * moment.diagonal(dim1=1, dim2=2).mean(1)
        eye = torch.eye(dim, dtype=moment.dtype, device=x.device)
        return torch.linalg.cholesky((moment + ridge[:, None, None] * eye).cpu())

    of_q, of_k = root(rows), root(keys)
    u, s, vh = torch.linalg.svd(of_q.transpose(1, 2) @ of_k)
    weights = s[:, None, :rank].sqrt()
    to_q = torch.linalg.solve_triangular(of_q.transpose(1, 2), u[..., :rank] * weights, upper=True)
    right = vh.transpose(1, 2)[..., :rank] * weights
    to_k = torch.linalg.solve_triangular(of_k.transpose(1, 2), right, upper=True)
    return to_q.to(k.device, torch.float32), to_k.to(k.device, torch.float32), centre.to(k.dtype)


def multiply(q: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """q [Hkv, N, E] with vectors [Hkv, pages, c, E]: float32 [Hkv, N, pages, c]."""
    flat = vectors.flatten(1, 2).transpose(1, 2)
    products = torch.bmm(q.float(), flat.float())
    return products.unflatten(2, vectors.shape[1:3])


# --- scores and choice


def page_scores(
    rows: torch.Tensor,
    lse: torch.Tensor,
    summary: Summary,
    division: Division,
    scale: float,
    *,
    total: bool = False,
) -> torch.Tensor:
    """float32 [Hkv, tiles, pages]; -inf for pages that are not of earlier blocks.

    Args:
        rows, lse: of `pool_rows`.
        total: the log of the sum of exp over rows and keys, instead of the largest.
    """
    kv_heads, tiles, count, _ = rows.shape
    scores = rows.new_full((kv_heads, tiles, division.pages), -torch.inf, dtype=torch.float32)
    per_tile = kv_heads * count * division.page * division.pages  # at most
    step = max(1, int(_AT_ONCE / (per_tile * min(1.0, summary.cost))))
    for begin in range(0, tiles, step):
        part = slice(begin, min(begin + step, tiles))
        pages = division.earlier_pages(part.stop - 1)
        if not pages:
            continue
        products = summary.logits(rows[:, part].flatten(1, 2), pages)
        found = products.mul_(scale).logsumexp(-1) if total else products.amax(-1).mul_(scale)
        found = found.unflatten(1, (-1, count)) - lse[:, part, :, None]
        scores[:, part, :pages] = found.logsumexp(2) if total else found.amax(2)
    allowed = division.candidates(rows.device)
    return scores.masked_fill_(~allowed, -torch.inf)


def antidiagonal_scores(
    q: torch.Tensor, k: torch.Tensor, division: Division, scale: float, stride: int = 16
) -> torch.Tensor:
    """XAttention's: products of rows and keys summed along antidiagonals of `stride`, their
    softmax over all keys up to the tile, summed over tile and page; float32 [Hkv, tiles, pages].

    Source: arXiv 2503.16428, section 2.1, algorithm 1.
    """
    kv_heads = k.shape[1]
    rows = tile_rows(q, kv_heads, division.tile)
    rows = rows.unflatten(3, (-1, stride)).flip(4).flatten(4).flatten(2, 3)
    keys = page_keys(k, division.page).unflatten(2, (-1, stride)).flatten(3)
    tiles, count = rows.shape[1:3]
    scores = multiply(rows.flatten(1, 2), keys).mul_(scale / stride).logsumexp(-1)
    scores = scores.unflatten(1, (tiles, count))
    own = torch.arange(1, tiles + 1, device=q.device) * division.tile - 1
    seen = torch.arange(division.pages, device=q.device) <= (own // division.page)[:, None]
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    scores = (scores - scores.logsumexp(-1, keepdim=True)).logsumexp(2)
    return scores.masked_fill(~division.candidates(q.device), -torch.inf)


def union_scores(*scores: torch.Tensor) -> torch.Tensor:
    """Pages by their best rank in any of the scores; the first score's go first."""
    ranks = [
        score.sort(dim=-1, descending=True, stable=True).indices.argsort(-1) * len(scores) + index
        for index, score in enumerate(scores)
    ]
    best = -torch.stack(ranks).amin(0).float()
    return best.masked_fill(scores[0] == -torch.inf, -torch.inf)


def choose(
    scores: torch.Tensor, count: int, margin: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best pages of each (KV head, tile); of equal ones the lower.

    Args:
        scores: [Hkv, tiles, pages]; -inf: may not be chosen.
        count: pages at most.
        margin: only pages whose score is at least this; None: as many as there are.

    Returns:
        int32 [Hkv, tiles, count], ascending, and how many of them hold, int32 [Hkv, tiles]; what is
        behind is 0.
    """
    count = min(count, scores.shape[-1])
    values, pages = scores.sort(dim=-1, descending=True, stable=True)
    values, pages = values[..., :count], pages[..., :count]
    holds = values > -torch.inf if margin is None else values >= margin
    counts = holds.sum(-1)
    pages = pages.masked_fill(~holds, scores.shape[-1]).sort(-1).values
    return pages.masked_fill_(pages == scores.shape[-1], 0).int(), counts.int()


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
