"""Where things are kept between runs that could be made again: decoded data, compiled kernels and programs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder(part: str) -> Path:
    """`$XDG_CACHE_HOME/cnnlib/PART`, else `~/.cache/cnnlib/PART`; without a home, in the temporary folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(base) if base else Path.home() / ".cache"
    except RuntimeError:  # no HOME, and no entry in the list of users
        root = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    return root / "cnnlib" / part


def is_writable(folder: Path) -> bool:
    """Whether files can be made in the folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
