"""Ways to attend in phase 1, by name, for studies of selected pages.

    dense                              every token sees all before it
    star/block=4/anchor=block          blocks of a quarter, anchors as long
    star                               blocks of an eighth, an anchor of 512 tokens
    SCORE[/pages=16][/block=8]...      `star` and pages that are chosen by a score

A score is SUMMARY[.ROWS][.LSE][.sum], of which the parts are, for instance:

    all mean16 far16 cluster8 quest16 peak16 low32    what stands for a page's keys
    rows4 heads4 last16 every4 need64                 what stands for a tile's rows (default: all)
    local full none                                   the LSE that is subtracted (default: local)
    sum                                               the sum over rows and keys, not the largest

or one of `max` (all.full, the ceiling), `mass` (all.full.sum), `random`, `nearest`, `diagonal16`
(XAttention), `flash` (FlashPrefill), `prism`. FIRST>SECOND chooses by the second score among the
`short` times `pages` best pages of the first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from star_attention import ops
from star_attention.distributed import SingleProcess
from star_attention.engines.torch.attention import Attention
from star_attention.models.config import ModelConfig
from star_attention.models.rotary import rotary_frequencies
from star_attention.ops import select_reference as select

ALIASES = {"max": "all.full", "mass": "all.full.sum", "flash": "mean128.none.sum"}
_ROWS = {"rows": "mean", "heads": "heads", "last": "last", "every": "every", "need": "need"}


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


@dataclass
class Inputs:
    """What scores are computed from, in one layer. See `select_reference`.

    Attributes:
        lse: by name, float32 [T, Hq].
        maps: of `sketch_maps`, kept for all contexts: those of the first one's tokens.
    """

    config: ModelConfig
    layer: int
    q: torch.Tensor
    k: torch.Tensor
    lse: dict[str, torch.Tensor]
    maps: dict[tuple[int, int], tuple[torch.Tensor, ...]] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        return self.config.head_dim**-0.5


def lse_names(score: str) -> set[str]:
    """Which LSEs a score needs."""
    names = set()
    for part in score.split(">"):
        fields = ALIASES.get(part, part).split(".")
        special = re.fullmatch(r"random|nearest|prism|diagonal\d+", fields[0])
        if not special and "none" not in fields:
            names.add("full" if "full" in fields else "local")
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
    config, q, k, scale = inputs.config, inputs.q, inputs.k, inputs.scale
    summary, *options = ALIASES.get(score, score).split(".")
    kind, size = re.fullmatch(r"([a-z]+)(\d*)", summary).groups()
    n = int(size or 0)
    if kind in ("random", "nearest"):
        shape = config.num_kv_heads, division.tiles, division.pages
        generator = torch.Generator(q.device).manual_seed(inputs.layer)
        scores = (
            torch.rand(shape, generator=generator, device=q.device)
            if kind == "random"
            else torch.arange(division.pages, device=q.device).float().expand(shape)
        )
        return scores.masked_fill(~division.candidates(q.device), -torch.inf)
    if kind == "diagonal":
        return select.antidiagonal_scores(q, k, division, scale, n)
    keys = select.page_keys(k, division.page)
    if kind == "prism":
        # Each band's softmax at its own temperature: the band's share of the variance of q k.
        fast = rotary_frequencies(config.rope, config.head_dim) * division.page > 6.2832
        fast = fast.repeat(2).to(q.device)
        bands = []
        for band in (~fast, fast):
            rows, lse = select.pool_rows(
                q[..., band],
                q.new_zeros(q.shape[:2], dtype=torch.float32),
                len(keys),
                division.tile,
            )
            wider = scale * (len(band) / int(band.sum())) ** 0.5
            pooled = select.means(keys[..., band], division.page)
            bands.append(select.page_scores(rows, lse, pooled, division, wider, total=True))
        return select.union_scores(*bands)
    lse = inputs.lse.get("full" if "full" in options else "local")
    if "none" in options:
        lse = q.new_zeros(q.shape[:2], dtype=torch.float32)
    pooling = "all"
    for option in options:
        name, count = re.fullmatch(r"([a-z]+)(\d*)", option).groups()
        if name in _ROWS:
            pooling = f"{_ROWS[name]}:{count}"
    rows, lse = select.pool_rows(q, lse, len(keys), division.tile, pooling)
    total = "sum" in options
    return select.page_scores(
        rows, lse, _summary(kind, n, keys, inputs), division, scale, total=total
    )


def _summary(kind: str, n: int, keys: torch.Tensor, inputs: Inputs) -> select.Summary:
    if kind == "all":
        return select.all_keys(keys)
    if kind == "mean":
        return select.means(keys, n)
    if kind == "far":
        return select.representatives(keys, n)
    if kind == "cluster":
        return select.clusters(keys, n)
    if kind == "quest":
        return select.Bounds(keys, n)
    if kind == "peak":
        return select.Peaks(keys, n, 2.0)
    if kind == "low":
        place = inputs.layer, n
        if place not in inputs.maps:
            inputs.maps[place] = select.sketch_maps(inputs.q, inputs.k, n)
        return select.Sketch(keys, *inputs.maps[place])
    raise ValueError(f"{kind} is no summary of keys")


def _over_heads(method: Method, scores: torch.Tensor) -> torch.Tensor:
    return scores.amax(0, keepdim=True).expand_as(scores) if method.heads == "all" else scores


class StudyAttention(Attention):
    """Phase 1 of one context by a method.

    Args:
        tokens: of the context, without padding.
        length: of the prompt, from which the block follows.
        maps: see `Inputs`.
    """

    def __init__(
        self,
        method: Method,
        config: ModelConfig,
        tokens: int,
        length: int,
        maps: dict,
        device: torch.device,
    ) -> None:
        super().__init__(SingleProcess(), config.head_dim**-0.5, device)
        self._method, self._config, self._maps = method, config, maps
        self._tokens, self._length = tokens, length
        self._layer = 0
        self._lists: tuple[torch.Tensor, torch.Tensor] | None = None

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
            inputs = Inputs(self._config, layer, q, pages.keys, lse, self._maps)
            self._lists = lists_of(method, inputs, division)
        return pages.attend(q, division, self._lists, self._scale)[0]


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
