"""Weights as tensors: from a checkpoint, or random ones."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from star_attention.errors import UserError
from star_attention.models.config import ModelConfig
from star_attention.models.weights import (
    Checkpoint,
    ModelWeights,
    Weight,
    assemble,
    weight_table,
)


def read_weight(checkpoint: Checkpoint, weight: Weight) -> torch.Tensor:
    """One whole weight as it is stored.

    Raises:
        UserError: it is missing, or has not the shape that the config asks for.
    """
    stored = checkpoint.tensor(weight.name)
    if stored.shape != weight.shape:
        raise UserError(
            f"{checkpoint.path}: {weight.name} has shape {list(stored.shape)}, "
            f"the config asks for {list(weight.shape)}"
        )
    return stored


def load_weights(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    part: int = 0,
    parts: int = 1,
) -> ModelWeights[torch.Tensor]:
    """Reads and fuses a checkpoint's weights, or one of `parts` GPUs' part of them.

    Raises:
        UserError: as `read_weight`, or they cannot be divided so.
    """
    return _load(
        checkpoint.config,
        lambda weight: read_weight(checkpoint, weight),
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
    table = {weight.name: weight for weight in weight_table(config)}
    return Checkpoint(
        Path("random weights"),
        config,
        lambda name: _random_weight(table[name], dtype, device).cpu(),
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
            whole = whole.chunk(parts, weight.split)[part]
        return whole.to(device=device, dtype=dtype).contiguous()

    def make(weights: Sequence[Weight]) -> torch.Tensor:
        taken = [take(weight) for weight in weights]
        return torch.cat(taken) if len(taken) > 1 else taken[0]

    return assemble(config, make, lambda embedding: embedding.chunk(parts)[part])
