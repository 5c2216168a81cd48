"""Whether ranks have the same model."""

from __future__ import annotations

import hashlib
from pathlib import Path

from star_attention.errors import UserError

_SAMPLES, _SAMPLE_BYTES = 64, 4096
_SUFFIXES = {".json", ".safetensors", ".gguf", ".plan", ".engine", ".bin"}


def fingerprint(path: Path) -> str:
    """A hash of the names, sizes and some of the bytes of a model's files: a folder's, or one
    file's. Not of all bytes, which would take as long as loading them.

    Raises:
        UserError: a file cannot be read.
    """
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in _SUFFIXES)
    digest = hashlib.sha256()
    try:
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            with file.open("rb") as data:
                for index in range(_SAMPLES):
                    data.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
                    digest.update(data.read(_SAMPLE_BYTES))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:16]
