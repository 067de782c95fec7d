"""Where things are kept between runs that could be made again: decoded data, compiled kernels and programs."""

from __future__ import annotations

import grp
import logging
import os
import pwd
import stat
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike


def cache_folder(part: str) -> Path:
    """`$XDG_CACHE_HOME/cnnlib/PART`, else `~/.cache/cnnlib/PART`; without a home, in the temporary folder.

    Links in the path are followed here. Otherwise a link could change after `changeable_by_others` has looked.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(base) if base else Path.home() / ".cache"
    except RuntimeError:  # no HOME, and no entry in the list of users
        root = private_folder(Path(tempfile.gettempdir()) / f"cnnlib-{os.getuid()}")
    return (root / "cnnlib" / part).resolve()


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


def kept_array(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray | None:
    """Return the array that an earlier run wrote; None where it is missing, damaged, or of another shape or type."""
    try:
        array: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # missing, unreadable, cut off
        return None
    return array if array.shape == shape and array.dtype == dtype else None


def keep_array(path: Path, array: np.ndarray) -> None:
    """Write an array for later runs. Processes that read meanwhile see the whole file or none.

    Where it cannot be written, a warning says so, and the next run makes the array again.
    """
    try:
        make(path.parent)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            np.save(file, array, allow_pickle=False)
        Path(file.name).replace(path)
    except OSError as error:
        logging.getLogger(__name__).warning("examples are not kept for other runs: %s", error)


def make(folder: Path) -> None:
    """Make a folder and those above it that are missing, for this user alone whatever the umask.

    Raises OSError where it cannot be made.
    """
    if not folder.is_dir():
        make(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def is_writable(folder: Path) -> bool:
    """Whether files can be made in the folder, which is made if need be."""
    try:
        make(folder)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def changeable_by_others(path: Path) -> Path | None:
    """Find what lets other users than this one and root change a file or folder: itself, or a folder above it.

    Others may write to a sticky folder above it, such as /tmp: they cannot replace there what is not theirs. This
    user's private group may write: it has no other members. Raises OSError where nothing is there.
    """
    for place in (path, *path.parents):
        found = place.lstat()
        others = 0o002 if is_private_group(found.st_gid) else 0o022
        is_shared = found.st_mode & others and not (found.st_mode & stat.S_ISVTX and place != path)
        if is_shared or found.st_uid not in (0, os.getuid()) or stat.S_ISLNK(found.st_mode):
            return place
    return None


def is_private_group(group: int) -> bool:
    """Whether a group is the one that the system made for this user alone, as Debian and Fedora do."""
    try:
        user, known = pwd.getpwuid(os.getuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return group == user.pw_gid and known.gr_name == user.pw_name and set(known.gr_mem) <= {user.pw_name}


def refusal(folder: Path) -> str | None:
    """Say why no code is loaded from a folder or kept in it, which is made if need be; None where it is."""
    if not is_writable(folder):
        return f"{folder} cannot be written"
    place = changeable_by_others(folder)
    return f"{place} can be changed by others (XDG_CACHE_HOME names another folder)" if place else None
