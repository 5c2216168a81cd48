"""Where the KV of a token is kept, when ranks share TensorRT-LLM's pages.

TensorRT-LLM gives each rank of a tensor-parallel group pages of `tokens_per_block` tokens with
1 / ranks of the KV heads. The same memory holds all heads of 1 / ranks of the tokens: that is how
it is used here. Rank r keeps the r-th part of every page, so all ranks keep equally many.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from star_attention.errors import UserError


@dataclass(frozen=True)
class Shards:
    """Parts of `page` tokens, one on each of `ranks`."""

    page: int
    ranks: int

    @classmethod
    def of(cls, tokens_per_block: int, ranks: int) -> Shards:
        """Raises UserError where `tokens_per_block` cannot be divided."""
        if tokens_per_block % ranks:
            raise UserError(
                f"kv_cache_config.tokens_per_block is {tokens_per_block}: use {128 * ranks}, "
                f"128 tokens for each of the {ranks} ranks (tensor_parallel_size)"
            )
        return cls(tokens_per_block // ranks, ranks)

    def keepers(self, positions: np.ndarray) -> np.ndarray:
        """The rank that keeps each token."""
        return positions // self.page % self.ranks

    def kept(self, length: int, rank: int) -> int:
        """How many of the first `length` tokens a rank keeps."""
        pages, rest = divmod(length, self.page * self.ranks)
        return pages * self.page + min(max(rest - rank * self.page, 0), self.page)

    def slots(self, positions: np.ndarray, pages: np.ndarray) -> np.ndarray:
        """int64, where in the pool the ranks that keep them have tokens of a sequence; `pages` are
        the sequence's, as TensorRT-LLM lists them."""
        return pages[positions // (self.page * self.ranks)] * self.page + positions % self.page


def shared_pool(
    buffers: torch.Tensor, num_kv_heads: int, page: int, head_dim: int
) -> tuple[torch.Tensor, int]:
    """A layer's KV cache, as TensorRT-LLM gives it, as a pool [P, 2, num_kv_heads, page, head_dim].

    Args:
        buffers: [num_pages, ...], what is behind the first dimension is contiguous.

    Returns:
        The pool, and how many pages of it one page of `buffers` is away from the next: where the
        pages of all layers are in one piece, the pool has those of the others in between.

    Raises:
        UserError: the pages are of another size.
    """
    size = 2 * num_kv_heads * page * head_dim
    between, rest = divmod(buffers.stride(0), size)
    if buffers[0].numel() != size or not buffers[0].is_contiguous() or rest:
        raise UserError(
            f"a page of the KV cache is {list(buffers.shape[1:])}, not 2 x {num_kv_heads} KV heads "
            f"x {page} tokens x {head_dim}: set kv_cache_config.use_kv_cache_manager_v2 to false, "
            f"and tensor_parallel_size so that it divides the {num_kv_heads} KV heads"
        )
    shape = (2, num_kv_heads, page, head_dim)
    strides = (size, size // 2, page * head_dim, head_dim, 1)
    return buffers.as_strided(((len(buffers) - 1) * between + 1, *shape), strides), between
