"""A GGUF file's header as `ModelConfig`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from star_attention.errors import UserError
from star_attention.models.config import MOST_LAYERS, ExpertsConfig, ModelConfig
from star_attention.models.fields import Fields
from star_attention.models.rope import RopeConfig, yarn_attention_factor

_FACTORS = "rope_freqs.weight"
_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"
# Tensors that describe the rotary embedding.
ROPE_FACTORS = (_FACTORS, _SHORT, _LONG)
# llama.cpp ends an answer at each of them.
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# What changes a model in ways that the decoder does not know, and the value without effect.
_UNKNOWN = {
    "attention.scale": 0,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "embedding_scale": 1,
    "residual_scale": 1,
    "logit_scale": 1,
    "rope.scale_linear": 1,
    "rope.scaling.alpha": 0,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
    "expert_shared_count": 0,
    "expert_weights_scale": 1,
    "expert_gating_func": 1,  # softmax
    "expert_group_count": 1,
    "leading_dense_block_count": 0,
}


_CAPS = "attn_logit_softcapping", "final_logit_softcapping"


@dataclass(frozen=True)
class _Architecture:
    """What llama.cpp computes for an architecture.

    Attributes:
        qkv_bias: the file must have it; otherwise biases are those that it has.
        is_fused: Q, K and V are one tensor, gate and up another.
        is_partial: heads may be rotated in part.
        has_window: `attention.sliding_window` counts.
        window: what it is if the file does not say.
        full_every: every so many layers have none; None: all have one.
        is_gemma: as in Hugging Face's `Architecture`.
        score_cap, logit_cap: without `attn_logit_softcapping`, `final_logit_softcapping`; 0: none.
        window_theta: of the rotary embedding of layers with a window, if the file does not say;
            None: it is that of the others.
        scaled_by_width: so many layers have scores scaled by the root of the hidden size over the
            heads, instead of a head's size.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    has_experts: bool = False
    is_fused: bool = False
    is_partial: bool = False
    has_window: bool = False
    window: int = 0
    full_every: int | None = None
    is_gemma: bool = False
    score_cap: float = 0.0
    logit_cap: float = 0.0
    window_theta: float | None = None
    scaled_by_width: int | None = None


ARCHITECTURES = {
    "llama": _Architecture(has_window=True),
    "qwen2": _Architecture(qkv_bias=True),
    "qwen3": _Architecture(qk_norm=True),
    "qwen3moe": _Architecture(qk_norm=True, has_experts=True),
    "phi3": _Architecture(is_fused=True, is_partial=True, has_window=True),
    "gemma2": _Architecture(
        has_window=True,
        window=4096,
        full_every=2,
        is_gemma=True,
        score_cap=50.0,
        logit_cap=30.0,
        scaled_by_width=46,
    ),
    "gemma3": _Architecture(
        qk_norm=True,
        has_window=True,
        full_every=6,
        is_gemma=True,
        window_theta=10000.0,
        scaled_by_width=62,
    ),
}


def read_config(
    path: Path,
    header: Fields,
    tensors: Mapping[str, Any],
    numbers: Callable[[str], list[float]],
) -> ModelConfig:
    """The shape of the model.

    Args:
        tensors: of all files, by name.
        numbers: reads one of them.

    Raises:
        UserError: the model is not supported, or a value is missing or wrong.
    """
    name = header.word("general.architecture", "(none)")
    if name not in ARCHITECTURES:
        shown = name if name.isidentifier() else repr(name)
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"GGUF architecture {shown} is not supported: use {known}")
    architecture = ARCHITECTURES[name]

    def key(field: str) -> str:
        return f"{name}.{field}"

    refused = _UNKNOWN if architecture.has_experts else {"expert_count": 0, **_UNKNOWN}
    if architecture.is_gemma:
        refused = {field: neutral for field, neutral in refused.items() if field not in _CAPS}
        refused["attention.sliding_window_pattern"] = architecture.full_every
    for field, neutral in refused.items():
        if header.get(key(field)) not in (None, 0, neutral):
            raise UserError(f"{path}: {key(field)} is {header.get(key(field))!r}: not supported")
    max_position = header.whole(key("context_length"))
    window = header.whole(key("attention.sliding_window"), architecture.window, 0)
    limits = 0 < window < max_position
    if limits and not architecture.has_window:
        raise UserError(f"{path}: attention.sliding_window {window} is not supported")
    num_q_heads = header.whole(key("attention.head_count"))
    hidden_size = header.whole(key("embedding_length"))
    head_dim = header.whole(key("attention.key_length"), hidden_size // num_q_heads)
    rotated = header.whole(key("rope.dimension_count"), head_dim)
    is_partial = architecture.is_partial and rotated < head_dim and rotated % 2 == 0
    for field in ("attention.value_length", *(() if is_partial else ("rope.dimension_count",))):
        if header.whole(key(field), head_dim) != head_dim:
            raise UserError(f"{path}: {key(field)} is {header.get(key(field))}: use {head_dim}")
    ends = (header.tokens(f"tokenizer.ggml.{field}") for field in _ENDS)
    vocabulary = tensors.get("token_embd.weight")
    if vocabulary is None:
        raise UserError(f"{path}: the weights lack token_embd.weight")
    experts = None
    if architecture.has_experts:
        counts = (header.whole(key(field)) for field in ("expert_count", "expert_used_count"))
        inner = header.whole(key("expert_feed_forward_length"))
        experts = ExpertsConfig(*counts, inner, normalises=True)
    num_layers = header.whole(key("block_count"))
    options: dict[str, Any] = {}
    if architecture.is_gemma:
        by_width = num_layers == architecture.scaled_by_width
        size = hidden_size // num_q_heads if by_width else head_dim
        options = _gemma(header, name, architecture, size)
    if architecture.window_theta is not None:
        theta = header.number(key("rope.freq_base_swa"), architecture.window_theta)
        options["window_rope"] = RopeConfig(theta)
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=header.whole(key("feed_forward_length")),
        num_q_heads=num_q_heads,
        num_kv_heads=header.whole(key("attention.head_count_kv"), num_q_heads),
        head_dim=head_dim,
        vocab_size=int(vocabulary.shape[-1]),
        max_position=max_position,
        rms_norm_eps=header.number(key("attention.layer_norm_rms_epsilon")),
        rope=_Rope(path, header, name, tensors, numbers).read(rotated, head_dim, max_position),
        qkv_bias=architecture.qkv_bias or "blk.0.attn_q.bias" in tensors,
        tie_embeddings="output.weight" not in tensors,
        eos_token_ids=tuple(dict.fromkeys(token for tokens in ends for token in tokens)),
        out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors,
        qk_norm=architecture.qk_norm,
        is_fused=architecture.is_fused,
        experts=experts,
        longest_text=None if limits else window or None,
        window=window if limits else None,
        windowed_layers=_windowed(architecture, num_layers) if limits else (),
        **options,
    )


