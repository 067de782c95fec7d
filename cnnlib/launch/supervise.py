"""Run jobs on an executor, and wait until they end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cnnlib.errors import Stopped, UserError

LOOK = 0.2
"""Seconds between two calls of `stop`."""


class Outcome(NamedTuple):
    """How a job ended."""

    status: int
    """The exit status of its process."""
    reason: str = ""
    """Why the job failed, if its output does not say so."""


class Executor(Protocol):
    """The interface of a place where jobs run."""

    def submit(self, job: str, command: Sequence[str], log: Path) -> Future[Any]:
        """Run a command as soon as there is room for the job. Append the output of the command to `log`."""

    def outcome(self, future: Future[Any]) -> Outcome:
        """Return how a job ended."""

    def stop(self) -> None:
        """Ask all running jobs to save and end; waiting jobs do not start."""


def supervise(
    executor: Executor,
    commands: Mapping[str, Sequence[str]],
    place: Path,
    stop: Callable[[], bool],
    says: Callable[[str], None],
) -> None:
    """Run the commands of all jobs until they end; the output of each job goes to `place/JOB.log`.

    If a job fails or `stop` returns True, ask the other jobs to save their state, and wait until they end. Then raise
    UserError or RuntimeError if a job has failed, or Stopped if `stop` returned True.
    """
    logs = {job: place / f"{job}.log" for job in commands}
    going = {executor.submit(job, command, logs[job]): job for job, command in commands.items()}
    error: Exception | None = None
    finished, is_stopping, waiting = 0, False, set(going)
    while waiting:
        done, waiting = wait(waiting, LOOK, FIRST_COMPLETED)
        for future in done:
            job, ended = going[future], executor.outcome(future)
            if ended.status == 0:
                finished += 1
                says(f"{job} is finished")
            elif not is_stopping:
                error = error or failure(job, ended, logs[job])
        if (error is not None or stop()) and not is_stopping:
            is_stopping = True
            executor.stop()
    if error is not None:
        raise error
    if is_stopping and finished < len(commands):
        raise Stopped(f"stopped: {finished} of {len(commands)} jobs are finished, what the others have is saved")


def failure(job: str, ended: Outcome, log: Path) -> Exception:
    """Return the error to raise for a failed job: RuntimeError after an unexpected error, else UserError."""
    if ended.reason:
        return UserError(f"job {job} {ended.reason}")
    if ended.status < 0:
        return UserError(f"job {job} was killed by {signal.Signals(-ended.status).name} each time")
    lines = log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
    text = f"job {job}: {lines[-1].removeprefix('error: ')} (see {log})"
    return UserError(text) if ended.status == 2 else RuntimeError(text)
