"""The model in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from star_attention import ops
from star_attention.config import ModelConfig
from star_attention.distributed import Communicator
from star_attention.engines.base import AttentionStep
from star_attention.engines.torch_attention import attention_on, to_device
from star_attention.models.llama import LayerWeights, LlamaWeights, rotary_table

# Rows that go through the projections and the MLP at a time: bounds the activations of a long
# block, and keeps them in the cache of a CPU core.
_CHUNK_ROWS = {"cpu": 512, "cuda": 16384}


class TorchEngine:
    """Runs a Llama-family model on one device. See `ModelEngine`.

    Args:
        config: the model's shape.
        weights: on the device and in the dtype to compute with.
        comm: connects the ranks; reaches the device's memory.
        tokens_per_block: tokens a page holds.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: LlamaWeights,
        comm: Communicator,
        tokens_per_block: int = 128,
    ) -> None:
        self.config = config
        self.tokens_per_block = tokens_per_block
        self._weights = weights
        self._comm = comm
        self._device = weights.embedding.device
        self._chunk = _CHUNK_ROWS[self._device.type]
        self._rotary = rotary_table(config.rope, config.head_dim, 0, self._device)
        self._pool = self._empty_pool(0)

    def reserve_pages(self, num_pages: int) -> None:
        if num_pages > self._pool.shape[1]:
            grown = self._empty_pool(num_pages)
            grown[:, : self._pool.shape[1]] = self._pool
            self._pool = grown

    def copy_page(self, source: int, target: int) -> None:
        self._pool[:, target] = self._pool[:, source]

    @torch.inference_mode()
    def step(
        self,
        token_ids: np.ndarray,
        positions: np.ndarray,
        attention: AttentionStep,
        logit_rows: np.ndarray,
        on_layer: Callable[[float], None] | None = None,
    ) -> np.ndarray:
        self._reserve_positions(int(positions.max(initial=-1)) + 1)
        weights = self._weights
        attend = attention_on(attention, self._comm, self.config.head_dim**-0.5, self._device)
        slots = to_device(attention.slot_mapping, self._device)
        row_positions = to_device(positions, self._device)
        x = F.embedding(to_device(token_ids, self._device), weights.embedding)
        q = x.new_empty(len(x), self.config.num_q_heads, self.config.head_dim)
        parts = [slice(i, i + self._chunk) for i in range(0, len(x), self._chunk)]
        last = len(weights.layers) - 1
        for index, layer in enumerate(weights.layers):
            pool = self._pool[index]
            for part in parts:
                self._append_kv(x[part], layer, row_positions[part], slots[part], pool, q[part])
            if index == last and not len(logit_rows):
                break
            attended = attend(q, pool)
            for part in parts:
                x[part].addmm_(attended[part].flatten(1), layer.out.t())
                self._add_mlp(x[part], layer)
            if on_layer:
                on_layer((index + 1) / len(weights.layers))
        x = self._norm(x[to_device(logit_rows, self._device)], weights.norm)
        return F.linear(x, weights.lm_head).float().cpu().numpy()

    def _append_kv(
        self,
        x: torch.Tensor,
        layer: LayerWeights,
        positions: torch.Tensor,
        slots: torch.Tensor,
        pool: torch.Tensor,
        q: torch.Tensor,
    ) -> None:
        """Projects x [T, hidden_size]; stores K and V in their pages, and Q, rotated, in q."""
        qkv = F.linear(self._norm(x, layer.input_norm), layer.qkv, layer.qkv_bias)
        ops.rope_append(qkv, positions, self._rotary, pool, slots, q)

    def _add_mlp(self, x: torch.Tensor, layer: LayerWeights) -> None:
        gate_up = F.linear(self._norm(x, layer.post_norm), layer.gate_up)
        x.addmm_(ops.silu_mul(gate_up), layer.down.t())

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, weight, self.config.rms_norm_eps)

    def _empty_pool(self, num_pages: int) -> torch.Tensor:
        config, embedding = self.config, self._weights.embedding
        return embedding.new_empty(
            config.num_layers,
            num_pages,
            2,
            config.num_kv_heads,
            self.tokens_per_block,
            config.head_dim,
        )

    def _reserve_positions(self, positions: int) -> None:
        if positions > self._rotary.shape[0]:
            rows = 1 << (positions - 1).bit_length()
            config = self.config
            self._rotary = rotary_table(config.rope, config.head_dim, rows, self._device)
