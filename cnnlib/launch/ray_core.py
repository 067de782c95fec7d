"""Run jobs on a cluster by Ray Core; the only file that knows Ray.

A job is a Ray task in a worker process of its own. Ray starts it again elsewhere when it loses the worker or the node,
and the job goes on from its checkpoint: its folder lies on a file system that all nodes share.
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
"""Prefixes of the environment variables that a job takes from the launching process instead of its node."""


class RayJobs:
    """Jobs on the nodes of a cluster: one that exists, or one of this machine that ends with this object."""

    def __init__(self, address: str | None, needs: Mapping[str, Any], retries: int) -> None:
        """Connect to a cluster, or begin one; `needs` are options of `ray.remote`, such as `num_cpus`.

        Raises UserError where there is no cluster, no Ray, or no node that has what a job needs.
        """
        if find_spec("ray") is None:
            raise UserError("--executor ray needs cnnlib's extra `ray`: pip install -e '.[ray]'")
        # Ray would warn of a cluster that is not there for five minutes, line by line, before it gives up.
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
        # A worker runs one job: JAX is imported and configured once per process.
        how = {"max_calls": 1, "max_retries": retries, "retry_exceptions": False, **needs}
        self._task = self._ray.remote(**how)(run_job)
        self._references: list[Any] = []

    def submit(self, job: str, command: Sequence[str], log: Path) -> Future[Any]:
        """Run a command as a task; Ray starts it again where it loses the worker, up to `retries` times."""
        task = self._task.options(name=f"cnnlib {job}")
        environment = {name: text for name, text in os.environ.items() if name.startswith(PASSED_ON)}
        self._references.append(task.remote(command[3:], str(log), environment))
        future: Future[Any] = self._references[-1].future()
        return future

    def outcome(self, future: Future[Any]) -> Outcome:
        """Return how a job has ended."""
        try:
            return Outcome(*future.result())
        except self._ray.exceptions.TaskCancelledError:
            return Outcome(-signal.SIGTERM)
        except self._ray.exceptions.RayError as lost:  # the worker, its node or its memory, time and again
            return Outcome(2, f"was lost by Ray: {' '.join(str(lost).split())[:200]}")

    def stop(self) -> None:
        """Ask all jobs to save what they have and end; those that wait do not begin."""
        for reference in self._references:
            self._ray.cancel(reference)

    def close(self) -> None:
        """Leave the cluster, which ends what runs of ours; end the cluster where it is ours."""
        with _signals_kept():
            self._ray.shutdown()


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray puts handlers of its own; outside they are what they were before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_job(arguments: Sequence[str], log: str, environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a command of cnnlib in a worker of Ray; returns the fields of its `Outcome`."""
    os.environ.update(environment)
    try:
        with Path(log).open("ab") as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
    except OSError as error:
        node = os.uname().nodename
        return 2, f"cannot write {log} on {node} ({error.strerror}): all nodes must share the run's folder"
    from experiments.__main__ import main

    status = main(arguments)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return status, ""
