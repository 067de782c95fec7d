"""Divide an experiment into jobs."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cnnlib.config.resolve import Part, TrainedArm
from cnnlib.config.schema import Experiment
from cnnlib.errors import UserError
from cnnlib.runs.folder import JOBS
from cnnlib.system.machine import cores_here, free_memory, gpus

BYTES_PER_JOB = 2**31
"""Bytes of free memory that each concurrent job needs."""


class Launch(NamedTuple):
    """How to divide an experiment into jobs, and where to run them: the options of `run --executor`."""

    executor: str
    """`local`, `slurm` or `ray`."""
    seeds_per_job: int | None = None
    """Number of an arm's seeds per job; None: all seeds."""
    jobs_at_a_time: int | None = None
    """Most jobs that run at the same time; None: as many as the cores, GPUs and memory have room for."""
    retries: int = 3
    """How often a job is started again after its process was killed."""
    ray_address: str | None = None
    """Address of the Ray cluster. None: take `RAY_ADDRESS`; if that is not set, start a cluster on this machine."""
    gpus_per_job: int = 0
    resources: Mapping[str, float] | None = None
    """Custom resources of a Ray cluster: for each name, the amount that one job takes."""
    slurm: Sequence[str] = ()
    """Options of `sbatch`, without the leading dashes, such as `time=04:00:00`."""

    def checked(self) -> Launch:
        """Return this launch. Raise UserError for numbers out of range and for options of another executor."""
        for name, least in (("seeds_per_job", 1), ("jobs_at_a_time", 1), ("retries", 0), ("gpus_per_job", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        if any(not number > 0 for number in (self.resources or {}).values()):
            raise UserError("--resources must be positive")
        owners = {"ray_address": "ray", "resources": "ray", "slurm": "slurm"}
        for name, executor in owners.items():
            if getattr(self, name) and self.executor != executor:
                raise UserError(f"--{name.replace('_', '-')} has no meaning with --executor {self.executor}")
        if self.gpus_per_job and self.executor == "local":
            raise UserError("--gpus-per-job has no meaning with --executor local, where each job has one GPU")
        if self.jobs_at_a_time and self.executor == "ray":
            raise UserError("--jobs-at-a-time has no meaning with --executor ray, which starts what its nodes hold")
        return self


def divided(arms: Sequence[TrainedArm], seeds_per_job: int | None) -> list[str]:
    """Return the names of the jobs, ordered by arm, then by seed; `Part.named` parses them."""
    found = []
    for arm in arms:
        seeds = arm.experiment.lanes.seed
        if seeds_per_job is None or seeds_per_job >= len(seeds):
            found.append(str(Part(arm.name)))
            continue
        blocks = (seeds[first : first + seeds_per_job] for first in range(0, len(seeds), seeds_per_job))
        found += [str(Part(arm.name, (block[0], block[-1]))) for block in blocks]
    return found


def job_command(command: Sequence[str], job: str, out: Path, more: Sequence[str]) -> list[str]:
    """Return the command that trains `job` of the experiment in `command`. It resumes from the checkpoint of `job`."""
    run = [sys.executable, "-m", "cnnlib", "run", *command, "--part", job]
    return [*run, "--out", str(out / JOBS / job), "--resume", "--wandb", "off", *more]


def devices_per_job(launch: Launch, experiment: Experiment, jobs: int) -> int | None:
    """Return the number of devices per job; None: a job takes all devices that it finds."""
    if asked := experiment.devices or (math.prod(experiment.mesh) if experiment.mesh else None):
        return asked
    if launch.executor == "local":
        return 1 if jobs > 1 and gpus() is None else None
    return launch.gpus_per_job or (None if launch.resources else 1)


def slots(devices: int | None, at_a_time: int | None) -> list[dict[str, str]]:
    """Return one set of environment variables per job that can run at the same time.

    On a machine with GPUs, the variables select the GPU of the job. Raise UserError if a job needs more cores than this
    machine has.
    """
    found = gpus()
    if found is None:
        cores = cores_here()
        if devices is not None and devices > cores:
            raise UserError(f"devices={devices}: this machine has {cores} cores for a job")
        found = [{}] * (cores // (devices or cores))
    most = at_a_time or max(1, free_memory() // BYTES_PER_JOB)
    return found[:most] if len(found) >= most or at_a_time is None else found + [{}] * (at_a_time - len(found))
