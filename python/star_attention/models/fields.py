"""Values of a file that nobody has checked."""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any

from star_attention.errors import UserError, reason_of

_MOST = (1 << 31) - 1


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: there is none.
    """
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: the folder has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {reason_of(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {reprlib.repr(content)}: it should be a JSON object")
    return content


class Fields:
    """An object's values by name; null is as if it were not there.

    Every method raises UserError for a value of another kind, and for one that is missing, unless
    there is a default.

    Args:
        source: what the messages call it.
    """

    def __init__(self, values: Any, source: str) -> None:
        if not isinstance(values, dict):
            raise UserError(f"{source} is {reprlib.repr(values)}: it should be an object")
        self._values, self._source = values, source

    def __contains__(self, name: str) -> bool:
        """Whether it is there, as null perhaps."""
        return name in self._values

    def get(self, name: str) -> Any:
        """As it is; None if it is missing."""
        return self._values.get(name)

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
            raise self._refusal(name, f"use a whole number from {least} to {_MOST}")
        return value

    def number(self, name: str, default: float | None = None, least: float = 0.0) -> float:
        """A finite one, more than `least`."""
        value = self._value(name, default)
        if not _is_number(value) or not least < value < math.inf:
            raise self._refusal(name, f"use a number above {least:g}")
        try:
            return float(value)
        except OverflowError:
            raise self._refusal(name, "use a smaller number") from None

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` finite numbers above 0."""
        values = self._value(name, None)
        is_list = isinstance(values, list) and len(values) == count
        if not is_list or not all(_is_number(value) and 0 < value < math.inf for value in values):
            raise self._refusal(name, f"use a list of {count} numbers above 0")
        try:
            return tuple(map(float, values))
        except OverflowError:
            raise self._refusal(name, "use smaller numbers") from None

    def objects(self) -> list[str]:
        """Names of the values that are objects."""
        return [name for name, value in self._values.items() if isinstance(value, dict)]

    def flag(self, name: str) -> bool:
        """False by default."""
        value = self._value(name, False)
        if not isinstance(value, bool):
            raise self._refusal(name, "use true or false")
        return value

    def word(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self._refusal(name, "use a word")
        return value

    def fields(self, name: str) -> Fields:
        """An object; empty by default."""
        return Fields(self._value(name, {}), f"{self._source}: {name}")

    def tokens(self, name: str) -> tuple[int, ...]:
        """A token, or a list of them; none by default."""
        value = self._value(name, [])
        tokens = value if isinstance(value, list) else [value]
        if not all(isinstance(t, int) and not isinstance(t, bool) for t in tokens):
            raise self._refusal(name, "use token ids")
        return tuple(tokens)

    def _value(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None:
            raise UserError(f"{self._source} lacks {name!r}")
        return value

    def _refusal(self, name: str, right: str) -> UserError:
        return UserError(f"{self._source}: {name} is {reprlib.repr(self.get(name))}: {right}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Those of a Hugging Face folder's config.json and generation_config.json together, as far as
    these are there.

    Raises:
        UserError: one of them is damaged.
    """
    files = (folder / name for name in ("config.json", "generation_config.json"))
    found = (
        Fields(read_json(file), file.name).tokens("eos_token_id") for file in files if file.exists()
    )
    return tuple(dict.fromkeys(token for tokens in found for token in tokens))
