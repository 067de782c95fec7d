"""Run several jobs at the same time on this machine."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from cnnlib.launch.supervise import Outcome


class LocalJobs:
    """Run jobs as processes on this machine, one per slot at a time."""

    def __init__(self, slots: Sequence[Mapping[str, str]], retries: int, says: Callable[[str], None]) -> None:
        """Make one slot per concurrent job.

        Each entry of `slots` holds the environment variables of one slot. `says` is called when a job was killed.
        """
        self._retries, self._says = retries, says
        self._free: queue.SimpleQueue[Mapping[str, str]] = queue.SimpleQueue()
        for slot in slots:
            self._free.put(slot)
        self._pool = ThreadPoolExecutor(len(slots))
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._asking, self._is_stopping = threading.Lock(), False

    def submit(self, job: str, command: Sequence[str], log: Path) -> Future[int]:
        """Run a command in a process. If a signal kills it, start it again, up to `retries` times."""
        return self._pool.submit(self._attempts, job, command, log)

    def outcome(self, future: Future[int]) -> Outcome:
        """Return how a job ended; a negative status is minus the number of the signal that ended the job."""
        return Outcome(future.result())

    def stop(self) -> None:
        """Ask all running jobs to save and end; waiting jobs do not start."""
        with self._asking:
            self._is_stopping = True
            for process in self._running.values():
                process.terminate()

    def close(self) -> None:
        """Ask all jobs to stop, and wait until they have ended."""
        self.stop()
        self._pool.shutdown()

    def _attempts(self, job: str, command: Sequence[str], log: Path) -> int:
        slot, status = self._free.get(), -signal.SIGTERM
        try:
            for attempt in range(self._retries + 1):
                if self._is_stopping:
                    break
                with log.open("ab") as file:
                    status = self._run(job, command, {**os.environ, **slot}, file.fileno())
                if status >= 0 or self._is_stopping:
                    break
                again = (
                    f"started again, {attempt + 1} of {self._retries} times" if attempt < self._retries else "given up"
                )
                self._says(f"{job} was killed by {signal.Signals(-status).name}: {again}")
            return status
        finally:
            self._free.put(slot)

    def _run(self, job: str, command: Sequence[str], environment: Mapping[str, str], file: int) -> int:
        # In a new session, the job does not receive Ctrl-C. Only `stop` ends the job: a job asked twice saves nothing.
        with self._asking:
            if self._is_stopping:
                return -signal.SIGTERM
            output = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
            process = subprocess.Popen(command, env=environment, **output)  # type: ignore[call-overload]
            self._running[job] = process
        status: int = process.wait()
        with self._asking:
            del self._running[job]
        return status
