"""The operators as CUDA kernels (star_attention._C) on torch's current stream: float16, bfloat16,
head_dim 64 and 128, pages of 64 and 128 tokens, compute capability 8.0 and newer. Nothing here
waits for the GPU, so all of it can be captured in a CUDA graph. Shapes and meaning:
`star_attention.ops`.

Checks that need the values of device tensors (page indices, slots, positions, lengths) cost a
synchronisation and run only when the environment variable STAR_ATTENTION_DEBUG is set to 1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from star_attention.ops import CUDA_SELECTED_PAGE, reference
from star_attention.ops.quantized import QuantizedRows, RowKind

try:
    from star_attention import _C
except ImportError as error:
    raise ImportError(
        "star_attention._C, the CUDA kernels, cannot be loaded: reinstall star-attention-trt where "
        f"nvcc is found, or use device cpu ({error})"
    ) from error

_DEBUG = os.environ.get("STAR_ATTENTION_DEBUG") == "1"


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
    kernel: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Few rows take the query kernel, which splits the cache; what fills the GPU without that, the
    context kernel.

    Args:
        kernel: "auto", or one of "context_sm80", "context_sm90", "query_sm80", "query_sm90" for
            benchmarks.

    Raises:
        ValueError: an argument is wrong; names it, what it is and what was expected.
    """
    if cap is not None:
        raise ValueError(f"cap: got {cap}, expected None: the kernels have none")
    o, lse = out or (torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32))
    if _DEBUG and page_table.dim() == 2:
        _check_lengths(kv_pool, page_table, cu_seqlens_q, kv_lens, q, max_q_len, max_kv_len)
    _C.paged_attention(
        q,
        kv_pool if kv_scales is None else _codes(kv_pool),
        page_table,
        cu_seqlens_q,
        kv_lens,
        other_pool,
        kv_scales,
        starts,
        o,
        lse,
        _allocator(q),
        causal,
        scale,
        max_q_len,
        max_kv_len,
        kernel,
        _stream(q),
    )
    return o, lse


