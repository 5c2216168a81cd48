"""Host memory for blocks of KV: files that are mapped, or memory of this process alone."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from typing import Protocol

import numpy as np

from star_attention.runtime.kv_file import BlockFile
from star_attention.runtime.store_folder import StoreFolder

# When a block is saved in place of another one, for a moment both its memory and the other's are
# spare.
_MAX_SPARES = 2


class Pinning(Protocol):
    """What is asked of an engine here. See `ModelEngine`."""

    def pin(self, buffer: np.ndarray) -> None: ...

    def unpin(self, buffer: np.ndarray) -> None: ...


class KvMemory:
    """The file of one block, in memory.

    Attributes:
        block: whose it is now.
        data: uint8 [total_bytes].
        has_file: it outlives this process, once its file has a block's name.
        draft: the name of its file while that is hidden.
        holders: who uses it; counted by whoever gives it out.
    """

    def __init__(self, block: BlockFile, descriptor: int | None, draft: str | None) -> None:
        self.block = block
        self.has_file = descriptor is not None
        self.draft = draft
        self.holders = 0
        self._descriptor = descriptor
        self._ready = 0  # layers that have memory behind them
        self._pinned = 0  # layers
        try:
            mapped = mmap.mmap(-1 if descriptor is None else descriptor, block.total_bytes)
        except ValueError:
            raise OSError(errno.EINVAL, "it is cut short") from None
        self.data = np.frombuffer(mapped, np.uint8)

    def layer(self, layer: int) -> np.ndarray:
        """uint8 [num_pages, page_bytes], a view."""
        start = self._start(layer)
        here = self.data[start : start + self.block.layer_bytes]
        return here.reshape(self.block.num_pages, -1)

    def layer_file(self, layer: int) -> tuple[np.ndarray, int]:
        """A layer's bytes, uint8 [layer_bytes], and where in the file they start."""
        start = self._start(layer)
        return self.data[start : start + self.block.layer_bytes], start

    def reserve(self, layers: int) -> None:
        """Takes the memory of the first `layers` layers, and of the header: without it, writing to
        a mapped file on a full tmpfs would end the process. Raises OSError."""
        if layers > self._ready:
            begin, end = self._start(self._ready) if self._ready else 0, self._start(layers)
            if self._descriptor is not None:
                os.posix_fallocate(self._descriptor, begin, end - begin)
            self._ready = layers
            if layers == self.block.description.num_layers:
                self._close_descriptor()

    def prepare(self, pinning: Pinning) -> None:
        """Takes all its memory, layer by layer, and page-locks it. Raises OSError."""
        for layer in range(self.block.description.num_layers):
            if layer >= self._ready:
                self.reserve(layer + 1)
                start = self._start(layer)
                self.data[start : start + self.block.layer_stride : mmap.PAGESIZE] = 0
            self.pin(pinning, layer + 1)

    def pin(self, pinning: Pinning, layers: int) -> None:
        """Page-locks the first `layers` layers, each for itself, which holds up others less."""
        for layer in range(self._pinned, layers):
            pinning.pin(self._stride(layer))
        self._pinned = max(self._pinned, layers)

    def unpin(self, pinning: Pinning) -> None:
        for layer in range(self._pinned):
            pinning.unpin(self._stride(layer))
        self._pinned = 0
        self._close_descriptor()

    def _start(self, layer: int) -> int:
        return self.block.header_bytes + layer * self.block.layer_stride

    def _stride(self, layer: int) -> np.ndarray:
        start = self._start(layer)
        return self.data[start : start + self.block.layer_stride]

    def _close_descriptor(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class MemoryPool:
    """Gives out memory for blocks and keeps some that was given back, or made ahead, for the next:
    taking new memory and page-locking it is slower than the copies into it.

    Args:
        folder: where the memory's files are; None: it has none.
    """

    def __init__(self, pinning: Pinning, folder: StoreFolder | None) -> None:
        self._pinning = pinning
        self._folder = folder
        self._lock = threading.Lock()
        self._spares: list[KvMemory] = []  # oldest first
        self._all: set[KvMemory] = set()

    def take(self, block: BlockFile) -> KvMemory:
        """Memory for a block; its contents are arbitrary. Raises OSError."""
        with self._lock:
            for memory in self._spares:
                if _same_layout(memory.block, block):
                    self._spares.remove(memory)
                    memory.block = block
                    return memory
        return self._make(block)

    def adopt(self, block: BlockFile, descriptor: int) -> KvMemory:
        """The memory of a block's file, whose descriptor it takes over. Raises OSError."""
        try:
            memory = KvMemory(block, descriptor, None)
        except OSError:
            os.close(descriptor)
            raise
        memory.reserve(block.description.num_layers)
        with self._lock:
            self._all.add(memory)
        return memory

    def make_spare(self, block: BlockFile) -> None:
        """Makes memory ahead for the next such block, if none is spare. Raises OSError."""
        with self._lock:
            if any(_same_layout(memory.block, block) for memory in self._spares):
                return
        memory = self._make(block)
        try:
            memory.prepare(self._pinning)
        except OSError:
            self._drop(memory)
            raise
        self.give_back(memory)

    def give_back(self, memory: KvMemory) -> None:
        """Nobody uses it, no copy either. A block's file, which has its name, stays what it is."""
        dropped: KvMemory | None = memory
        if memory.draft is not None or not memory.has_file:
            with self._lock:
                self._spares.append(memory)
                dropped = self._spares.pop(0) if len(self._spares) > _MAX_SPARES else None
        if dropped is not None:
            self._drop(dropped)

    def close(self) -> None:
        """Gives all memory back; files of blocks stay."""
        for memory in list(self._all):
            self._drop(memory)

    def _make(self, block: BlockFile) -> KvMemory:
        if self._folder is None:
            memory = KvMemory(block, None, None)
        else:
            draft, descriptor = self._folder.create()
            try:
                os.ftruncate(descriptor, block.total_bytes)
                memory = KvMemory(block, descriptor, draft)
            except OSError:
                os.close(descriptor)
                self._folder.remove_draft(draft)
                raise
        with self._lock:
            self._all.add(memory)
        return memory

    def _drop(self, memory: KvMemory) -> None:
        memory.unpin(self._pinning)
        if self._folder is not None and memory.draft is not None:
            self._folder.remove_draft(memory.draft)
        with self._lock:
            self._all.discard(memory)


def _same_layout(one: BlockFile, other: BlockFile) -> bool:
    return (one.num_pages, one.header_bytes) == (other.num_pages, other.header_bytes)
