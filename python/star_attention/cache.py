"""What is kept between runs, in the user's cache folder."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Ours; it need not exist, and nothing in it is needed."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "star_attention"
