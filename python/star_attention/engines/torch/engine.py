"""The model in plain torch."""

from __future__ import annotations

import resource
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from star_attention import ops
from star_attention.distributed import Communicator, SingleProcess, Traffic
from star_attention.engines.base import AttentionStep, Limits, PagedStep, is_decode_step
from star_attention.engines.torch.attention import (
    Attention,
    PagedAttention,
    PagedTables,
    attention_on,
    stream_of,
    to_device,
)
from star_attention.models.config import ModelConfig
from star_attention.models.llama import LayerWeights, LlamaWeights, rotary_table

# Rows that go through the projections and the MLP at a time: bounds the activations of a long
# block, and keeps them in the cache of a CPU core.
_CHUNK_ROWS = {"cpu": 512, "cuda": 16384}


class TorchEngine:
    """Runs a Llama-family model on one device. See `ModelEngine`.

    On a GPU, steps of one token a sequence are captured in a CUDA graph, one for each number of
    sequences, when they come for the second time, and replayed from then on.

    Args:
        config: the model's shape.
        weights: on the device and in the dtype to compute with.
        comm: connects the ranks; reaches the device's memory.
        tokens_per_block: tokens a page holds.
        max_pages: pages of the KV pool, allocated at once; None: it grows, without CUDA graphs.
        group: the ranks that have the other parts of `weights`, and the same tokens (tensor
            parallelism); `comm` connects this rank with those that have the same part.
    """

    has_ring = True
    graph_steps = 0

    def __init__(
        self,
        config: ModelConfig,
        weights: LlamaWeights,
        comm: Communicator,
        tokens_per_block: int = 128,
        max_pages: int | None = None,
        group: Communicator | None = None,
    ) -> None:
        self.config = config
        self._group = group or SingleProcess()
        self._part = config.shard(self._group.size)
        self.tokens_per_block = tokens_per_block
        self.max_pages = max_pages
        self.wait_seconds = 0.0
        self._weights = weights
        self._comm = comm
        self._device = weights.embedding.device
        self._chunk = _CHUNK_ROWS[self._device.type]
        self._rotary = rotary_table(config.rope, config.head_dim, 0, self._device)
        self._pool = self._empty_pool(max_pages or 0)
        fit = self._tokens_that_fit() if self._device.type == "cuda" else None
        self.limits = Limits(max_pages, fit, question_tokens=fit)
        self._graphs: dict[int, _DecodeGraph | None] = {}  # by sequences; None: seen once

    @property
    def peak_memory_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def reserve_pages(self, num_pages: int) -> None:
        if self.max_pages is None and num_pages > self._pool.shape[1]:
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
    ) -> torch.Tensor:
        graph = self._graph_for(attention, logit_rows)
        if graph:
            logits = graph.replay(token_ids, positions, attention)
        else:
            attend = attention_on(attention, self._comm, self._scale, self._device)
            inputs = (token_ids, positions, attention.slot_mapping, logit_rows)
            try:
                logits = self._forward(
                    *(to_device(array, self._device) for array in inputs), attend, on_layer
                )
            except torch.OutOfMemoryError as error:
                raise MemoryError(
                    f"{len(token_ids)} tokens in one pass do not fit beside the KV cache: use more "
                    f"ranks, smaller blocks or a smaller --kv-cache-gib ({error})"
                ) from None
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()
            self._comm.check()
            self._group.check()
        if not graph:
            self.wait_seconds += attend.wait_seconds
        return logits

    @property
    def _scale(self) -> float:
        return self.config.head_dim**-0.5

    def _forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        logit_rows: torch.Tensor,
        attend: Attention,
        on_layer: Callable[[float], None] | None = None,
    ) -> torch.Tensor:
        weights = self._weights
        x = F.embedding(token_ids, weights.embedding)
        q = x.new_empty(len(x), self._part.num_q_heads, self._part.head_dim)
        parts = [slice(i, min(i + self._chunk, len(x))) for i in range(0, len(x), self._chunk)]
        last = len(weights.layers) - 1
        for index, layer in enumerate(weights.layers):
            pool = self._pool[index]
            attends = index < last or len(logit_rows) > 0
            if attends:
                attend.begin(pool)
            for part in parts:
                self._append_kv(x[part], layer, positions[part], slots[part], pool, q[part])
                if attends:
                    attend.stored(pool, part.stop)
            if not attends:
                attend.end()
                return x.new_empty(0, self.config.vocab_size, dtype=torch.float32)
            attended = attend(q, pool)
            for part in parts:
                self._add(x[part], attended[part].flatten(1), layer.out)
                self._add_mlp(x[part], layer)
            if on_layer:
                self._wait_for_layer(index)
                on_layer((index + 1) / len(weights.layers))
        attend.end()
        x = self._norm(x[logit_rows], weights.norm)
        return self._whole_rows(ops.linear(x, weights.lm_head)).float()

    def _whole_rows(self, logits: torch.Tensor) -> torch.Tensor:
        """[R, vocab_size] from each rank's part of the rows."""
        if self._group.size == 1:
            return logits
        parts = logits.new_empty(self._group.size, *logits.shape)
        self._group.all_gather(logits, parts, stream_of(logits.device))
        return parts.transpose(0, 1).flatten(1)

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
        qkv = ops.linear(self._norm(x, layer.input_norm), layer.qkv, layer.qkv_bias)
        ops.rope_append(qkv, positions, self._rotary, pool, slots, q)

    def _add_mlp(self, x: torch.Tensor, layer: LayerWeights) -> None:
        gate_up = ops.linear(self._norm(x, layer.post_norm), layer.gate_up)
        self._add(x, ops.silu_mul(gate_up), layer.down)

    def _add(self, x: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor) -> None:
        """x += inputs weight^T, summed over the group, whose first rank adds x."""
        ops.linear(inputs, weight, None if self._group.rank else x, out=x)
        self._group.all_reduce(x, stream_of(x.device))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, weight, self.config.rms_norm_eps)

    def _graph_for(self, attention: AttentionStep, logit_rows: np.ndarray) -> _DecodeGraph | None:
        """The graph that can run this step, if any. All ranks capture at the same step: capturing
        can be a collective call."""
        if self.max_pages is None or not (self._comm.capturable and self._group.capturable):
            return None
        if not is_decode_step(attention, logit_rows):
            return None
        count = len(attention.slot_mapping)
        if count not in self._graphs:
            self._graphs[count] = None
        elif self._graphs[count] is None:
            self._graphs[count] = _DecodeGraph(self, count, attention.merge)
        return self._graphs[count]

    def _wait_for_layer(self, index: int) -> None:
        """Lets the host run at most a layer ahead of a GPU, so that progress is true."""
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            if index:
                self._layer_done.synchronize()
            self._layer_done = event

    def _empty_pool(self, num_pages: int) -> torch.Tensor:
        shape = self._part.kv_shape(num_pages, self.tokens_per_block)
        return self._weights.embedding.new_empty(shape)

    def _tokens_that_fit(self) -> int:
        """Tokens whose activations the GPU's free memory holds: x, q and attention's output of all
        of them, and the MLP's of a chunk, with something to spare for tables and fragments."""
        part, size = self._part, self._pool.element_size()
        free = 0.9 * torch.cuda.mem_get_info(self._device)[0]
        chunk = self._chunk * (part.hidden_size + 3 * part.intermediate_size) * size
        each = (part.hidden_size + 2 * part.num_q_heads * part.head_dim) * size
        return max(0, int((free - chunk) // each))

    def reserve_positions(self, positions: int) -> None:
        if positions > self._rotary.shape[0]:
            rows = 1 << (positions - 1).bit_length()
            config = self.config
            self._rotary = rotary_table(config.rope, config.head_dim, rows, self._device)
            self._graphs.clear()


class _DecodeGraph:
    """One token for each of `count` sequences, captured on construction; its inputs are copied to
    the GPU in one piece before each replay."""

    def __init__(self, engine: TorchEngine, count: int, merge: bool) -> None:
        width = engine.max_pages
        sizes = [count] * 4 + [count + 1, count * width]
        self._host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=True)
        self._inputs = self._host.to(engine._device)
        host = np.split(self._host.numpy(), np.cumsum(sizes)[:-1])
        self._token_ids, self._positions, self._slots, self._kv_lens, starts, table = host
        starts[:] = np.arange(count + 1)
        self._table = table.reshape(count, width)
        token_ids, positions, slots, kv_lens, starts, table = self._inputs.split(sizes)
        tables = PagedTables(
            table.view(count, width), starts, kv_lens, False, 1, width * engine.tokens_per_block
        )
        attend = PagedAttention(tables, engine._comm, engine._scale, merge=merge)
        self._rows = torch.arange(count, device=engine._device)
        self._traffic = engine._comm.traffic
        before = self._traffic.copy()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            inputs = (token_ids, positions, slots, self._rows)
            self._logits = engine._forward(*inputs, attend)
        self._per_step = self._traffic - before
        self._traffic.add(Traffic() - self._per_step)  # nothing was sent yet

    def replay(self, token_ids: np.ndarray, positions: np.ndarray, step: PagedStep) -> torch.Tensor:
        self._token_ids[:] = token_ids
        self._positions[:] = positions
        self._slots[:] = step.slot_mapping
        self._kv_lens[:] = step.kv_lens
        self._table[:, : step.page_table.shape[1]] = step.page_table
        self._inputs.copy_(self._host, non_blocking=True)
        self._graph.replay()
        self._traffic.add(self._per_step)
        return self._logits
