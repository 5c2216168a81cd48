"""Rotary position embedding."""

from __future__ import annotations

import math

import torch

from star_attention.models.config import RopeConfig

_AT_ONCE = 65536  # positions whose angles are in memory together


def rotary_table(
    rope: RopeConfig, head_dim: int, positions: int, device: torch.device
) -> torch.Tensor:
    """float32 [positions, head_dim]: cosines, then sines, of every position's angles.

    Source: RoFormer, arXiv 2104.09864, section 3.4; the half-rotation layout of Hugging Face.
    """
    frequencies = rotary_frequencies(rope, head_dim).to(device)
    table = torch.empty(positions, head_dim, device=device)
    for begin in range(0, positions, _AT_ONCE):
        rows = table[begin : begin + _AT_ONCE]
        places = torch.arange(begin, begin + len(rows), device=device, dtype=torch.float32)
        angles = places[:, None] * frequencies
        torch.cat((angles.cos(), angles.sin()), dim=-1, out=rows)
    return table


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
