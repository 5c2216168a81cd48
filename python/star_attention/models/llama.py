"""The Llama-family decoder: its weights, fused as it computes with them, and its rotary table."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from star_attention.errors import UserError
from star_attention.models.checkpoint import Checkpoint
from star_attention.models.config import ModelConfig, RopeConfig


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
    """All weights; `lm_head` is `embedding` itself, or rows of it, where the model ties them."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    lm_head: torch.Tensor


def load_weights(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    part: int = 0,
    parts: int = 1,
) -> LlamaWeights:
    """Reads and fuses a checkpoint's weights, or one of `parts` GPUs' part of them.

    Raises:
        UserError: a weight is missing, has not the shape that the config asks for, or cannot be
            divided so.
    """

    def read(name: str, *shape: int) -> torch.Tensor:
        weight = checkpoint.tensor(name)
        if weight.shape != shape:
            raise UserError(
                f"{checkpoint.path}: {name} has shape {list(weight.shape)}, "
                f"the config asks for {list(shape)}"
            )
        return weight

    return _assemble(checkpoint.config, read, dtype, device, part, parts)


def random_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    part: int = 0,
    parts: int = 1,
) -> LlamaWeights:
    """Weights for benchmarks and tests: normal with deviation 1/sqrt(in), norms of one; the same
    numbers whatever part of them is asked for."""

    def draw(name: str, *shape: int) -> torch.Tensor:
        return _random_weight(name, shape, dtype, device)

    return _assemble(config, draw, dtype, device, part, parts)


def random_checkpoint(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Checkpoint:
    """A checkpoint, on no disk, of the numbers that `random_weights` gives."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, *shape: int) -> torch.Tensor:
        shapes[name] = shape
        return torch.empty(shape, device="meta")

    _assemble(config, note, dtype, torch.device("meta"), 0, 1)
    return Checkpoint(
        Path("random weights"),
        config,
        lambda name: _random_weight(name, shapes[name], dtype, device).cpu(),
    )


def _random_weight(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    weight = torch.randn(shape, generator=generator, dtype=dtype, device=device)
    return weight.mul_(shape[-1] ** -0.5)


def _assemble(
    config: ModelConfig,
    read: Callable[..., torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
    part: int,
    parts: int,
) -> LlamaWeights:
    """All weights, fused, from `read(Hugging Face's name, *whole shape)`. Of the projections that
    open attention and MLP, and of lm_head, a part has some of the rows, of those that close them
    some of the columns."""
    config.shard(parts)  # raises if it is not possible
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows = config.num_q_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim

    def take(name: str, *shape: int, divide: int | None = None) -> torch.Tensor:
        weight = read(name, *shape)
        if divide is not None and parts > 1:
            weight = weight.chunk(parts, divide)[part]
        return weight.to(device=device, dtype=dtype).contiguous()

    def layer(index: int) -> LayerWeights:
        prefix = f"model.layers.{index}."
        projections = (("q", q_rows), ("k", kv_rows), ("v", kv_rows))
        attention = prefix + "self_attn."

        def projected(kind: str, *shape: int) -> torch.Tensor:
            return torch.cat(
                [
                    take(f"{attention}{name}_proj.{kind}", rows, *shape, divide=0)
                    for name, rows in projections
                ]
            )

        return LayerWeights(
            input_norm=take(prefix + "input_layernorm.weight", hidden),
            qkv=projected("weight", hidden),
            qkv_bias=projected("bias") if config.qkv_bias else None,
            out=take(attention + "o_proj.weight", hidden, q_rows, divide=1),
            post_norm=take(prefix + "post_attention_layernorm.weight", hidden),
            gate_up=torch.cat(
                [
                    take(f"{prefix}mlp.{name}_proj.weight", inner, hidden, divide=0)
                    for name in ("gate", "up")
                ]
            ),
            down=take(prefix + "mlp.down_proj.weight", hidden, inner, divide=1),
        )

    vocabulary = config.vocab_size, hidden
    embedding = take("model.embed_tokens.weight", *vocabulary)
    if not config.tie_embeddings:
        lm_head = take("lm_head.weight", *vocabulary, divide=0)
    else:
        lm_head = embedding.chunk(parts)[part]
    return LlamaWeights(
        embedding=embedding,
        layers=tuple(layer(index) for index in range(config.num_layers)),
        norm=take("model.norm.weight", hidden),
        lm_head=lm_head,
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
