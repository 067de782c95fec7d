"""Run jobs on a cluster with Ray Core. Only this file imports Ray.

Each job is a Ray task in its own worker process. If Ray loses the worker or the node, it starts the job elsewhere. The
job then continues from its checkpoint, so all nodes must share the file system of the job's folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cnnlib.errors import UserError
from cnnlib.launch.supervise import Outcome

PASSED_ON = ("CNNLIB_", "JAX_", "LIBTPU_", "MALLOC_", "TFDS_", "XLA_")
"""Prefixes of environment variables that a job takes from the launching process, not from its node."""


class RayJobs:
    """Run jobs on an existing cluster, or on a cluster of this machine that ends with this object."""

    def __init__(self, address: str | None, needs: Mapping[str, Any], retries: int) -> None:
        """Connect to a cluster, or start one. `needs` holds options of `ray.remote`, such as `num_cpus`.

        Raise UserError if Ray is not installed, if there is no cluster, or if no node has what a job needs.
        """
        if find_spec("ray") is None:
            raise UserError("--executor ray needs cnnlib's extra `ray`: pip install -e '.[ray]'")
        # Without these settings, Ray warns about a missing cluster for five minutes, line by line, before it gives up.
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_NUM_REDIS_GET_RETRIES": "1", "RAY_BACKEND_LOG_LEVEL": "error"}
        for variable, value in quiet.items():
            os.environ.setdefault(variable, value)
        address = address or os.environ.get("RAY_ADDRESS") or None
        import ray

        with _signals_kept():
            try:
                ours: dict[str, Any] = {"address": address or "local"}
                if address is None:
                    ours["include_dashboard"] = False
                ray.init(**ours, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, OSError, RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split())[:300]
                raise UserError(f"--executor ray: no cluster at {address or 'this machine'}: {reason}") from error
        self._ray: Any = ray
        wanted = {"CPU": needs["num_cpus"], "GPU": needs["num_gpus"], **(needs["resources"] or {})}
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(all(node.get(name, 0.0) >= count for name, count in wanted.items()) for node in nodes):
            self.close()
            told = ", ".join(f"{count:g} {name}" for name, count in wanted.items() if count)
            raise UserError(f"--executor ray: no node of the cluster has {told} for a job")
        # Each worker runs only one job, since JAX is imported and configured once per process.
        how = {"max_calls": 1, "max_retries": retries, "retry_exceptions": False, **needs}
        self._task = self._ray.remote(**how)(run_job)
        self._references: list[Any] = []

    def submit(self, job: str, command: Sequence[str], log: Path) -> Future[Any]:
        """Run a command as a task. If Ray loses the worker, it starts the task again, up to `retries` times."""
        task = self._task.options(name=f"cnnlib {job}")
        environment = {name: text for name, text in os.environ.items() if name.startswith(PASSED_ON)}
        self._references.append(task.remote(command[3:], str(log), environment))
        future: Future[Any] = self._references[-1].future()
        return future

    def outcome(self, future: Future[Any]) -> Outcome:
        """Return how a job ended."""
        try:
            return Outcome(*future.result())
        except self._ray.exceptions.TaskCancelledError:
            return Outcome(-signal.SIGTERM)
        except self._ray.exceptions.RayError as lost:  # each attempt lost its worker or node, or lacked memory
            return Outcome(2, f"was lost by Ray: {' '.join(str(lost).split())[:200]}")

    def stop(self) -> None:
        """Ask all running jobs to save and end; waiting jobs do not start."""
        for reference in self._references:
            self._ray.cancel(reference)

    def close(self) -> None:
        """Leave the cluster, which ends our running tasks; end the cluster if this object started it."""
        with _signals_kept():
            self._ray.shutdown()


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Restore the handlers of SIGINT and SIGTERM on exit, since Ray installs its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_job(arguments: Sequence[str], log: str, environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a cnnlib command in a Ray worker; return the fields of its `Outcome`."""
    os.environ.update(environment)
    try:
        with Path(log).open("ab") as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
    except OSError as error:
        node = os.uname().nodename
        return 2, f"cannot write {log} on {node} ({error.strerror}): all nodes must share the run's folder"
    from cnnlib.cli.main import main

    status = main(arguments)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return status, ""
