"""Contexts that were read, to be found again as the beginning of a longer text."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

_MOST = 4096


class KnownContexts:
    """The most recent contexts by their tokens.

    Args:
        is_cached: whether the blocks of these keys are cached still.
    """

    def __init__(self, is_cached: Callable[[Sequence[bytes]], bool]) -> None:
        self._is_cached = is_cached
        self._keys: OrderedDict[tuple[int, bytes], tuple[int, Sequence[bytes]]] = OrderedDict()

    def add(self, token_ids: np.ndarray, block_size: int, keys: Sequence[bytes]) -> None:
        """A context, int32 [n], that is read, and the keys of its blocks."""
        entry = len(token_ids), _digest(token_ids)
        self._keys[entry] = block_size, keys
        self._keys.move_to_end(entry)
        while len(self._keys) > _MOST:
            self._keys.popitem(last=False)

    def longest(self, token_ids: np.ndarray, border: int) -> int:
        """Tokens, at most `border`, of the longest cached context that the text begins with, if
        fewer than a block of it are missing then; otherwise `border`."""
        lengths = sorted({n for (n, _), (size, _) in self._keys.items() if n <= border < n + size})
        digest, begin, found = hashlib.blake2b(digest_size=32), 0, border
        for length in lengths:
            digest.update(np.ascontiguousarray(token_ids[begin:length], np.int32))
            begin = length
            known = self._keys.get((length, digest.digest()))
            if known and border < length + known[0] and self._is_cached(known[1]):
                found = length
        return found


def _digest(token_ids: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(token_ids, np.int32), digest_size=32).digest()
