"""Weights as tensors: from a checkpoint, or random ones."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from star_attention.errors import UserError
from star_attention.models.config import ModelConfig
from star_attention.models.quantization import Quantization
from star_attention.models.weights import (
    Checkpoint,
    ModelWeights,
    Weight,
    assemble,
)
from star_attention.ops.quantized import QuantizedRows, RowKind, quantize_rows

# What cuBLAS takes in FP8: multiples of so many rows and columns, and what the kernels in front of
# it take of columns.
_FP8_MULTIPLE, _MOST_FP8_COLUMNS = 16, 32768


def load_weights(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    part: int = 0,
    parts: int = 1,
    quantization: Quantization = "none",
) -> ModelWeights[torch.Tensor | QuantizedRows]:
    """Reads and fuses a checkpoint's weights, or one of `parts` GPUs' part of them.

    Args:
        quantization: `none`: all in `dtype`; `fp8`, `int8`: projections in 8 bits, those of experts
            excepted; `auto`: those of them that are stored in FP8 in FP8.

    Raises:
        UserError: one cannot be read, or they cannot be divided or quantised so.
    """

    def kind_of(weight: Weight) -> RowKind | None:
        if quantization == "auto":
            return "fp8" if checkpoint.is_fp8(weight) else None
        return None if quantization == "none" else quantization

    return _load(
        checkpoint.config,
        checkpoint.tensor,
        dtype,
        device,
        part,
        parts,
        kind_of,
    )


def random_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    part: int = 0,
    parts: int = 1,
    quantization: Quantization = "none",
) -> ModelWeights[torch.Tensor | QuantizedRows]:
    """Weights of a model that was never trained, to try speed and memory.

    Each is drawn whole from a generator that its name seeds, so that the parts of several GPUs are
    those of one model. Raises UserError if it cannot be divided or quantised so.
    """
    return _load(
        config,
        lambda weight: _random_weight(weight, dtype, device),
        dtype,
        device,
        part,
        parts,
        lambda weight: None if quantization in ("none", "auto") else quantization,
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
    read: Callable[[Weight], torch.Tensor | QuantizedRows],
    dtype: torch.dtype,
    device: torch.device,
    part: int,
    parts: int,
    kind_of: Callable[[Weight], RowKind | None],
) -> ModelWeights[torch.Tensor | QuantizedRows]:
    config.shard(parts)  # raises if it is not possible

    def own(weight: Weight, whole: torch.Tensor) -> torch.Tensor:
        return _own(weight, whole, part, parts)

    def widened(whole: torch.Tensor | QuantizedRows) -> torch.Tensor:
        return _widened(whole, dtype, device)

    def make(weights: Sequence[Weight]) -> torch.Tensor | QuantizedRows:
        """One that is stored as it is wanted stays in the file's memory; others are copied, a
        stored one at a time."""
        kinds = {kind_of(weight) if is_projection(config, weight) else None for weight in weights}
        if len(kinds) == 1 and (kind := kinds.pop()):
            if device.type == "cuda":
                rows, columns = _stacked_shape(weights, parts)
                check_fp8(weights[0].name, rows, columns, "another --tp")
            return quantized_rows(weights, read, kind, dtype, device, part, parts)
        if len(weights) == 1:
            return (
                own(weights[0], widened(read(weights[0])))
                .to(device=device, dtype=dtype)
                .contiguous()
            )
        shapes = [_part_shape(weight, parts) for weight in weights]
        rows = [shape[0] for shape in shapes]
        made = torch.empty(sum(rows), *shapes[0][1:], dtype=dtype, device=device)
        for weight, place in zip(weights, made.split(rows), strict=True):
            place.copy_(own(weight, widened(read(weight))))
        return made

    return assemble(config, make, lambda embedding: embedding.chunk(parts)[part])


def quantized_rows(
    weights: Sequence[Weight],
    read: Callable[[Weight], torch.Tensor | QuantizedRows],
    kind: RowKind,
    dtype: torch.dtype,
    device: torch.device,
    part: int = 0,
    parts: int = 1,
) -> QuantizedRows:
    """Matrices stacked, or one of `parts` GPUs' part of them. Rows are quantised whole, so that the
    parts of several GPUs are those of one model."""
    rows = [_part_shape(weight, parts)[0] for weight in weights]
    made = QuantizedRows.empty(*_stacked_shape(weights, parts), kind, dtype, device)
    places = zip(made.values.split(rows), made.scales.split(rows), strict=True)
    for weight, (values, scales) in zip(weights, places, strict=True):
        whole = read(weight)
        if isinstance(whole, torch.Tensor) or whole.kind != kind:
            whole = quantize_rows(_widened(whole, dtype, device).to(device), kind)
        values.copy_(_own(weight, whole.values, part, parts))
        of_rows = _own(weight, whole.scales, part, parts) if weight.split == 0 else whole.scales
        scales.copy_(of_rows)
    return made


def _own(weight: Weight, whole: torch.Tensor, part: int, parts: int) -> torch.Tensor:
    if weight.split is not None and parts > 1:
        return whole.chunk(parts, weight.split)[part]
    return whole


def _widened(
    whole: torch.Tensor | QuantizedRows, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    if isinstance(whole, QuantizedRows):
        return replace(whole, dtype=dtype).to(device).widened()
    return whole


def _part_shape(weight: Weight, parts: int) -> tuple[int, ...]:
    shape = enumerate(weight.shape)
    return tuple(size // parts if dim == weight.split else size for dim, size in shape)


def _stacked_shape(weights: Sequence[Weight], parts: int) -> tuple[int, int]:
    """Rows and columns of matrices one over the other."""
    shapes = [_part_shape(weight, parts) for weight in weights]
    return sum(shape[0] for shape in shapes), shapes[0][1]


def is_projection(config: ModelConfig, weight: Weight) -> bool:
    """Of a layer, but none of experts, their router included."""
    if weight.field in ("qkv", "out"):
        return True
    return weight.field in ("gate_up", "down") and config.layers[weight.layer].experts is None


def check_fp8(name: str, rows: int, columns: int, otherwise: str) -> None:
    """Raises UserError for a matrix that no GPU multiplies in FP8.

    Args:
        otherwise: what to use instead, beside no FP8.
    """
    if rows % _FP8_MULTIPLE or columns % _FP8_MULTIPLE or columns > _MOST_FP8_COLUMNS:
        raise UserError(
            f"{name} and what is fused with it are {rows} rows of {columns}, FP8 on a GPU needs "
            f"multiples of {_FP8_MULTIPLE}, and rows up to {_MOST_FP8_COLUMNS}: "
            f"use --quantization none, or {otherwise}"
        )
