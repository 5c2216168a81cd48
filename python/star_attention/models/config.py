"""The shape of a model, from Hugging Face's config or ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from star_attention.errors import UserError
from star_attention.models.fields import Fields
from star_attention.models.quantization import fp8_format
from star_attention.models.rope import RopeConfig, RopeDefaults, rope_from_hf, window_rope_from_hf

MOST_LAYERS, _MOST_HEAD_DIM, _MOST_EXPERTS = 4096, 4096, 4096


@dataclass(frozen=True)
class Architecture:
    """What Hugging Face's class of a model is, and means by a config that leaves something out.

    Attributes:
        biases: fields of the config that ask for biases.
        kv_heads: without `num_key_value_heads`; None: as many as query heads.
        head_dim: without `head_dim`; None: hidden size over heads.
        windows: whether `sliding_window` counts: never, in all layers, in those that `layer_types`
            says, or with `use_sliding_window` only, in all layers or in those that `layer_types`
            says, without it from `max_window_layers` on.
        window: without `sliding_window`; None: every token sees all before it.
        full_every: without `layer_types`, every so many layers have no window; None: all have one.
        reads_pattern: `sliding_window_pattern` says so too.
        is_gemma: Gemma's layers: norms also behind attention and MLP, whose weights files have less
            one; embeddings times the root of their size; GELU; a scale of scores of its own; tied
            embeddings if nothing is said.
        score_cap, logit_cap: without `attn_logit_softcapping`, `final_logit_softcapping`; 0: there
            is no such field, None: no cap.
        is_fused: Q, K and V are one tensor of a checkpoint, gate and up another.
    """

    qkv_bias: bool = False
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    kv_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    windows: Literal["never", "always", "by layer", "if used", "in later layers"] = "never"
    window: int | None = 4096
    full_every: int | None = None
    reads_pattern: bool = False
    is_gemma: bool = False
    score_cap: float | None = 0
    logit_cap: float | None = 0
    has_experts: bool = False
    is_fused: bool = False
    rope: RopeDefaults = field(default_factory=RopeDefaults)


_MISTRAL = Architecture(kv_heads=8, windows="always")
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(biases=("attention_bias", "mlp_bias")),
    "MistralForCausalLM": _MISTRAL,
    "MinistralForCausalLM": replace(_MISTRAL, windows="by layer"),
    "Qwen2ForCausalLM": Architecture(qkv_bias=True, kv_heads=32, windows="in later layers"),
    "Qwen3ForCausalLM": Architecture(
        biases=("attention_bias",),
        qk_norm=True,
        kv_heads=32,
        head_dim=128,
        windows="in later layers",
    ),
    "Qwen3MoeForCausalLM": Architecture(
        biases=("attention_bias",), qk_norm=True, kv_heads=4, windows="if used", has_experts=True
    ),
    "Phi3ForCausalLM": Architecture(
        rms_norm_eps=1e-5,
        windows="always",
        window=None,
        is_fused=True,
        rope=RopeDefaults(
            is_partial=True,
            original_max_position=4096,
            aliases={"su": "longrope", "yarn": "longrope"},
        ),
    ),
    "Gemma2ForCausalLM": Architecture(
        kv_heads=4,
        head_dim=256,
        windows="by layer",
        full_every=2,
        is_gemma=True,
        score_cap=50.0,
        logit_cap=30.0,
    ),
    "Gemma3ForCausalLM": Architecture(
        qk_norm=True,
        kv_heads=4,
        head_dim=256,
        windows="by layer",
        full_every=6,
        reads_pattern=True,
        is_gemma=True,
        logit_cap=None,
        rope=RopeDefaults(theta=1e6, local_theta=10000.0),
    ),
}


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts instead of one MLP.

    Attributes:
        count: experts of a layer.
        per_token: those that a token goes through, the ones of its largest router probabilities.
        intermediate_size: of an expert.
        normalises: whether the probabilities of a token's experts are made to add up to one.
    """

    count: int
    per_token: int
    intermediate_size: int
    normalises: bool


