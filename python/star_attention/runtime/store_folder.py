"""One rank's folder of block files. Links are never followed, and nothing is deleted there that was
not made here."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from star_attention.errors import UserError
from star_attention.runtime.kv_file import VERSION, StoreDescription

_STORE = "store.json"
_STORE_DRAFT = re.compile(r"\.store-\d+\.json\.tmp")
_BLOCK = re.compile(r"((?:[0-9a-f]{2}){1,64})\.kv")
_DRAFT = re.compile(r"\.[0-9a-f]+\.kv\.tmp")
_MAX_STORE_BYTES = 1 << 16
_OURS_ONLY = 0o600
_SAFELY = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class StoreFolder:
    """`rank-<n>` of a store, held by this process alone until `close`.

    Args:
        path: of the store: new, empty, or one of the same description.
        option: what the user calls it by, for messages.

    Raises:
        UserError: it is something else's, in use, or cannot be written to.
    """

    def __init__(self, path: Path, description: StoreDescription, option: str) -> None:
        self.name = f"{option} {path}"
        self._path, self._rank = path, description.rank
        self._numbers = itertools.count()
        try:
            path.mkdir(0o700, parents=True, exist_ok=True)
            self._describe(path, description)
            self._folder = self._open_rank(path / f"rank-{description.rank}")
            self._lock = self._take_lock()
            for name in os.listdir(self._folder):
                if _DRAFT.fullmatch(name):
                    self.remove_draft(name)
        except OSError as error:
            raise UserError(f"{self.name} cannot be used: {error.strerror}") from None

    def keys(self) -> Iterator[bytes]:
        """Of what may be a block."""
        for name in os.listdir(self._folder):
            if match := _BLOCK.fullmatch(name):
                yield bytes.fromhex(match[1])

    def open(self, key: bytes, flags: int = os.O_RDONLY) -> int:
        """A descriptor of a block's regular file. Raises OSError."""
        return _open_regular(_block_name(key), flags, self._folder)

    def create(self) -> tuple[str, int]:
        """A new hidden file: its name and descriptor. Raises OSError."""
        name = self._draft_name()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFELY
        return name, os.open(name, flags, _OURS_ONLY, dir_fd=self._folder)

    def publish(self, draft: str, key: bytes, *, sync: bool) -> None:
        """Makes a hidden file the block's; with `sync` for good. Raises OSError, also where
        something that is not a file has its name."""
        name = _block_name(key)
        if self._exists(name) and not self._is_regular(name):
            raise FileExistsError(errno.EEXIST, "what has a block's name is not a file")
        os.rename(draft, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        if sync:
            os.fsync(self._folder)

    def withdraw(self, key: bytes) -> str:
        """The block's file becomes hidden again: its new name. Raises OSError."""
        draft = self._draft_name()
        os.rename(_block_name(key), draft, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        return draft

    def remove(self, key: bytes) -> None:
        """Deletes the block's file, if there is one."""
        self._remove(_block_name(key))

    def remove_draft(self, name: str) -> None:
        self._remove(name)

    def close(self) -> None:
        os.close(self._lock)
        os.close(self._folder)

    def delete(self) -> None:
        """Of a folder that is closed: this rank's part is gone, with the last one the store."""
        shutil.rmtree(self._path / f"rank-{self._rank}", ignore_errors=True)
        with contextlib.suppress(OSError):  # others are there, or were faster
            if not any(self._path.glob("rank-*")):
                (self._path / _STORE).unlink()
                self._path.rmdir()

    def _describe(self, path: Path, description: StoreDescription) -> None:
        """Says in a new store what it is; compares in an old one."""
        ours = {"format": VERSION, **asdict(description)}
        del ours["rank"]
        if not os.path.lexists(path / _STORE):
            others = [name for name in os.listdir(path) if not _STORE_DRAFT.fullmatch(name)]
            if others and _STORE not in others:
                raise UserError(
                    f"{self.name} is not empty and holds no contexts: name another folder"
                )
            draft = path / f".store-{description.rank}.json.tmp"
            draft.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFELY
            with open(os.open(draft, flags, _OURS_ONLY), "w") as file:
                json.dump(ours, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.rename(draft, path / _STORE)
        theirs = self._read_store(path / _STORE)
        names = ["format", *(field.name for field in fields(StoreDescription))]
        for name in names:
            if name in ("rank", "model") or theirs.get(name) == ours[name]:
                continue
            there, here = (values.get(name) for values in (theirs, ours))
            if name == "fingerprint":
                name = "model"
                there, here = f"{theirs.get('model')} ({there})", f"{ours['model']} ({here})"
            raise UserError(
                f"{self.name} was made with {name} {there}, here it is {here}: "
                "use another folder or delete it"
            )

    def _read_store(self, path: Path) -> dict[str, Any]:
        try:
            with open(_open_regular(path, os.O_RDONLY), "rb") as file:
                values = json.loads(file.read(_MAX_STORE_BYTES))
            if isinstance(values, dict):
                return values
        except (OSError, ValueError, RecursionError):
            pass
        raise UserError(f"{self.name}: {_STORE} is damaged: use another folder or delete it")

    def _open_rank(self, path: Path) -> int:
        path.mkdir(0o700, exist_ok=True)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def _take_lock(self) -> int:
        lock = _open_regular("lock", os.O_RDWR | os.O_CREAT, self._folder)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            os.close(self._folder)
            raise UserError(
                f"{self.name} is in use by another process: use another folder"
            ) from None
        return lock

    def _draft_name(self) -> str:
        return f".{next(self._numbers):x}.kv.tmp"

    def _exists(self, name: str) -> bool:
        try:
            os.stat(name, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def _is_regular(self, name: str) -> bool:
        return stat.S_ISREG(os.stat(name, dir_fd=self._folder, follow_symlinks=False).st_mode)

    def _remove(self, name: str) -> None:
        try:
            if self._is_regular(name):
                os.unlink(name, dir_fd=self._folder)
        except OSError:
            pass  # gone already, or not ours to delete any more


def _block_name(key: bytes) -> str:
    return f"{key.hex()}.kv"


def _open_regular(name: str | Path, flags: int, folder: int | None = None) -> int:
    descriptor = os.open(name, flags | _SAFELY, _OURS_ONLY, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a file")
    return descriptor
