"""Tokens of long texts, kept for the next question over them."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

# int32 [tokens], and the index of the first token at or behind each of some characters.
Tokenized = tuple[np.ndarray, list[int]]


class KeptTokens:
    """What was tokenised last, by the hash of its text. Threads that want the same wait for the one
    that was first.

    Args:
        most: tokens that are kept.
    """

    def __init__(self, most: int = 1 << 24) -> None:
        self._most = most
        self._tokens = 0
        self._texts: OrderedDict[bytes, Future[Tokenized]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, text: str, begins: Sequence[int], encode: Callable[[], Tokenized]) -> Tokenized:
        """What `encode` gives for a text and these characters in it."""
        data = f"{len(text)} {list(begins)} ".encode() + text.encode(errors="surrogatepass")
        key = hashlib.blake2b(data, digest_size=32).digest()
        with self._lock:
            kept = self._texts.get(key)
            is_new = kept is None
            if kept is None:
                kept = self._texts[key] = Future()
            self._texts.move_to_end(key)
        if is_new:
            self._fill(key, kept, encode)
        return kept.result()

    def _fill(self, key: bytes, kept: Future[Tokenized], encode: Callable[[], Tokenized]) -> None:
        try:
            kept.set_result(encode())
        except BaseException as error:
            kept.set_exception(error)
        with self._lock:
            if self._texts.get(key) is not kept:
                return
            if kept.exception():
                del self._texts[key]
                return
            self._tokens += len(kept.result()[0])
            while self._tokens > self._most:
                _, oldest = self._texts.popitem(last=False)
                if oldest.done() and not oldest.exception():
                    self._tokens -= len(oldest.result()[0])
