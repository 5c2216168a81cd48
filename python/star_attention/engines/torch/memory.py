"""What a forward pass takes of a GPU's memory."""

from __future__ import annotations

import torch

from star_attention.engines.base import Limits
from star_attention.engines.torch.operators import CHUNK_ROWS
from star_attention.errors import UserError
from star_attention.models.config import ModelConfig

_FLOAT = 4  # bytes
# Of free memory; the rest is for tables, logits and fragments.
_USABLE = 0.9
# Shorter passes are of no use.
_LEAST_TOKENS = 128


def pass_limits(
    part: ModelConfig, dtype: torch.dtype, num_ranks: int, pages: int, free: int
) -> Limits:
    """Limits of a rank that has `free` bytes of its GPU beside weights, rotary table and KV pool.

    Args:
        part: what the GPU computes of the model.
        pages: of the KV pool.

    Raises:
        UserError: hardly anything fits.
    """
    tokens, question = tokens_that_fit(part, dtype.itemsize, num_ranks, free)
    if min(tokens, question) < _LEAST_TOKENS:
        raise UserError(
            f"beside weights and KV cache, {free / 2**30:.1f} GiB of the GPU are free, too little "
            "for a pass: use a smaller --kv-cache-gib, or a larger --tp"
        )
    return Limits(pages=pages, pass_tokens=tokens, question_tokens=question)


def tokens_that_fit(part: ModelConfig, itemsize: int, num_ranks: int, free: int) -> tuple[int, int]:
    """Tokens of a pass of phase 1, and of one that merges over ranks, in `free` bytes."""
    q, kv = part.num_q_heads * part.head_dim, 2 * part.num_kv_heads * part.head_dim
    partial = (q + part.num_q_heads) * _FLOAT
    # Of all rows: x, q and attention's output, and the log-sum-exp beside it.
    alone = (part.hidden_size + 2 * q) * itemsize + part.num_q_heads * _FLOAT
    context = question = alone
    if num_ranks > 1:
        question += partial
        # A ring's two partials and pages that leave and arrive; a shared anchor's copies take less.
        context += 2 * partial + 3 * kv * itemsize
    # Of a chunk's, whichever is more: the MLP's normed x, gate, up and their product, or the fused
    # projection.
    chunk = (part.hidden_size + max(3 * part.intermediate_size, q + kv)) * itemsize
    return tuple(
        _rows(int(_USABLE * free), each, chunk, CHUNK_ROWS["cuda"]) for each in (context, question)
    )


def _rows(free: int, each: int, chunk: int, chunk_rows: int) -> int:
    """Rows that take `each` bytes, and up to chunk_rows of them `chunk` bytes more."""
    few = free // (each + chunk)
    if few <= chunk_rows:
        return few
    return (free - chunk_rows * chunk) // each
