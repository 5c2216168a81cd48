"""How the server divides contexts: so that a text that grows keeps its blocks."""

from __future__ import annotations

from dataclasses import replace

from star_attention.config import StarConfig

# Shorter texts are one block, which is dense attention.
DENSE_TOKENS = 2048
_BITS = 3


def division_for(tokens: int, config: StarConfig, num_ranks: int) -> StarConfig:
    """The division of a context of so many tokens.

    A block size that is not given is the context over `StarConfig.default_blocks`, as everywhere,
    rounded up to three significant bits of pages: it stays the same until the text has grown by a
    quarter at most, and with it every block but the last.
    """
    if config.attention != "star" or config.block_size is not None:
        return config
    page = config.tokens_per_block
    pages = -(-tokens // (config.default_blocks(num_ranks) * page))
    step = 1 << max(0, pages.bit_length() - _BITS)
    block_size = max(-(-pages // step) * step * page, -(-DENSE_TOKENS // page) * page)
    anchor_size = config.anchor_size
    if anchor_size is not None:
        anchor_size = min(anchor_size, block_size)
    return replace(config, block_size=block_size, anchor_size=anchor_size, preset=None)
