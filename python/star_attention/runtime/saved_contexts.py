"""Contexts on disk: what is said of them as JSON, their tokens as .npy, no pickles.

Their KV is apart, in a store (`tiers.py`), whose blocks are found by the tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np

from star_attention.errors import UserError
from star_attention.models.fields import read_json
from star_attention.models.tokenizer import Tokenizer

CONTEXT_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_PROBE = "The quick brown fox,\n\tjumps over 12345 lazy dogs \N{EM DASH} na\u00efve \u4f60\u597d."


@dataclass(frozen=True)
class SavedContext:
    """What is said of a context.

    Attributes:
        files: `name` and `bytes` of each.
        tokenizer, sha256: tell whether its tokens still count.
        division: the `StarConfig` that its KV was made with; None: the server's choice.
    """

    name: str
    created: float
    bytes: int
    tokens: int
    tokenizer: str
    sha256: str
    files: tuple[dict[str, Any], ...] = ()
    pinned: bool = False
    ttl_seconds: float | None = None
    last_used: float | None = None
    questions: int = 0
    division: dict[str, Any] | None = None


_KINDS: dict[str, type | UnionType] = {
    "name": str,
    "created": float | int,
    "bytes": int,
    "tokens": int,
    "tokenizer": str,
    "sha256": str,
    "files": list,
    "pinned": bool,
    "ttl_seconds": float | int | None,
    "last_used": float | int | None,
    "questions": int,
    "division": dict | None,
}


def fingerprint(tokenizer: Tokenizer) -> str:
    """Differs between tokenizers that read a text differently."""
    tokens = [tokenizer.vocab_size, tokenizer.uses_chat, *tokenizer.context_tokens(_PROBE)]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


class SavedContexts:
    """A folder; only files of the form <name>.json and <name>.npy in it are touched.

    Args:
        option: what the user calls the folder by, for messages.

    Raises:
        UserError: nothing can be written there.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, option: str = "--context-dir") -> None:
        self._folder = folder
        self._fingerprint = fingerprint(tokenizer)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(
                f"{option}: {folder} cannot be written: {error.strerror}: use another"
            ) from None

    def write(
        self, said: Mapping[str, Any], token_ids: np.ndarray, tokens_too: bool = True
    ) -> None:
        """Each file is written beside and renamed; the tokens, int32 [n], only if wanted.

        Raises:
            UserError: the name is no name.
            OSError
        """
        saved = SavedContext(
            **said,
            tokens=len(token_ids),
            tokenizer=self._fingerprint,
            sha256=_digest(token_ids),
        )
        if not re.fullmatch(CONTEXT_NAME, saved.name):
            raise UserError(
                f"the context's name is {saved.name!r}: use letters, digits, '.', '_' and '-', 64 "
                "at most, of which the first is a letter or a digit"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        if tokens_too:
            with self._replacing(f"{saved.name}.npy") as file:
                np.save(file, token_ids, allow_pickle=False)
        with self._replacing(f"{saved.name}.json") as file:
            file.write(json.dumps(asdict(saved)).encode())

    def remove(self, name: str) -> None:
        """Raises OSError."""
        for ending in (".json", ".npy"):
            (self._folder / (name + ending)).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Of what may be a context."""
        return sorted(path.stem for path in self._folder.glob("*.json"))

    def read(self, name: str) -> tuple[SavedContext, np.ndarray]:
        """A context and its tokens, int32 [n].

        Raises:
            UserError: it is not there, not whole, or was made with another tokenizer.
        """
        path = self._folder / f"{name}.json"
        saved = _checked(read_json(path), path)
        if saved.name != name:
            raise UserError(f"{path}: it calls itself {saved.name}")
        if saved.tokenizer != self._fingerprint:
            raise UserError(f"{path}: it was made for another model's tokenizer")
        try:
            token_ids = np.load(path.with_suffix(".npy"), allow_pickle=False)
        except (OSError, ValueError, EOFError, MemoryError) as error:
            raise UserError(f"{path}: its tokens cannot be read: {error}") from None
        if (
            token_ids.dtype != np.int32
            or token_ids.ndim != 1
            or not len(token_ids)
            or len(token_ids) != saved.tokens
            or _digest(token_ids) != saved.sha256
        ):
            raise UserError(f"{path}: its tokens are damaged")
        return saved, token_ids

    @contextlib.contextmanager
    def _replacing(self, name: str) -> Iterator[Any]:
        handle, beside = tempfile.mkstemp(prefix=".", suffix=".unfinished", dir=self._folder)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
            os.replace(beside, self._folder / name)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise


def _checked(values: dict[str, Any], path: Path) -> SavedContext:
    names = [field.name for field in fields(SavedContext)]
    known = {name: values[name] for name in names if name in values}
    for name, value in known.items():
        kind = _KINDS[name]
        is_right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not is_right or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"{path} is damaged: {name} is {str(value)[:40]}")
    try:
        saved = SavedContext(**known)
    except TypeError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not re.fullmatch(CONTEXT_NAME, saved.name) or not all(map(_is_file, saved.files)):
        raise UserError(f"{path} is damaged")
    return saved


def _is_file(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and isinstance(value.get("bytes"), int)
    )


def _digest(token_ids: np.ndarray) -> str:
    return hashlib.sha256(token_ids.tobytes()).hexdigest()
