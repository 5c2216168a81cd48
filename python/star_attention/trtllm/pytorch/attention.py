"""TensorRT-LLM's attention backend interface over Star Attention's operators. names.py lists what
is used of TensorRT-LLM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tensorrt_llm._torch.attention.backends.interface import (
    AttentionBackend,
    AttentionMetadata,
    PredefinedAttentionMask,
)

from star_attention import ops
from star_attention.config import StarConfig
from star_attention.distributed import Communicator
from star_attention.distributed.base import Addressed, Done, Request
from star_attention.engines.torch.attention import (
    Seen,
    merge_over_ranks,
    stream_of,
    tables_of,
    to_device,
)
from star_attention.errors import UserError
from star_attention.trtllm.pytorch.shards import Shards, shared_pool
from star_attention.trtllm.pytorch.step import Moves, Scheduled, rank_step

# Options of a forward call that change what is computed, other than the mask.
_UNSUPPORTED = (
    *("attention_window_size", "attention_mask_data", "attention_sinks"),
    *("relative_attention_bias", "cross_kv", "mrope_rotary_cos_sin"),
)


class StarAttentionMetadata(AttentionMetadata):
    """One rank's rows of a forward pass, for all layers.

    Attributes:
        comm: the ranks.
        page: tokens of a page of the pool.
        rows: int64 [T], the rows of the scheduled batch.
    """

    @classmethod
    def of_rank(
        cls,
        scheduled: AttentionMetadata,
        config: StarConfig,
        query_size: int,
        comm: Communicator,
        layers: Sequence[int],
        pages_between: int,
        device: torch.device,
    ) -> StarAttentionMetadata:
        """From TensorRT-LLM's metadata of the pass, in which all ranks have all rows.

        Args:
            query_size: tokens at the end of a prompt that see all of it.
            layers: of the model; their pages have the same numbers.
            pages_between: of `shared_pool`.

        Raises:
            UserError: the pass is one that Star Attention cannot compute.
        """
        manager = scheduled.kv_cache_manager
        shards = Shards.of(manager.tokens_per_block, comm.size)
        step = rank_step(
            _batch(scheduled, layers, pages_between), config, query_size, shards, comm.rank
        )
        self = cls(
            max_num_requests=scheduled.max_num_requests,
            max_num_tokens=scheduled.max_num_tokens,
            kv_cache_manager=manager,
            seq_lens=torch.tensor(step.rows_per_sequence, dtype=torch.int),
            num_contexts=scheduled.num_contexts,
            request_ids=scheduled.request_ids,
        )
        self.comm, self.page = comm, shards.page
        self.rows = to_device(step.rows, device)
        self._scratch_slots = to_device(step.scratch_slots, device)
        self._scratch_pages = step.scratch_pages
        self._context_rows = to_device(step.context_rows, device)
        self._tail_rows = to_device(step.tail_rows, device)
        self._context = step.context and tables_of(step.context, device)
        self._tail = step.tail and tables_of(step.tail, device)
        self._cached = step.cached and tables_of(step.cached, device)
        self._fetch = step.fetch and _MovesOnDevice(step.fetch, self.page, device)
        self._keep = _MovesOnDevice(step.keep, self.page, device)
        self._scratch: torch.Tensor | None = None
        # `rope_append` stores KV; what comes here is rotated, so it turns by nothing.
        self._positions = torch.zeros(len(step.rows), dtype=torch.int32, device=device)
        self._no_rotation: torch.Tensor | None = None
        return self

    def attend(self, qkv: torch.Tensor, pool: torch.Tensor, scale: float) -> torch.Tensor:
        """One layer: qkv [T, (Hq + 2 Hkv) * D], rotated, to [T, Hq, D], its KV kept by the ranks in
        their pools, [*, 2, Hkv, page, D]."""
        _, _, num_kv_heads, page, head_dim = pool.shape
        if self._scratch is None:
            self._scratch = qkv.new_empty(self._scratch_pages, 2, num_kv_heads, page, head_dim)
            half = torch.ones(1, head_dim // 2, device=qkv.device)
            self._no_rotation = torch.cat((half, torch.zeros_like(half)), dim=-1)
        scratch = self._scratch
        q = qkv.new_empty(len(qkv), qkv.shape[1] // head_dim - 2 * num_kv_heads, head_dim)
        ops.rope_append(qkv, self._positions, self._no_rotation, scratch, self._scratch_slots, q)
        self._keep.here(scratch, pool)
        if not self.num_contexts:
            return self._attend_tail(q, scratch, pool, scale)
        if self._fetch:
            self._fetch.here(pool, scratch)
            self._fetch.start(self.comm, pool)
        self._keep.start(self.comm, scratch)
        o = torch.empty_like(q)
        if self._fetch:
            self._fetch.finish(scratch)
        if self._context:
            rows = self._context_rows
            o[rows], _ = self._context.attend(q[rows], 0, scratch, scale)
        self._keep.finish(pool)
        rows = self._tail_rows
        o[rows] = self._attend_tail(q[rows], scratch, pool, scale)
        return o

    def _attend_tail(
        self, q: torch.Tensor, scratch: torch.Tensor, pool: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Queries and generated tokens, over what all ranks keep and over one another."""
        seen = Seen(q, 0, scale)
        seen.add((self._cached,), pool)
        if self._tail:
            seen.add((self._tail,), scratch)
        if self.comm.size == 1:
            return seen.merged(q.dtype)[0]
        if not q.is_cuda:
            return merge_over_ranks(self.comm, *seen.merged(q.dtype))
        merged = torch.empty_like(q)
        self.comm.merge(*seen.merged(torch.float32), merged, stream_of(q.device))
        return merged


