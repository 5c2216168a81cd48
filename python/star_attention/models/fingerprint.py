"""Whether ranks have the same model."""

from __future__ import annotations

import hashlib
from pathlib import Path

from star_attention.errors import UserError
from star_attention.models.checkpoint import model_files

_SAMPLES, _SAMPLE_BYTES = 64, 4096
_SUFFIXES = {".json", ".safetensors", ".gguf", ".plan", ".engine", ".bin"}


def fingerprint(path: Path) -> str:
    """A hash of the names, sizes and some of the bytes of a model's files. Not of all bytes, which
    would take as long as loading them.

    Raises:
        UserError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for file in model_files(path):
            if file.suffix not in _SUFFIXES:
                continue
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            with file.open("rb") as data:
                for index in range(_SAMPLES):
                    data.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
                    digest.update(data.read(_SAMPLE_BYTES))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:16]
