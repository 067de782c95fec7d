"""Start the jobs of an experiment, and wait for them unless Slurm runs them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cnnlib.config.resolve import resolve
from cnnlib.config.schema import Experiment
from cnnlib.errors import UserError
from cnnlib.launch.jobs import Launch, devices_per_job, divided, job_command, slots
from cnnlib.launch.local import LocalJobs
from cnnlib.launch.slurm import array_script, merge_script, submit
from cnnlib.launch.supervise import supervise
from cnnlib.runs.folder import JOBS, RunFolder, check, inside, is_locked, state
from cnnlib.runs.record import RECORD
from cnnlib.system.files import write_whole

if TYPE_CHECKING:
    from cnnlib.launch.ray_core import RayJobs


def start(
    experiment: Experiment,
    command: Sequence[str],
    out: Path,
    launch: Launch,
    more: Mapping[str, Sequence[str]],
    resume: bool,
    stop: Callable[[], bool],
    says: Callable[[str], None],
) -> bool:
    """Start the jobs of an experiment. Wait until they are finished, unless Slurm runs them.

    Args:
        experiment: The experiment to train.
        command: The name of the experiment and its overrides, as on the command line.
        out: The folder of the run; each job has a folder in `jobs/`.
        launch: How to divide the experiment, and where to run the jobs.
        more: Extra options for each of the two commands `run` and `merge`.
        resume: Whether to continue the jobs that exist in `out`.
        stop: Called regularly. If it returns True, the jobs save their state and end early.
        says: Called with each progress message.

    Returns whether all jobs are finished. Raises UserError, or Stopped if `stop` ended the run.
    """
    out = out.absolute()
    arms = resolve(experiment)
    jobs = divided(arms, launch.seeds_per_job)
    devices = devices_per_job(launch, experiment, len(jobs))
    if devices is not None and experiment.devices is None and experiment.mesh is None:
        command, experiment = [*command, f"devices={devices}"], replace(experiment, devices=devices)
    room = slots(devices, launch.jobs_at_a_time) if launch.executor == "local" else []
    check(out)
    with RunFolder(out) as held:
        if running := [job.name for job in (out / JOBS).glob("*/") if is_locked(job)]:
            raise UserError(
                f"job {running[0]} in {out} is running: wait for its end, or give another folder with --out"
            )
        if resume:
            _check_same_division(out, jobs)
        elif (earlier := held.make_room()) is not None:
            says(f"the files of an earlier run moved to {earlier}")
        place = inside(out, held / JOBS)
        place.mkdir(exist_ok=True)
        todo = {
            job: job_command(command, job, out, more["run"])
            for job in jobs
            if not (place / job / RECORD).exists() or state(place / job) != "finished"
        }
        says(f"{len(jobs)} jobs, {len(jobs) - len(todo)} of them finished before; each prints to {place}/JOB.log")
        if not todo:
            return True
        if launch.executor == "slurm":
            _submit(todo, out, place, launch, devices or 1, more["merge"], says)
            return False
        with contextlib.closing(_executor(launch, devices, room, says)) as executor:
            supervise(executor, todo, place, stop, says)
    return True


def _executor(
    launch: Launch, devices: int | None, room: Sequence[Mapping[str, str]], says: Callable[[str], None]
) -> LocalJobs | RayJobs:
    if launch.executor == "local":
        return LocalJobs(room, launch.retries, says)
    from cnnlib.launch.ray_core import RayJobs

    cores = 1 if launch.gpus_per_job or launch.resources else devices or 1
    resources = dict(launch.resources) if launch.resources else None
    needs = {"num_cpus": cores, "num_gpus": launch.gpus_per_job, "resources": resources}
    return RayJobs(launch.ray_address, needs, launch.retries)


def _check_same_division(out: Path, jobs: Sequence[str]) -> None:
    """Raise UserError if `out` holds earlier work that `jobs` would not continue."""
    if (out / RECORD).exists() and state(out) != "finished":
        raise UserError(
            f"{out} has a run of one process: --resume without --executor goes on with it; without --resume it is "
            "moved aside and a new one begins"
        )
    for path in sorted((out / JOBS).glob("*/")):
        if path.name not in jobs:
            raise UserError(
                f"{path} is a job of an earlier session, which divided the arms in another way: --seeds-per-job must "
                "be what it was; without --resume the run is moved aside and a new one begins"
            )


def _submit(
    commands: Mapping[str, Sequence[str]],
    out: Path,
    place: Path,
    launch: Launch,
    cores: int,
    merge: Sequence[str],
    says: Callable[[str], None],
) -> None:
    array, after = place / "array.sh", place / "merge.sh"
    options = (launch.slurm, cores, launch.gpus_per_job, launch.jobs_at_a_time, launch.retries)
    for path, text in (
        (array, array_script(commands, place, *options)),
        (after, merge_script(out, place, merge, launch.slurm)),
    ):
        write_whole(path, lambda beside, text=text: beside.write_text(text))  # type: ignore[misc]
    first, second = submit(array, after)
    says(f"submitted {array} as Slurm's job {first}, and {after} as {second}; `squeue` shows them")
