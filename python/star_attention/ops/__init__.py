"""The kernel contract: attention over pages, rotary append, the log-sum-exp merge, and what a
decoder layer needs besides matrix products.

Calls go to the implementation for the device of their first tensor. A KV pool is one layer's
`[num_pages, 2 (K, V), num_kv_heads, tokens_per_block, head_dim]`.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

from star_attention.ops.quantized import DTYPES, QuantizedRows, RowKind

# Tokens of a page that can be selected on a GPU: kSelectionPage of the kernels.
CUDA_SELECTED_PAGE = 128

_IMPLEMENTATIONS = {"cpu": "star_attention.ops.reference", "cuda": "star_attention.ops.cuda"}


@functools.cache
def implementation(device: torch.device) -> ModuleType:
    """The module that implements the operators on `device`."""
    if device.type not in _IMPLEMENTATIONS:
        raise ValueError(f"device {device} is not supported: use {' or '.join(_IMPLEMENTATIONS)}")
    return importlib.import_module(_IMPLEMENTATIONS[device.type])


def paged_attention(
    q: torch.Tensor,
    kv_pool: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    causal: bool,
    scale: float,
    max_q_len: int,
    max_kv_len: int,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    other_pool: torch.Tensor | None = None,
    kv_scales: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each sequence's query rows to the pages that it lists.

    With `causal`, row i of a sequence of n rows sees the first `kv_len - (n - 1 - i)` cached tokens
    (bottom-right aligned); otherwise every row sees all `kv_len`. A row that sees nothing gets
    o = 0, lse = -inf.

    Each KV head may have a list of its own: page_table is [S, Hkv, P] then, kv_lens [S, Hkv], and
    lists are of planes, the keys of one KV head in one page: plane (page * 2) * Hkv + head. The
    values are Hkv planes behind. A number e < 0 is plane -1 - e of `other_pool`. Not with `causal`.

    Args:
        q: [T, Hq, D], the rows of all sequences one after the other.
        kv_pool: [num_pages, 2, Hkv, tokens_per_block, D], Hkv divides Hq.
        page_table: int32 [S, P], the pages of each sequence in order; what is behind
            ceil(kv_len / tokens_per_block) is not read.
        cu_seqlens_q: int32 [S + 1], prefix sums of the rows per sequence.
        kv_lens: int32 [S], cached tokens of each sequence.
        scale: factor of the scores, usually D ** -0.5.
        max_q_len, max_kv_len: upper bounds of the lengths.
        out: o and lse to write, o in q's dtype or, for partials that are merged later, float32.
        other_pool: pages beside those of kv_pool, of the same shape but for their number.
        kv_scales: of `quantize_pages`, float32 [num_pages, 2, Hkv]: kv_pool has 8-bit codes. Not
            with lists of planes.
        starts: int32 [T], ascending within a sequence: each row sees of the tokens above only those
            from this one on. Not with lists of planes, nor `kv_scales`.
        cap: a score x counts as cap * tanh(x / cap). Likewise, and on CPUs only.

    Returns:
        o [T, Hq, D] in q's dtype, and lse float32 [T, Hq], the natural log-sum-exp of the scores;
        or `out`.
    """
    return implementation(q.device).paged_attention(
        q,
        kv_pool,
        page_table,
        cu_seqlens_q,
        kv_lens,
        causal=causal,
        scale=scale,
        max_q_len=max_q_len,
        max_kv_len=max_kv_len,
        out=out,
        other_pool=other_pool,
        kv_scales=kv_scales,
        starts=starts,
        cap=cap,
    )


def code_dtype(kv_dtype: str) -> torch.dtype:
    """Of the codes of `fp8` (e4m3) or `int8`."""
    return DTYPES[kv_dtype]


