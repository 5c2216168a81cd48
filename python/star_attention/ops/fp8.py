"""Matrices in 8 bits: float8_e4m3fn, and a float32 scale for each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
_LEAST_MAGNITUDE = 1e-12  # rows of less are scaled as if they had this
_ROWS = 2048  # that are quantised at a time, in float32


@dataclass(frozen=True)
class Fp8Rows:
    """Rows that are quantised each for itself: a row stands for its values times its scale.

    Attributes:
        values: float8_e4m3fn [R, K], contiguous.
        scales: float32 [R].
        dtype: of what they stand for, and of products with them.
    """

    values: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @classmethod
    def empty(cls, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Fp8Rows:
        values = torch.empty(rows, width, dtype=FP8, device=device)
        return cls(values, torch.empty(rows, dtype=torch.float32, device=device), dtype)

    def to(self, device: torch.device) -> Fp8Rows:
        return Fp8Rows(self.values.to(device), self.scales.to(device), self.dtype)

    def widened(self) -> torch.Tensor:
        """[R, K] in `dtype`."""
        wide = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        pieces = zip(*(each.split(_ROWS) for each in (wide, self.values, self.scales)), strict=True)
        for out, values, scales in pieces:
            out.copy_(values.float() * scales[:, None])
        return wide


def quantize_rows(x: torch.Tensor) -> Fp8Rows:
    """Rows x [R, K] with the scales with which their largest magnitudes become e4m3's largest
    number, values rounded to nearest, ties to even. A row with a NaN is NaN."""
    made = Fp8Rows.empty(*x.shape, x.dtype, x.device)
    for rows, values, scales in zip(
        *(each.split(_ROWS) for each in (x, made.values, made.scales)), strict=True
    ):
        rows = rows.float()
        most = rows.abs().amax(1).clamp(min=_LEAST_MAGNITUDE)
        full = torch.full_like(most, FP8_MAX)  # by a number torch divides less exactly
        values.copy_(rows * (full / most)[:, None])
        scales.copy_(most / full)
    return made
