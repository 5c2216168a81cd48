"""GGUF models in several files."""

from __future__ import annotations

import re
from pathlib import Path

from star_attention.errors import UserError

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def split_files(path: Path) -> list[Path]:
    """The files of the model that `path`, one of them, belongs to: `NAME-00001-of-0000N.gguf` and
    so on, or `path` alone.

    Raises:
        UserError: one is missing.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    name, _, count = match.groups()
    files = []
    for number in range(1, max(1, int(count)) + 1):
        files.append(path.with_name(f"{name}-{number:05}-of-{count}.gguf"))
        if not files[-1].exists():
            raise UserError(f"{files[-1]} is missing, of the {int(count)} files of that model")
    return files
