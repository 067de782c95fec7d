"""What a run writes: JSON lines while it goes, whole files at its end, and where its code came from."""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import cnnlib
from cnnlib.errors import UserError

RUN_FILES = ("config.json", "metrics.jsonl", "results.json", "table.md", "accuracy.png")
GROWTH_FILES = ("config.json", "results.json", "table.md", "growth.png")


def plain(value: Any) -> Any:
    """A JSON-ready copy in which a number that is not finite is None, since JSON has no word for it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any) -> str:
    """Indented JSON, with a newline at its end."""
    return json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def check_folder(folder: Path) -> None:
    """Raises UserError where the folder of a run cannot be made or written; makes nothing."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


def open_folder(folder: Path) -> str | None:
    """Makes room for a run in its folder. Files of an earlier run in it move to `earlier/TIME/` inside it, TIME being
    when the earlier run began; returns that place, or None. Raises UserError where the folder cannot be written."""
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # lexists and lstat: a link that leads nowhere is in the way as well
        old = [folder / name for name in dict.fromkeys((*RUN_FILES, *GROWTH_FILES)) if os.path.lexists(folder / name)]
        if not old:
            return None
        began = min(path.lstat().st_mtime for path in old)
        stamp = time.strftime("%Y-%m-%dT%H-%M-%S", time.localtime(began))
        place = folder / "earlier" / stamp
        number = 1
        while place.exists():
            number += 1
            place = folder / "earlier" / f"{stamp}-{number}"
        place.mkdir(parents=True)
        for path in old:
            path.rename(place / path.name)
        return str(place)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a file beside `path` and renames it, so that `path` is never seen half-written."""
    beside = path.with_name(f".{path.name}.part{path.suffix}")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


class JsonLines:
    """A file of one JSON object a line, each line flushed as it is written."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("w", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(plain(line), allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def versions() -> dict[str, str]:
    """Versions of Python, of cnnlib and of the libraries that a result depends on."""
    import platform

    libraries = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return {"python": platform.python_version(), **libraries, "cnnlib": cnnlib.__version__}


def commit() -> str | None:
    """The commit of cnnlib's own checkout, with `-dirty` where tracked files differ from it; None outside git."""
    package = Path(cnnlib.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True, check=False)
        except FileNotFoundError:  # no git on this machine
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside somebody else's checkout: only a tracked file tells that this one is ours.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    revision = git("rev-parse", "HEAD")
    if revision is None:
        return None
    return revision + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