@dataclass(frozen=True)
class LayerConfig:
    """What a layer has besides the sizes that all of them share.

    Attributes:
        out_bias: of the projection behind attention.
        qk_norm: each head of Q and K is normalised before it is rotated.
        experts: None: one MLP, with biases if `mlp_bias`.
        output_norms: as the model's `has_output_norms`.
    """

    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    experts: ExpertsConfig | None = None
    output_norms: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-family decoder. Names are Hugging Face's where they exist.

    The fields are the model's; `layers` says what follows from them for each layer.

    Attributes:
        is_fused: how checkpoints store projections, as in `Architecture`.
        experts: of all layers but `dense_layers`.
        longest_text: tokens of context, question and answer with which the model computes what it
            was made for; longer texts are refused. None: any number, with answers that may get
            worse beyond `max_position`.
        window: tokens that a row of `windowed_layers` sees, itself and those before it. Where it
            limits no text up to `max_position`, it is `longest_text` instead.
        window_rope: the rotary embedding of these layers; None: that of the others.
        activation: of the gates of MLPs.
        embedding_scale: factor of the embeddings of a text, not of `lm_head`.
        score_scale: factor of q·k; None: head_dim ** -0.5.
        score_cap, logit_cap: scores of attention, and logits, x become cap * tanh(x / cap).
        has_output_norms: what attention and MLPs give is normalised before it is added.
        norms_less_one: Hugging Face's files have the weights of norms less one.
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
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    is_fused: bool = False
    experts: ExpertsConfig | None = None
    dense_layers: tuple[int, ...] = ()
    longest_text: int | None = None
    window: int | None = None
    windowed_layers: tuple[int, ...] = ()
    window_rope: RopeConfig | None = None
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_scale: float = 1.0
    score_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    has_output_norms: bool = False
    norms_less_one: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `dataclasses.asdict`, also behind JSON.

        Raises:
            KeyError, TypeError: a value is missing, or one is not ours.
        """

        def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}

        experts, window_rope = values.get("experts"), values.get("window_rope")
        parts = {
            "rope": RopeConfig(**tuples(values["rope"])),
            "window_rope": RopeConfig(**tuples(window_rope)) if window_rope else None,
            "experts": ExpertsConfig(**experts) if experts else None,
        }
        return cls(**{**tuples(values), **parts})

    def __post_init__(self) -> None:
        if self.num_layers > MOST_LAYERS:
            raise UserError(f"the model has {self.num_layers} layers: use at most {MOST_LAYERS}")
        if self.head_dim % 2 or not 0 < self.head_dim <= _MOST_HEAD_DIM:
            raise UserError(
                f"the model's head_dim is {self.head_dim}: use an even one up to {_MOST_HEAD_DIM}"
            )
        if self.num_q_heads % self.num_kv_heads:
            raise UserError(
                f"the model has {self.num_q_heads} query heads, "
                f"which its {self.num_kv_heads} KV heads do not divide"
            )
        if self.experts and self.experts.count > _MOST_EXPERTS:
            raise UserError(
                f"the model has {self.experts.count} experts: use at most {_MOST_EXPERTS}"
            )
        if self.experts and self.experts.per_token > self.experts.count:
            raise UserError(
                f"a token goes through {self.experts.per_token} experts, "
                f"of which the model has {self.experts.count}"
            )

    def check_length(self, tokens: int) -> None:
        """Raises UserError for more tokens of context, question and answer than `longest_text`."""
        if self.longest_text is not None and tokens > self.longest_text:
            raise UserError(
                f"context, question and answer have {tokens} tokens: beyond {self.longest_text} "
                "the model has a sliding window, or a rotary embedding that depends on the text's "
                "length, which is not supported: use a shorter text"
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
        sparse = LayerConfig(
            self.qkv_bias,
            self.out_bias,
            self.mlp_bias,
            self.qk_norm,
            self.experts,
            self.has_output_norms,
        )
        dense = replace(sparse, experts=None)
        return tuple(dense if i in self.dense_layers else sparse for i in range(self.num_layers))

    def kv_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of the KV of `tokens` tokens in all layers, in elements of `itemsize` bytes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * tokens * itemsize

    def kept_kv_bytes(self, tokens_per_block: int) -> int:
        """Bytes of a page of 8 bits in all layers, with float32 scales of K and V of each head."""
        return self.kv_bytes(tokens_per_block, 1) + 2 * self.num_layers * self.num_kv_heads * 4

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
        part = {name: _part_of(name, getattr(self, name), parts) for name in divided}
        if self.experts:
            inner = _part_of("experts' size", self.experts.intermediate_size, parts)
            part["experts"] = replace(self.experts, intermediate_size=inner)
        return replace(self, **part)

    @property
    def gemm_flops_per_token(self) -> int:
        """FLOPs of all projections of one token, without embedding and lm_head."""
        qkv = self.hidden_size * (self.num_q_heads + 2 * self.num_kv_heads) * self.head_dim
        out = self.num_q_heads * self.head_dim * self.hidden_size
        inner = sum(
            each.experts.per_token * each.experts.intermediate_size
            if each.experts
            else self.intermediate_size
            for each in self.layers
        )
        return 2 * (self.num_layers * (qkv + out) + 3 * self.hidden_size * inner)

    @property
    def attention_flops_per_pair(self) -> int:
        """FLOPs of one (query token, key token) pair over all layers without a window."""
        layers = self.num_layers - len(self.windowed_layers)
        return 4 * layers * self.num_q_heads * self.head_dim

    @property
    def window_flops_per_token(self) -> int:
        """FLOPs of one token's attention in the layers with a window."""
        pairs = len(self.windowed_layers) * (self.window or 0)
        return 4 * pairs * self.num_q_heads * self.head_dim

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5 if self.score_scale is None else self.score_scale

    def check_no_gemma(self, where: str) -> None:
        """Raises UserError for Gemma's layers, which `where` does not compute."""
        if self.has_output_norms:
            raise UserError(f"Gemma is not supported {where}")

    def check_no_window(self, where: str) -> None:
        """Raises UserError for a model with sliding windows, which `where` does not compute."""
        if self.window is not None:
            raise UserError(
                f"the model's sliding window of {self.window} tokens is not supported {where}"
            )

    def check_kv_dtype(self, kv_dtype: str) -> None:
        """Raises UserError if the model's KV cannot be kept so."""
        if kv_dtype == "auto":
            return
        self.check_no_gemma(f"with --kv-dtype {kv_dtype}: use auto")
        self.check_no_window(f"with --kv-dtype {kv_dtype}: use auto")

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
            fp8_format(fields.fields("quantization_config"))  # raises for what is not read
        _check_activation(fields, architecture)
        if architecture.is_gemma and fields.flag("use_bidirectional_attention"):
            raise UserError("use_bidirectional_attention is not supported: use false")
        for flag in ("attention_bias", "mlp_bias"):
            if fields.flag(flag) and flag not in architecture.biases:
                raise UserError(f"{flag} is not supported for {name}")
        max_position = fields.whole("max_position_embeddings")
        num_layers = fields.whole("num_hidden_layers")
        num_q_heads = fields.whole("num_attention_heads")
        hidden_size = fields.whole("hidden_size")
        kv_heads = architecture.kv_heads if "num_key_value_heads" not in fields else None
        head_dim = fields.whole("head_dim", architecture.head_dim or hidden_size // num_q_heads)
        rope, longest = rope_from_hf(fields, architecture.rope, head_dim, max_position)
        window_rope = window_rope_from_hf(fields, architecture.rope, head_dim, max_position)
        experts, dense_layers = _experts(fields, architecture, num_layers)
        window, windowed_layers = _window(fields, architecture, num_layers)
        lengths = [longest]
        if window is not None and window >= max_position:
            lengths.append(window)
            window, windowed_layers = None, ()
        return cls(
            num_layers=num_layers,
            hidden_size=hidden_size,
            intermediate_size=fields.whole("intermediate_size"),
            num_q_heads=num_q_heads,
            num_kv_heads=fields.whole("num_key_value_heads", kv_heads or num_q_heads),
            head_dim=head_dim,
            vocab_size=fields.whole("vocab_size"),
            max_position=max_position,
            rms_norm_eps=fields.number("rms_norm_eps", architecture.rms_norm_eps),
            rope=rope,
            qkv_bias=architecture.qkv_bias or fields.flag("attention_bias"),
            tie_embeddings=(
                architecture.is_gemma
                if "tie_word_embeddings" not in fields
                else fields.flag("tie_word_embeddings")
            ),
            eos_token_ids=fields.tokens("eos_token_id"),
            out_bias=fields.flag("attention_bias"),
            mlp_bias=fields.flag("mlp_bias"),
            qk_norm=architecture.qk_norm,
            is_fused=architecture.is_fused,
            experts=experts,
            dense_layers=dense_layers,
            longest_text=min((each for each in lengths if each), default=None),
            window=window,
            windowed_layers=windowed_layers,
            window_rope=window_rope,
            **(_gemma(fields, architecture, hidden_size) if architecture.is_gemma else {}),
        )


def _check_activation(fields: Fields, architecture: Architecture) -> None:
    name, known = "hidden_act", "silu"
    if architecture.is_gemma:
        name, known = "hidden_activation", "gelu_pytorch_tanh"
    if (activation := fields.word(name, known)) != known:
        raise UserError(f"{name} {activation!r} is not supported: use {known}")


def _gemma(fields: Fields, architecture: Architecture, hidden_size: int) -> dict[str, Any]:
    def cap(name: str, default: float | None) -> float | None:
        if default == 0 or (fields.get(name) is None and (default is None or name in fields)):
            return None
        return fields.number(name, default)

    return {
        "activation": "gelu_tanh",
        "embedding_scale": hidden_size**0.5,
        "score_scale": fields.number("query_pre_attn_scalar", 256) ** -0.5,
        "score_cap": cap("attn_logit_softcapping", architecture.score_cap),
        "logit_cap": cap("final_logit_softcapping", architecture.logit_cap),
        "has_output_norms": True,
        "norms_less_one": True,
    }


def _part_of(name: str, size: int, parts: int) -> int:
    if size % parts:
        raise UserError(f"--tp is {parts}, which does not divide the model's {name}, {size}")
    return size // parts


def _experts(
    fields: Fields, architecture: Architecture, num_layers: int
) -> tuple[ExpertsConfig | None, tuple[int, ...]]:
    """The experts of the layers that have some, and the layers that have none."""
    if not architecture.has_experts:
        return None, ()
    experts = ExpertsConfig(
        fields.whole("num_experts", fields.whole("num_local_experts", 128)),
        fields.whole("num_experts_per_tok", 8),
        fields.whole("moe_intermediate_size", 768),
        fields.flag("norm_topk_prob"),
    )
    step, dense = fields.whole("decoder_sparse_step", 1), fields.tokens("mlp_only_layers")
    layers = range(min(num_layers, MOST_LAYERS))
    return experts, tuple(i for i in layers if i in dense or (i + 1) % step)


def _window(
    fields: Fields, architecture: Architecture, num_layers: int
) -> tuple[int | None, tuple[int, ...]]:
    """How many tokens a row of some layers sees, and these layers; None: there are none."""
    layers = range(min(num_layers, MOST_LAYERS))
    kinds = fields.get("layer_types")
    known = ["full_attention"]
    if architecture.windows != "never":
        known.append("sliding_attention")
    is_list = isinstance(kinds, Sequence) and len(kinds) == num_layers
    if kinds is not None and not (is_list and all(kind in known for kind in kinds)):
        raise UserError(
            f"the model's config.json: layer_types should be a list of {num_layers} of "
            f"{' and '.join(known)}"
        )
    by_layer = kinds is not None and architecture.windows in ("by layer", "in later layers")
    if by_layer:
        windowed = tuple(i for i in layers if kinds[i] == "sliding_attention")
    elif architecture.windows == "in later layers":
        windowed = tuple(layers[fields.whole("max_window_layers", 28, 0) :])
    elif (every := architecture.full_every) is not None:
        if architecture.reads_pattern:
            every = fields.whole("sliding_window_pattern", every)
        windowed = tuple(i for i in layers if (i + 1) % every)
    else:
        windowed = tuple(layers)
    used = architecture.windows in ("always", "by layer")
    if architecture.windows in ("if used", "in later layers"):
        used = fields.flag("use_sliding_window")
    is_null = fields.get("sliding_window") is None
    is_none = is_null and ("sliding_window" in fields or architecture.window is None)
    if used and windowed and not is_none:
        return fields.whole("sliding_window", architecture.window), windowed
    if by_layer and windowed:
        raise UserError(
            "the model's config.json: layer_types has sliding_attention, but no window is used"
        )
    return None, ()


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
