"""Divide an experiment into jobs."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cnnlib.config import Experiment
from cnnlib.errors import UserError
from cnnlib.folder import JOBS
from cnnlib.machine import cores_here, free_memory, gpus
from cnnlib.resolve import Part, TrainedArm

BYTES_PER_JOB = 2**31
"""Free memory that each job beside others must have."""


class Launch(NamedTuple):
    """How an experiment is divided into jobs, and where they run; the options of `run --executor`."""

    executor: str
    """`local`, `slurm` or `ray`."""
    seeds_per_job: int | None = None
    """Seeds of an arm that are one job; None: all of them."""
    jobs_at_a_time: int | None = None
    """None: as many as the cores, GPUs and memory have room for."""
    retries: int = 3
    """Times that a job is started again after its process was killed."""
    ray_address: str | None = None
    """None: `RAY_ADDRESS`, else a cluster of this machine, which begins and ends with the run."""
    gpus_per_job: int = 0
    resources: Mapping[str, float] | None = None
    """That a job takes of those that the nodes of a Ray cluster have."""
    slurm: Sequence[str] = ()
    """Options of `sbatch` without dashes, such as `time=04:00:00`."""

    def checked(self) -> Launch:
        """Return it; raises UserError for numbers that make no sense, and options of another executor."""
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
    """Return the names of the jobs, in the order of the arms and of their seeds; `Part.named` reads them."""
    found = []
    for arm in arms:
        seeds = arm.experiment.lanes.seed
        if seeds_per_job is None or seeds_per_job >= len(seeds):
            found.append(str(Part(arm.name)))
            continue
        blocks = (seeds[first : first + seeds_per_job] for first in range(0, len(seeds), seeds_per_job))
        found += [str(Part(arm.name, (block[0], block[-1]))) for block in blocks]
    return found


def command(name: str, overrides: Sequence[str], job: str, out: Path, more: Sequence[str]) -> list[str]:
    """Return the command that trains `job` of the experiment `name`; it resumes from the job's checkpoint."""
    run = [sys.executable, "-m", "experiments", "run", name, *overrides, "--part", job]
    return [*run, "--out", str(out / JOBS / job), "--resume", "--wandb", "off", *more]


def devices_per_job(launch: Launch, experiment: Experiment, jobs: int) -> int | None:
    """Return how many devices a job takes; None: all that it finds."""
    if asked := experiment.devices or (math.prod(experiment.mesh) if experiment.mesh else None):
        return asked
    if launch.executor == "local":
        return 1 if jobs > 1 and gpus() is None else None
    return launch.gpus_per_job or (None if launch.resources else 1)


def slots(devices: int | None, at_a_time: int | None) -> list[dict[str, str]]:
    """Return, for each job that this machine has room for at a time, the environment that gives it its own GPU.

    Raises UserError where a job needs more cores than there are.
    """
    found = gpus()
    if found is None:
        cores = cores_here()
        if devices is not None and devices > cores:
            raise UserError(f"devices={devices}: this machine has {cores} cores for a job")
        found = [{}] * (cores // (devices or cores))
    most = at_a_time or max(1, free_memory() // BYTES_PER_JOB)
    return found[:most] if len(found) >= most or at_a_time is None else found + [{}] * (at_a_time - len(found))
