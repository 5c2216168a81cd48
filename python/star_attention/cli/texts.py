"""Texts that a command reads: files, and standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from star_attention.errors import UserError


def read_texts(option: str, names: Sequence[str]) -> list[str]:
    """The texts of files; `-` is standard input. A byte order mark is not part of them.

    Raises:
        UserError: one cannot be read, is no UTF-8 text, or is blank; or two are standard input.
    """
    if names.count("-") > 1:
        raise UserError(f"{option} - can be given once")
    return [_read_text(option, name) for name in names]


def _read_text(option: str, name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"{option} {name} cannot be read: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{option} {name} is not UTF-8 text: use a text file") from None
    if "\0" in text:
        raise UserError(f"{option} {name} is binary: use a text file")
    if not text.strip():
        raise UserError(f"{option} {name} is empty: give it some text")
    return text
