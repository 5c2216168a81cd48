"""What a forward pass takes of a GPU's memory."""

from __future__ import annotations

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
    part: ModelConfig,
    itemsize: int,
    num_ranks: int,
    pages: int,
    tokens_per_block: int,
    free: int,
    quantized: bool = False,
    quantized_kv: bool = False,
) -> Limits:
    """Limits of a rank that has `free` bytes of its GPU beside weights, rotary table and KV pool.

    Pages that ranks exchange are copied where they are not consecutive, while the rows are
    projected, before there is attention's output: those of a layer that leave this rank and those
    that arrive, which are other ones. They are those that hold the rows of all ranks, and at most
    the pool. In a ring, a rank's own pages, those that are attended to and those that arrive may
    each be all that a rank has.

    Args:
        part: what the GPU computes of the model, in elements of `itemsize` bytes.
        pages, tokens_per_block: of the KV pool.
        quantized: projections are.
        quantized_kv: contexts are: partials over them and over a question's own pages are merged.

    Raises:
        UserError: hardly anything fits.
    """
    q, kv = part.num_q_heads * part.head_dim, 2 * part.num_kv_heads * part.head_dim
    partial = (q + part.num_q_heads) * _FLOAT
    # Of all rows: x, q and attention's output, and the log-sum-exp beside it.
    alone = (part.hidden_size + 2 * q) * itemsize + part.num_q_heads * _FLOAT
    # Of a chunk's, whichever is more: the MLP's normed x, gate, up and their product, or the fused
    # projection, and heads of Q before and after they are normalised.
    inner = 3 * part.intermediate_size
    if part.experts:  # an expert may get all rows: its gate, up, product, input and output, the sum
        inner = max(inner, 3 * part.experts.intermediate_size + 4 * part.hidden_size)
    projected = q + kv + (2 * q if part.qk_norm else 0)
    chunk = (part.hidden_size + max(inner, projected)) * itemsize
    if quantized:  # a product, before it is added to x
        chunk += part.hidden_size * itemsize
    usable = int(_USABLE * free)
    context = question = ring = _rows(usable, alone, chunk)
    selected = min(context, _rows(usable, alone + 2 * partial, chunk))
    if num_ranks > 1:
        layer = part.kv_bytes(pages * tokens_per_block, itemsize) // part.num_layers
        exchanged = max(0, num_ranks * kv - q) * itemsize  # more than the output takes later
        context = max(_rows(usable, alone + exchanged, chunk), _rows(usable - layer, alone, chunk))
        question = _rows(usable, alone + partial, chunk)
        ring = _rows(usable - 3 * layer, alone + 2 * partial, chunk)
        selected = min(context, _rows(usable - layer, alone + 2 * partial, chunk))
    if quantized_kv:
        question = _rows(usable, alone + 3 * partial, chunk)
    if min(context, question) < _LEAST_TOKENS:
        raise UserError(
            f"beside weights and KV cache, {free / 2**30:.1f} GiB of the GPU are free, too little "
            "for a pass: use a smaller --kv-cache-gib, or a larger --tp"
        )
    ring, selected = (rows if rows >= _LEAST_TOKENS else 0 for rows in (ring, selected))
    return Limits(
        pages=pages,
        pass_tokens=context,
        ring_tokens=ring,
        selected_tokens=selected,
        question_tokens=question,
    )


def _rows(free: int, each: int, chunk: int) -> int:
    """Rows that take `each` bytes, and up to a chunk of them `chunk` bytes more."""
    most = CHUNK_ROWS["cuda"]
    few = max(0, free) // (each + chunk)
    return few if few <= most else (free - most * chunk) // each
