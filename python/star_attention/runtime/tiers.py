"""One rank's lower tiers: where the KV of blocks of contexts is when it is not on the GPU.

The host tier is a folder of files in memory (tmpfs), which outlive this process; the disk tier is a
folder that outlives the machine's power. Both have the same files (`kv_file.py`). A block is copied
a few layers at a time, and only copies between the engine's pages and host memory happen in the
caller's thread. Other threads do the rest: one ends saves and gives memory back, one writes to the
disk, some read and check what an earlier process left.
"""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from star_attention.engines.base import ModelEngine
from star_attention.errors import say
from star_attention.runtime.kv_file import MAGIC, BlockFile, DamagedError, checksum_of
from star_attention.runtime.kv_file import StoreDescription as StoreDescription
from star_attention.runtime.kv_memory import KvMemory, MemoryPool
from star_attention.runtime.store_folder import StoreFolder

Tier = Literal["host", "disk"]
LoadState = Literal["done", "waiting", "failed"]

_PIECE_BYTES = 16 << 20  # that are written to the disk at a time
_DISK_LOADS = 2  # at a time, each with host memory of its own
_READERS = 4  # threads, of a layer each


class SaveEnd(NamedTuple):
    """A save into a tier is over: the block is there, or is not."""

    key: bytes
    tier: Tier
    stored: bool


