"""Tokenises a huge text in a process of its own.

The tokens of ten million characters, as `tokenizers` has them, take two gigabytes, of which much
stays with a process, and tenths of a second in which no other thread of it runs.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from star_attention.errors import UserError
from star_attention.models.kept_tokens import Tokenized

_running: set[subprocess.Popen] = set()


def encode_apart(state: str, text: str, begins: Sequence[int]) -> Tokenized:
    """A text's tokens, and the index of the first at or behind each of these characters.

    Args:
        state: of the `tokenizers.Tokenizer`, as JSON.

    Raises:
        UnicodeEncodeError: the text has half of a surrogate pair.
        UserError: the process was ended.
    """
    encoded = state.encode()
    head = json.dumps({"state": len(encoded), "begins": list(begins)}).encode() + b"\n"
    data = b"".join((head, encoded, text.encode()))
    command = [sys.executable, "-m", __name__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        _running.add(process)
        try:
            output, _ = process.communicate(data)
        finally:
            _running.discard(process)
    if process.returncode:
        raise UserError(
            "the text cannot be tokenised: the process that did so ended with code "
            f"{process.returncode}; it may be too large for this machine's memory"
        )
    found = np.frombuffer(output, np.int32)
    count = len(found) - len(begins)
    return found[:count], found[count:].tolist()


def end_all() -> None:
    """Whatever is tokenised now is not wanted any more."""
    for process in list(_running):
        process.kill()


def first_tokens(encoded: Any, begins: Sequence[int], length: int) -> list[int]:
    """Of a `tokenizers.Encoding` of a text of so many characters: the index of the first token at
    or behind each of these."""
    firsts = []
    for begin in begins:
        # A tokenizer may drop characters.
        behind = map(encoded.char_to_token, range(begin, length))
        firsts.append(next((token for token in behind if token is not None), len(encoded)))
    return firsts


def _main() -> None:
    from tokenizers import Tokenizer

    with contextlib.suppress(OSError):  # where memory runs out, rather this process than a server
        Path("/proc/self/oom_score_adj").write_text("1000")
    head = json.loads(sys.stdin.buffer.readline())
    backend = Tokenizer.from_str(sys.stdin.buffer.read(head["state"]).decode())
    text = sys.stdin.buffer.read().decode()
    encoded = backend.encode(text, add_special_tokens=False)
    firsts = first_tokens(encoded, head["begins"], len(text))
    sys.stdout.buffer.write(np.array([*encoded.ids, *firsts], np.int32))


if __name__ == "__main__":
    _main()
