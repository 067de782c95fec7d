"""Checkpoints beside the training, from the side of the training process; without JAX until there is one to write.

They are written by a process of its own, `python -m cnnlib.checkpoint`: Orbax spends 20 ms of Python on each and, with
JAX, seconds on its import, and training would wait for both. That process is started before this one imports anything
heavy, and takes the processor only where training leaves it idle, or waits for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cnnlib import priority
from cnnlib.errors import UserError

PATIENCE = 120.0
"""Seconds that a checkpoint may take while somebody waits for it."""
HESITATION = 5.0
"""Seconds that one may take at the lowest priority while somebody waits, where the system lets nobody raise it."""


class Job(NamedTuple):
    """A checkpoint to be written."""

    run: Path
    folder: Path
    epoch: int
    keep: int
    best: int | None
    progress: dict[str, Any]
    taken: Any
    """Words and checksums, on the device."""
    rows: int
    """Of them that are lanes; what follows fills up a device."""
    share: float
    """Of the processor's time that writing may take."""


class Writer:
    """Writes checkpoints beside the training; nothing here waits but `wait`.

    `check` and `wait` raise UserError once one could not be written; those that were whole before stay.
    """

    def __init__(self) -> None:
        self._process = start()
        priority.lower(self._process.pid)
        self._changed = threading.Condition()
        self._jobs: list[Job] = []
        self._is_busy = self._is_closed = self._is_replaced = False
        self._ready_at = 0.0
        self._failure: str | None = None
        self._written: set[tuple[Path, int]] = set()
        self._thread: threading.Thread | None = None

    def is_ready(self) -> bool:
        """Whether a checkpoint that is put now is begun now, and writing keeps to its share of the time."""
        with self._changed:
            return not (self._jobs or self._is_busy) and time.monotonic() >= self._ready_at

    def put(self, job: Job) -> None:
        """Takes a checkpoint to be written when those before it are."""
        self.check()
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._feed, daemon=True)
            self._thread.start()

    def check(self) -> None:
        """Raises UserError where a checkpoint could not be written."""
        if self._failure is not None:
            raise UserError(f"cannot write a checkpoint: {self._failure}")

    def has_written(self, folder: Path, epoch: int) -> bool:
        """Whether this checkpoint is whole on the disk."""
        with self._changed:
            return (folder, epoch) in self._written

    def wait(self) -> None:
        """Returns when every checkpoint is written."""
        with self._changed:
            is_done = self._hurried(lambda: self._failure is not None or not (self._jobs or self._is_busy))
        if not is_done:
            self._process.kill()
            raise UserError(f"the process that writes checkpoints has not answered for {PATIENCE:.0f} s")
        self.check()

    def close(self) -> None:
        """Lets the process finish what it writes, and end; at once where there was nothing to write."""
        with self._changed:
            self._jobs.clear()
            self._is_closed = True
            self._changed.notify_all()
            if not self._hurried(lambda: not self._is_busy):
                self._process.kill()
        if self._thread is not None:
            self._thread.join()
        priority.lend(self._process.pid)  # also to end: at the lowest priority that takes seconds on a busy machine
        if self._thread is None:
            self._process.kill()
        end(self._process)

    def _hurried(self, is_done: Callable[[], bool]) -> bool:
        """Whether it is done within `PATIENCE`, with `_changed` held; until then the process has our own priority.

        At the lowest one a busy machine gives it next to nothing. Where it cannot be raised another process takes over.
        """
        if is_done():
            return True
        is_lent = priority.lend(self._process.pid)
        if not self._changed.wait_for(is_done, PATIENCE if is_lent else min(HESITATION, PATIENCE)) and not is_lent:
            self._is_replaced = True
            self._process.kill()
            self._changed.wait_for(is_done, PATIENCE)
        priority.lower(self._process.pid)
        return is_done()

    def _feed(self) -> None:
        import jax
        import numpy as np

        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._jobs) or self._is_closed)
                if self._is_closed:
                    return
                job = self._jobs.pop(0)
                self._is_busy = True
            failure = None
            try:
                words, checksums = (array[: job.rows] for array in jax.device_get(job.taken))
                progress = {**job.progress, "checksums": checksums.tolist()}
                told = {
                    "run": str(job.run),
                    "folder": str(job.folder),
                    "epoch": job.epoch,
                    "keep": job.keep,
                    "best": job.best,
                }
                text = json.dumps({**told, "progress": progress, "shape": list(words.shape)}).encode()
                numbers = np.ascontiguousarray(words).data.cast("B")
                answer = self._answer(text, numbers)
                if answer is None and self._is_replaced:
                    end(self._process)
                    self._process, self._is_replaced = start(), False
                    answer = self._answer(text, numbers)
                if answer is None:
                    failure = "the process that writes them has died"
                else:
                    failure = answer["failure"]
                    self._ready_at = time.monotonic() + answer["seconds"] * (1.0 / job.share - 1.0)
            except Exception as error:  # told by `check`, in the thread that can end the run
                failure = " ".join((str(error).strip() or type(error).__name__).split())[:300]
            with self._changed:
                self._is_busy = False
                self._failure = self._failure or failure
                if failure is None:
                    self._written.add((job.folder, job.epoch))
                self._changed.notify_all()
                if failure is not None:
                    return

    def _answer(self, text: bytes, numbers: memoryview) -> dict[str, Any] | None:
        """What the process says when it has written a checkpoint; None where it is no more."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(len(text).to_bytes(8, "little") + text)
            stdin.write(numbers)
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            return None
        answer: dict[str, Any] | None = json.loads(line) if line else None
        return answer


def start() -> subprocess.Popen[bytes]:
    """The process that writes."""
    return subprocess.Popen(
        [sys.executable, "-m", "cnnlib.checkpoint", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        process_group=0,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """Closes its pipes, whose end is its own."""
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what a dead process did not take
            if pipe is not None:
                pipe.close()
    process.wait()