class StarAttention(AttentionBackend[StarAttentionMetadata]):
    """Attention of a layer. What it is given is rotated already."""

    Metadata = StarAttentionMetadata

    def __init__(
        self,
        layer_idx: int,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        quant_config: Any = None,
        q_scaling: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(layer_idx, num_heads, head_dim, num_kv_heads, quant_config, **kwargs)
        self._scale = 1 / (math.sqrt(head_dim) * (q_scaling or 1.0))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        metadata: StarAttentionMetadata,
        forward_args: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """q [T, Hq * D], k and v [T, Hkv * D], or q has all three; [T, Hq * D].

        Raises:
            UserError: an option is not supported, or the KV cache has another dtype than q.
        """
        _check_options(forward_args or SimpleNamespace(**kwargs))
        qkv = q if k is None else torch.cat((q, k, v), dim=-1)
        pool, _ = self.pool(metadata.kv_cache_manager, metadata.page)
        if pool.dtype != qkv.dtype:
            raise UserError(
                f"the KV cache is {pool.dtype}, the model {qkv.dtype}: set kv_cache_config.dtype "
                "to auto, and take a checkpoint without KV quantisation"
            )
        return metadata.attend(qkv, pool, self._scale).flatten(1)

    def pool(self, manager: Any, page: int) -> tuple[torch.Tensor, int]:
        """`shared_pool` of the layer."""
        buffers = manager.get_buffers(self.layer_idx)
        return shared_pool(buffers, self.num_kv_heads, page, self.head_dim)


def _check_options(options: Any) -> None:
    mask = getattr(options, "attention_mask", PredefinedAttentionMask.CAUSAL)
    if mask != PredefinedAttentionMask.CAUSAL:
        raise UserError(f"attention_mask is {mask}: Star Attention is causal")
    for name in _UNSUPPORTED:
        if getattr(options, name, None) is not None:
            raise UserError(f"{name} is given: Star Attention has none, use another model")


def _batch(
    scheduled: AttentionMetadata, layers: Sequence[int], pages_between: int
) -> list[Scheduled]:
    """The sequences of a pass."""
    manager = scheduled.kv_cache_manager
    ids = list(scheduled.request_ids)
    first, last = (manager.get_batch_cache_indices(ids, layers[each]) for each in (0, -1))
    if first != last:
        raise UserError(
            "layers have pages of their own: set kv_cache_config.use_kv_cache_manager_v2 to false"
        )
    batch = []
    lengths = zip(
        scheduled.kv_cache_params.num_cached_tokens_per_seq,
        scheduled.seq_lens.tolist(),
        first,
        strict=True,
    )
    for index, (cached, new, pages) in enumerate(lengths):
        is_prompt = index < scheduled.num_contexts
        if is_prompt and cached % manager.tokens_per_block:
            raise UserError(
                "a page is reused in part: set kv_cache_config.enable_partial_reuse to false"
            )
        batch.append(Scheduled(cached, new, np.array(pages) * pages_between, is_prompt))
    return batch


@dataclass(frozen=True)
class _Places:
    """N tokens in a pool [P, 2, Hkv, page, D]: pages and offsets in them, int64 [N]."""

    pages: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def on(cls, device: torch.device, slots: np.ndarray, page: int) -> _Places:
        return cls(*(to_device(each, device) for each in np.divmod(slots, page)))

    def of(self, pool: torch.Tensor) -> torch.Tensor:
        """Their KV, [N, 2, Hkv, D]."""
        return pool[self.pages, :, :, self.offsets].contiguous()

    def room(self, pool: torch.Tensor) -> torch.Tensor:
        """For what `of` gives."""
        _, kinds, heads, _, head_dim = pool.shape
        return pool.new_empty(len(self.pages), kinds, heads, head_dim)

    def set(self, pool: torch.Tensor, tokens: torch.Tensor) -> None:
        pool[self.pages, :, :, self.offsets] = tokens


class _MovesOnDevice:
    """`Moves`, in every layer."""

    def __init__(self, moves: Moves, page: int, device: torch.device) -> None:
        def places(slots: np.ndarray) -> _Places:
            return _Places.on(device, slots, page)

        self._sends = [(places(slots), rank) for slots, rank in moves.sends]
        self._receives = [(places(slots), rank) for slots, rank in moves.receives]
        self._from, self._to = map(places, moves.here)
        self._request: Request = Done()
        self._arriving: Addressed = ()

    def here(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """What stays on this rank."""
        self._to.set(target, self._from.of(source))

    def start(self, comm: Communicator, source: torch.Tensor) -> None:
        """Begins what goes to others and comes from them. All ranks call it."""
        sends = [(places.of(source), rank) for places, rank in self._sends]
        self._arriving = [(places.room(source), rank) for places, rank in self._receives]
        self._request = comm.exchange(sends, self._arriving, stream_of(source.device))

    def finish(self, target: torch.Tensor) -> None:
        """It is in `target`."""
        self._request.wait(stream_of(target.device))
        for (places, _), (tokens, _) in zip(self._receives, self._arriving, strict=True):
            places.set(target, tokens)
