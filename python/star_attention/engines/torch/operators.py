"""The decoder's operators in torch: rows in place, a chunk of them at a time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.nn import functional as F

from star_attention import ops
from star_attention.distributed import Communicator
from star_attention.engines.torch.attention import Attention, stream_of
from star_attention.engines.torch.experts import mix_by_expert, mix_captured
from star_attention.models.config import ModelConfig
from star_attention.models.weights import LayerWeights
from star_attention.ops.quantized import QuantizedRows

# A matrix: 16 or 32 bits, or quantised.
Rows: TypeAlias = "torch.Tensor | QuantizedRows"

# Rows that go through the projections and the MLP at a time: bounds the activations of a long
# block, and keeps them in the cache of a CPU core.
CHUNK_ROWS = {"cpu": 512, "cuda": 16384}


@dataclass(frozen=True)
class PassInputs:
    """A pass's tokens on the device.

    Attributes:
        token_ids, slots: int32 [T].
        positions: int32 [T], rows of the rotary table.
        logit_rows: int32 [R]; None: all rows.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    logit_rows: torch.Tensor | None


class TorchOperators:
    """The operators of one pass. See `models.decoder.Operators`.

    Args:
        part: what this GPU computes of the model.
        pool: KV pages of all layers, [num_layers, num_pages, 2, Hkv, tokens_per_block, D].
        rotary: `rotary_table` of enough positions.
        window_rotary: of layers with a window, where it is another one.
        attention: of this pass.
        group: the ranks that have the other parts of the model.
        is_captured: the pass becomes a CUDA graph, so the host must not look at its values.
    """

    def __init__(
        self,
        part: ModelConfig,
        inputs: PassInputs,
        pool: torch.Tensor,
        rotary: torch.Tensor,
        attention: Attention,
        group: Communicator,
        is_captured: bool = False,
        window_rotary: torch.Tensor | None = None,
    ) -> None:
        self._window_rotary = window_rotary
        self._part = part
        self._inputs = inputs
        self._pool = pool
        self._rotary = rotary
        self._attention = attention
        self._group = group
        self._is_captured = is_captured
        rows = inputs.logit_rows
        self._wants_logits = rows is None or len(rows) > 0

    def embed(self, embedding: torch.Tensor) -> torch.Tensor:
        x = F.embedding(self._inputs.token_ids, embedding)
        if self._part.embedding_scale != 1:
            x *= torch.tensor(self._part.embedding_scale, dtype=x.dtype)  # rounded to it
        self._q = x.new_empty(len(x), self._part.num_q_heads, self._part.head_dim)
        return x

    def attend(
        self, layer: int, x: torch.Tensor, project: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor | None:
        inputs, pool, attention = self._inputs, self._pool[layer], self._attention
        rotary = self._rotary
        if self._window_rotary is not None and layer in self._part.windowed_layers:
            rotary = self._window_rotary
        attention.begin(pool)
        for chunk in _chunks(x, attention.cuts):
            qkv = project(x[chunk])
            positions, slots = inputs.positions[chunk], inputs.slots[chunk]
            ops.rope_append(qkv, positions, rotary, pool, slots, self._q[chunk])
            del qkv  # before the next chunk's is made
            attention.stored(pool, chunk.stop)
        if layer == self._part.num_layers - 1 and not self._wants_logits:
            attention.finish(pool)
            return None
        return attention(self._q, pool).flatten(1)

    def by_rows(
        self,
        finish: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        attended: torch.Tensor,
    ) -> torch.Tensor:
        for chunk in _chunks(x):
            finish(x[chunk], attended[chunk])
        return x

    def wanted_rows(self, x: torch.Tensor) -> torch.Tensor:
        rows = self._inputs.logit_rows
        return x if rows is None else x[rows]

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, reader: Rows | None = None) -> Rows:
        kind = ops.kind_of_rows(len(x), reader)
        return ops.rms_norm(x, weight, self._part.rms_norm_eps, kind=kind)

    def linear(self, x: Rows, weight: Rows, bias: torch.Tensor | None = None) -> torch.Tensor:
        return ops.linear(x, weight, bias)

    def norm_heads(
        self, qkv: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor
    ) -> torch.Tensor:
        """In qkv."""
        q, kv = (
            heads * self._part.head_dim
            for heads in (self._part.num_q_heads, self._part.num_kv_heads)
        )
        for part, weight in ((qkv[:, :q], q_norm), (qkv[:, q : q + kv], k_norm)):
            heads = part.reshape(-1, self._part.head_dim)
            part.copy_(self.rms_norm(heads, weight).view_as(part))
        return qkv

    def add_linear(
        self,
        x: torch.Tensor,
        inputs: Rows,
        weight: Rows,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """In x, which the group's first rank adds, and the bias."""
        inputs = _for(weight, inputs)
        is_first = self._group.rank == 0
        if bias is not None and is_first:
            x += bias
        ops.linear(inputs, weight, x if is_first else None, out=x)
        self._group.all_reduce(x, stream_of(x.device))
        return x

    def add_normed(
        self, x: torch.Tensor, inputs: Rows, weight: Rows, norm: torch.Tensor
    ) -> torch.Tensor:
        """In x."""
        product = ops.linear(_for(weight, inputs), weight)
        self._group.all_reduce(product, stream_of(x.device))
        x += self.rms_norm(product, norm)
        return x

    def add_experts(
        self, x: torch.Tensor, inputs: torch.Tensor, layer: LayerWeights[torch.Tensor]
    ) -> torch.Tensor:
        """In x, which the group's first rank adds."""
        mix = mix_captured if self._is_captured else mix_by_expert
        mixed = mix(inputs, layer, self._part.experts)
        x.copy_(mixed) if self._group.rank else x.add_(mixed)
        self._group.all_reduce(x, stream_of(x.device))
        return x

    def activate(self, gate_up: torch.Tensor, reader: Rows) -> Rows:
        kind = ops.kind_of_rows(len(gate_up), reader)
        if self._part.activation == "silu":
            return ops.silu_mul(gate_up, kind=kind)
        gate, up = gate_up.chunk(2, dim=-1)
        product = F.gelu(gate, approximate="tanh").mul_(up)
        return ops.quantize_rows(product, kind) if kind else product

    def logits(self, x: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
        """Every rank of the group has a part of the vocabulary."""
        own = ops.linear(x, lm_head)
        if (cap := self._part.logit_cap) is not None:
            own = own.div_(cap).tanh_().mul_(cap)
        if self._group.size == 1:
            return own.float()
        parts = own.new_empty(self._group.size, *own.shape)
        self._group.all_gather(own, parts, stream_of(own.device))
        return parts.transpose(0, 1).flatten(1).float()


def _for(weight: Rows, inputs: Rows) -> Rows:
    """As `weight` wants them. Attention's output is quantised here: its kernels see a row's heads
    one by one, and no largest element of them."""
    if isinstance(inputs, torch.Tensor) and (kind := ops.kind_of_rows(len(inputs), weight)):
        return ops.quantize_rows(inputs, kind)
    return inputs


def _chunks(x: torch.Tensor, cuts: tuple[int, ...] = ()) -> tuple[slice, ...]:
    """Rows of x in pieces, of which one ends at each of `cuts`."""
    return _slices(len(x), CHUNK_ROWS[x.device.type], cuts)


@functools.lru_cache
def _slices(rows: int, size: int, cuts: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(
        slice(first, min(first + size, end))
        for begin, end in itertools.pairwise((0, *cuts, rows))
        for first in range(begin, end, size)
    )
