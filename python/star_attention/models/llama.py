"""The Llama-family decoder: its weights, fused as it computes with them, and its rotary table."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from star_attention.config import ModelConfig, RopeConfig
from star_attention.errors import UserError
from star_attention.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Projections are [out, in]; norms [hidden_size].

    Attributes:
        qkv: Q, K and V stacked, [(Hq + 2 Hkv) * D, hidden_size]; `qkv_bias` likewise, or None.
        gate_up: gate over up, [2 * intermediate_size, hidden_size].
    """

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class LlamaWeights:
    """All weights; `lm_head` is `embedding` itself where the model ties them."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    lm_head: torch.Tensor


def load_weights(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> LlamaWeights:
    """Reads and fuses a checkpoint's weights.

    Raises:
        UserError: a weight is missing or has not the shape that the config asks for.
    """
    config = checkpoint.config
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows = config.num_q_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim

    def read(name: str, *shape: int) -> torch.Tensor:
        weight = checkpoint.tensor(name)
        if weight.shape != shape:
            raise UserError(
                f"{checkpoint.path}: {name} has shape {list(weight.shape)}, "
                f"the config asks for {list(shape)}"
            )
        return weight.to(device=device, dtype=dtype)

    def layer(index: int) -> LayerWeights:
        prefix = f"model.layers.{index}."
        projections = (("q", q_rows), ("k", kv_rows), ("v", kv_rows))
        attention = prefix + "self_attn."
        qkv_bias = None
        if config.qkv_bias:
            qkv_bias = torch.cat([read(f"{attention}{p}_proj.bias", n) for p, n in projections])
        return LayerWeights(
            input_norm=read(prefix + "input_layernorm.weight", hidden),
            qkv=torch.cat([read(f"{attention}{p}_proj.weight", n, hidden) for p, n in projections]),
            qkv_bias=qkv_bias,
            out=read(attention + "o_proj.weight", hidden, q_rows),
            post_norm=read(prefix + "post_attention_layernorm.weight", hidden),
            gate_up=torch.cat(
                [read(f"{prefix}mlp.{p}_proj.weight", inner, hidden) for p in ("gate", "up")]
            ),
            down=read(prefix + "mlp.down_proj.weight", hidden, inner),
        )

    embedding = read("model.embed_tokens.weight", config.vocab_size, hidden)
    return LlamaWeights(
        embedding=embedding,
        layers=tuple(layer(index) for index in range(config.num_layers)),
        norm=read("model.norm.weight", hidden),
        lm_head=embedding
        if config.tie_embeddings
        else read("lm_head.weight", config.vocab_size, hidden),
    )


def random_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> LlamaWeights:
    """Weights for benchmarks and tests: normal with deviation 1/sqrt(in), norms of one."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        weight = torch.randn(*shape, generator=generator, dtype=dtype, device=device)
        return weight.mul_(shape[-1] ** -0.5)

    def ones() -> torch.Tensor:
        return torch.ones(config.hidden_size, dtype=dtype, device=device)

    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows = config.num_q_heads * config.head_dim
    qkv_rows = q_rows + 2 * config.num_kv_heads * config.head_dim
    embedding = normal(config.vocab_size, hidden)
    return LlamaWeights(
        embedding=embedding,
        layers=tuple(
            LayerWeights(
                input_norm=ones(),
                qkv=normal(qkv_rows, hidden),
                qkv_bias=normal(qkv_rows) if config.qkv_bias else None,
                out=normal(hidden, q_rows),
                post_norm=ones(),
                gate_up=normal(2 * inner, hidden),
                down=normal(hidden, inner),
            )
            for _ in range(config.num_layers)
        ),
        norm=ones(),
        lm_head=embedding if config.tie_embeddings else normal(config.vocab_size, hidden),
    )


def rotary_table(
    rope: RopeConfig, head_dim: int, positions: int, device: torch.device
) -> torch.Tensor:
    """float32 [positions, head_dim]: cosines, then sines, of every position's angles.

    Source: RoFormer, arXiv 2104.09864, section 3.4; the half-rotation layout of Hugging Face.
    """
    frequencies = rotary_frequencies(rope, head_dim).to(device)
    angles = torch.arange(positions, device=device, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotary_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """float32 [head_dim / 2], radians per position, scaled as the model asks."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "factors":
        return frequencies / torch.tensor(rope.factors)
    if rope.scaling == "llama3":
        # Waves longer than the original context are stretched, short ones kept, those between
        # blended by how many of them fit into it.
        waves = rope.original_max_position * frequencies / (2 * math.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        keep = ((waves - rope.low_freq_factor) / span).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / rope.factor)
    return frequencies
