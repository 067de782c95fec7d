"""Read and write standard JSON and JSON Lines (one JSON object per line). No function leaves a file half-written."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from cnnlib.errors import UserError
from cnnlib.system.provenance import MOST_BYTES


def plain(value: Any) -> Any:
    """Return a copy of `value` for JSON. NaN and infinities become None, because JSON cannot express them."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: object) -> str:
    """Return `value` as indented JSON that ends in a newline."""
    return json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary path beside `path`, then rename the file, so that nobody sees `path` half-written."""
    beside = path.with_name(f".{path.name}.part{path.suffix}")
    with cannot_write(path):
        try:
            beside.unlink(missing_ok=True)  # if a link has this name, `write` would follow it
            write(beside)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


class JsonLines:
    """A file with one JSON object per line, flushed after every write."""

    def __init__(self, path: Path, lines: Sequence[Mapping[str, object]] = ()) -> None:
        """Open the file and replace its content by `lines`. Raises UserError if the file cannot be written."""
        self._path = path
        with cannot_write(path):
            write_whole(path, lambda beside: beside.write_text(_json_lines(lines), encoding="utf-8"))
            self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, lines: Sequence[Mapping[str, object]]) -> None:
        """Append `lines` in one write. If the process is killed, at worst the last line is truncated."""
        with cannot_write(self._path):
            self._file.write(_json_lines(lines))
            self._file.flush()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # disk full: `write` has already raised the error for these lines
            self._file.close()


def _json_lines(lines: Sequence[Mapping[str, object]]) -> str:
    return "".join(json.dumps(plain(line), allow_nan=False) + "\n" for line in lines)


def read_regular(path: Path) -> str:
    """Return the text of an untrusted file. Raises OSError if it is no regular file or exceeds `MOST_BYTES` bytes."""
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise OSError(f"{path} is no file of at most {MOST_BYTES} bytes")
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; None if the file does not exist or is not valid JSON."""
    try:
        text = read_regular(path)
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # fails for half a surrogate pair, which is no text
    except (OSError, ValueError, RecursionError):
        return None
    return value


def read_json_lines(path: Path) -> list[dict[str, object]]:
    """Return the objects of a JSON Lines file up to the first damaged line. If no file exists, return an empty list."""
    found: list[dict[str, object]] = []
    try:
        text = read_regular(path)
    except (OSError, ValueError):  # missing or unreadable
        return found
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # truncated: the run was killed
            break
        if not isinstance(value, dict):
            break
        found.append(value)
    return found


def finite(row: Mapping[str, object]) -> dict[str, object]:
    """Return `row` without None, NaN and infinite values. For example, a diverged lane (model) has a NaN loss."""
    return {key: value for key, value in plain(row).items() if value is not None}


def follow_json_lines(path: Path, begin: int, is_over: Callable[[], bool]) -> Iterator[list[dict[str, object]]]:
    """Yield the new objects of a growing JSON Lines file in batches. Start at byte `begin`.

    Stop when `is_over()` is true and all lines are read.
    """
    rest = b""
    with path.open("rb") as file:
        file.seek(begin)
        ends = False
        while not ends:
            ends = is_over()  # call before reading: lines written before the end are then not missed
            *whole, rest = (rest + file.read()).split(b"\n")
            yield [json.loads(line) for line in whole]


@contextlib.contextmanager
def cannot_write(path: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from error


def _not_through_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o644)
