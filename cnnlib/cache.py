"""Where things are kept between runs that could be made again: decoded data, compiled kernels and programs."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def cache_folder(part: str) -> Path:
    """`$XDG_CACHE_HOME/cnnlib/PART`, else `~/.cache/cnnlib/PART`; without a home, in the temporary folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(base) if base else Path.home() / ".cache"
    except RuntimeError:  # no HOME, and no entry in the list of users
        root = private_folder(Path(tempfile.gettempdir()) / f"cnnlib-{os.getuid()}")
    return root / "cnnlib" / part


def private_folder(folder: Path) -> Path:
    """`folder`, made for this user alone; another one where somebody else was first, since what lies there is run."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            return Path(tempfile.mkdtemp(prefix="cnnlib-"))
    return folder


def keep_file(path: Path, data: bytes) -> None:
    """Writes a file that other processes read and write as well: each sees one of them whole.

    Raises OSError where it cannot be written.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as part:
        part.write(data)
    Path(part.name).replace(path)


def is_writable(folder: Path) -> bool:
    """Whether files can be made in the folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
