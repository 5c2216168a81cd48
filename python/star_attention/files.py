"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Replaces a file; what cannot be written leaves the old one, or none. Raises OSError."""
    path = path.resolve()
    if path.exists() and not path.is_file():  # a pipe, /dev/stdout
        path.write_bytes(data)
        return
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
