"""The cache folder. It holds files that cnnlib can make again: decoded data, compiled kernels and compiled programs."""

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
    """Return `$XDG_CACHE_HOME/cnnlib/PART`; if the variable is not set, return `~/.cache/cnnlib/PART`.

    If the user has no home folder, use the temporary folder. Links in the returned path are resolved, because a link
    could change after the `changeable_by_others` check.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(base) if base else Path.home() / ".cache"
    except RuntimeError:  # no HOME, and the user database has no entry
        root = private_folder(Path(tempfile.gettempdir()) / f"cnnlib-{os.getuid()}")
    return (root / "cnnlib" / part).resolve()


def private_folder(folder: Path) -> Path:
    """Make `folder` for this user only, and return it. If `folder` exists and is not private, return a new folder.

    Other users must not write to the folder, because cnnlib runs compiled code from it.
    """
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            return Path(tempfile.mkdtemp(prefix="cnnlib-"))
    return folder


def keep_file(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file and rename that file to `path`, so that nobody sees a half-written file.

    Raises OSError if the file cannot be written.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as part:
        part.write(data)
    Path(part.name).replace(path)


def kept_array(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray | None:
    """Return the array in the file `path`; None if the file is missing or damaged, or has another shape or type."""
    try:
        array: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # missing, unreadable or truncated
        return None
    return array if array.shape == shape and array.dtype == dtype else None


def keep_array(path: Path, array: np.ndarray) -> None:
    """Write an array for later runs. A process that reads at the same time sees the whole file or no file.

    If the write fails, log a warning; the next run then makes the array again.
    """
    try:
        make(path.parent)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            np.save(file, array, allow_pickle=False)
        Path(file.name).replace(path)
    except OSError as error:
        logging.getLogger(__name__).warning("examples are not kept for other runs: %s", error)


def make(folder: Path) -> None:
    """Make a folder and its missing parents for this user only, whatever the umask. Raises OSError on failure."""
    if not folder.is_dir():
        make(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def is_writable(folder: Path) -> bool:
    """Return whether this process can create files in the folder. Make the folder if it is missing."""
    try:
        make(folder)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def changeable_by_others(path: Path) -> Path | None:
    """Find where other users can change `path`: in `path` itself or in one of its parents. Return None if they cannot.

    Every user except this user and root is another user. A sticky parent such as /tmp is safe, because users can
    replace only their own files in it. This user's private group is safe, because it has no other members. Raises
    OSError if `path` is missing.
    """
    for place in (path, *path.parents):
        found = place.lstat()
        others = 0o002 if is_private_group(found.st_gid) else 0o022
        is_shared = found.st_mode & others and not (found.st_mode & stat.S_ISVTX and place != path)
        if is_shared or found.st_uid not in (0, os.getuid()) or stat.S_ISLNK(found.st_mode):
            return place
    return None


def is_private_group(group: int) -> bool:
    """Return whether a group is this user's private group, which Debian and Fedora make for each user."""
    try:
        user, known = pwd.getpwuid(os.getuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return group == user.pw_gid and known.gr_name == user.pw_name and set(known.gr_mem) <= {user.pw_name}


def refusal(folder: Path) -> str | None:
    """Return why compiled code in `folder` is not safe; None if it is safe. Make `folder` if it is missing."""
    if not is_writable(folder):
        return f"{folder} cannot be written"
    place = changeable_by_others(folder)
    return f"{place} can be changed by others (XDG_CACHE_HOME names another folder)" if place else None
