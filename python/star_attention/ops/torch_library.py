"""The kernel contract as `torch.library` operators, for models under `torch.compile` and attention
backends of other engines. Importing this module defines `torch.ops.star_attention.paged_attention`,
`rope_append` and `merge_lse`; shapes and meaning are those of `star_attention.ops`."""

from __future__ import annotations

import torch

from star_attention import ops


@torch.library.custom_op("star_attention::paged_attention", mutates_args=())
def paged_attention(
    q: torch.Tensor,
    kv_pool: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    causal: bool,
    scale: float,
    max_q_len: int,
    max_kv_len: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.paged_attention` into new tensors."""
    return ops.paged_attention(
        q,
        kv_pool,
        page_table,
        cu_seqlens_q,
        kv_lens,
        causal=causal,
        scale=scale,
        max_q_len=max_q_len,
        max_kv_len=max_kv_len,
    )


@paged_attention.register_fake
def _(q: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("star_attention::rope_append", mutates_args=("kv_pool", "q"))
def rope_append(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rotary: torch.Tensor,
    kv_pool: torch.Tensor,
    slot_mapping: torch.Tensor,
    q: torch.Tensor,
) -> None:
    """`ops.rope_append`: writes `kv_pool` and `q`."""
    ops.rope_append(qkv, positions, rotary, kv_pool, slot_mapping, q)


@rope_append.register_fake
def _(*_: object) -> None:
    pass


@torch.library.custom_op("star_attention::merge_lse", mutates_args=())
def merge_lse(
    o: torch.Tensor, lse: torch.Tensor, out_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.merge_lse`, its results contiguous on every device."""
    merged, merged_lse = ops.merge_lse(o, lse, out_dtype=out_dtype)
    return merged.contiguous(), merged_lse.contiguous()


@merge_lse.register_fake
def _(
    o: torch.Tensor, lse: torch.Tensor, out_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return o.new_empty(o.shape[1:], dtype=out_dtype or o.dtype), lse.new_empty(lse.shape[1:])
