"""An experiment trained as several jobs, beside one another on this machine or on a cluster, and put together again.

A job is one arm, or some of its seeds: a process (`job.py`) with a run's folder of its own, in `jobs/`. It is a run of
a part, and so it goes on from its checkpoints. Here jobs are made, started, followed, and their arms put together; what
is left is a run whose arms are finished, and a last job writes its results. JAX computes nothing in this process.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import jax
import numpy as np

from cnnlib import folder, tracking
from cnnlib.arms import described_arm, headline_of, settings_of
from cnnlib.config import Experiment, LaneNumbers
from cnnlib.data import open_splits
from cnnlib.errors import Stopped, UserError
from cnnlib.fields import to_dict
from cnnlib.folder import JOBS, RunFolder, inside
from cnnlib.job import ERRORS, EVENTS, Ending, Process, Task, beside, parsed, wait_for
from cnnlib.predictions import Answers, answers_of, read_answers, write_answers
from cnnlib.programs import free_memory
from cnnlib.resolve import Part, TrainedArm, resolve
from cnnlib.resume import FinishedArm, Left, read_arm, write_arm
from cnnlib.run import MERGED, begin, changes_since, earlier_run
from cnnlib.watcher import Beginning, EpochReport, Watcher, Watchers

EXECUTORS = ("local", "ray")
USUAL_BYTES = 2**30
"""Memory that a job is taken to need while none has shown what it does."""
TICK = 0.1
"""Seconds between two looks at what goes on."""
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


class PartOfArm(NamedTuple):
    """What one job trains."""

    name: str
    """`lenet5`, or with its first and last seed `lenet5-0..4`."""
    arm: TrainedArm
    """With the job's lanes, and no others."""
    part: Part


def divided(arms: Sequence[TrainedArm], seeds_a_job: int | None) -> list[PartOfArm]:
    """The jobs, in the order of the arms and of their seeds."""
    found = []
    for arm in arms:
        seeds = arm.experiment.lanes.seed
        if seeds_a_job is None or seeds_a_job >= len(seeds):
            found.append(PartOfArm(arm.name, arm, Part(arm.name)))
            continue
        for first in range(0, len(seeds), seeds_a_job):
            part = Part(arm.name, seeds[first : first + seeds_a_job])
            assert part.seeds is not None
            found.append(PartOfArm(f"{arm.name}-{part.seeds[0]}..{part.seeds[-1]}", part.of(arms)[0], part))
    return found


# One machine.


class Host:
    """This machine as a device, for `programs.free_memory`."""

    def memory_stats(self) -> None:
        """It has the host's memory."""


class LocalJobs:
    """Jobs on this machine, as many at a time as it has room for.

    Each slot is what a job gets of its own: as many cores as it has devices, or one GPU. Another job starts only where
    the free memory would hold it, and what those that run may still grow by, were each as large as the largest so far.
    """

    def __init__(self, slots: Sequence[Mapping[str, str]]) -> None:
        self._free = list(slots)
        self._running: dict[str, tuple[Process, Mapping[str, str]]] = {}
        self._largest = USUAL_BYTES
        self._has_seen = False

    def fits(self) -> bool:
        """Whether there is a slot, and memory; one job always fits."""
        if not self._running:
            return True
        if not self._free:
            return False
        peaks = [process.peak_bytes for process, _ in self._running.values()]
        largest = max(self._largest, *peaks)
        to_come = sum(largest - peak for peak in peaks)
        return free_memory(cast(jax.Device, Host())) >= largest + to_come

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


def cores_here() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


# Following jobs.


class Tail:
    """The events of a job, as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = path.stat().st_size if path.exists() else 0

    def new(self) -> list[dict[str, Any]]:
        """Those that have come since."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._place)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._place += len(whole)
        return list(parsed(whole))