def codes_of(kv_pool: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The memory of pages [L, num_pages, ...] as `itemsize` times as many 8-bit pages; those of
    page p are itemsize * p and following."""
    layers, num_pages, *page = kv_pool.shape
    return kv_pool.view(dtype).view(layers, num_pages * kv_pool.itemsize, *page)


def quantize_pages(
    kv_pool: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    pages: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """Quantises pages where they are, in all layers: of every `itemsize` of them, all are in the
    memory of the first afterwards, in their order, and the memory of the others is free.

    A scale is the largest magnitude of a page's K or V in a KV head over 448 (e4m3) or 127 (int8),
    1 if that is 0; a code is what is nearest to value / scale, of two the even one. A NaN makes the
    scale one.

    Args:
        kv_pool: [L, num_pages, 2, Hkv, tokens_per_block, D], read.
        codes: `codes_of` it, written.
        scales: float32 [L, codes.shape[1], 2, Hkv], written.
        pages: int32 [N].
        tokens: int32 [N], how many of each page count; the others become 0.
    """
    implementation(kv_pool.device).quantize_pages(kv_pool, codes, scales, pages, tokens)


def dequantize_pages(
    kv_pool: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    sources: torch.Tensor,
    targets: torch.Tensor,
) -> None:
    """Writes 8-bit pages, int32 [N] of `codes`, as pages, int32 [N] of `kv_pool`, in all layers.
    They have no memory in common. The rest as in `quantize_pages`."""
    implementation(kv_pool.device).dequantize_pages(kv_pool, codes, scales, sources, targets)


def rope_append(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rotary: torch.Tensor,
    kv_pool: torch.Tensor,
    slot_mapping: torch.Tensor,
    q: torch.Tensor,
) -> None:
    """Rotates Q and K by position, writes K and V into their pages and Q into `q`.

    Args:
        qkv: [T, (Hq + 2 Hkv) * D], the fused projection: Q, K, V.
        positions: int32 [T], each token's position in the context.
        rotary: float32 [max_position, D], cosines in the first half of a row, sines in the second;
            element i turns with element i + D/2.
        kv_pool: written, [num_pages, 2, Hkv, tokens_per_block, D].
        slot_mapping: int32 [T], page * tokens_per_block + offset; -1: do not store.
        q: written, [T, Hq, D].
    """
    implementation(qkv.device).rope_append(qkv, positions, rotary, kv_pool, slot_mapping, q)


def merge_lse(
    o: torch.Tensor, lse: torch.Tensor, *, out_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of N disjoint shards of keys, from each shard's own.

    Args:
        o: [N, T, Hq, D], attention outputs per shard.
        lse: float32 [N, T, Hq]; -inf: the shard has nothing for this row.
        out_dtype: of the merged o; by default that of the partials.

    Returns:
        o [T, Hq, D] and lse [T, Hq]; rows that are empty in all shards give 0 and -inf.

    Source: Star Attention, arXiv 2411.17116, section 2.2 (phase 2).
    """
    return implementation(o.device).merge_lse(o, lse, out_dtype=out_dtype)


def page_means(
    kv_pool: torch.Tensor, pages: torch.Tensor, rows: torch.Tensor, means: torch.Tensor
) -> None:
    """Writes means of 16 consecutive keys of each page, summed in float32.

    Args:
        pages, rows: int32 [N], pages of the pool, and rows of `means`.
        means: written, [*, Hkv, `means_of_page(tokens_per_block)`, D].
    """
    implementation(kv_pool.device).page_means(kv_pool, pages, rows, means)


def means_of_page(tokens_per_block: int) -> int:
    """One that stands for a whole page where 16 does not divide it."""
    return tokens_per_block // 16 if tokens_per_block % 16 == 0 else 1


def select_pages(
    q: torch.Tensor,
    lse: torch.Tensor,
    tiles: torch.Tensor,
    candidates: torch.Tensor,
    means: torch.Tensor,
    *,
    count: int,
    page: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pages that each tile and KV head sees besides: those with the best scores, of equal ones
    the lower. A score is the largest `q k scale - lse` over means of four of the tile's rows, in
    all heads of a group, and means of the page's keys.

    Args:
        q: [T, Hq, D].
        lse: float32 [T, Hq], of the rows over what they see anyway.
        tiles: int32 [N + 1], first rows; a tile has up to `page` rows, and the last stands for
            those that it lacks.
        candidates: int32 [N], a tile chooses from so many of the first pages.
        means: [C, Hkv, c, D], of `page_means`.
        page: tokens of one.

    Returns:
        int32 lists [N, Hkv, count], rows of `means`, ascending, 0 behind what holds; and int32
        counts [N, Hkv].

    Source: docs/selection.md.
    """
    return implementation(q.device).select_pages(
        q, lse, tiles, candidates, means, count=count, page=page, scale=scale
    )


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, kind: RowKind | None = None
) -> torch.Tensor | QuantizedRows:
    """x [T, H] over its rows' root mean square, times weight [H]; [T, H], in x's dtype or, rounded
    to that first, in `kind`.

    Source: arXiv 1910.07467, equation 4.
    """
    return implementation(x.device).rms_norm(x, weight, eps, kind=kind)


def linear(
    x: torch.Tensor | QuantizedRows,
    weight: torch.Tensor | QuantizedRows,
    addend: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, K] weight^T [K, N] + addend, which is a bias [N] or [T, N] and may be `out` [T, N].

    With a quantised weight, x is as `kind_of_rows` says. A GPU may read `weight` before work that
    stands in front on the stream has ended.
    """
    return implementation(x.device).linear(x, weight, addend, out=out)


def kind_of_rows(rows: int, weight: torch.Tensor | QuantizedRows | None) -> RowKind | None:
    """How `linear` wants so many rows that it multiplies with `weight`: quantised as it is, or not.
    On a GPU the few rows of a decode step are not: there reading the weights takes all the time."""
    if not isinstance(weight, QuantizedRows):
        return None
    return implementation(weight.device).kind_of_rows(rows, weight)


def quantize_rows(x: torch.Tensor, kind: RowKind) -> QuantizedRows:
    """Rows x [T, K] by the rule of `ops.quantized.quantize_rows`."""
    return implementation(x.device).quantize_rows(x, kind)


def silu_mul(gate_up: torch.Tensor, *, kind: RowKind | None = None) -> torch.Tensor | QuantizedRows:
    """silu(gate) * up [T, I] of the fused projection gate_up [T, 2 I], gate first; in its dtype or,
    rounded to that first, in `kind`."""
    return implementation(gate_up.device).silu_mul(gate_up, kind=kind)
