"""The shape of a model, from Hugging Face's config or ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from star_attention.errors import UserError

# Hugging Face architecture -> whether its QKV projection has a bias.
ARCHITECTURES = {
    "LlamaForCausalLM": False,
    "MistralForCausalLM": False,
    "Qwen2ForCausalLM": True,
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
        if self.num_q_heads % self.num_kv_heads:
            raise UserError(
                f"the model has {self.num_q_heads} query heads, "
                f"which its {self.num_kv_heads} KV heads do not divide"
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
    def from_hf(cls, config: dict[str, Any]) -> ModelConfig:
        """Reads a Hugging Face `config.json`. Raises UserError for what is not supported."""
        architecture = (config.get("architectures") or ["(none)"])[0]
        if architecture not in ARCHITECTURES:
            raise UserError(
                f"architecture {architecture} is not supported: use {', '.join(ARCHITECTURES)}"
            )
        if config.get("hidden_act", "silu") != "silu":
            raise UserError(f"hidden_act {config['hidden_act']!r} is not supported: use silu")
        for flag in ("attention_bias", "mlp_bias"):
            if config.get(flag):
                raise UserError(f"{flag} is not supported for {architecture}")
        max_position = _need(config, "max_position_embeddings")
        window = config.get("sliding_window")
        windowed = architecture == "MistralForCausalLM" or config.get("use_sliding_window")
        if windowed and window is not None and window < max_position:
            raise UserError(f"sliding_window {window} is not supported: use a model without one")
        num_q_heads = _need(config, "num_attention_heads")
        hidden_size = _need(config, "hidden_size")
        eos = config.get("eos_token_id")
        return cls(
            num_layers=_need(config, "num_hidden_layers"),
            hidden_size=hidden_size,
            intermediate_size=_need(config, "intermediate_size"),
            num_q_heads=num_q_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_q_heads,
            head_dim=config.get("head_dim") or hidden_size // num_q_heads,
            vocab_size=_need(config, "vocab_size"),
            max_position=max_position,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=_rope_from_hf(config),
            qkv_bias=ARCHITECTURES[architecture],
            tie_embeddings=config.get("tie_word_embeddings", False),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )


def _need(config: dict[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise UserError(f"the model's config.json lacks {key!r}")
    return config[key]


def _rope_from_hf(config: dict[str, Any]) -> RopeConfig:
    # transformers 5 writes "rope_parameters", which includes theta; 4 wrote the two fields apart.
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta") or config.get("rope_theta", 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", factor=_need(scaling, "factor"))
    if kind == "llama3":
        return RopeConfig(
            theta,
            "llama3",
            factor=_need(scaling, "factor"),
            low_freq_factor=_need(scaling, "low_freq_factor"),
            high_freq_factor=_need(scaling, "high_freq_factor"),
            original_max_position=_need(scaling, "original_max_position_embeddings"),
        )
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
