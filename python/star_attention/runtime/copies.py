"""Which blocks are being saved into the lower tiers or loaded out of them: orders, no KV.

A block is copied a few layers at a time. It is saved soon after it was read: what leaves the pages
later, or is lost with its rank, need not be read again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from star_attention.runtime.blocks import Block, BlockTable
from star_attention.runtime.orders import Forget, Load, Save
from star_attention.runtime.store import TIERS, Store
from star_attention.runtime.tiers import LoadState, SaveEnd, Tier

# Blocks a rank has that are saved and not ended: what is read faster than it is written waits.
_SAVES_UNDER_WAY = 2


class Copies:
    """See the module.

    Attributes:
        pages: of one layer, that are copied at a time.
    """

    def __init__(self, store: Store, blocks: BlockTable, num_ranks: int) -> None:
        self.pages = 1
        self._store, self._blocks = store, blocks
        self._most_saves = _SAVES_UNDER_WAY * num_ranks
        self._loading: deque[Block] = deque()
        self._saving: deque[Block] = deque()  # the first one is held while it is copied
        self._saves: dict[bytes, tuple[int, int]] = {}  # not over: rank and bytes
        self._ends: dict[tuple[bytes, Tier], list[bool]] = {}  # what processes said of them

    @property
    def awaits_saves(self) -> bool:
        """Whether ranks are to be asked which saves have ended (`Saved`)."""
        return bool(self._saves)

    @property
    def is_saving(self) -> bool:
        """Whether blocks that were read are not in the tiers yet."""
        return bool(self._saving or self._saves)

    def add_load(self, block: Block) -> None:
        """A block that has pages, and whose `source` has its KV."""
        self._loading.append(block)

    def add_save(self, block: Block) -> None:
        """A block that was read."""
        if self._store.budgets and block.key is not None:
            self._saving.append(block)

    def drop(self, block: Block) -> None:
        """Its pages are given up."""
        if block in self._loading:
            self._loading.remove(block)

    def load(self) -> Load | None:
        """The next layers of a block that a lower tier has."""
        if not self._loading:
            return None
        block = self._loading[0]
        return Load(block.number, block.key, block.rank, block.copied, self._until(block))

    def save(self) -> Save | Forget | None:
        """The next layers of a block that was read, or what makes room for it."""
        while self._saving:
            block = self._saving[0]
            if not block.copied:
                if len(self._saves) >= self._most_saves:
                    return None
                size = block.pages * self._store.page_bytes
                tiers = self._store.tiers_for(size)
                if not self._is_to_be_saved(block, tiers):
                    self._saving.popleft()
                    continue
                # What is under way will be there too.
                rooms = {tier: size + self._under_way(tier, block.rank) for tier in tiers}
                if any(size < room > self._store.budgets[tier] for tier, room in rooms.items()):
                    return None
                for tier, room in rooms.items():
                    if gone := self._store.make_room(tier, block.rank, room):
                        return Forget(tier, block.rank, tuple(gone))
                self._begin_save(block, size, tiers)
            first, block.copied = block.copied, self._until(block)
            tiers = tuple(tier for tier in TIERS if (block.key, tier) in self._ends)
            order = Save(block.number, block.key, block.rank, first, block.copied, tiers)
            if block.copied == self._store.num_layers:
                self._saving.popleft()
                block.copied = 0
                self._blocks.give_back(block)
            return order
        return None

    def loaded(self, load: Load, states: Sequence[LoadState]) -> Block | None:
        """Takes what the processes said to a load; the block, if it cannot be loaded."""
        block = next((each for each in self._loading if each.number == load.block), None)
        if block is None:
            return None
        if "failed" in states:
            for tier in TIERS:
                self._store.forget(tier, load.key)
            return block
        if "waiting" in states:
            self._loading.rotate(-1)
            return None
        block.copied = load.last
        if load.last == self._store.num_layers:
            self._loading.remove(block)
            block.is_ready, block.source, block.copied = True, None, 0
        return None

    def saved(self, every: Sequence[Sequence[SaveEnd]]) -> list[Forget]:
        """Takes which saves each process says have ended; what is to be forgotten by the other
        processes of a rank, where one could not save its part."""
        forget = []
        for end in (end for ends in every for end in ends):
            states = self._ends.get((end.key, end.tier))
            if states is None:
                continue
            states.append(end.stored)
            if len(states) < self._store.processes:
                continue
            del self._ends[end.key, end.tier]
            rank, size = self._saves[end.key]
            if all(states):
                self._store.add(end.tier, end.key, rank, size)
            elif any(states):
                forget.append(Forget(end.tier, rank, (end.key,)))
            if not any((end.key, tier) in self._ends for tier in TIERS):
                del self._saves[end.key]
        return forget

    def _is_to_be_saved(self, block: Block, tiers: Sequence[Tier]) -> bool:
        """Whether it still has its pages, and is not in all of the tiers already."""
        return self._blocks.find(block.key) is block and not self._store.has(block.key, tiers)

    def _under_way(self, tier: Tier, rank: int) -> int:
        """Bytes of what a rank saves in a tier."""
        saves = (self._saves[key] for key, where in self._ends if where == tier)
        return sum(size for whose, size in saves if whose == rank)

    def _begin_save(self, block: Block, size: int, tiers: Sequence[Tier]) -> None:
        self._blocks.hold(block)
        self._saves[block.key] = block.rank, size
        for tier in tiers:
            self._ends[block.key, tier] = []
            self._store.forget(tier, block.key)  # or making room would forget what is under way

    def _until(self, block: Block) -> int:
        """Layers of it that are there after the next copy."""
        layers = max(1, self.pages // block.pages)
        return min(block.copied + layers, self._store.num_layers)
