"""What the ranks' lower tiers have, as rank 0 knows it: keys and bytes, no KV."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from star_attention.engines.base import ModelEngine
from star_attention.errors import UserError
from star_attention.runtime.orders import OpenStore, Order
from star_attention.runtime.tiers import Tier

TIERS: tuple[Tier, ...] = ("host", "disk")  # the faster one first


@dataclass(frozen=True)
class Stored:
    """A block that a rank has in a tier."""

    rank: int
    tier: Tier


class Store:
    """The blocks of each tier, least recently used first.

    Args:
        budgets: bytes that a rank may have in each tier; what is not there has none.
        processes: of a rank; each has its own part of a block.
        num_layers: of a block, which is copied layer by layer.
        page_bytes: of a page in all layers, on a process.
    """

    def __init__(
        self, budgets: Mapping[Tier, int], processes: int, num_layers: int, page_bytes: int
    ) -> None:
        self.budgets = dict(budgets)
        self.processes = processes
        self.num_layers = num_layers
        self.page_bytes = page_bytes
        self._blocks: dict[Tier, OrderedDict[bytes, tuple[int, int]]] = {
            tier: OrderedDict() for tier in TIERS
        }

    def find_all(self, every: Sequence[Mapping[Tier, Mapping[bytes, int]]]) -> None:
        """Takes what each process found in its folders; blocks count that a rank has wholly."""
        for first in range(0, len(every), self.processes):
            parts = every[first : first + self.processes]
            for tier in self.budgets:
                for key, size in parts[0].get(tier, {}).items():
                    if all(key in part.get(tier, {}) for part in parts):
                        self.add(tier, key, first // self.processes, size)

    def add(self, tier: Tier, key: bytes, rank: int, size: int) -> None:
        self._blocks[tier][key] = rank, size

    def forget(self, tier: Tier, key: bytes) -> None:
        self._blocks[tier].pop(key, None)

    def tiers_for(self, size: int) -> tuple[Tier, ...]:
        """Those that may have a block of so many bytes."""
        return tuple(tier for tier, budget in self.budgets.items() if size <= budget)

    def has(self, key: bytes, tiers: Iterable[Tier]) -> bool:
        """In each of these tiers."""
        return all(key in self._blocks[tier] for tier in tiers)

    def find(self, key: bytes) -> Stored | None:
        """Where it is, and from now on was used last."""
        found = None
        for tier in reversed(TIERS):
            if key in self._blocks[tier]:
                self._blocks[tier].move_to_end(key)
                found = Stored(self._blocks[tier][key][0], tier)
        return found

    def make_room(self, tier: Tier, rank: int, size: int) -> list[bytes]:
        """Forgets blocks of a rank's tier, least recently used first, until so many bytes more fit;
        which those are."""
        blocks = self._blocks[tier]
        own = [(key, each) for key, (where, each) in blocks.items() if where == rank]
        over = sum(each for _, each in own) + size - self.budgets[tier]
        gone = []
        for key, each in own:
            if over <= 0:
                break
            over -= each
            gone.append(key)
            del blocks[key]
        return gone

    def counts(self) -> dict[Tier, tuple[int, int]]:
        """Blocks and bytes in each tier, of all ranks together."""
        return {
            tier: (len(self._blocks[tier]), sum(size for _, size in self._blocks[tier].values()))
            for tier in self.budgets
        }


def open_store(
    execute: Callable[[Order], Any],
    order: OpenStore,
    budgets: Mapping[Tier, int],
    engine: ModelEngine,
    tp: int,
) -> Store:
    """Opens the lower tiers, on all ranks.

    Args:
        budgets: as in `Store`.
        engine: rank 0's.
        tp: processes of a rank.

    Raises:
        UserError: on any rank, a folder is something else's, in use, or cannot be written to.
    """
    found = execute(order)
    for problem in found:
        if isinstance(problem, str):
            raise UserError(problem)
    num_layers = engine.config.num_layers
    page_bytes = engine.kept_page_bytes * engine.kv_packing  # of what takes a page's memory
    store = Store(budgets, tp, num_layers, page_bytes * num_layers)
    store.find_all(found)
    return store
