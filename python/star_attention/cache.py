"""What is kept between runs, in the user's folders; nothing in them is needed."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """What can be made again; it need not exist."""
    return _folder("XDG_CACHE_HOME", ".cache")


def state_folder() -> Path:
    """What cannot; it need not exist."""
    return _folder("XDG_STATE_HOME", ".local/state")


def _folder(variable: str, usual: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / usual) / "star_attention"
