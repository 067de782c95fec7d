"""The folder of a run: lock it for one writer, move an earlier run aside, and record the sessions.

A session is one process that trained the run: the first process, and one more per resume.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cnnlib.errors import UserError
from cnnlib.system import files, provenance

RUN_FILES = ("config.json", "environment.json", "log.txt", "metrics.jsonl", "results.json", "table.md", "accuracy.png")
GROWTH_FILES = ("config.json", "results.json", "table.md", "growth.png")
RECORD = "run.json"
ARMS, CHECKPOINTS, PREDICTIONS, UNREADABLE = "arms", "checkpoints", "predictions", "unreadable"
PROFILES, TENSORBOARD = "profile", "tensorboard"
JOBS = "jobs"
FOLDERS = (ARMS, CHECKPOINTS, PREDICTIONS, PROFILES, TENSORBOARD, UNREADABLE, JOBS, "wandb")
OURS = dict.fromkeys((*RUN_FILES, *GROWTH_FILES, RECORD, "git.diff", *FOLDERS))
"""All names that a run may leave in its folder, except its lock and `earlier`."""
LOCK = ".lock"
FORMAT = 2
"""Format of runs and their checkpoints. cnnlib 0.1 wrote format 1."""
STATES = ("running", "finished", "interrupted", "failed")


def check(folder: Path) -> None:
    """Raise UserError if a run's folder cannot be created or written, or if a run is using it. Create nothing."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    with files.cannot_write(folder), tempfile.TemporaryFile(dir=there):
        pass
    if is_locked(folder):
        raise UserError(_in_use(folder))


def is_locked(folder: Path) -> bool:
    """Return whether a live process holds the lock of the folder."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:  # no lock file, so no run
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def locked(path: Path, patience: float, refusal: str) -> Iterator[None]:
    """Create the file `path` and lock it for this process. The system releases the lock if the process dies.

    Raise UserError if another process holds the lock for over `patience` seconds, or `path` cannot be created.
    """
    with files.cannot_write(path.parent):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(refusal) from None
                time.sleep(0.02)
            except OSError as error:
                raise UserError(f"cannot lock {path}: {error.strerror or error}") from error
        yield
    finally:
        os.close(descriptor)


def _last_session(folder: Path) -> dict[str, Any]:
    record = read_json(folder / RECORD)
    sessions = record.get("sessions") if isinstance(record, dict) else None
    return sessions[-1] if isinstance(sessions, list) and sessions and isinstance(sessions[-1], dict) else {}


def _in_use(folder: Path) -> str:
    last = _last_session(folder)
    who = f" (process {last['pid']} on {last.get('host')})" if "pid" in last else ""
    return f"a run is going on in {folder}{who}; wait for its end, or give another folder with --out"


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; None if the file does not exist or is not valid JSON."""
    try:
        text = files.read_regular(path)
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # fails for half a surrogate pair, which is no text
    except (OSError, ValueError, RecursionError):
        return None
    return value


def inside(folder: Path, path: Path) -> Path:
    """Return `path`. Raise UserError if `path`, with all links followed, is not in the folder of the run."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path} leads out of {folder}: nothing there is read or written")
    return path


class RunFolder:
    """A run's folder, locked by this process until the folder is closed or the process ends for any reason."""

    def __init__(self, path: Path) -> None:
        """Create and lock the folder. Raise UserError if it is locked or cannot be written."""
        self.path = path
        self.record: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            with files.cannot_write(path):
                path.mkdir(parents=True, exist_ok=True)
            # Another process that calls `is_locked` holds the lock for a moment, so wait up to 1 s.
            stack.enter_context(locked(path / LOCK, 1.0, _in_use(path)))
            self._locks = stack.pop_all()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._locks.close()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def make_room(self, keep: Sequence[str] = ()) -> str | None:
        """Move the files of an earlier run to `earlier/TIME/`, except those in `keep`. TIME is when that run began.

        Return the path of the new folder, or None if there was nothing to move.
        """
        folder = self.path
        with files.cannot_write(folder):
            # lexists and lstat also see a broken link, which would be in the way
            old = [folder / name for name in OURS if name not in keep and os.path.lexists(folder / name)]
            if not old:
                return None
            began = min(path.lstat().st_mtime for path in old)
            stamp = time.strftime("%Y-%m-%dT%H-%M-%S", time.localtime(began))
            inside(folder, folder / "earlier")
            place = folder / "earlier" / stamp
            number = 1
            while place.exists():
                number += 1
                place = folder / "earlier" / f"{stamp}-{number}"
            place.mkdir(parents=True)
            for path in old:
                path.rename(place / path.name)
            return str(place)

    def begin_session(self, record: dict[str, Any]) -> None:
        """Record that this process trains the run. `record` holds what to store in `run.json`."""
        began = {"began": provenance.now(), "host": platform.node(), "pid": os.getpid(), "state": "running"}
        sessions = [*self.record.get("sessions", []), began]
        self.record = {"id": secrets.token_hex(4), **self.record, **record, "sessions": sessions}
        self.write()

    def end_session(self, state: str, message: str | None = None) -> None:
        """Record how the session ended: `state` is finished, interrupted or failed."""
        if self.record:
            self.record["sessions"][-1] |= {"ended": provenance.now(), "state": state, "message": message}
            # The session may have failed because the disk is full. Then the record on the disk still says `running`.
            with contextlib.suppress(UserError) if state != "finished" else contextlib.nullcontext():
                self.write()

    def write(self) -> None:
        """Write the record to `run.json`."""
        files.write_whole(self / RECORD, lambda path: path.write_text(files.to_json(self.record)))

    def read_record(self) -> bool:
        """Read the record of earlier sessions. Return False if there is no readable record."""
        found = read_json(self / RECORD)
        if not isinstance(found, dict) or not is_record(found):
            return False
        self.record = found
        return True


def is_record(found: dict[str, Any]) -> bool:
    """Return whether `found` has the form that `begin_session` writes."""
    sessions = found.get("sessions")
    return (
        isinstance(found.get("id"), str)
        and 1 <= len(found["id"]) <= 32
        and found["id"].isalnum()
        and isinstance(found.get("identity"), dict)
        and isinstance(found.get("experiment"), str)
        and isinstance(found.get("resumed", []), list)
        and isinstance(sessions, list)
        and len(sessions) > 0
        and all(isinstance(session, dict) and session.get("state") in STATES for session in sessions)
    )


def require_format(what: Path | str, found: Any) -> None:
    """Raise UserError if `found` is not a run's record or has another format. The message names the right version."""
    if not isinstance(found, dict):
        raise UserError(f"{what} is no folder of a run that can be read")
    version = found.get("format", 1)
    if version != FORMAT:
        who = "a newer cnnlib" if isinstance(version, int) and version > FORMAT else "cnnlib 0.1"
        raise UserError(f"{what} has format {version}, and this version reads format {FORMAT}: {who} reads it")


def state(folder: Path) -> str:
    """Return the state of the run in a folder: running, finished, interrupted or failed."""
    if is_locked(folder):
        return "running"
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or not is_record(record):
        return "finished" if (folder / "results.json").exists() else "interrupted"
    last: str = record["sessions"][-1]["state"]
    return "interrupted" if last == "running" else last
