"""The file of one block's KV on one rank, and the header that says whose it is.

    magic, version, length and checksum of the JSON, the JSON, then at multiples of 4096 bytes each
    layer's pages. The JSON has the description, the key, the shape and a checksum of each layer.

The checksums are xxh3_64.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import xxhash

VERSION = 1
MAGIC = b"STARKV\r\n"
_PREFIX = struct.Struct("<8sIIQ")
_ALIGNMENT = 4096
_MAX_JSON_BYTES = 1 << 20


class DamagedError(Exception):
    """A file is not what was written. The message says what is wrong."""


@dataclass(frozen=True)
class StoreDescription:
    """What stored KV belongs to: it is of no use to any other model, machine layout or rank.

    Attributes:
        model: its name, for people.
        fingerprint: of the model's files.
        dtype: of K and V.
        num_kv_heads: of one process.
        page_bytes: of one page in one layer on one process.
        rank: of this process, of num_ranks · tp.
        num_ranks, tp: Star Attention's ranks, and the processes that share a rank's model.
        quantization: of the weights that it was computed with; None: none.
    """

    model: str
    fingerprint: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    tokens_per_block: int
    page_bytes: int
    rank: int
    num_ranks: int
    tp: int
    quantization: str | None = None


@dataclass(frozen=True)
class BlockFile:
    """Where everything is in the file of a block of `num_pages` pages."""

    description: StoreDescription
    key: bytes
    num_pages: int

    @property
    def layer_bytes(self) -> int:
        return self.num_pages * self.description.page_bytes

    @property
    def layer_stride(self) -> int:
        """Bytes from one layer to the next."""
        return _aligned(self.layer_bytes)

    @cached_property
    def header_bytes(self) -> int:
        return _aligned(len(self.header([0] * self.description.num_layers)))

    @cached_property
    def total_bytes(self) -> int:
        return self.header_bytes + self.description.num_layers * self.layer_stride

    def header(self, checksums: Sequence[int]) -> bytes:
        """The file's first bytes, as many for any checksums."""
        about = asdict(self.description)
        del about["model"]  # a folder may be renamed
        values = {
            "description": about,
            "key": self.key.hex(),
            "shape": [self.description.num_layers, self.num_pages, self.description.page_bytes],
            "checksums": [f"{checksum:016x}" for checksum in checksums],
        }
        text = json.dumps(values).encode()
        return _PREFIX.pack(MAGIC, VERSION, len(text), checksum_of(text)) + text

    @classmethod
    def read(
        cls,
        description: StoreDescription,
        key: bytes,
        size: int,
        read: Callable[[int, int], bytes],
    ) -> tuple[BlockFile, list[int]]:
        """The file's layout and its layers' checksums.

        Args:
            size: of the file, in bytes.
            read: called with a number of bytes and where they start.

        Raises:
            DamagedError: it is not this description's file of this key, whole.
        """
        prefix = read(_PREFIX.size, 0)
        if len(prefix) < _PREFIX.size or not prefix.startswith(MAGIC):
            raise DamagedError("it does not start as such a file")
        _, version, length, checksum = _PREFIX.unpack(prefix)
        if version != VERSION:
            raise DamagedError(f"its version is {version}, not {VERSION}")
        if length > _MAX_JSON_BYTES:
            raise DamagedError("its header is too long")
        text = read(length, _PREFIX.size)
        if len(text) != length or checksum_of(text) != checksum:
            raise DamagedError("its header is damaged")
        try:
            values = json.loads(text)
            num_pages = values["shape"][1]
            checksums = [int(each, 16) for each in values["checksums"]]
            # That the rest is as it should be is seen by writing it again.
            pages_at_most = size // description.page_bytes
            block = cls(description, key, num_pages)
            right = type(num_pages) is int and 0 < num_pages <= pages_at_most
            if not right or block.header(checksums) != prefix + text:
                raise DamagedError("it is another block's or another model's")
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            raise DamagedError("its header is not ours") from None
        if len(checksums) != description.num_layers or size != block.total_bytes:
            raise DamagedError(f"it has {size} bytes, not {block.total_bytes}")
        return block, checksums


def checksum_of(data: bytes | np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(data)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