class Follower:
    """Tells the terminal and the log what the jobs tell."""

    def __init__(self, shown: Callable[[str], Watcher], says: Callable[[str], None], log: Watcher) -> None:
        self._shown, self._says, self._log = shown, says, log
        self._tails: dict[str, Tail] = {}
        self._watchers: dict[str, Watcher] = {}
        self._hosts: dict[str, list[str]] = {}
        self._said: set[str] = set()

    def begins(self, job: PartOfArm, place: Path) -> None:
        """From now on, what this job tells."""
        if job.name not in self._tails:
            self._tails[job.name] = Tail(beside(place, EVENTS))

    def hosts(self, job: str) -> list[str]:
        """Where a job has begun in this session, once for each time."""
        return self._hosts.get(job, [])

    def follow(self) -> None:
        """Tells what has come since."""
        for name, tail in self._tails.items():
            for event in tail.new():
                self._tell(name, event)

    def _tell(self, name: str, event: dict[str, Any]) -> None:
        what = event.pop("event", None)
        if what == "begins":
            hosts = self._hosts.setdefault(name, [])
            hosts.append(event["host"])
            if len(hosts) > 1:
                self._says(f"{name} begins again on {event['host']}")
        elif what == "says":
            text = event["text"]
            key = f"{name} {text}" if arm_of(name) in text else text  # what concerns all is said once
            if key not in self._said:
                self._said.add(key)
                self._says(f"{name}: {text}")
        elif what == "arm_begins":
            if name not in self._watchers:
                self._watchers[name] = self._shown(name)
                self._watchers[name].arm_begins(name, event["lanes"], event["epochs"])
        elif what == "training_begins":
            for watcher in (self._watchers[name], self._log):
                watcher.training_begins(name, event["epoch"])
        elif what == "epoch_ends":
            report = EpochReport(**{**event["report"], "arm": name})
            for watcher in (self._watchers[name], self._log):
                watcher.epoch_ends(report)


# Putting arms together.


def merged(arm: TrainedArm, parts: Sequence[FinishedArm], wall_seconds: float) -> FinishedArm:
    """An arm of the parts of its lanes, in the order of all; seconds are added up, of memory there is the most.

    Raises UserError where the parts are not those of the arm, or disagree about what they share.
    """
    place = {numbers: lane for lane, numbers in enumerate(arm.lanes)}
    results = [part.result for part in parts]
    own = [[place.get(numbers_of(lane), -1) for lane in result["lanes"]] for result in results]
    if sorted(lane for lanes in own for lane in lanes) != list(range(len(arm.lanes))):
        raise UserError(f"arm {arm.name}: its jobs have other lanes than it has")
    lanes: list[dict[str, Any]] = [{}] * len(arm.lanes)
    for result, where in zip(results, own, strict=True):
        for lane, number in zip(result["lanes"], where, strict=True):
            lanes[number] = lane
    settings = settings_of(lanes)
    first = results[0]
    seconds = sum(result["train_seconds_per_lane"] * len(result["lanes"]) for result in results)
    sums = [key for key in ("compile_seconds", "waited_seconds") if key in first]
    most = ("lanes_at_a_time", "devices", "mesh", "memory_bytes")
    found: dict[str, Any] = {
        **{key: sum(result[key] for result in results) for key in sums},
        **{key: max(result[key] for result in results) for key in most},
        "train_seconds_per_lane": seconds / len(lanes),
        **headline_of(settings),
        "settings": settings,
        "lanes": lanes,
    }
    for key in first:
        if key not in found and any(result.get(key) != first[key] for result in results):
            raise UserError(f"arm {arm.name}: its jobs disagree about {key}")
    lines = [
        {**line, "lane": where[line["lane"]]} for part, where in zip(parts, own, strict=True) for line in part.lines
    ]
    lines.sort(key=lambda line: (line["epoch"], line["lane"]))
    return FinishedArm(tracking.plain({**first, **found}), lines, wall_seconds)


def numbers_of(lane: Mapping[str, Any]) -> LaneNumbers:
    """The numbers of a lane of some results."""
    return LaneNumbers(*(lane[name] for name in LaneNumbers._fields))


def merged_answers(
    arm: TrainedArm,
    parts: Sequence[tuple[FinishedArm, Answers]],
    examples_at: Callable[[np.ndarray], np.ndarray],
) -> Answers:
    """The answers of all lanes, in their order; `examples_at` gives test examples that no part has kept."""
    rows = {
        numbers_of(lane): (answers.predicted[row], answers.loss[row])
        for finished, answers in parts
        for row, lane in enumerate(finished.result["lanes"])
    }
    predicted, loss = (np.stack([rows[numbers][index] for numbers in arm.lanes]) for index in (0, 1))
    first = parts[0][1]
    if any(not np.array_equal(answers.labels, first.labels) for _, answers in parts):
        raise UserError(f"arm {arm.name}: its jobs were tested on different examples")
    known = {
        int(index): example
        for _, answers in parts
        for index, example in zip(answers.worst, answers.worst_examples, strict=True)
    }

    def kept_at(indices: np.ndarray) -> np.ndarray:
        missing = np.array([index for index in indices.tolist() if index not in known], np.int64)
        if len(missing):
            known.update(zip(missing.tolist(), examples_at(missing), strict=True))
        return np.stack([known[index] for index in indices.tolist()]) if len(indices) else first.worst_examples[:0]

    return answers_of(first.labels, kept_at, predicted, loss, predicted[:, 0] == -1)


