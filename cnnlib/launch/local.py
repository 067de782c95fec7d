"""Run jobs on this machine, beside one another."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from cnnlib.errors import Stopped, UserError

LOOK = 0.2
"""Seconds from one look at whether somebody wants to stop to the next."""


class LocalJobs:
    """Jobs as processes of this machine, one per slot at a time."""

    def __init__(self, slots: Sequence[Mapping[str, str]], retries: int, says: Callable[[str], None]) -> None:
        """`slots` are the environments of jobs that run beside one another; `says` is told how it goes."""
        self._slots, self._retries, self._says = slots, retries, says
        self._free: queue.SimpleQueue[Mapping[str, str]] = queue.SimpleQueue()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._asking, self._is_stopping = threading.Lock(), False

    def run(self, commands: Mapping[str, Sequence[str]], place: Path, stop: Callable[[], bool]) -> None:
        """Run the commands of the jobs; their outputs go to `place/JOB.log`.

        A job whose process was killed by a signal is started again, up to `retries` times. Raises UserError for a job
        that fails, and Stopped where `stop` asks for it; the others have saved what they have by then.
        """
        for slot in self._slots:
            self._free.put(slot)
        error: Exception | None = None
        finished = 0
        with ThreadPoolExecutor(len(self._slots)) as pool:
            going = {pool.submit(self._attempts, job, one, place / f"{job}.log"): job for job, one in commands.items()}
            waiting: set[Future[int]] = set(going)
            while waiting:
                done, waiting = wait(waiting, LOOK, FIRST_COMPLETED)
                for future in done:
                    job, status = going[future], -signal.SIGTERM if future.cancelled() else future.result()
                    finished += status == 0
                    if status == 0:
                        self._says(f"{job} is finished")
                    elif not self._is_stopping:
                        error = error or failure(job, status, place / f"{job}.log")
                if (error is not None or stop()) and not self._is_stopping:
                    for future in waiting:
                        future.cancel()
                    with self._asking:
                        self._is_stopping = True
                        for process in self._running.values():
                            process.terminate()
        if error is not None:
            raise error
        if self._is_stopping and finished < len(commands):
            raise Stopped(f"stopped: {finished} of {len(commands)} jobs are finished, what the others have is saved")

    def _attempts(self, job: str, command: Sequence[str], log: Path) -> int:
        """Run a job until it ends by itself; returns its exit status, negative for a signal."""
        slot, status = self._free.get(), -signal.SIGTERM
        try:
            for attempt in range(self._retries + 1):
                if self._is_stopping:
                    break
                with log.open("ab") as file:  # Ctrl-C is for this process, which then asks the jobs to stop
                    output = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
                    process = subprocess.Popen(command, env={**os.environ, **slot}, **output)  # type: ignore[call-overload]
                    with self._asking:  # each is asked once: a job that is asked twice saves nothing
                        self._running[job] = process
                        if self._is_stopping:
                            process.terminate()
                    status = process.wait()
                    with self._asking:
                        del self._running[job]
                if status >= 0 or self._is_stopping:
                    break
                again = (
                    f"started again, {attempt + 1} of {self._retries} times" if attempt < self._retries else "given up"
                )
                self._says(f"{job} was killed by {signal.Signals(-status).name}: {again}")
            return status
        finally:
            self._free.put(slot)


def failure(job: str, status: int, log: Path) -> Exception:
    """Return the error of the run for a failed job: UserError for a user's mistake, otherwise RuntimeError."""
    if status < 0:
        return UserError(f"job {job} was killed by {signal.Signals(-status).name} each time")
    lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
    text = f"job {job}: {lines[-1].removeprefix('error: ')} (see {log})"
    return UserError(text) if status == 2 else RuntimeError(text)
