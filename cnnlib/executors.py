"""What runs jobs: this machine, as many at a time as its cores, GPUs and memory have room for, or a cluster of Ray."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Protocol

from cnnlib.config import Experiment
from cnnlib.errors import UserError
from cnnlib.job import Ending, Process, Task
from cnnlib.machine import cores_here, free_memory

USUAL_BYTES = 2**30
"""Memory that a job is taken to need while none has shown what it does."""
TOKEN, STOP = ".token", ".stop"
"""In `jobs/`: a number that tells whether another machine sees this folder; there when all jobs are to save and end."""


class Wanted(NamedTuple):
    """How an experiment is divided into jobs, and where they run."""

    executor: str
    seeds_a_job: int | None = None
    """Seeds of an arm that are one job; None: all of them."""
    retries: int = 3
    """Times that a job goes on after it died."""
    ray_address: str | None = None
    """None: `RAY_ADDRESS`, else a cluster of this machine, which begins and ends with the run."""
    gpus_a_job: int = 0
    resources: Mapping[str, float] | None = None
    """That a job takes of those that the nodes of the cluster have."""

    def checked(self) -> Wanted:
        """Raises UserError for numbers that make no sense."""
        if self.seeds_a_job is not None and self.seeds_a_job < 1:
            raise UserError(f"--seeds-a-job must be at least 1, not {self.seeds_a_job}")
        if self.retries < 0:
            raise UserError(f"--retries must not be negative, not {self.retries}")
        if self.gpus_a_job < 0 or any(not number > 0 for number in (self.resources or {}).values()):
            raise UserError("--gpus-a-job must not be negative, and --resources must be positive")
        if self.executor == "local" and (self.ray_address or self.gpus_a_job or self.resources):
            raise UserError("--ray-address, --gpus-a-job and --resources have no meaning with --executor local")
        return self


class Executor(Protocol):
    """What runs jobs."""

    def fits(self) -> bool:
        """Whether another job may be started now."""

    def start(self, name: str, task: Task, place: Path | None) -> None:
        """Starts a job, whose outputs go to files beside `place`; None: nowhere."""

    def ended(self) -> list[tuple[str, Ending]]:
        """The jobs that have ended since this was asked, and how."""

    def stop(self) -> None:
        """Asks all jobs to save what they have and end."""

    def close(self) -> None:
        """Ends those that run, at once."""


class LocalJobs:
    """Jobs on this machine, as many at a time as it has room for.

    There is a slot for each GPU, which is the job's own, or for as many cores as a job has devices, which the system
    shares out between them. Another job starts only where the free memory would hold it, and what those that run may
    still grow by, were each as large as the largest so far.
    """

    def __init__(self, slots: Sequence[Mapping[str, str]]) -> None:
        self._free = list(slots)
        self._running: dict[str, tuple[Process, Mapping[str, str]]] = {}
        self._largest = USUAL_BYTES

    def fits(self) -> bool:
        """Whether there is a slot, and memory; one job always fits."""
        if not self._running:
            return True
        if not self._free:
            return False
        peaks = [process.peak_bytes for process, _ in self._running.values()]
        largest = max(self._largest, *peaks)
        to_come = sum(largest - peak for peak in peaks)
        return 9 * free_memory() // 10 >= largest + to_come

    def start(self, name: str, task: Task, place: Path | None) -> None:
        """Starts a process in a slot."""
        slot = self._free.pop(0)
        self._running[name] = (Process(task._asdict(), place, {**os.environ, **slot}), slot)

    def ended(self) -> list[tuple[str, Ending]]:
        """Those whose process is no more."""
        found = []
        for name, (process, slot) in list(self._running.items()):
            ending = process.ending()
            if ending is not None:
                del self._running[name]
                self._free.append(slot)
                self._largest = max(self._largest, process.peak_bytes)
                found.append((name, ending))
        return found

    def stop(self) -> None:
        """SIGTERM, as a batch system would."""
        for process, _ in self._running.values():
            process.stop()

    def close(self) -> None:
        """Kills what is left."""
        for process, _ in self._running.values():
            process.close()
        self._running.clear()


def accelerators() -> list[dict[str, str]] | None:
    """What tells a process to take one of this machine's GPUs, for each; one entry for all of a TPU; None without."""
    asked = os.environ.get("JAX_PLATFORMS", "").split(",")
    is_wanted = asked == [""] or bool({"cuda", "gpu", "tpu"} & set(asked))
    if not is_wanted:
        return None
    if find_spec("jax_cuda12_plugin") or find_spec("jax_cuda13_plugin"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = Path("/proc/driver/nvidia/gpus")
        names = [str(number) for number in range(len(list(gpus.iterdir())))] if gpus.is_dir() else []
        names = names if visible is None else [name for name in visible.split(",") if name and name != "-1"]
        if names:
            return [{"CUDA_VISIBLE_DEVICES": name} for name in names]
    is_tpu = find_spec("libtpu") is not None and any(Path("/dev").glob("accel*"))
    return [{}] if is_tpu else None


def executor_for(wanted: Wanted, experiment: Experiment, jobs: int, place: Path) -> tuple[Executor, int | None]:
    """What runs so many jobs, and how many devices each has (None: all that it finds); raises UserError."""
    asked = experiment.devices or (math.prod(experiment.mesh) if experiment.mesh else None)
    if wanted.executor == "ray":
        from cnnlib.ray_jobs import RayJobs

        devices = asked or wanted.gpus_a_job or (None if wanted.resources else 1)
        cores = 1 if wanted.gpus_a_job or wanted.resources else devices or 1
        needs = (cores, wanted.gpus_a_job, dict(wanted.resources or {}))
        return RayJobs(wanted.ray_address, *needs, wanted.retries, place / TOKEN, place / STOP), devices
    if (slots := accelerators()) is not None:
        return LocalJobs(slots), asked or (None if slots == [{}] else 1)
    devices = asked or (1 if jobs > 1 else None)
    count = cores_here()
    if devices is not None and devices > count:
        raise UserError(f"devices={devices}: this machine has {count} cores for a job")
    return LocalJobs([{}] * (count // (devices or count))), devices
