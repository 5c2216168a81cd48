"""Blocks of KV as rank 0 knows them: what is in them, which rank holds them, and for whom.

What a rank keeps of a context are parts of the plan's blocks; here each is a block of its own. Its
KV depends on its tokens, those before it in the plan's block, where they stand, and the anchor in
front of them: two contexts that agree in these share it, whatever else they say. Blocks that no
context holds stay as long as nobody needs their room.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from star_attention.plan import Plan
from star_attention.runtime.tiers import Tier


@dataclass(eq=False)
class Block:
    """The KV of a block, in pages of one rank.

    Attributes:
        key: of its contents; None: they are nobody else's.
        holders: contexts that are open and have it.
        is_ready: its KV is there; until then one of its holders reads it, or it is loaded.
        source: the tier that it is being loaded from.
        copied: layers that are loaded or saved so far.
    """

    number: int
    key: bytes | None
    rank: int
    tokens: int
    pages: int
    holders: int = 0
    is_ready: bool = False
    source: Tier | None = None
    copied: int = 0


def block_keys(token_ids: np.ndarray, plan: Plan, is_long: bool) -> list[bytes | None]:
    """A key for each part of a plan; equal ones have equal KV, for one model and dtype. Where
    blocks are chained it is one of all the text so far. In a ring, where nothing stays as it is
    when a text grows, they have none.

    Args:
        token_ids: int32 [n], of the context.
        is_long: whether the model rotates it otherwise than shorter contexts.
    """
    if plan.attention == "ring":
        return [None] * len(plan.parts)
    tokens = np.ascontiguousarray(token_ids, np.int32)
    anchor = hashlib.blake2b(tokens[: plan.anchor_size], digest_size=32).digest()
    keys: list[bytes | None] = []
    for part in plan.parts:
        block = plan.blocks[part.block]
        if part.start == block.start and not (part.start and plan.is_chained):
            before = (block.start, anchor if block.prefix else b"", *(["long"] if is_long else []))
            if plan.is_chained:
                before += plan.selected_pages, plan.block_size, plan.anchor_size
            digest = hashlib.blake2b(repr(before).encode(), digest_size=32)
        digest.update(tokens[part.start : part.end])
        own = digest.copy()
        own.update(part.start.to_bytes(8, "little"))
        keys.append(own.digest())
    return keys


class BlockTable:
    """All blocks that ranks hold.

    Attributes:
        live, idle: pages of each rank, int64 [ranks], in blocks that contexts hold, and in others.
    """

    def __init__(self, num_ranks: int) -> None:
        self.live = np.zeros(num_ranks, np.int64)
        self.idle = np.zeros(num_ranks, np.int64)
        self._by_key: dict[bytes, Block] = {}
        self._idle: dict[Block, None] = {}  # least recently used first
        self._numbers = 0

    @property
    def count(self) -> int:
        """Of those that contexts may share."""
        return len(self._by_key)

    def find(self, key: bytes | None) -> Block | None:
        return None if key is None else self._by_key.get(key)

    def hold(self, block: Block) -> None:
        """One more context has it."""
        if not block.holders:
            if block in self._idle:
                del self._idle[block]
                self.idle[block.rank] -= block.pages
            self.live[block.rank] += block.pages
        block.holders += 1

    def new(self, key: bytes | None, rank: int, tokens: int, pages: int) -> Block:
        """A block for one context; if another of its contents is there, nobody else's."""
        self._numbers += 1
        if key in self._by_key:
            key = None
        block = Block(self._numbers, key, rank, tokens, pages)
        if key is not None:
            self._by_key[key] = block
        self.hold(block)
        return block

    def give_back(self, block: Block) -> bool:
        """A context has it no longer; whether it is gone with it."""
        block.holders -= 1
        if block.holders:
            return False
        self.live[block.rank] -= block.pages
        if block.is_ready and block.key is not None:
            self._idle[block] = None
            self.idle[block.rank] += block.pages
            return False
        if block.key is not None:
            del self._by_key[block.key]
        return True

    def forget(self, block: Block) -> None:
        """Gives up an idle block."""
        del self._idle[block]
        self.idle[block.rank] -= block.pages
        del self._by_key[block.key]

    def evict(self, missing: np.ndarray, besides: Collection[Block | None]) -> list[Block]:
        """Gives up idle blocks, least recently used first, until the ranks have so many more pages,
        int64 [ranks], or no others are idle there."""
        gone, missing = [], missing.copy()
        for block in list(self._idle):
            if (missing <= 0).all():
                break
            if missing[block.rank] > 0 and block not in besides:
                missing[block.rank] -= block.pages
                self.forget(block)
                gone.append(block)
        return gone
