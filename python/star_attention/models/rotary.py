"""Rotary position embedding."""

from __future__ import annotations

import math

import torch

from star_attention.models.config import ModelConfig
from star_attention.models.rope import RopeConfig
from star_attention.models.weights import ModelWeights

_AT_ONCE = 65536  # positions whose angles are in memory together


def rotary_table(
    rope: RopeConfig, head_dim: int, positions: int, device: torch.device
) -> torch.Tensor:
    """float32 [positions * rope.rows_per_position, head_dim]: cosines, then sines, of every
    position's angles, those for short and long contexts in turn.

    Element i of a head turns with element i + head_dim / 2; those that the model does not rotate
    come behind the others in both halves, and have the angle 0.

    Source: RoFormer, arXiv 2104.09864, section 3.4; the half-rotation layout of Hugging Face.
    """
    sets = [rotary_frequencies(rope, head_dim)]
    if rope.scaling == "longrope":
        sets.append(rotary_frequencies(rope, head_dim, is_long=True))
    frequencies = torch.stack(sets).to(device)
    rotated = frequencies.shape[-1]
    table = torch.zeros(positions, len(sets), 2, head_dim // 2, device=device)
    table[:, :, 0, rotated:] = 1
    for begin in range(0, positions, _AT_ONCE):
        rows = table[begin : begin + _AT_ONCE]
        places = torch.arange(begin, begin + len(rows), device=device, dtype=torch.float32)
        angles = places[:, None, None] * frequencies
        rows[:, :, 0, :rotated] = angles.cos()
        rows[:, :, 1, :rotated] = angles.sin()
        rows[..., :rotated] *= rope.attention_factor
    return table.view(-1, head_dim)


def rotary_frequencies(rope: RopeConfig, head_dim: int, *, is_long: bool = False) -> torch.Tensor:
    """float32 [rotated elements / 2], radians per position, scaled as the model asks."""
    size = rope.rotated or head_dim
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    frequencies = 1.0 / rope.theta**exponents
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling in ("factors", "longrope"):
        return frequencies / torch.tensor(rope.long_factors if is_long else rope.factors)
    if rope.scaling == "llama3":
        # Waves longer than the original context are stretched, short ones kept, those between
        # blended by how many of them fit into it.
        waves = rope.original_max_position * frequencies / (2 * math.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        keep = ((waves - rope.low_freq_factor) / span).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / rope.factor)
    if rope.scaling == "yarn":
        keep = _kept_by_yarn(rope, size)
        return frequencies * (keep + (1 - keep) / rope.factor)
    return frequencies


def _kept_by_yarn(rope: RopeConfig, size: int) -> torch.Tensor:
    """float32 [size / 2]: 1 for frequencies that are kept, 0 for those that are divided, and a ramp
    between the frequencies of which `beta_fast` and `beta_slow` turns fit into the original
    context. Source: YaRN, arXiv 2309.00071, section 3.2."""

    def index(turns: float) -> float:
        waves = rope.original_max_position / (turns * 2 * math.pi)
        return size * math.log(waves) / (2 * math.log(rope.theta))

    low, high = index(rope.beta_fast), index(rope.beta_slow)
    if rope.truncates:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (torch.arange(size // 2).float() - low) / (high - low or 1e-3)
    return 1 - ramp.clamp(0, 1)


def key_centers(part: ModelConfig, weights: ModelWeights) -> torch.Tensor | None:
    """float32 [num_layers, Hkv, D]: what keys have of their bias on average, over all positions. Of
    a model whose keys have none, or are normalised behind it, None.

    A bias may be hundreds of times as large as what else keys are made of (Qwen2), where it hardly
    turns with the position. Softmax does not depend on what all keys have in common.
    """
    if not part.qkv_bias or part.qk_norm:
        return None
    q, kv = (heads * part.head_dim for heads in (part.num_q_heads, part.num_kv_heads))
    biases = torch.stack([layer.qkv_bias[q : q + kv].float() for layer in weights.layers])
    biases = biases.view(part.num_layers, part.num_kv_heads, 2, part.head_dim // 2)
    table = rotary_table(part.rope, part.head_dim, part.max_position, biases.device)
    cosines, sines = table.mean(0).view(2, -1)
    first, second = biases.unbind(2)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), -1)
