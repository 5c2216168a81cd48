"""Every name of TensorRT-LLM that its PyTorch backend's models with Star Attention use: where it
is, and the arguments that are passed. `tests/python/test_trtllm_pytorch.py` compares this with the
code and, where TensorRT-LLM is installed, with TensorRT-LLM.

Taken from its public source after release 1.3.0rc24, with `_torch/attention/backends`: the commits
of each file are in docs/tensorrt_llm.md. `register_auto_model` is documented for models of others;
what is in `_torch` otherwise may change with any release.
"""

from __future__ import annotations

_INTERFACE = "tensorrt_llm._torch.attention.backends.interface"
_ATTENTION = "tensorrt_llm._torch.attention.attention"

# Module -> name -> the arguments that are passed.
NAMES: dict[str, dict[str, str]] = {
    _INTERFACE: {
        "AttentionBackend": "(layer_idx, num_heads, head_dim, num_kv_heads, quant_config)",
        "AttentionMetadata": (
            "(max_num_requests, max_num_tokens, kv_cache_manager, seq_lens, num_contexts, "
            "request_ids)"
        ),
        "PredefinedAttentionMask": "",
    },
    _ATTENTION: {"Attention": ""},
    "tensorrt_llm._torch.models.modeling_llama": {"LlamaForCausalLM": "(model_config)"},
    "tensorrt_llm._torch.models.modeling_qwen": {"Qwen2ForCausalLM": "(model_config)"},
    "tensorrt_llm._torch.models.modeling_qwen3": {"Qwen3ForCausalLM": "(model_config)"},
    "tensorrt_llm._torch.models.modeling_utils": {"register_auto_model": "(name)"},
    "tensorrt_llm._utils": {"mpi_comm": "()"},
    "tensorrt_llm.mapping": {"Mapping": "(world_size, rank, tp_size)"},
}

# Owner -> methods that TensorRT-LLM calls of ours, or that are called, with their arguments.
METHODS: dict[str, dict[str, str]] = {
    f"{_INTERFACE}.AttentionBackend": {
        "forward": "(q, k, v, metadata, forward_args)",
        "update_quant_config": "(new_quant_config)",
    },
    "tensorrt_llm._torch.models.modeling_utils.DecoderModelForCausalLM": {
        "forward": "(attn_metadata, input_ids, position_ids, inputs_embeds, return_context_logits)",
    },
    "tensorrt_llm._torch.pyexecutor.resource_manager.KVCacheManager": {
        "get_buffers": "(layer_idx)",
        "get_batch_cache_indices": "(request_ids, layer_idx)",
    },
}

# Owner -> attributes of its instances that are read or set.
MEMBERS: dict[str, tuple[str, ...]] = {
    f"{_INTERFACE}.AttentionMetadata": (
        *("max_num_requests", "max_num_tokens", "max_num_sequences", "kv_cache_manager"),
        *("kv_cache_params", "seq_lens"),
        *("num_contexts", "request_ids", "is_cuda_graph", "runtime_features"),
    ),
    f"{_INTERFACE}.AttentionRuntimeFeatures": ("chunked_prefill", "cache_reuse"),
    f"{_INTERFACE}.AttentionBackend": ("layer_idx", "num_heads", "head_dim", "num_kv_heads"),
    f"{_INTERFACE}.PredefinedAttentionMask": ("CAUSAL",),
    f"{_INTERFACE}.AttentionForwardArgs": (
        *("attention_mask", "attention_window_size", "attention_mask_data", "attention_sinks"),
        *("relative_attention_bias", "cross_kv", "mrope_rotary_cos_sin"),
    ),
    f"{_ATTENTION}.Attention": (
        *("attn", "layer_idx", "num_heads", "head_dim", "num_key_value_heads", "quant_config"),
        "q_scaling",
    ),
    "tensorrt_llm._torch.metadata.KVCacheParams": ("num_cached_tokens_per_seq",),
    "tensorrt_llm._torch.model_config.ModelConfig": ("mapping", "attn_backend", "_frozen"),
    "tensorrt_llm._torch.pyexecutor.resource_manager.KVCacheManager": ("tokens_per_block",),
    "tensorrt_llm.mapping.Mapping": ("tp_size", "pp_size", "cp_size", "enable_attention_dp"),
}
