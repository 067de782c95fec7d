"""An experiment trained as several jobs, beside one another on this machine or on a cluster, and put together again.

A job is one arm, or some of its seeds: a process (`job.py`) with a run's folder of its own, in `jobs/`. It is a run of
a part, and so it goes on from its checkpoints. Here jobs are started, followed, and their arms put together; what is
left is a run whose arms are finished, and a last job writes its results. JAX computes nothing in this process.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from cnnlib import folder, tracking
from cnnlib.config import Experiment
from cnnlib.data import open_splits
from cnnlib.errors import Stopped, UserError
from cnnlib.executors import STOP, TOKEN, Executor, Wanted, executor_for
from cnnlib.fields import to_dict
from cnnlib.folder import CHECKPOINTS, JOBS, RunFolder, arm_of_job, inside
from cnnlib.job import ERRORS, EVENTS, Ending, Task, beside, parsed, wait_for
from cnnlib.parts import PartOfArm, divided, merged, merged_answers
from cnnlib.predictions import Answers, read_answers, write_answers
from cnnlib.resolve import TrainedArm, resolve
from cnnlib.resume import FinishedArm, Left, read_arm, write_arm
from cnnlib.run import MERGED, begin, changes_since, earlier_run
from cnnlib.watcher import EpochReport, Watcher, Watchers

TICK = 0.1
"""Seconds between two looks at what goes on."""


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
            key = f"{name} {text}" if arm_of_job(name) in text else text  # what concerns all is said once
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
    check: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """`run.run` of the experiment, trained as jobs; returns what `results.json` holds.

    `watcher` is told what concerns the run; `shown` makes, for the name of a job, who is told how it goes; `copy` is
    told once all arms are put together. Raises UserError and Stopped as `run` does. Jobs that are finished are not
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
        told = Task("identify", name, to_dict(experiment), str(out / JOBS / ".none"), devices, force=force, check=check)
        known = alone(executor, told, wanted.retries, stop)
        this = known["identity"]
        changes: list[str] = []
        if held is not None:
            changes, results = changes_since(held, this, arms, force, watcher)
            if results is not None:
                return results
            left = Left({arm.name: kept for arm in arms if (kept := read_arm(held, arm)) is not None}, {})
            check_division(out, jobs, left)
        else:
            left = Left({}, {})
            held = stack.enter_context(RunFolder(out))
            if (earlier := held.make_room()) is not None:
                watcher.says(f"the files of an earlier run moved to {earlier}")
        sweep = Sweep(held, arms, jobs, left, executor, wanted, began, watcher)
        try:
            beginning = begin(held, name, experiment, this, left, changes, force, check, arms)
            log.run_begins(beginning)
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
            if copy is not None:  # of everything, whatever was resumed
                copy.run_begins(beginning._replace(is_resumed=False))
            return cast(dict[str, Any], results)
        except Exception as error:
            executor.close()  # before the folder is given back
            state = "interrupted" if isinstance(error, Stopped) else "failed"
            with contextlib.suppress(UserError):  # on a full disk there is no place for these either
                watcher.says(f"{state}: {error}")
            if MERGED not in held.record:
                held.end_session(state, " ".join(str(error).split())[:500])
            raise


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
            f"job {job} was {ending.text}, and is not tried again" if ending.status < 0 else f"{job}: {ending.text}"
        )
    return RuntimeError(f"job {job}: {ending.text}")


def check_division(out: Path, jobs: Sequence[PartOfArm], left: Left) -> None:
    """Raises UserError where something was left behind of arms that are not finished, and that these jobs would not go
    on with: other jobs, or what one process has trained."""
    names, place = {job.name for job in jobs}, out / JOBS
    for name in dict.fromkeys(job.part.arm for job in jobs):
        if name not in left.finished and (out / CHECKPOINTS / name).is_dir():
            raise UserError(
                f"{out} has checkpoints of {name} by one process: --resume without --executor goes on with them; "
                "without --resume the run is moved aside and a new one begins"
            )
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        if path.is_dir() and path.name not in names and arm_of_job(path.name) not in left.finished:
            raise UserError(
                f"{path} is a job of an earlier session, which divided the arms in another way: "
                "--seeds-a-job must be what it was; without --resume the run is moved aside and a new one begins"
            )


class Sweep:
    """The jobs of a run while they run."""

    task: Task
    expected: dict[str, dict[str, Any]]
    """The identity that a job of an arm has, by the name of the arm."""
    follower: Follower

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
            if path.is_dir() and arm_of_job(path.name) in self._left.finished:
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
