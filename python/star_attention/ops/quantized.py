"""Matrices in 8 bits, with a float32 scale for each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

RowKind = Literal["fp8", "int8"]

FP8 = torch.float8_e4m3fn
DTYPES: dict[RowKind, torch.dtype] = {"fp8": FP8, "int8": torch.int8}
# What the largest magnitude that shares a scale becomes.
LARGEST: dict[torch.dtype, float] = {FP8: 448.0, torch.int8: 127.0}
_LEAST_MAGNITUDE = 1e-12  # rows of less are scaled as if they had this
_ROWS = 2048  # that are quantised at a time, in float32


@dataclass(frozen=True)
class QuantizedRows:
    """Rows that are quantised each for itself: a row stands for its values times its scale.

    Attributes:
        values: float8_e4m3fn or int8 [R, K], contiguous.
        scales: float32 [R].
        dtype: of what they stand for, and of products with them.
    """

    values: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.values)

    @property
    def kind(self) -> RowKind:
        return "fp8" if self.values.dtype == FP8 else "int8"

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @classmethod
    def empty(
        cls, rows: int, width: int, kind: RowKind, dtype: torch.dtype, device: torch.device
    ) -> QuantizedRows:
        values = torch.empty(rows, width, dtype=DTYPES[kind], device=device)
        return cls(values, torch.empty(rows, dtype=torch.float32, device=device), dtype)

    def to(self, device: torch.device) -> QuantizedRows:
        return QuantizedRows(self.values.to(device), self.scales.to(device), self.dtype)

    def widened(self) -> torch.Tensor:
        """[R, K] in `dtype`."""
        wide = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        pieces = zip(*(each.split(_ROWS) for each in (wide, self.values, self.scales)), strict=True)
        for out, values, scales in pieces:
            out.copy_(values.float() * scales[:, None])
        return wide


def quantize_rows(x: torch.Tensor, kind: RowKind) -> QuantizedRows:
    """Rows x [R, K] with the scales with which their largest magnitudes become 448 in FP8 and 127
    in INT8, values rounded to nearest, ties to even. A row with a NaN is NaN."""
    made = QuantizedRows.empty(*x.shape, kind, x.dtype, x.device)
    for rows, values, scales in zip(
        *(each.split(_ROWS) for each in (x, made.values, made.scales)), strict=True
    ):
        rows = rows.float()
        most = rows.abs().amax(1).clamp(min=_LEAST_MAGNITUDE)
        # A tensor: by a number torch divides less exactly.
        full = torch.full_like(most, LARGEST[values.dtype])
        rows = rows * (full / most)[:, None]
        values.copy_(rows.round_() if kind == "int8" else rows)
        scales.copy_(most / full)
    return made
