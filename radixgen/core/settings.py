"""The one place where environment variables are read."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Where radixgen keeps the embedded model: `RADIXGEN_CACHE`, else `radixgen` in the user's cache."""
    chosen = os.environ.get("RADIXGEN_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "radixgen"
