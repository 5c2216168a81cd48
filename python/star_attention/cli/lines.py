"""Lines that people type, or a program sends."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator

import click

from star_attention.cache import state_folder

_PROMPT = "> "
_HISTORY_LINES = 1000


def are_typed() -> bool:
    """Whether somebody sits at a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def lines(commands: Collection[str]) -> Iterator[str]:
    """What comes, without white space around it. Where it is typed, with a prompt, the lines of
    earlier runs, and commands that Tab completes; without readline, with the prompt alone. Ctrl-C
    begins a new line."""
    if not are_typed():
        yield from map(str.strip, sys.stdin)
        return
    remember = _editing(commands)
    while True:
        try:
            line = input(_PROMPT).strip()
        except KeyboardInterrupt:
            click.echo()
            continue
        except EOFError:
            click.echo()
            return
        remember()
        yield line


def _editing(commands: Collection[str]) -> Callable[[], None]:
    """Turns readline on; what keeps the lines that came so far for the next run."""
    try:
        import readline
    except ImportError:
        return lambda: None

    def complete(text: str, index: int) -> str | None:
        found = [each for each in commands if text and each.startswith(text)]
        return found[index] if index < len(found) else None

    def remember() -> None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(0o700, parents=True, exist_ok=True)
            path.touch(0o600)
            readline.write_history_file(path)

    path = state_folder() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY_LINES)
    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    return remember
