"""TensorRT-LLM's Llama, Qwen2 and Qwen3 with Star Attention: importing this registers them. The
ranks of the tensor-parallel group hold the whole model each and share contexts instead. names.py
lists what is used of TensorRT-LLM."""

from __future__ import annotations

import atexit
import copy
from typing import Any

import torch
from tensorrt_llm._torch.attention.attention import Attention
from tensorrt_llm._torch.attention.backends.interface import AttentionMetadata
from tensorrt_llm._torch.models.modeling_llama import LlamaForCausalLM
from tensorrt_llm._torch.models.modeling_qwen import Qwen2ForCausalLM
from tensorrt_llm._torch.models.modeling_qwen3 import Qwen3ForCausalLM
from tensorrt_llm._torch.models.modeling_utils import register_auto_model
from tensorrt_llm._utils import mpi_comm
from tensorrt_llm.mapping import Mapping

from star_attention.distributed import Communicator, SingleProcess
from star_attention.distributed.base import require_same
from star_attention.engines.torch.attention import stream_of
from star_attention.errors import UserError
from star_attention.trtllm.pytorch.attention import StarAttention, StarAttentionMetadata
from star_attention.trtllm.pytorch.settings import PREFIX, Settings
from star_attention.trtllm.pytorch.shards import Shards


class _StarForCausalLM:
    def __init__(self, model_config: Any) -> None:
        mapping = model_config.mapping
        for name, value in (
            ("pipeline_parallel_size", mapping.pp_size),
            ("context_parallel_size", mapping.cp_size),
            ("enable_attention_dp", mapping.enable_attention_dp),
        ):
            if value not in (1, False):
                raise UserError(
                    f"{name} is {value}: leave it away, the ranks of tensor_parallel_size share "
                    "contexts"
                )
        super().__init__(_whole(model_config))
        self._star_mapping = mapping
        self._star_settings = Settings.from_environment()
        self._star_layers: dict[int, StarAttention] = {}
        self._star_comm: Communicator | None = None
        for module in self.modules():
            if isinstance(module, Attention):
                module.attn = StarAttention(
                    module.layer_idx,
                    module.num_heads,
                    module.head_dim,
                    module.num_key_value_heads,
                    quant_config=module.quant_config,
                    q_scaling=module.q_scaling,
                )
                self._star_layers[module.layer_idx] = module.attn

    def forward(
        self,
        attn_metadata: AttentionMetadata,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        return_context_logits: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Logits of each sequence's last token, float32 [S, V], the same on all ranks.

        Raises:
            UserError: the pass is one that Star Attention cannot compute.
        """
        features, most = attn_metadata.runtime_features, attn_metadata.max_num_requests
        for name, value, advice in (
            ("gather_context_logits", return_context_logits, "set it to false"),
            ("inputs_embeds", inputs_embeds is not None, "use a model of text"),
            ("speculative_config", kwargs.get("spec_metadata") is not None, "leave it away"),
            ("lora_config", bool(kwargs.get("lora_params")), "merge it into the weights"),
            ("cuda_graph_config", attn_metadata.is_cuda_graph, "set it to null"),
            ("max_beam_width", (attn_metadata.max_num_sequences or 0) > most, "set it to 1"),
            ("enable_chunked_prefill", features.chunked_prefill, "set it to false"),
            (
                "kv_cache_config.enable_block_reuse",
                features.cache_reuse and self._star_settings.block_size is None,
                f"set it to false, or the block size, {PREFIX}BLOCK_SIZE, which has to be the same "
                "for all prompts",
            ),
        ):
            if value:
                raise UserError(f"{name} is set: {advice}")
        comm = self._star_comm
        if comm is None:
            comm = self._star_comm = connect(self._star_mapping)
            require_same(comm, **vars(self._star_settings))
        metadata = self._metadata(attn_metadata, comm, input_ids.device)
        logits = super().forward(
            attn_metadata=metadata,
            input_ids=input_ids[metadata.rows],
            position_ids=position_ids[..., metadata.rows],
            **kwargs,
        )
        return _agreed(comm, logits.contiguous()) if metadata.num_contexts else logits

    def _metadata(
        self, scheduled: AttentionMetadata, comm: Communicator, device: torch.device
    ) -> StarAttentionMetadata:
        manager = scheduled.kv_cache_manager
        page = Shards.of(manager.tokens_per_block, comm.size).page
        layers = sorted(self._star_layers)
        _, between = self._star_layers[layers[0]].pool(manager, page)
        config, query_size = self._star_settings.on_pages(page)
        return StarAttentionMetadata.of_rank(
            scheduled, config, query_size, comm, layers, between, device
        )


@register_auto_model("LlamaForCausalLM")
class StarLlamaForCausalLM(_StarForCausalLM, LlamaForCausalLM):
    """Checkpoints whose architecture is LlamaForCausalLM."""


@register_auto_model("Qwen2ForCausalLM")
class StarQwen2ForCausalLM(_StarForCausalLM, Qwen2ForCausalLM):
    """Checkpoints whose architecture is Qwen2ForCausalLM."""


@register_auto_model("Qwen3ForCausalLM")
class StarQwen3ForCausalLM(_StarForCausalLM, Qwen3ForCausalLM):
    """Checkpoints whose architecture is Qwen3ForCausalLM."""


def connect(mapping: Mapping) -> Communicator:
    """The ranks of the tensor-parallel group."""
    if mapping.tp_size == 1:
        return SingleProcess()
    from star_attention.distributed.gpu import GpuCommunicator
    from star_attention.distributed.mpi import MpiCommunicator

    comm = GpuCommunicator(MpiCommunicator(mpi_comm().Dup()), torch.cuda.current_device())
    atexit.register(comm.close)  # or ranks that end later take the others for lost
    return comm


def _whole(model_config: Any) -> Any:
    """The same model on one rank, its layers' own attention in plain torch: RoPE is then applied
    before it is called."""
    config = copy.copy(model_config)
    config._frozen = False
    config.mapping = Mapping(world_size=1, rank=0, tp_size=1)
    config.attn_backend = "VANILLA"
    config._frozen = True
    return config


def _agreed(comm: Communicator, logits: torch.Tensor) -> torch.Tensor:
    """Rank 0's logits, on all ranks: where they had different rows, products may differ in the
    last bits, and ranks that sample different tokens fall apart."""
    others = range(1, comm.size)
    sends = [(logits, rank) for rank in others] if comm.rank == 0 else []
    receives = [(logits, 0)] if comm.rank in others else []
    stream = stream_of(logits.device)
    comm.exchange(sends, receives, stream).wait(stream)
    return logits