class Told(Watcher):
    """Tells a watcher of arms that are put together what it would have been told while they trained."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def arm(self, finished: FinishedArm) -> None:
        """From the arm's beginning to its end."""
        result = finished.result
        name, epochs = result["name"], result["epochs"]
        self._watcher.training_begins(name, 0)
        for epoch in range(1, epochs + 1):
            lines = [line for line in finished.lines if line["epoch"] == epoch]
            gone = sum(line["status"] != "ok" for line in lines)
            self._watcher.epoch_ends(EpochReport(name, epoch, epochs, len(lines), gone, {}, 0.0, lines))
        self._watcher.arm_ends(name, result, 0)


# The whole.


def run_jobs(
    experiment: Experiment,
    name: str,
    out: Path,
    wanted: Wanted,
    watcher: Watcher,
    shown: Callable[[str], Watcher],
    *,
    copy: Watcher | None = None,
    resume: bool = False,
    force: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """`run.run` of the experiment, trained as jobs; returns what `results.json` holds.

    `watcher` is told what concerns the run; `shown` makes, for the name of a job, who is told how it goes; `copy` is
    told of each arm when it is put together. Raises UserError and Stopped as `run` does. Jobs that are finished are not
    run again with `resume`; the others go on from their checkpoints.
    """
    began, out = time.perf_counter(), out.absolute()
    jobs = divided(resolve(experiment), wanted.checked().seeds_a_job)
    with contextlib.ExitStack() as stack:
        log = tracking.Log()
        stack.callback(log.close)
        watcher = Watchers((watcher, log))
        held = earlier_run(out, watcher) if resume else None
        if held is None:
            folder.check(out)
        else:
            stack.enter_context(held)
        executor, devices = executor_for(wanted, experiment, len(jobs), out / JOBS)
        stack.callback(executor.close)
        experiment = replace(experiment, devices=devices)
        arms = resolve(experiment)
        jobs = divided(arms, wanted.seeds_a_job)
        told = Task("identify", name, to_dict(experiment), str(out / JOBS / ".none"), devices, force=force)
        known = alone(executor, told, wanted.retries, stop)
        this = known["identity"]
        changes: list[str] = []
        if held is not None:
            changes, results = changes_since(held, this, arms, force, watcher)
            if results is not None:
                return results
            left = Left({arm.name: kept for arm in arms if (kept := read_arm(held, arm)) is not None}, {})
            check_division(out / JOBS, jobs, left)
        else:
            left = Left({}, {})
            held = stack.enter_context(RunFolder(out))
            if (earlier := held.make_room()) is not None:
                watcher.says(f"the files of an earlier run moved to {earlier}")
        sweep = Sweep(held, arms, jobs, left, executor, wanted, began, watcher)
        try:
            beginning = begin(held, name, experiment, this, left, changes, force)
            beginning = described(beginning, arms)
            log.run_begins(beginning)
            if copy is not None:
                copy.run_begins(beginning)
                sweep.copy = Told(copy)
            sweep.follower = Follower(shown, watcher.says, log)
            sweep.task = told
            sweep.expected = known["parts"]
            sweep.train(stop)
            held.record[MERGED] = True
            held.end_session("interrupted", "its results are still to be written")
            held.__exit__(None, None, None)
            alone(executor, told._replace(does="finish", folder=str(out)), wanted.retries, lambda: False)
            shutil.rmtree(out / JOBS)
            results = folder.read_json(out / "results.json")
            if copy is not None:
                copy.run_ends(results)
            return cast(dict[str, Any], results)
        except Exception as error:
            executor.close()  # before the folder is given back
            state = "interrupted" if isinstance(error, Stopped) else "failed"
            with contextlib.suppress(UserError):  # on a full disk there is no place for these either
                watcher.says(f"{state}: {error}")
            if MERGED not in held.record:
                held.end_session(state, " ".join(str(error).split())[:500])
            raise


def described(beginning: Beginning, arms: Sequence[TrainedArm]) -> Beginning:
    """The beginning of a run of these arms, as its watchers are told."""
    return beginning._replace(
        data="+".join(dict.fromkeys(arm.description.name for arm in arms)),
        arms={arm.name: {**described_arm(arm), "config": to_dict(arm.experiment)} for arm in arms},
        lanes={arm.name: [numbers._asdict() for numbers in arm.lanes] for arm in arms},
    )


def alone(executor: Executor, task: Task, retries: int, stop: Callable[[], bool]) -> Any:
    """Does a task that is no training, and returns what it found; raises UserError with what it says."""
    for attempt in range(retries + 1):
        executor.start(task.does, task, None)
        while not (ended := executor.ended()):
            if stop():
                raise Stopped("stopped before training began")
            time.sleep(TICK)
        ((_, ending),) = ended
        if ending.status == 0:
            return ending.value
        if not ending.is_death or attempt == retries:
            break
    raise failure(f"{task.name} ({task.does})", ending)


def failure(job: str, ending: Ending) -> Exception:
    """What a job's ending is for the run: a mistake of the user, or an error that nobody expected."""
    if ending.status == 2:
        return UserError(ending.text)
    if ending.is_death:
        return UserError(
            f"job {job} was {ending.text}, time and again" if ending.status < 0 else f"{job}: {ending.text}"
        )
    return RuntimeError(f"job {job}: {ending.text}")


def check_division(place: Path, jobs: Sequence[PartOfArm], left: Left) -> None:
    """Raises UserError where jobs were left behind that are not among these, and whose arm is not finished."""
    names = {job.name for job in jobs}
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        if path.is_dir() and path.name not in names and arm_of(path.name) not in left.finished:
            raise UserError(
                f"{path} is a job of an earlier session, which divided the arms in another way: "
                "--seeds-a-job must be what it was; without --resume the run is moved aside and a new one begins"
            )


def arm_of(job: str) -> str:
    """The arm whose job it is: names of arms have no dots, ends of blocks of seeds have."""
    return job.rpartition("-")[0] if ".." in job else job


class Sweep:
    """The jobs of a run while they run."""

    task: Task
    expected: dict[str, dict[str, Any]]
    """The identity that a job of an arm has, by the name of the arm."""
    follower: Follower
    copy: Told | None = None

    def __init__(
        self,
        held: RunFolder,
        arms: Sequence[TrainedArm],
        jobs: Sequence[PartOfArm],
        left: Left,
        executor: Executor,
        wanted: Wanted,
        began: float,
        watcher: Watcher,
    ) -> None:
        self._held, self._arms, self._jobs, self._left = held, tuple(arms), jobs, left
        self._executor, self._wanted, self._watcher = executor, wanted, watcher
        self._since = began - left.seconds
        self._deaths: dict[str, int] = {}
        self._parts: dict[str, FinishedArm] = {}

    def train(self, stop: Callable[[], bool]) -> None:
        """Trains what is left, and puts each arm together when its jobs have ended; raises Stopped and UserError."""
        self._make_place()
        waiting = deque(self._begin())
        running: dict[str, PartOfArm] = {}
        error: Exception | None = None
        is_stopping = False
        while waiting or running:
            if (stop() or error is not None) and not is_stopping:
                is_stopping = True
                waiting.clear()
                self._executor.stop()
            while waiting and self._executor.fits():
                job = waiting.popleft()
                self._start(job)
                running[job.name] = job
            self.follower.follow()
            for name, ending in self._executor.ended():
                job = running.pop(name)
                self.follower.follow()
                if ending.status == 0:
                    self._finish(job)
                elif ending.is_death and is_stopping:
                    self._watcher.says(f"{name}: {ending.text}")
                elif ending.is_death and self._deaths.get(name, 0) < self._wanted.retries:
                    self._deaths[name] = self._deaths.get(name, 0) + 1
                    again = f"again, {self._deaths[name]} of at most {self._wanted.retries} times"
                    self._watcher.says(f"{name} was {ending.text}: {again}")
                    waiting.appendleft(job)
                else:
                    error = error or failure(name, ending)
            time.sleep(TICK)
        if error is not None:
            raise error
        if is_stopping and len(self._left.finished) < len(self._arms):
            done = f"{len(self._left.finished)} of {len(self._arms)} arms are finished"
            raise Stopped(f"stopped: {done}, what the other jobs have is saved")

    def _make_place(self) -> None:
        place = inside(self._held.path, self._held / JOBS)
        with tracking.cannot_write(place):
            place.mkdir(exist_ok=True)
            (place / STOP).unlink(missing_ok=True)
        tracking.write_whole(place / TOKEN, lambda path: path.write_text(secrets.token_hex(16)))
        for path in list(place.iterdir()):
            if path.is_dir() and arm_of(path.name) in self._left.finished:
                self._remove(path)

    def _begin(self) -> list[PartOfArm]:
        """The jobs that are not finished; arms whose jobs all are, are put together."""
        if self._left.finished:
            self._watcher.says(f"finished before: {', '.join(self._left.finished)}")
        todo = []
        for job in self._jobs:
            if job.part.arm in self._left.finished:
                continue
            if (found := self._found(job)) is None:
                todo.append(job)
            else:
                self._watcher.says(f"{job.name}: finished before")
                self._parts[job.name] = found
        for arm in self._arms:
            self._merge_if_whole(arm)
        self._write_lines()
        return todo

    def _place(self, job: PartOfArm) -> Path:
        return inside(self._held.path, self._held / JOBS / job.name)

    def _start(self, job: PartOfArm) -> None:
        place = self._place(job)
        self.follower.begins(job, place)
        task = self.task._replace(
            does="train",
            folder=str(place),
            arm=job.part.arm,
            seeds=job.part.seeds,
            expected=self.expected[job.part.arm],
        )
        self._executor.start(job.name, task, place)

    def _found(self, job: PartOfArm) -> FinishedArm | None:
        """What a job that is finished came to."""
        place = self._place(job)
        if not (place / folder.RECORD).exists():
            return None
        wait_for(place)
        with RunFolder(place) as kept:
            return read_arm(kept, job.arm)

    def _finish(self, job: PartOfArm) -> None:
        found = self._found(job)
        if found is None:
            raise RuntimeError(f"job {job.name} has ended, and {self._place(job)} does not hold what it came to")
        self._parts[job.name] = found
        arm = next(arm for arm in self._arms if arm.name == job.part.arm)
        if self._merge_if_whole(arm):
            self._write_lines()

    def _merge_if_whole(self, arm: TrainedArm) -> bool:
        """Puts an arm together where all of its jobs are finished."""
        jobs = [job for job in self._jobs if job.part.arm == arm.name]
        if arm.name in self._left.finished or not all(job.name in self._parts for job in jobs):
            return False
        parts = [(self._parts[job.name], self._answers(job)) for job in jobs]
        finished = merged(arm, [part for part, _ in parts], time.perf_counter() - self._since)
        answers = merged_answers(arm, parts, lambda indices: np.asarray(open_splits(arm.data).test.read(indices).x))
        write_answers(self._held, arm.name, answers)
        self._keep_record(jobs)
        write_arm(self._held, finished)
        self._left.finished[arm.name] = finished
        for job in jobs:
            self._remove(self._place(job))
        self._watcher.says(f"{arm.name} is finished")
        if self.copy is not None:
            self.copy.arm(finished)
        return True

    def _answers(self, job: PartOfArm) -> Answers:
        found = read_answers(self._place(job), job.part.arm)
        if found is None:
            raise UserError(
                f"{self._place(job)} has lost its predictions: remove it, and --resume trains that job again"
            )
        return found

    def _keep_record(self, jobs: Sequence[PartOfArm]) -> None:
        """Keeps, in the record of the run, how often and where its jobs were begun, and from where they went on."""
        known = self._held.record.setdefault(JOBS, {})
        for job in jobs:
            record = folder.read_json(self._place(job) / folder.RECORD)
            sessions = [{key: one.get(key) for key in ("began", "host", "state")} for one in record["sessions"]]
            known[job.name] = {"sessions": sessions, "resumed": record["resumed"]}
        self._held.write()

    def _write_lines(self) -> None:
        with tracking.JsonLines(self._held / "metrics.jsonl", self._left.lines(self._arms)):
            pass

    def _remove(self, place: Path) -> None:
        inside(self._held.path, place)
        with tracking.cannot_write(place):
            shutil.rmtree(place)
            for end in (EVENTS, ERRORS):
                beside(place, end).unlink(missing_ok=True)
