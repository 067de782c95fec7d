"""The folder of a run: lock it for one writer, move an earlier run aside, and record the sessions.

A session is one process that trained the run: the first process, and one more per resume.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from cnnlib.config.fields import to_dict
from cnnlib.errors import UserError
from cnnlib.runs.record import RECORD, RunRecord, State, read_record
from cnnlib.system import files, provenance

RUN_FILES = ("config.json", "environment.json", "log.txt", "metrics.jsonl", "results.json", "table.md", "accuracy.png")
GROWTH_FILES = ("config.json", "results.json", "table.md", "growth.png")
ARMS, CHECKPOINTS, PREDICTIONS, UNREADABLE = "arms", "checkpoints", "predictions", "unreadable"
PROFILES, TENSORBOARD = "profile", "tensorboard"
JOBS = "jobs"
FOLDERS = (ARMS, CHECKPOINTS, PREDICTIONS, PROFILES, TENSORBOARD, UNREADABLE, JOBS, "wandb")
OURS = dict.fromkeys((*RUN_FILES, *GROWTH_FILES, RECORD, "git.diff", *FOLDERS))
"""All names that a run may leave in its folder, except its lock and `earlier`."""
LOCK = ".lock"


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


def _in_use(folder: Path) -> str:
    who = ""
    with contextlib.suppress(UserError):
        last = read_record(folder).sessions[-1]
        who = f" (process {last.pid} on {last.host})"
    return f"a run is going on in {folder}{who}; wait for its end, or give another folder with --out"


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
        self.record: RunRecord | None = None
        """The record of the run; None before the first session."""
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

    def write(self, record: RunRecord) -> None:
        """Write the record to `run.json`."""
        files.write_whole(self / RECORD, lambda path: path.write_text(files.to_json(to_dict(record))))
        self.record = record

    def end_session(self, state: State, message: str | None = None) -> None:
        """Record how the session ended."""
        if self.record is not None:
            *others, last = self.record.sessions
            last = replace(last, ended=provenance.now(), state=state, message=message)
            # The session may have failed because the disk is full. Then the record on the disk still says `running`.
            with contextlib.suppress(UserError) if state != "finished" else contextlib.nullcontext():
                self.write(replace(self.record, sessions=(*others, last)))


def state(folder: Path) -> State:
    """Return the state of the run in a folder: running, finished, interrupted or failed."""
    if is_locked(folder):
        return "running"
    try:
        last = read_record(folder).state
    except UserError:
        return "finished" if (folder / "results.json").exists() else "interrupted"
    return "interrupted" if last == "running" else last
