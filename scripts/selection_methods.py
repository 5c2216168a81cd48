"""Ways to attend in phase 1, by name, for studies of selected pages.

    dense                              every token sees all before it
    star/block=4/anchor=block          blocks of a quarter, anchors as long
    star                               blocks of an eighth, an anchor of 512 tokens
    SCORE[/pages=16][/block=8]...      `star` and pages that are chosen by a score

A score is KEYS[.ROWS][.LSE][.sum], of which the parts are, for instance:

    all mean16 quest16                 a page's keys, means of 16, bounds of 16 (Quest)
    rows4 heads4                       means of 4 rows, and of the group's heads too (default: all)
    local full none rough              the LSE that is subtracted (default: local)
    sum                                the sum over rows and keys, not the largest

or one of `max` (all.full, the ceiling), `mass` (all.full.sum), `random`, `nearest`, `diagonal16`
(XAttention), `flash` (FlashPrefill). FIRST>SECOND chooses by the second score among the `short`
times `pages` best pages of the first. Options: `Method`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from star_attention import ops
from star_attention.engines.torch.attention import Attention
from star_attention.ops import select_reference as select

ALIASES = {"max": "all.full", "mass": "all.full.sum", "flash": "mean128.none.sum"}


@dataclass(frozen=True)
class Method:
    """A way to attend.

    Attributes:
        score: empty: no pages are chosen.
        block: the length is divided by it; 1: dense.
        anchor: tokens; None: the block.
        pages: chosen for each tile and KV head, at most.
        heads: `each` KV head has its own pages, or `all` have the same.
        every: layers that share a choice.
        dense: first layers that attend to everything.
        margin: the least score of a page that is chosen; None: any.
        short: pages of a shortlist, as a multiple of `pages`.
    """

    name: str
    score: str
    block: int = 8
    anchor: int | None = 512
    pages: int = 16
    tile: int = 128
    heads: str = "each"
    every: int = 1
    dense: int = 0
    margin: float | None = None
    short: int = 4

    @classmethod
    def parse(cls, name: str) -> Method:
        score, *options = name.split("/")
        values = {}
        for option in options:
            key, _, value = option.partition("=")
            if key == "heads":
                values[key] = value
            elif key == "anchor" and value == "block":
                values[key] = None
            else:
                values[key] = float(value) if key == "margin" else int(value)
        if score == "dense":
            return cls(name, "", block=1)
        return cls(name, "" if score == "star" else score, **values)

    def division(self, tokens: int, length: int, page: int) -> select.Division:
        """Of a context of so many tokens, padded, of a prompt of `length` tokens."""
        block = -(-length // (self.block * page)) * page
        anchor = block if self.anchor is None else min(self.anchor, block)
        return select.Division(tokens, block, anchor, page, self.tile)


@dataclass(frozen=True)
class Inputs:
    """What scores are computed from, in one layer.

    Attributes:
        q: [T, Hq, D].
        k: [T, Hkv, D].
        lse: by name, float32 [T, Hq].
    """

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    lse: dict[str, torch.Tensor]
    scale: float


def lse_names(score: str) -> set[str]:
    """Which LSEs of attention a score needs."""
    names = set()
    for part in score.split(">"):
        options = ALIASES.get(part, part).split(".")
        special = re.fullmatch(r"random|nearest|diagonal\d+", options[0])
        if not special and not {"none", "rough"} & set(options):
            names.add("full" if "full" in options else "local")
    return names


def lists_of(
    method: Method, inputs: Inputs, division: select.Division
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages and counts, as `select_reference.choose`."""
    *firsts, last = method.score.split(">")
    allowed = None
    for first in firsts:
        scores = _over_heads(method, scores_of(first, inputs, division))
        short = select.choose(scores, method.short * method.pages)
        allowed = select.chosen_mask(*short, division.pages)
    scores = _over_heads(method, scores_of(last, inputs, division))
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return select.choose(scores, method.pages, method.margin)