def quantize_pages(
    kv_pool: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    pages: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    _C.quantize_pages(kv_pool, _codes(codes), scales, pages, tokens, _stream(kv_pool))


def dequantize_pages(
    kv_pool: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    sources: torch.Tensor,
    targets: torch.Tensor,
) -> None:
    _C.dequantize_pages(kv_pool, _codes(codes), scales, sources, targets, _stream(kv_pool))


def rope_append(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rotary: torch.Tensor,
    kv_pool: torch.Tensor,
    slot_mapping: torch.Tensor,
    q: torch.Tensor,
) -> None:
    if _DEBUG:
        _check_range("positions", positions, 0, rotary.shape[0])
        _check_range("slot_mapping", slot_mapping, -1, kv_pool.shape[0] * kv_pool.shape[3])
    _C.rope_append(qkv, positions, rotary, kv_pool, slot_mapping, q, _stream(qkv))


def merge_lse(
    o: torch.Tensor, lse: torch.Tensor, *, out_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(o.shape[1:], dtype=out_dtype or o.dtype, device=o.device)
    out_lse = torch.empty(lse.shape[1:], dtype=torch.float32, device=o.device)
    _C.merge_lse(o, lse, out, out_lse, _stream(o))
    return out, out_lse


def page_means(
    kv_pool: torch.Tensor, pages: torch.Tensor, rows: torch.Tensor, means: torch.Tensor
) -> None:
    """Of pages of 128 tokens."""
    _C.page_means(kv_pool, pages, rows, means, _stream(kv_pool))


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
    """From pages of 128 tokens, up to 256."""
    if page != CUDA_SELECTED_PAGE:
        raise ValueError(f"page: got {page}, expected {CUDA_SELECTED_PAGE}")
    lists = torch.empty(len(candidates), means.shape[1], count, dtype=torch.int32, device=q.device)
    counts = torch.empty(lists.shape[:2], dtype=torch.int32, device=q.device)
    _C.select_pages(
        q, lse, tiles, candidates, means, lists, counts, _allocator(q), scale, _stream(q)
    )
    return lists, counts


def fetch_pages(
    lists: torch.Tensor,
    counts: torch.Tensor,
    pages: torch.Tensor,
    owners: torch.Tensor,
    pools: Sequence[int],
    rank: int,
    fetched: torch.Tensor,
) -> torch.Tensor:
    """Copies what `select_pages` chose of other ranks' pages out of their memory, each KV head's
    part of a page once.

    Args:
        lists, counts: of `select_pages`.
        pages: int32 [C], in the pools of their ranks.
        owners: int32 [C], these ranks.
        pools: addresses of the layer's pool on each rank, as mapped here.
        rank: this one.
        fetched: written, [at least min(N * count, pages of other ranks), 2, Hkv, page, D].

    Returns:
        int32 [N, Hkv, count], the lists as `paged_attention` takes them, with `fetched` as the
        other pool.
    """
    planes = torch.empty_like(lists)
    _C.fetch_pages(
        lists,
        counts,
        pages,
        owners,
        pools,
        rank,
        fetched,
        planes,
        _allocator(lists),
        _stream(lists),
    )
    return planes


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, kind: RowKind | None = None
) -> torch.Tensor | QuantizedRows:
    out = _rows_like(x, x.shape[1], kind)
    _C.rms_norm(x, weight, *_parts(out), eps, _stream(x))
    return out


def linear(
    x: torch.Tensor | QuantizedRows,
    weight: torch.Tensor | QuantizedRows,
    addend: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The few rows of a decode step take a kernel of ours, more take cuBLAS."""
    if isinstance(x, QuantizedRows):
        return _linear_fp8(x, weight, addend, out)
    if isinstance(weight, torch.Tensor) and len(x) > _C.max_skinny_tokens(x.shape[1]):
        return reference.linear(x, weight, addend, out=out)
    if out is None:
        out = x.new_empty(len(x), len(weight))
    _C.skinny_linear(x, *_parts(weight), addend, out, _stream(x))
    return out


def _linear_fp8(
    x: QuantizedRows, weight: QuantizedRows, addend: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    """By cuBLAS, which adds no rows, and for some shapes of few rows no bias."""
    product = torch._scaled_mm(
        x.values,
        weight.values.t(),
        x.scales[:, None],
        weight.scales[None],
        out_dtype=x.dtype,
        use_fast_accum=True,
        out=out if addend is None else None,
    )
    return product if addend is None else torch.add(product, addend, out=out)


def kind_of_rows(rows: int, weight: QuantizedRows) -> RowKind | None:
    return weight.kind if rows > _C.max_skinny_tokens_fp8(weight.shape[1]) else None


def quantize_rows(x: torch.Tensor, kind: RowKind) -> QuantizedRows:
    out = _rows_like(x, x.shape[1], kind)
    _C.quantize_rows(x, *_parts(out), _stream(x))
    return out


def silu_mul(gate_up: torch.Tensor, *, kind: RowKind | None = None) -> torch.Tensor | QuantizedRows:
    out = _rows_like(gate_up, gate_up.shape[1] // 2, kind)
    _C.silu_mul(gate_up, *_parts(out), _stream(gate_up))
    return out


def _rows_like(x: torch.Tensor, width: int, kind: RowKind | None) -> torch.Tensor | QuantizedRows:
    if kind:
        return QuantizedRows.empty(len(x), width, kind, x.dtype, x.device)
    return torch.empty(len(x), width, dtype=x.dtype, device=x.device)


def _parts(rows: torch.Tensor | QuantizedRows) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As the kernels take them: bytes with scales, or 16-bit numbers."""
    if isinstance(rows, QuantizedRows):
        return rows.values.view(torch.uint8), rows.scales
    return rows, None


def _codes(pool: torch.Tensor) -> torch.Tensor:
    """uint8 for e4m3, as the kernels take it."""
    return pool if pool.dtype == torch.int8 else pool.view(torch.uint8)


def _allocator(tensor: torch.Tensor) -> Callable[[int], torch.Tensor]:
    """Of workspaces beside it."""
    return lambda size: torch.empty(size, dtype=torch.uint8, device=tensor.device)


def _stream(tensor: torch.Tensor) -> int:
    # What torch.cuda.current_stream gives, without the object around it.
    return torch._C._cuda_getCurrentRawStream(tensor.device.index) if tensor.is_cuda else 0


def _check_range(name: str, values: torch.Tensor, low: int, high: int) -> None:
    if values.numel() == 0:
        return
    least, most = int(values.min()), int(values.max())
    if least < low or most >= high:
        got = least if least < low else most
        raise ValueError(f"{name}: got {got}, expected values from {low} to {high - 1}")


def _check_lengths(
    kv_pool: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    q: torch.Tensor,
    max_q_len: int,
    max_kv_len: int,
) -> None:
    starts = cu_seqlens_q.tolist()
    if starts[0] != 0 or starts[-1] != q.shape[0]:
        raise ValueError(f"cu_seqlens_q: got {starts}, expected 0 first and {q.shape[0]} last")
    _check_range("rows of a sequence", cu_seqlens_q.diff(), 0, max_q_len + 1)
    _check_range("kv_lens", kv_lens, 0, max_kv_len + 1)
    pages = -(-kv_lens // kv_pool.shape[3])
    if int(pages.max()) > page_table.shape[1]:
        raise ValueError(
            f"kv_lens: got {int(kv_lens.max())} tokens, expected at most the "
            f"{page_table.shape[1] * kv_pool.shape[3]} that a row of page_table lists"
        )
    listed = torch.arange(page_table.shape[1], device=page_table.device) < pages[:, None]
    _check_range("page_table", page_table[listed], 0, kv_pool.shape[0])