def _windowed(architecture: _Architecture, num_layers: int) -> tuple[int, ...]:
    every, layers = architecture.full_every, range(min(num_layers, MOST_LAYERS))
    return tuple(i for i in layers if every is None or (i + 1) % every)


def _gemma(header: Fields, prefix: str, architecture: _Architecture, size: int) -> dict[str, Any]:
    """What its layers have besides. `size` is what scores are scaled by the root of."""

    def cap(name: str, default: float) -> float | None:
        is_capped = default or header.get(f"{prefix}.{name}")
        return header.number(f"{prefix}.{name}", default) if is_capped else None

    scores, logits = _CAPS
    return {
        "activation": "gelu_tanh",
        "embedding_scale": header.whole(f"{prefix}.embedding_length") ** 0.5,
        "score_scale": size**-0.5,
        "score_cap": cap(scores, architecture.score_cap),
        "logit_cap": cap(logits, architecture.logit_cap),
        "has_output_norms": True,
    }


class _Rope:
    """The rotary embedding of a file, from header and tensors."""

    def __init__(
        self,
        path: Path,
        header: Fields,
        architecture: str,
        tensors: Mapping[str, Any],
        numbers: Callable[[str], list[float]],
    ) -> None:
        self._path, self._header, self._prefix = path, header, f"{architecture}.rope"
        self._tensors, self._numbers = tensors, numbers

    def read(self, rotated: int, head_dim: int, max_position: int) -> RopeConfig:
        header, scaling = self._header, f"{self._prefix}.scaling"
        unnamed = "linear" if f"{scaling}.factor" in header else "none"
        kind = header.word(f"{scaling}.type", unnamed)
        original = header.whole(f"{scaling}.original_context_length", max_position)
        # llama.cpp multiplies what is rotated by it, whatever the scaling.
        attention_factor = header.number(f"{scaling}.attn_factor", 1.0)
        options = {
            "theta": header.number(f"{self._prefix}.freq_base", 10000.0),
            "rotated": None if rotated == head_dim else rotated,
            "attention_factor": attention_factor,
        }
        if _FACTORS in self._tensors:
            return RopeConfig(
                scaling="factors", factors=self._factors(_FACTORS, rotated), **options
            )
        if _SHORT in self._tensors or _LONG in self._tensors:
            return RopeConfig(
                scaling="longrope",
                factors=self._factors(_SHORT, rotated),
                long_factors=self._factors(_LONG, rotated),
                original_max_position=original,
                **options,
            )
        if kind == "none":
            return RopeConfig(**options)
        if kind not in ("linear", "yarn"):
            raise UserError(f"rope scaling {kind!r} is not supported: use none, linear or yarn")
        factor = header.number(f"{scaling}.factor")
        if kind == "linear":
            return RopeConfig(scaling="linear", factor=factor, **options)
        options["attention_factor"] = attention_factor * yarn_attention_factor(factor)
        return RopeConfig(
            scaling="yarn",
            factor=factor,
            original_max_position=original,
            beta_fast=header.number(f"{scaling}.yarn_beta_fast", 32.0),
            beta_slow=header.number(f"{scaling}.yarn_beta_slow", 1.0),
            **options,
        )

    def _factors(self, name: str, rotated: int) -> tuple[float, ...]:
        if name not in self._tensors:
            raise UserError(f"{self._path}: the weights lack {name}")
        values = self._numbers(name)
        if len(values) != rotated // 2 or not all(0 < value < math.inf for value in values):
            raise UserError(f"{self._path}: {name} are not {rotated // 2} positive numbers")
        return tuple(values)
