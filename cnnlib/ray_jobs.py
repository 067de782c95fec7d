"""Jobs on a cluster, by Ray Core; the only file that knows Ray.

A job is a Ray task that starts `python -m cnnlib.job` beside itself, as `--executor local` does, and waits for it; JAX
is imported there only. Where Ray loses the task's worker or its node, it starts the task again elsewhere: the job goes
on from its checkpoint, since its folder lies on a file system that all nodes share.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cnnlib.errors import UserError
from cnnlib.job import Ending, Process, Task, beside

PASSED_ON = ("CNNLIB_", "JAX_", "LIBTPU_", "MALLOC_", "TFDS_", "XLA_")
"""Beginnings of the names of variables that a job has from whoever asked for it, and not from its node."""
OBJECT_STORE_BYTES = 2**27
"""Of a cluster that is ours; what passes through it are a few lines a job."""
CONNECTING = 10.0
"""Seconds that the head of a cluster may take to answer."""
RUNNING = ".running"
"""End of the name of the file beside a job's folder that is there while a node has the job."""


class RayJobs:
    """Jobs on the nodes of a cluster: one that exists, or one of this machine that ends with this object."""

    def __init__(
        self,
        address: str | None,
        cores: int,
        gpus: int,
        resources: dict[str, float],
        retries: int,
        token: Path,
        stop: Path,
    ) -> None:
        """Connects to a cluster, or begins one; raises UserError where there is none, or no Ray."""
        if find_spec("ray") is None:
            raise UserError("--executor ray needs cnnlib's extra `ray`: pip install -e '.[ray]'")
        self._token, self._stop = token, stop
        address = address or os.environ.get("RAY_ADDRESS") or None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if address is not None:
            check_address(address)
        elif not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
            # Nobody else may use a cluster of ours. Left alone, Ray would put the token in the user's home.
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
        import ray

        if ray.is_initialized():
            raise UserError("--executor ray: this process is connected to a cluster already")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        ours = {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        others = children_of(os.getpid())
        with signals_kept():
            try:
                ray.init(**quiet, **(ours if address is None else {"address": address}))
            except (ConnectionError, OSError, RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split())[:300]
                raise UserError(f"--executor ray: no cluster at {address or 'this machine'}: {reason}") from error
        self._guard = guarded(children_of(os.getpid()) - others) if address is None else None
        self._needs = {"num_cpus": cores, "num_gpus": gpus, "resources": resources or None}
        # Ray tries again where it lost a worker or a node, and not where the task itself raised something.
        self._needs |= {"max_retries": retries, "retry_exceptions": False}
        self._attended: Any = ray.remote(attended)
        self._refs: dict[Any, tuple[str, Path | None]] = {}
        self._environment = {name: text for name, text in os.environ.items() if name.startswith(PASSED_ON)}
        known = {"CPU": float(cores), "GPU": float(gpus), **resources}
        cluster: Any = ray  # this part of it has no types
        nodes = [node["Resources"] for node in cluster.nodes() if node["Alive"]]
        has_room = any(all(node.get(name, 0.0) >= count for name, count in known.items()) for node in nodes)
        if not has_room:
            self.close()
            wanted = ", ".join(f"{count:g} {name}" for name, count in known.items() if count)
            raise UserError(f"--executor ray: no node of the cluster has {wanted} for a job")

    def fits(self) -> bool:
        """Ray itself keeps those waiting that have no room."""
        return True

    def start(self, name: str, task: Task, place: Path | None) -> None:
        """Hands a job to Ray."""
        if place is not None:
            beside(place, RUNNING).unlink(missing_ok=True)  # of a node that died
        token = None if place is None else self._token.read_text()
        where = None if place is None else str(place)
        what = (task._asdict(), where, self._environment, str(self._token), token, str(self._stop))
        self._refs[self._attended.options(name=f"cnnlib {name}", **self._needs).remote(*what)] = (name, place)

    def ended(self) -> list[tuple[str, Ending]]:
        """The jobs whose task is done, or that Ray has given up."""
        import ray

        done, _ = ray.wait(list(self._refs), num_returns=len(self._refs), timeout=0.0) if self._refs else ([], [])
        found = []
        for ref in done:
            name, _ = self._refs.pop(ref)
            try:
                found.append((name, Ending(*ray.get(ref))))
            except ray.exceptions.TaskCancelledError:
                found.append((name, Ending(128 + signal.SIGTERM, "stopped before it began")))
            except (ray.exceptions.RayTaskError, ray.exceptions.RaySystemError):
                raise
            except ray.exceptions.RayError as error:  # the worker, its node or its memory, and Ray has tried again
                lost = f"{name} was lost by Ray, which has tried again {self._needs['max_retries']} times"
                found.append((name, Ending(2, f"{lost}: {' '.join(str(error).split())[:200]}")))
        return found

    def stop(self) -> None:
        """Tells those that run by a file, since it reaches all nodes; takes back those that wait."""
        import ray

        self._stop.touch()
        for ref, (_, place) in self._refs.items():
            if place is None or not beside(place, RUNNING).exists():
                ray.cancel(ref)

    def close(self) -> None:
        """Leaves the cluster, which ends what runs of ours; ends the cluster where it is ours."""
        import ray

        self._refs.clear()
        if ray.is_initialized():
            with signals_kept():
                ray.shutdown()
        if self._guard is not None:
            self._guard.communicate()
            self._guard = None


def children_of(pid: int) -> set[int]:
    """The processes that a process has started and that still are its children, where Linux tells them."""
    return {child for child, (parent, _) in parents().items() if parent == pid}


def parents() -> dict[int, tuple[int, str]]:
    """The parent of each process, and when the process began: numbers are used again."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):  # gone by now
            fields = (place / "stat").read_text(errors="replace").rpartition(")")[2].split()
            found[int(place.name)] = (int(fields[1]), fields[19])
    return found


def guarded(roots: set[int]) -> subprocess.Popen[bytes]:
    """Starts what ends these processes, and all that they start, when its standard input ends.

    Ray sees to it that its processes end with the one that began the cluster, but for two a node: they stay where that
    one is killed.
    """
    command = [sys.executable, "-m", "cnnlib.ray_jobs", *map(str, roots)]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, start_new_session=True, env={**os.environ, "PYTHONPATH": path}
    )


def guard(roots: set[int]) -> None:
    """What `guarded` starts: looks twice a second who belongs to the family, and kills it in the end."""
    family: dict[int, str] = {}
    is_over = False
    while True:
        known = parents()
        family |= {root: known[root][1] for root in roots if root in known and root not in family}
        size = 0
        while size < len(family):
            size = len(family)
            family |= {pid: began for pid, (parent, began) in known.items() if parent in family and pid not in family}
        if is_over:  # and what they started last is known
            break
        is_readable, _, _ = select.select([0], [], [], 0.5)
        is_over = bool(is_readable) and not os.read(0, 1)
    known = parents()
    for pid, began in family.items():
        if known.get(pid, (0, ""))[1] == began:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def check_address(address: str) -> None:
    """Raises UserError where nothing listens; Ray itself would take half a minute, and tell it in thirty lines."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise UserError(f"--executor ray: {address} is no address of a cluster's head; expected HOST:PORT or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECTING).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--executor ray: no cluster at {address}: {error}") from error


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Ray puts handlers of its own; outside they are what they were before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def attended(
    task: dict[str, Any],
    place: str | None,
    environment: Mapping[str, str],
    token_file: str,
    token: str | None,
    stop: str,
) -> tuple[int, str, Any]:
    """What a worker of Ray does: runs the job in a process of its own, which does not outlive the worker."""
    beginning = None if place is None else Path(place)
    if beginning is not None:
        try:
            seen = Path(token_file).read_text()
        except OSError:
            seen = None
        if seen != token:
            host = os.uname().nodename
            folder = beginning.parents[1]
            return 2, f"{host} does not see {folder} as this machine does: all nodes must share its file system", None
        if Path(stop).exists():
            return 128 + signal.SIGTERM, "stopped before it began", None
        beside(beginning, RUNNING).touch()
    process = Process(task, beginning, {**os.environ, **environment})
    try:
        is_told = False
        while (ending := process.ending()) is None:
            if beginning is not None and not is_told and Path(stop).exists():
                is_told = True
                process.stop()
            time.sleep(0.2)
        return tuple(ending)
    finally:
        process.close()
        if beginning is not None:
            beside(beginning, RUNNING).unlink(missing_ok=True)


if __name__ == "__main__":
    guard(set(map(int, sys.argv[1:])))