def scores_of(score: str, inputs: Inputs, division: select.Division) -> torch.Tensor:
    """float32 [Hkv, tiles, pages]."""
    q, k, scale = inputs.q, inputs.k, inputs.scale
    summary, *options = ALIASES.get(score, score).split(".")
    kind, size = _split(summary)
    if kind in ("random", "nearest"):
        return _without_keys(kind, k.shape[1], inputs.layer, division, q.device)
    if kind == "diagonal":
        return antidiagonal_scores(q, k, division, scale, size)
    pooling = {"rows": 1, "heads": False}
    for option in options:
        name, count = _split(option)
        if name in ("rows", "heads"):
            pooling = {"rows": count, "heads": name == "heads"}
        elif name not in ("local", "full", "none", "rough", "sum"):
            raise ValueError(f"{score}: {name} is no part of a score")
    rows = select.pool_rows(q, k.shape[1], division.tile, **pooling)
    vectors = select.page_keys(k, division.page)
    if kind == "mean":
        vectors = select.means(vectors, size)
    elif kind == "quest":
        rows, vectors = bound_rows(rows), bounds(vectors, size)
    elif kind != "all":
        raise ValueError(f"{score}: {kind} is not all, mean, quest, random, nearest or diagonal")
    if "rough" in options:
        lse = select.rough_lse(rows, vectors, division, scale)
    elif "none" in options:
        lse = rows.new_zeros(rows.shape[:3], dtype=torch.float32)
    else:
        lse = inputs.lse["full" if "full" in options else "local"]
        lse = select.pool_rows(lse, k.shape[1], division.tile, **pooling)
    return select.page_scores(rows, lse, vectors, division, scale, total="sum" in options)


def _split(name: str) -> tuple[str, int]:
    """mean16: mean, 16."""
    found = re.fullmatch(r"([a-z]+)(\d*)", name)
    if not found:
        raise ValueError(f"{name} is no part of a score")
    return found[1], int(found[2] or 0)


def _without_keys(
    kind: str, kv_heads: int, layer: int, division: select.Division, device: torch.device
) -> torch.Tensor:
    shape = kv_heads, division.tiles, division.pages
    if kind == "random":
        generator = torch.Generator(device).manual_seed(layer)
        scores = torch.rand(shape, generator=generator, device=device)
    else:
        scores = torch.arange(division.pages, device=device).float().expand(shape)
    return scores.masked_fill(~division.candidates(device), -torch.inf)


def bounds(keys: torch.Tensor, size: int) -> torch.Tensor:
    """The largest and smallest elements of `size` keys [Hkv, pages, page, D]: [Hkv, pages,
    page / size, 2 D]. Their products with `bound_rows` are the largest that a key between them
    could have. Source: Quest, arXiv 2406.10774, section 3.3."""
    parts = keys.unflatten(2, (-1, size))
    return torch.cat((parts.amax(3), parts.amin(3)), dim=-1)


def bound_rows(rows: torch.Tensor) -> torch.Tensor:
    """[..., D] as [..., 2 D]: what is above 0, and what is below."""
    return torch.cat((rows.clamp(min=0), rows.clamp(max=0)), dim=-1)


