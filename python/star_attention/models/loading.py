"""Weights as tensors: from a checkpoint, or random ones."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from star_attention.models.config import ModelConfig
from star_attention.models.weights import (
    Checkpoint,
    ModelWeights,
    Weight,
    assemble,
)


def load_weights(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    part: int = 0,
    parts: int = 1,
) -> ModelWeights[torch.Tensor]:
    """Reads and fuses a checkpoint's weights, or one of `parts` GPUs' part of them.

    Raises:
        UserError: one cannot be read, or they cannot be divided so.
    """
    return _load(
        checkpoint.config,
        checkpoint.tensor,
        dtype,
        device,
        part,
        parts,
    )


def random_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    part: int = 0,
    parts: int = 1,
) -> ModelWeights[torch.Tensor]:
    """Weights of a model that was never trained, to try speed and memory.

    Each is drawn whole from a generator that its name seeds, so that the parts of several GPUs are
    those of one model. Raises UserError if it cannot be divided so.
    """
    return _load(
        config, lambda weight: _random_weight(weight, dtype, device), dtype, device, part, parts
    )


def random_checkpoint(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Checkpoint:
    """The model of `random_weights`, weight by weight, drawn on `device` and kept on the CPU."""
    return Checkpoint(
        Path("random weights"),
        config,
        lambda weight: _random_weight(weight, dtype, device).cpu(),
    )


def _random_weight(weight: Weight, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if weight.name.endswith("norm.weight"):
        return torch.ones(weight.shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(weight.name.encode()))
    values = torch.randn(weight.shape, generator=generator, dtype=dtype, device=device)
    return values.mul_(weight.shape[-1] ** -0.5)


def _load(
    config: ModelConfig,
    read: Callable[[Weight], torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
    part: int,
    parts: int,
) -> ModelWeights[torch.Tensor]:
    config.shard(parts)  # raises if it is not possible

    def take(weight: Weight) -> torch.Tensor:
        whole = read(weight)
        if weight.split is not None and parts > 1:
            return whole.chunk(parts, weight.split)[part]
        return whole

    def part_shape(weight: Weight) -> tuple[int, ...]:
        shape = enumerate(weight.shape)
        return tuple(size // parts if dim == weight.split else size for dim, size in shape)

    def make(weights: Sequence[Weight]) -> torch.Tensor:
        """One that is stored as it is wanted stays in the file's memory; others are copied, a
        stored one at a time."""
        if len(weights) == 1:
            return take(weights[0]).to(device=device, dtype=dtype).contiguous()
        shapes = [part_shape(weight) for weight in weights]
        rows = [shape[0] for shape in shapes]
        made = torch.empty(sum(rows), *shapes[0][1:], dtype=dtype, device=device)
        for weight, place in zip(weights, made.split(rows), strict=True):
            place.copy_(take(weight))
        return made

    return assemble(config, make, lambda embedding: embedding.chunk(parts)[part])
