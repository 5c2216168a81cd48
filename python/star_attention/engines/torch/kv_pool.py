"""The pages of this rank's KV cache."""

from __future__ import annotations

import torch

from star_attention import ops
from star_attention.models.config import ModelConfig

_GROWTH = 1.5
_PAGES_AT_ONCE = 256  # that are copied


class KvPool:
    """Pages of all layers. On the CPU the pool grows, by a factor, so that many small requests copy
    little; on a GPU it is fixed, and its address with it.

    Args:
        part: what this rank computes of the model.
        tokens_per_block: tokens a page holds.
        fixed: pages; None: it starts empty and grows.
        kv_dtype: `fp8` or `int8`: pages may be quantised; None: not.
        centers: of keys that are; see `key_centers`.

    Attributes:
        data: [num_layers, num_pages, 2, Hkv, tokens_per_block, D], not initialised.
        codes, scales, centers: of quantised pages; see `QuantizedKv`.
    """

    def __init__(
        self,
        part: ModelConfig,
        tokens_per_block: int,
        dtype: torch.dtype,
        device: torch.device,
        fixed: int | None,
        kv_dtype: str | None = None,
        centers: torch.Tensor | None = None,
    ) -> None:
        self._part = part
        self._tokens_per_block = tokens_per_block
        self._fixed = fixed
        self._kv_dtype = kv_dtype
        self.centers = centers
        self.data = torch.empty(self._shape(fixed or 0), dtype=dtype, device=device)
        self.codes = self.scales = None
        self._add_codes()

    @property
    def num_pages(self) -> int:
        return self.data.shape[1]

    def reserve(self, num_pages: int) -> None:
        """Makes pages below `num_pages` usable. Raises ValueError if a fixed pool has fewer."""
        have = self.num_pages
        if num_pages <= have:
            return
        if self._fixed is not None:
            raise ValueError(f"{num_pages} pages are asked for, the KV pool has {self._fixed}")
        grown = self.data.new_empty(self._shape(max(num_pages, int(_GROWTH * have))))
        grown[:, :have] = self.data
        self.data = grown
        self._add_codes()

    def _add_codes(self) -> None:
        if self._kv_dtype:
            self.codes = ops.codes_of(self.data, ops.code_dtype(self._kv_dtype))
            scales = self.data.new_empty(self.codes.shape[:4], dtype=torch.float32)
            if self.scales is not None:
                scales[:, : self.scales.shape[1]] = self.scales
            self.scales = scales

    def quantize(self, pages: torch.Tensor, tokens: torch.Tensor) -> None:
        """As `ops.quantize_pages`."""
        self._add_to_keys(pages, -1)
        ops.quantize_pages(self.data, self.codes, self.scales, pages, tokens)

    def dequantize(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """As `ops.dequantize_pages`."""
        ops.dequantize_pages(self.data, self.codes, self.scales, sources, targets)
        self._add_to_keys(targets, 1)

    def _add_to_keys(self, pages: torch.Tensor, times: int) -> None:
        if self.centers is None:
            return
        for some in pages.long().split(_PAGES_AT_ONCE):
            for keys, centers in zip(self.data[:, :, 0], self.centers, strict=True):
                keys[some] = (keys[some].float() + times * centers[:, None]).to(keys.dtype)

    def copy_page(self, source: int, target: int) -> None:
        self.data[:, target] = self.data[:, source]

    def _shape(self, num_pages: int) -> tuple[int, ...]:
        return self._part.kv_shape(num_pages, self._tokens_per_block)