def antidiagonal_scores(
    q: torch.Tensor, k: torch.Tensor, division: select.Division, scale: float, stride: int = 16
) -> torch.Tensor:
    """XAttention's: products of rows and keys summed along antidiagonals of `stride`, their
    softmax over all keys up to the tile, summed over tile and page; float32 [Hkv, tiles, pages].

    Source: arXiv 2503.16428, section 2.1, algorithm 1.
    """
    kv_heads = k.shape[1]
    rows = select.tile_rows(q, kv_heads, division.tile)
    rows = rows.unflatten(3, (-1, stride)).flip(4).flatten(4).flatten(2, 3)
    keys = select.page_keys(k, division.page).unflatten(2, (-1, stride)).flatten(3)
    tiles, count = rows.shape[1:3]
    scores = select.multiply(rows.flatten(1, 2), keys).mul_(scale / stride).logsumexp(-1)
    scores = scores.unflatten(1, (tiles, count))
    own = torch.arange(1, tiles + 1, device=q.device) * division.tile - 1
    seen = torch.arange(division.pages, device=q.device) <= (own // division.page)[:, None]
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    scores = (scores - scores.logsumexp(-1, keepdim=True)).logsumexp(2)
    return scores.masked_fill(~division.candidates(q.device), -torch.inf)


def _over_heads(method: Method, scores: torch.Tensor) -> torch.Tensor:
    return scores.amax(0, keepdim=True).expand_as(scores) if method.heads == "all" else scores


class OneRank(Attention):
    """A pass's attention that needs no other rank."""

    cuts = ()

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def begin(self, pool: torch.Tensor) -> None: ...

    def stored(self, pool: torch.Tensor, rows: int) -> None: ...

    def finish(self, pool: torch.Tensor) -> None: ...


class StudyAttention(OneRank):
    """Phase 1 of one context by a method.

    Args:
        tokens: of the context, without padding.
        length: of the prompt, from which the block follows.

    """

    def __init__(self, method: Method, scale: float, tokens: int, length: int) -> None:
        super().__init__(scale)
        self._method, self._tokens, self._length = method, tokens, length
        self._layer = 0
        self._lists: tuple[torch.Tensor, torch.Tensor] | None = None
        self._counts: list[torch.Tensor] = []

    def __call__(self, q: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        method = self._method
        q[self._tokens :] = q[self._tokens - 1]  # padding asks for nothing of its own
        layer, self._layer = self._layer, self._layer + 1
        if method.block == 1 or layer < method.dense:
            return attend_densely(q, pool, self._scale)[0]
        division = method.division(len(q), self._length, pool.shape[3])
        pages = KvHeads(pool[: division.pages])
        if not method.score:
            return pages.attend(q, division, None, self._scale)[0]
        if self._lists is None or layer % method.every == 0:
            needed = lse_names(method.score)
            lse = {}
            if "full" in needed:
                lse["full"] = attend_densely(q, pool, self._scale)[1]
            if "local" in needed:
                lse["local"] = pages.attend(q, division, None, self._scale)[1]
            inputs = Inputs(layer, q, pages.keys, lse, self._scale)
            self._lists = lists_of(method, inputs, division)
        places = division.candidates(q.device).any(-1).sum() * pool.shape[2]
        self._counts.append(self._lists[1].sum() / places.clamp(min=1))
        return pages.attend(q, division, self._lists, self._scale)[0]

    def pages(self) -> float:
        """Pages of a KV head and tile that may choose, on average."""
        return torch.stack(self._counts).mean().item() if self._counts else 0.0


def attend_densely(
    q: torch.Tensor, pool: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """o and lse of q [T, Hq, D] over the first T tokens of the pool, causally."""
    table = torch.arange(len(pool), dtype=torch.int32, device=q.device)[None]
    count = torch.tensor([len(q)], dtype=torch.int32, device=q.device)
    starts = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
    return ops.paged_attention(
        q,
        pool,
        table,
        starts,
        count,
        causal=True,
        scale=scale,
        max_q_len=len(q),
        max_kv_len=len(q),
    )


class KvHeads:
    """A layer's pool [num_pages, 2, Hkv, page, D], taken apart by KV head."""

    def __init__(self, pool: torch.Tensor) -> None:
        self._pool = pool

    @property
    def keys(self) -> torch.Tensor:
        """[T, Hkv, D]."""
        return self._pool[:, 0].transpose(1, 2).flatten(0, 1)

    def attend(
        self,
        q: torch.Tensor,
        division: select.Division,
        lists: tuple[torch.Tensor, torch.Tensor] | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """o [T, Hq, D] and lse [T, Hq] over anchor, own block and the pages of `lists`."""
        if lists is None:
            shape = self._pool.shape[2], division.tiles, 0
            empty = torch.zeros(shape, dtype=torch.int32, device=q.device)
            lists = empty, empty.sum(-1, dtype=torch.int32)
        kv_heads, num_heads = self._pool.shape[2], q.shape[1]
        pool = self._pool.permute(2, 0, 1, 3, 4).flatten(0, 1).unsqueeze(2)
        rows = q.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(0, 1)
        table, kv_lens = select.tile_tables(division, *lists)
        starts = torch.arange(len(table) + 1, dtype=torch.int32, device=q.device) * division.tile
        o, lse = ops.paged_attention(
            rows.contiguous(),
            pool.contiguous(),
            table,
            starts,
            kv_lens,
            causal=True,
            scale=scale,
            max_q_len=division.tile,
            max_kv_len=table.shape[1] * division.page,
        )
        o, lse = (x.unflatten(0, (kv_heads, -1)).transpose(0, 1) for x in (o, lse))
        return o.reshape(len(q), num_heads, -1), lse.reshape(len(q), num_heads)
