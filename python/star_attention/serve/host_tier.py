"""The host tier's folder: memory that the ranks map, and that outlives them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from star_attention.errors import UserError

_MEMORY = Path("/dev/shm")
_PREFIX = "star-attention-"


@contextmanager
def host_tier(gib: float, processes: int) -> Iterator[Path]:
    """An empty folder in memory, which is gone afterwards. Those of programs that were killed are
    removed.

    Args:
        gib: that each of so many processes may keep there.

    Raises:
        UserError: there is not so much memory.
    """
    _remove_left()
    free = shutil.disk_usage(_MEMORY).free
    if gib * processes * 2**30 > free:
        raise UserError(
            f"--host-cache-gib {gib:g} takes {gib * processes:g} GiB of {_MEMORY}, which has "
            f"{free / 2**30:.1f}: use at most {free / 2**30 / processes:.1f}, or give it more "
            "(docker: --shm-size)"
        )
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_MEMORY))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left() -> None:
    for folder in _MEMORY.glob(f"{_PREFIX}*-*"):
        process = folder.name.removeprefix(_PREFIX).split("-")[0]
        if process.isdecimal() and not Path("/proc", process).exists():
            shutil.rmtree(folder, ignore_errors=True)
