"""What Star Attention takes from trtllm-build's flags and from checkpoints, and what it refuses.

Nothing here needs TensorRT-LLM. Names are those of its flags and of its config.json files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from star_attention.engines.tensorrt.folder import EngineLimits
from star_attention.errors import UserError
from star_attention.models.config import ModelConfig

MODEL_FILE = Path(__file__).with_name("model.py")
# Architecture of a checkpoint -> the class in MODEL_FILE.
MODEL_CLASSES = {
    "LlamaForCausalLM": "StarLlamaForCausalLM",
    "Qwen2ForCausalLM": "StarQwen2ForCausalLM",
}
# Star Attention's settings of an engine, of `EngineLimits`.
SETTINGS = ("block_size", "anchor_size", "anchor_mode")

_ONE_ENGINE = "one engine serves all ranks: {}, and start the ranks with mpirun -n"
_WANTED_ROWS = "the engine gives the logits of the rows that are asked for: leave it away"
# Values that are allowed, and what to do with others. Switches are "true" and "false", what is not
# set is "false".
_CHECKPOINT = {  # fields of its config.json
    "tp_size": ("1", _ONE_ENGINE.format("convert it with --tp_size 1")),
    "pp_size": ("1", _ONE_ENGINE.format("convert it with --pp_size 1")),
    "cp_size": ("1", _ONE_ENGINE.format("convert it with --cp_size 1")),
    "dtype": ("float16 bfloat16", "convert it with --dtype float16 or bfloat16"),
    "head_size": ("64 128", "use a model whose heads have 64 or 128 elements"),
    "kv_cache_quant_algo": ("false", "the KV cache is 16-bit: convert it without KV quantisation"),
    "quant_algo": (
        "false w8a16 w4a16 w4a16_awq w4a16_gptq fp8",
        "convert it with one of w8a16, w4a16, w4a16_awq, w4a16_gptq, fp8, or without",
    ),
}
_SCALINGS = ("default", "linear", "llama3")
_FLAGS = {  # of trtllm-build
    "workers": ("1", "there is one engine to build: leave it away"),
    "max_beam_width": ("1", "there is no beam search: use 1"),
    "max_encoder_input_len": ("0", "there is no cross attention: leave it away"),
    "max_prompt_embedding_table_size": ("0", "there is no prompt tuning: leave it away"),
    "max_draft_len": ("0", "there is no speculative decoding: leave it away"),
    "speculative_decoding_mode": ("false", "there is no speculative decoding: leave it away"),
    "kv_cache_type": ("paged", "the KV cache is paged: use paged"),
    "paged_kv_cache": ("true", "the KV cache is paged: use enable"),
    "remove_input_padding": ("true", "tokens are packed: use enable"),
    "lora_plugin": ("false", "there is no LoRA: merge it into the weights"),
    "streamingllm": ("false", "Star Attention has anchors instead: use disable"),
    "norm_quant_fusion": ("false", "use disable"),
    "manage_weights": ("false", "the engine holds its weights: use disable"),
    "fast_build": ("false", "it turns on manage_weights: leave it away"),
    "strip_plan": ("false", "the engine holds its weights: leave it away"),
    "logits_dtype": ("false float32", "logits are float32: use float32"),
    "gather_context_logits": ("false", _WANTED_ROWS),
    "gather_all_token_logits": ("false", _WANTED_ROWS),
}


def check_version(version: str) -> None:
    """Raises UserError for releases that have no engine backend, or another one."""
    if not re.match(r"1\.[0-2](\.|$)", version):
        raise UserError(
            f"TensorRT-LLM {version} is installed: use 1.0 to 1.2, or star-attn build, which needs "
            "none (newer ones have no trtllm-build)"
        )


def check_flags(flags: Mapping[str, Any]) -> None:
    """Raises UserError for the first flag whose value Star Attention cannot serve."""
    _check(flags, _FLAGS, "--")


def check_model(pretrained: Mapping[str, Any]) -> ModelConfig:
    """The model of a checkpoint's config.json, if Star Attention can serve it.

    Raises:
        UserError: it cannot.
    """
    architecture = pretrained.get("architecture")
    if architecture not in MODEL_CLASSES:
        raise UserError(
            f"the checkpoint's architecture is {architecture}: use {' or '.join(MODEL_CLASSES)}"
        )
    for fields in (pretrained, pretrained.get("mapping"), pretrained.get("quantization")):
        _check(fields or {}, _CHECKPOINT, "the checkpoint's ")
    names = {
        "head_dim": "head_size",
        "rms_norm_eps": "norm_epsilon",
        "rope_theta": "rotary_base",
        "rope_scaling": "rotary_scaling",
    }
    same = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    same += ("num_key_value_heads", "vocab_size", "max_position_embeddings", "hidden_act")
    names |= {name: name for name in same}
    known = {name: pretrained[theirs] for name, theirs in names.items() if theirs in pretrained}
    model = ModelConfig.from_hf({"architectures": [architecture], **known})
    if model.rope.scaling not in _SCALINGS or model.longest_text is not None:
        kind = pretrained["rotary_scaling"]
        raise UserError(f"the checkpoint's rotary_scaling is {kind}: use {', '.join(_SCALINGS)}")
    return model


def limits_of(build: Mapping[str, Any], star: Mapping[str, Any]) -> EngineLimits:
    """What an engine can run that trtllm-build makes with `build`. max_input_len counts for nothing
    there, nor here.

    Raises:
        UserError: they do not fit together.
    """
    names = ("max_batch_size", "max_seq_len", "max_num_tokens", "tokens_per_block")
    return EngineLimits(
        **{name: build[name] for name in names},
        max_input_len=build["max_seq_len"] - 1,
        **{name: star.get(name) for name in SETTINGS},
    )


def _check(values: Mapping[str, Any], rules: Mapping[str, tuple[str, str]], prefix: str) -> None:
    for name, (allowed, advice) in rules.items():
        # An enum, a word of the command line, or JSON.
        value = getattr(values.get(name), "name", values.get(name))
        words = {"enable": "true", "disable": "false", "none": "false"}
        plain = words.get(str(value).lower(), str(value).lower())
        if name in values and plain not in allowed.split():
            raise UserError(f"{prefix}{name} is {value}: {advice}")
