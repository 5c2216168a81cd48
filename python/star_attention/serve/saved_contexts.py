"""Named contexts on disk: what is said of them as JSON, their tokens as .npy, no pickles."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from star_attention.errors import UserError
from star_attention.models.tokenizer import Tokenizer
from star_attention.serve.api import ContextName

logger = logging.getLogger("star_attention.serve")

_PROBE = "The quick brown fox,\n\tjumps over 12345 lazy dogs \N{EM DASH} na\u00efve \u4f60\u597d."


class SavedFile(BaseModel):
    name: str
    bytes: int


class SavedContext(BaseModel):
    """What is said of a context. `tokenizer` and `sha256` tell whether its tokens still count."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    name: ContextName
    created: float
    bytes: int
    files: list[SavedFile]
    pinned: bool
    ttl_seconds: float | None
    last_used: float | None
    questions: int
    tokens: int
    tokenizer: str
    sha256: str


def fingerprint(tokenizer: Tokenizer) -> str:
    """Differs between tokenizers that read a text differently."""
    tokens = [tokenizer.vocab_size, tokenizer.uses_chat, *tokenizer.context_tokens(_PROBE)]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


class SavedContexts:
    """A folder; only files of the form <name>.json and <name>.npy in it are touched.

    Raises:
        UserError: nothing can be written there.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self._folder = folder
        self._fingerprint = fingerprint(tokenizer)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(
                f"--context-dir: {folder} cannot be written: {error.strerror}: use another"
            ) from None

    def write(self, said: dict[str, Any], token_ids: np.ndarray, tokens_too: bool) -> bool:
        """Each file is written beside and renamed; the tokens only if wanted. Whether it went well:
        if not, the log says why, and the context is there until the server ends."""
        name = said["name"]
        saved = SavedContext(
            **said,
            tokens=len(token_ids),
            tokenizer=self._fingerprint,
            sha256=_digest(token_ids),
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if tokens_too:
                with self._replacing(f"{name}.npy") as file:
                    np.save(file, token_ids, allow_pickle=False)
            with self._replacing(f"{name}.json") as file:
                file.write(saved.model_dump_json().encode())
        except OSError as error:
            logger.warning("context %s is not saved: %s", name, error.strerror)
            return False
        return True

    def remove(self, name: str) -> None:
        for ending in (".json", ".npy"):
            try:
                (self._folder / (name + ending)).unlink(missing_ok=True)
            except OSError as error:
                logger.warning("context %s stays on disk: %s", name, error.strerror)

    def read(self) -> list[tuple[SavedContext, np.ndarray]]:
        """All that are whole and were made with this tokenizer; others are skipped with a line."""
        found = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                saved = SavedContext.model_validate_json(path.read_bytes())
                if saved.name != path.stem:
                    raise ValueError(f"it calls itself {saved.name}")
                if saved.tokenizer != self._fingerprint:
                    raise ValueError("it was made for another model's tokenizer")
                token_ids = np.load(path.with_suffix(".npy"), allow_pickle=False)
                if (
                    token_ids.dtype != np.int32
                    or token_ids.ndim != 1
                    or not len(token_ids)
                    or len(token_ids) != saved.tokens
                    or _digest(token_ids) != saved.sha256
                ):
                    raise ValueError("its tokens are damaged")
            except (OSError, ValueError, EOFError, MemoryError) as error:
                reason = "its JSON is damaged" if isinstance(error, ValidationError) else error
                logger.warning("saved context %s is skipped: %s", path.name, reason)
                continue
            found.append((saved, token_ids))
        return found

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


def _digest(token_ids: np.ndarray) -> str:
    return hashlib.sha256(token_ids.tobytes()).hexdigest()