class Tiers:
    """The host and the disk tier of one rank.

    Beyond the blocks in the host tier there is memory for the next one or two. A block that is
    saved on the disk alone takes host memory until it is written; one that is loaded from the disk
    takes some until then.

    Args:
        engine: whose pages are copied.
        description: of the engine's KV.
        host_folder, disk_folder: of the tiers; None: there is none.
        disk_option: what the user calls the latter by, for messages.

    Raises:
        UserError: a folder is something else's, in use, or cannot be written to.
    """

    def __init__(
        self,
        engine: ModelEngine,
        description: StoreDescription,
        host_folder: Path | None,
        disk_folder: Path | None,
        disk_option: str = "--context-dir",
    ) -> None:
        if description.page_bytes != engine.kept_page_bytes:
            raise ValueError(
                f"pages of {engine.kept_page_bytes} bytes are described as {description}"
            )
        self._engine = engine
        self._description = description
        self._host = self._disk = None
        if host_folder is not None:
            self._host = StoreFolder(host_folder, description, "the host tier's folder")
            _allow_open_files()
        if disk_folder is not None:
            try:
                self._disk = StoreFolder(disk_folder, description, disk_option)
            except BaseException:
                if self._host:
                    self._host.close()
                raise
        self._staging = MemoryPool(engine, None)
        self._saving = MemoryPool(engine, self._host) if self._host else self._staging
        self._saves: dict[bytes, KvMemory | None] = {}  # None: it failed
        self._loads: dict[bytes, _Load] = {}
        self._on_host: dict[bytes, KvMemory] = {}
        self._unread = self._blocks_in(self._host)  # of an earlier process, and not checked
        self._on_disk = self._blocks_in(self._disk)
        self._writes: dict[bytes, _Write] = {}  # to the disk, not ended
        self._ends: list[SaveEnd] = []
        self._said: set[str] = set()
        self._bug: BaseException | None = None
        self._closing = False
        self._lock = threading.Lock()  # holders, _on_disk, _writes, _ends
        self._ender, self._writer, self._reader, self._layers = (
            ThreadPoolExecutor(count, f"tiers-{name}")
            for name, count in (("ender", 1), ("writer", 1), ("reader", 1), ("layers", _READERS))
        )

    def stored(self) -> dict[Tier, dict[bytes, int]]:
        """The bytes of each block that is whole in a tier."""
        host = {key: memory.block.total_bytes for key, memory in self._on_host.items()}
        with self._lock:
            return {"host": {**self._unread, **host}, "disk": dict(self._on_disk)}

    def block_bytes(self, num_pages: int) -> int:
        """What a block of so many pages takes in a tier."""
        return BlockFile(self._description, bytes(32), num_pages).total_bytes

    def save(
        self,
        key: bytes,
        pages: Sequence[int],
        layers: range,
        tiers: Sequence[Tier] = ("host", "disk"),
    ) -> None:
        """Copies layers of a block into these tiers, as far as there are such, the first ones
        first. With the last one the block is there and can be loaded; `ended` says when it is in
        the tiers for good, or could not be saved.

        The pages may be used for something else as soon as this has returned."""
        self._check()
        if layers.start == 0:
            self._begin_save(key, len(pages), "host" in tiers)
        memory = self._saves.get(key)
        if memory is not None:
            try:
                memory.reserve(layers.stop)
            except OSError as error:
                self._say_not_saved(self._host if memory.has_file else None, error)
                self._saves[key] = None
                self._release(memory)
            else:
                for layer in layers:
                    self._engine.read_layer(layer, pages, memory.layer(layer))
        if layers.stop == self._description.num_layers and key in self._saves:
            self._end_save(key, self._saves.pop(key), tiers)

    def load(self, key: bytes, pages: Sequence[int], layers: range) -> LoadState:
        """Copies layers of a block into the engine's pages.

        Returns:
            `waiting`: they are still read and checked, call it again; `failed`: the block is not
            there, or is damaged, and then forgotten. What was loaded of it before is not to be
            used.
        """
        self._check()
        memory = self._hold_in_memory(key)
        if memory is not None:
            try:
                if memory.block.num_pages != len(pages):
                    self._forget_everywhere(key)
                    return "failed"
                self._write_layers(memory, pages, layers)
            finally:
                self._release(memory)
            return "done"
        load = self._loads.get(key)
        if load is None:
            tier = self._tier_of(key)
            if tier is None:
                return "failed"
            under_way = sum(each.tier == "disk" for each in self._loads.values())
            if tier == "disk" and under_way >= _DISK_LOADS:
                return "waiting"
            load = self._begin_load(key, tier, len(pages))
        if load.failed:
            self.forget(key, load.tier)
            return self.load(key, pages, layers)  # another tier may have it
        if load.checked < layers.stop:
            return "waiting"
        self._write_layers(load.memory, pages, layers)
        if layers.stop == self._description.num_layers:
            if load.tier == "host":
                self._on_host[key] = self._hold(load.memory)
                self._unread.pop(key, None)
            self._end_load(key)
        return "done"

    def forget(self, key: bytes, tier: Tier) -> None:
        """The block is not in the tier any more."""
        if key in self._loads and self._loads[key].tier == tier:
            self._end_load(key)
        if tier == "host":
            if self._unread.pop(key, None) is not None:
                self._submit(self._ender, self._host.remove, key)
            if (memory := self._on_host.pop(key, None)) is not None:
                self._submit(self._ender, self._withdraw, key, memory)
            return
        with self._lock:
            known = self._on_disk.pop(key, None) is not None
            write = self._writes.pop(key, None)
        if write:
            write.given_up = True
        if write or known:
            self._submit(self._writer, self._disk.remove, key)

    def cancel(self, key: bytes) -> None:
        """Gives up a save or a load of which the last layer was not asked for."""
        memory = self._saves.pop(key, None)
        if memory is not None:
            self._release(memory)
        self._end_load(key)

    def ended(self) -> list[SaveEnd]:
        """Saves that ended since the last call, those of each tier in their order. What was
        cancelled, or is forgotten by now, is not among them."""
        self._check()
        with self._lock:
            ends, self._ends = self._ends, []
            there = {"host": self._on_host, "disk": self._on_disk}
            return [end for end in ends if not end.stored or end.key in there[end.tier]]

    def close(self) -> None:
        """Ends what is still to be written, and gives memory and folders back. What is in the tiers
        stays."""
        self._closing = True
        for load in self._loads.values():
            load.given_up = True
        for thread in (self._reader, self._layers, self._ender, self._writer):
            thread.shutdown()
        self._engine.finish_copies()
        for pool in {self._saving, self._staging}:
            pool.close()
        for folder in (self._host, self._disk):
            if folder:
                folder.close()

    def delete_host(self) -> None:
        """Of what is closed: deletes this rank's part of the host tier's folder, and the folder
        with the last part on this machine."""
        if self._host:
            self._host.delete()

    # Saving

    def _begin_save(self, key: bytes, num_pages: int, in_host: bool) -> None:
        self.cancel(key)
        self.forget(key, "host")
        block = BlockFile(self._description, key, num_pages)
        pool = self._saving if in_host else self._staging
        try:
            self._saves[key] = self._hold(pool.take(block))
        except OSError as error:
            self._say_not_saved(self._host if in_host else None, error)
            self._saves[key] = None
        else:
            self._submit(self._ender, self._make_spare, pool, block)

    def _make_spare(self, pool: MemoryPool, block: BlockFile) -> None:
        with suppress(OSError):  # the save that needs it says so
            pool.make_spare(block)

    def _end_save(self, key: bytes, memory: KvMemory | None, tiers: Sequence[Tier]) -> None:
        write = None
        with self._lock:
            if memory is None and self._host and "host" in tiers:
                self._ends.append(SaveEnd(key, "host", False))
            if self._disk and "disk" in tiers and key not in self._writes:
                if memory is None or key in self._on_disk:
                    self._ends.append(SaveEnd(key, "disk", key in self._on_disk))
                else:
                    write = self._writes[key] = _Write(memory)
                    memory.holders += 1
        if memory is None:
            return
        if memory.has_file:
            self._on_host[key] = self._hold(memory)
        self._submit(self._ender, self._complete, key, memory, write)

    def _complete(self, key: bytes, memory: KvMemory, write: _Write | None) -> None:
        """In a thread: the file is made whole, and gets its name."""
        self._engine.finish_copies()
        layers = range(self._description.num_layers)
        memory.pin(self._engine, len(layers))
        checksums = [checksum_of(memory.layer_file(layer)[0]) for layer in layers]
        header = memory.block.header(checksums)
        memory.data[: len(header)] = np.frombuffer(header, np.uint8)
        memory.data[len(header) : memory.block.header_bytes] = 0
        if memory.has_file:
            try:
                self._host.publish(memory.draft, key, sync=False)
                memory.draft = None
            except OSError as error:
                # It serves this process, and is gone with it.
                self._say_not_saved(self._host, error)
            with self._lock:
                self._ends.append(SaveEnd(key, "host", True))
        if write:
            self._submit(self._writer, self._write, key, write, while_closing=True)
        self._release(memory)

    def _write(self, key: bytes, write: _Write) -> None:
        """In a thread: a block's memory becomes a file on the disk."""
        stored = False
        try:
            stored = self._write_file(key, write)
        except OSError as error:
            self._say_not_saved(self._disk, error)
        with self._lock:
            if self._writes.get(key) is write:
                del self._writes[key]
                if stored:
                    self._on_disk[key] = write.memory.block.total_bytes
                self._ends.append(SaveEnd(key, "disk", stored))
        self._release(write.memory)

    def _write_file(self, key: bytes, write: _Write) -> bool:
        """Whether it was written to its end. Raises OSError."""
        draft, descriptor = self._disk.create()
        try:
            data = memoryview(write.memory.data)
            start = 0
            while start < len(data):
                if write.given_up:
                    return False
                start += os.pwrite(descriptor, data[start : start + _PIECE_BYTES], start)
            os.fsync(descriptor)
            self._disk.publish(draft, key, sync=True)
            return True
        finally:
            os.close(descriptor)
            self._disk.remove_draft(draft)

    def _withdraw(self, key: bytes, memory: KvMemory) -> None:
        """In a thread: a block of the host tier loses its name."""
        if memory.draft is None:
            with suppress(OSError):  # its file is gone: the memory is not
                memory.draft = self._host.withdraw(key)
        self._release(memory)

    # Loading

    def _tier_of(self, key: bytes) -> Tier | None:
        """Where a block is that this process has not saved, or has not in memory any more."""
        if key in self._unread:
            return "host"
        with self._lock:
            return "disk" if key in self._on_disk else None

    def _begin_load(self, key: bytes, tier: Tier, num_pages: int) -> _Load:
        load = self._loads[key] = _Load(tier, num_pages)
        self._submit(self._reader, self._read, key, load)
        return load

    def _end_load(self, key: bytes) -> None:
        load = self._loads.pop(key, None)
        if load is None:
            return
        with self._lock:
            load.given_up = True
            memory, load.memory = load.memory, None
        if memory is not None:
            self._release(memory)

    def _read(self, key: bytes, load: _Load) -> None:
        """In a thread: brings a block into memory and checks it, layer by layer."""
        folder = self._host if load.tier == "host" else self._disk
        memory = None
        try:
            descriptor = folder.open(key, os.O_RDWR if load.tier == "host" else os.O_RDONLY)
            try:
                block, checksums = self._read_header(key, descriptor)
                if block.num_pages != load.num_pages:
                    raise DamagedError(f"it has {block.num_pages} pages, not {load.num_pages}")
                if load.tier == "host":
                    memory = self._hold(self._saving.adopt(block, os.dup(descriptor)))
                else:
                    memory = self._hold(self._staging.take(block))
                with self._lock:
                    if load.given_up:
                        return
                    load.memory = memory
                    memory.holders += 1
                self._check_layers(load, memory, descriptor, checksums)
            finally:
                os.close(descriptor)
        except (OSError, DamagedError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            self._say(f"a block in {folder.name} cannot be read and is forgotten: {reason}")
            load.failed = True
        finally:
            if memory is not None:
                self._release(memory)

    def _check_layers(
        self, load: _Load, memory: KvMemory, descriptor: int, checksums: list[int]
    ) -> None:
        def checksum_now(layer: int) -> int | None:
            if load.given_up:
                return None
            data, start = memory.layer_file(layer)
            if load.tier == "disk":
                _read_fully(descriptor, data, start)
            return checksum_of(data)

        memory.reserve(len(checksums))
        found = [self._layers.submit(checksum_now, layer) for layer in range(len(checksums))]
        try:
            for layer, checksum in enumerate(checksums):
                now = found[layer].result()
                if load.given_up:
                    return
                if now != checksum:
                    raise DamagedError(f"layer {layer} is damaged")
                memory.pin(self._engine, layer + 1)
                load.checked = layer + 1
        finally:
            for each in found:
                each.cancel()
            wait(found)  # no thread uses descriptor and memory any more

    def _blocks_in(self, folder: StoreFolder | None) -> dict[bytes, int]:
        """The bytes of each block there; files of ours that cannot be one are deleted."""
        found: dict[bytes, int] = {}
        for key in folder.keys() if folder else ():
            try:
                descriptor = folder.open(key)
            except OSError:
                continue
            try:
                found[key] = self._read_header(key, descriptor)[0].total_bytes
            except (OSError, DamagedError):
                if os.pread(descriptor, len(MAGIC), 0) == MAGIC:
                    folder.remove(key)
            finally:
                os.close(descriptor)
        return found

    def _read_header(self, key: bytes, descriptor: int) -> tuple[BlockFile, list[int]]:
        def read(count: int, start: int) -> bytes:
            return os.pread(descriptor, count, start)

        size = os.fstat(descriptor).st_size
        return BlockFile.read(self._description, key, size, read)

    # Memory

    def _hold_in_memory(self, key: bytes) -> KvMemory | None:
        """The memory of a block that this process saved or has checked, with one more holder."""
        with self._lock:
            memory = self._on_host.get(key)
            if memory is None and key in self._writes:
                memory = self._writes[key].memory
            if memory is not None:
                memory.holders += 1
            return memory

    def _hold(self, memory: KvMemory) -> KvMemory:
        with self._lock:
            memory.holders += 1
        return memory

    def _release(self, memory: KvMemory) -> None:
        with self._lock:
            memory.holders -= 1
            free = not memory.holders
        if free:
            self._submit(self._ender, self._give_back, memory)

    def _give_back(self, memory: KvMemory) -> None:
        """In a thread: copies from and to the memory may be under way."""
        self._engine.finish_copies()
        (self._saving if memory.has_file else self._staging).give_back(memory)

    def _write_layers(self, memory: KvMemory, pages: Sequence[int], layers: range) -> None:
        for layer in layers:
            self._engine.write_layer(layer, pages, memory.layer(layer))

    def _forget_everywhere(self, key: bytes) -> None:
        for tier in ("host", "disk"):
            self.forget(key, tier)

    # Threads and messages

    def _submit(
        self,
        thread: ThreadPoolExecutor,
        work: Callable[..., None],
        *args: Any,
        while_closing: bool = False,
    ) -> None:
        if not self._closing or while_closing:
            thread.submit(self._run, work, *args)

    def _run(self, work: Callable[..., None], *args: Any) -> None:
        try:
            work(*args)
        except BaseException as error:
            self._bug = error

    def _check(self) -> None:
        """Raises what went wrong in a thread, and is not a file's fault."""
        if self._bug is not None:
            raise self._bug

    def _say_not_saved(self, folder: StoreFolder | None, error: OSError) -> None:
        where = folder.name if folder else "host memory"
        self._say(f"a context's KV is not kept in {where}: {error.strerror}")

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            say(message)


@dataclass(eq=False)
class _Write:
    """A block on its way to the disk."""

    memory: KvMemory
    given_up: bool = False


@dataclass(eq=False)
class _Load:
    """A block that is read and checked.

    Attributes:
        checked: layers whose data is in memory and right.
        given_up: nobody waits for it any more.
    """

    tier: Tier
    num_pages: int
    memory: KvMemory | None = None
    checked: int = 0
    failed: bool = False
    given_up: bool = False


def _read_fully(descriptor: int, data: np.ndarray, start: int) -> None:
    view = memoryview(data)
    while len(view):
        count = os.preadv(descriptor, [view], start)
        if not count:
            raise DamagedError("it is cut short")
        view, start = view[count:], start + count


def _allow_open_files() -> None:
    """A mapped file takes a descriptor: as many as the system lets this process have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
