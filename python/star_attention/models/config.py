"""The shape of a model, from Hugging Face's config or ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from star_attention.errors import UserError
from star_attention.models.fields import Fields

_MOST_LAYERS, _MOST_HEAD_DIM = 4096, 4096


@dataclass(frozen=True)
class Architecture:
    """What Hugging Face's class of a model means by a config that leaves something out.

    Attributes:
        kv_heads: without `num_key_value_heads`; None: as many as query heads.
        window: without `sliding_window`; None: every token sees all before it.
        window_is_optional: whether windows only count with `use_sliding_window`.
    """

    qkv_bias: bool = False
    kv_heads: int | None = None
    window: int | None = None
    window_is_optional: bool = True


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(),
    "MistralForCausalLM": Architecture(kv_heads=8, window=4096, window_is_optional=False),
    "Qwen2ForCausalLM": Architecture(qkv_bias=True, kv_heads=32, window=4096),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: `theta` and how its frequencies are scaled.

    `llama3` is Llama 3.1's scaling by wavelength; `factors` divides frequency i by `factors[i]`
    (GGUF files carry Llama 3.1's scaling in that form).
    """

    theta: float = 10000.0
    scaling: Literal["default", "linear", "llama3", "factors"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class LayerConfig:
    """What a layer has besides the sizes that all of them share."""

    qkv_bias: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-family decoder. Names are Hugging Face's where they exist.

    The fields are the model's; `layers` says what follows from them for each layer.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool = False
    tie_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `dataclasses.asdict`, also behind JSON.

        Raises:
            KeyError, TypeError: a value is missing, or one is not ours.
        """

        def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}

        return cls(**{**tuples(values), "rope": RopeConfig(**tuples(values["rope"]))})

    def __post_init__(self) -> None:
        if self.num_layers > _MOST_LAYERS:
            raise UserError(f"the model has {self.num_layers} layers: use at most {_MOST_LAYERS}")
        if self.head_dim % 2 or not 0 < self.head_dim <= _MOST_HEAD_DIM:
            raise UserError(
                f"the model's head_dim is {self.head_dim}: use an even one up to {_MOST_HEAD_DIM}"
            )
        if self.num_q_heads % self.num_kv_heads:
            raise UserError(
                f"the model has {self.num_q_heads} query heads, "
                f"which its {self.num_kv_heads} KV heads do not divide"
            )

    def check_tokens(self, token_ids: np.ndarray) -> None:
        """Raises UserError for a token, of int32 [n], that the model's vocabulary does not have."""
        largest = int(token_ids.max(initial=0))
        if largest >= self.vocab_size:
            raise UserError(
                f"the text has token {largest}, but the model knows {self.vocab_size} tokens: "
                "its tokenizer is another model's"
            )

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        return (LayerConfig(qkv_bias=self.qkv_bias),) * self.num_layers

    def kv_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of the KV of `tokens` tokens in all layers, in elements of `itemsize` bytes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * tokens * itemsize

    def kv_shape(self, num_pages: int, tokens_per_block: int) -> tuple[int, ...]:
        """Of the KV pool of all layers."""
        page = 2, self.num_kv_heads, tokens_per_block, self.head_dim
        return self.num_layers, num_pages, *page

    def shard(self, parts: int) -> ModelConfig:
        """What one of `parts` GPUs computes of every layer: its heads and its part of the MLP.

        Raises:
            UserError: the heads, the MLP or the vocabulary cannot be divided so.
        """
        divided = ("num_kv_heads", "num_q_heads", "intermediate_size", "vocab_size")
        for name in divided:
            if getattr(self, name) % parts:
                raise UserError(
                    f"--tp is {parts}, which does not divide the model's {name}, "
                    f"{getattr(self, name)}"
                )
        return replace(self, **{name: getattr(self, name) // parts for name in divided})

    @property
    def gemm_flops_per_token(self) -> int:
        """FLOPs of all projections of one token, without embedding and lm_head."""
        qkv = self.hidden_size * (self.num_q_heads + 2 * self.num_kv_heads) * self.head_dim
        out = self.num_q_heads * self.head_dim * self.hidden_size
        mlp = 3 * self.hidden_size * self.intermediate_size
        return 2 * self.num_layers * (qkv + out + mlp)

    @property
    def attention_flops_per_pair(self) -> int:
        """FLOPs of one (query token, key token) pair over all layers."""
        return 4 * self.num_layers * self.num_q_heads * self.head_dim

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Reads a Hugging Face `config.json`. Raises UserError for what is not supported."""
        fields = Fields(config, "the model's config.json")
        names = fields.get("architectures")
        name = names[0] if isinstance(names, list) and names else None
        if not isinstance(name, str) or name not in ARCHITECTURES:
            shown = name if isinstance(name, str) and name.isidentifier() else repr(name)
            raise UserError(
                f"architecture {shown} is not supported: use {', '.join(ARCHITECTURES)}"
            )
        architecture = ARCHITECTURES[name]
        if fields.get("quantization_config") is not None:
            quantization = fields.fields("quantization_config")
            method = quantization.word("quant_method", "unnamed method")
            raise UserError(
                f"the model's weights are quantised ({method!r}): use a safetensors folder in "
                "float32, bfloat16 or float16, or a GGUF file"
            )
        if (activation := fields.word("hidden_act", "silu")) != "silu":
            raise UserError(f"hidden_act {activation!r} is not supported: use silu")
        for flag in ("attention_bias", "mlp_bias"):
            if fields.flag(flag):
                raise UserError(f"{flag} is not supported for {name}")
        max_position = fields.whole("max_position_embeddings")
        _check_window(fields, architecture, max_position)
        num_q_heads = fields.whole("num_attention_heads")
        hidden_size = fields.whole("hidden_size")
        kv_heads = architecture.kv_heads if "num_key_value_heads" not in fields else None
        return cls(
            num_layers=fields.whole("num_hidden_layers"),
            hidden_size=hidden_size,
            intermediate_size=fields.whole("intermediate_size"),
            num_q_heads=num_q_heads,
            num_kv_heads=fields.whole("num_key_value_heads", kv_heads or num_q_heads),
            head_dim=fields.whole("head_dim", hidden_size // num_q_heads),
            vocab_size=fields.whole("vocab_size"),
            max_position=max_position,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=_rope_from_hf(fields),
            qkv_bias=architecture.qkv_bias,
            tie_embeddings=fields.flag("tie_word_embeddings"),
            eos_token_ids=fields.tokens("eos_token_id"),
        )


def _check_window(fields: Fields, architecture: Architecture, max_position: int) -> None:
    """Raises UserError if there are tokens that do not see all tokens before them."""
    layers, first = fields.whole("num_hidden_layers"), fields.whole("max_window_layers", 28, 0)
    is_used = fields.flag("use_sliding_window") and first < layers
    is_null = "sliding_window" in fields and fields.get("sliding_window") is None
    window = architecture.window
    if is_null or (architecture.window_is_optional and not is_used):
        window = None
    elif window is not None:
        window = fields.whole("sliding_window", window)
    kinds = fields.get("layer_types") or ()
    if not isinstance(kinds, Sequence) or any(kind != "full_attention" for kind in kinds):
        raise UserError("layer_types other than full_attention are not supported")
    if window is not None and window < max_position:
        said = "" if "sliding_window" in fields else ", the default of this architecture,"
        raise UserError(
            f"sliding_window {window}{said} is not supported: use a model without one "
            "(its config.json says null), or one whose max_position_embeddings it does not limit"
        )


def _rope_from_hf(fields: Fields) -> RopeConfig:
    # transformers 5 writes "rope_parameters", which includes theta; 4 wrote the two fields apart.
    scaling = fields.fields("rope_parameters" if fields.get("rope_parameters") else "rope_scaling")
    theta = scaling.number("rope_theta", fields.number("rope_theta", 10000.0))
    for each in (fields, scaling):
        if (share := each.number("partial_rotary_factor", 1.0)) != 1:
            raise UserError(f"partial_rotary_factor {share} is not supported: use 1")
    kind = scaling.word("rope_type", scaling.word("type", "default"))
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", factor=scaling.number("factor"))
    if kind == "llama3":
        low, high = (scaling.number(f"{name}_freq_factor") for name in ("low", "high"))
        if low >= high:
            raise UserError(f"low_freq_factor is {low}: use less than high_freq_factor, {high}")
        original = scaling.whole("original_max_position_embeddings")
        return RopeConfig(theta, "llama3", scaling.number("factor"), low, high, original)
    raise UserError(f"rope scaling {kind!r} is not supported: use default, linear or llama3")


LLAMA_3_1_8B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position=131072,
    rms_norm_eps=1e-5,
    rope=RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192),
    eos_token_ids=(128001, 128008, 128009),
)
LLAMA_3_1_70B = replace(
    LLAMA_3_1_8B, num_layers=80, hidden_size=8192, intermediate_size=28672, num_q_heads=64
)
SHAPES = {"llama-3.1-8b": LLAMA_3_1_8B, "llama-3.1-70b": LLAMA_3_1_70B}
