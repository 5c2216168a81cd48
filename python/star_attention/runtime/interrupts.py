"""Where Ctrl-C may strike: between orders and while an engine computes, not in the books."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_depth = 0  # of `held`; only the main thread gets signals
_pending = False


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _note(*_: Any) -> None:
    global _pending
    _pending = True


@contextlib.contextmanager
def held() -> Iterator[None]:
    """An interrupt waits for the end of the block."""
    global _depth, _pending
    if not _is_main() or signal.getsignal(signal.SIGINT) not in (signal.default_int_handler, _note):
        yield
        return
    if not _depth:
        _pending = False
        signal.signal(signal.SIGINT, _note)
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if _pending:
                _pending = False
                raise KeyboardInterrupt


@contextlib.contextmanager
def allowed() -> Iterator[None]:
    """Inside `held`: an interrupt strikes at once."""
    global _pending
    if not _depth or not _is_main():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if _pending:
            _pending = False
            raise KeyboardInterrupt
        yield
    finally:
        signal.signal(signal.SIGINT, _note)
