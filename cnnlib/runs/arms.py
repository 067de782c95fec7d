"""Train all lanes (models) of one arm together: run the epochs, write checkpoints, and build the arm's results."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from cnnlib.config.fields import to_dict
from cnnlib.config.resolve import TrainedArm
from cnnlib.config.schema import Experiment
from cnnlib.data.declaration import Data
from cnnlib.errors import Stopped, UserError
from cnnlib.runs.arm_results import LaneMeans, SoFar, means_of_lane, result_of, sums_of, trained_models
from cnnlib.runs.callbacks import EpochReport, Watcher
from cnnlib.runs.folder import RunFolder
from cnnlib.runs.metrics import METRICS, MetricsLine, means_of
from cnnlib.runs.predictions import answers_of, write_answers
from cnnlib.runs.results import FORMAT
from cnnlib.runs.resume import FinishedArm, Left, Progress, checkpoints_folder, write_arm
from cnnlib.system import files
from cnnlib.train.checkpoint import Checkpoints, Snapshot
from cnnlib.train.feeds import ArmFeed, Feed
from cnnlib.train.loop import Epoch, TrainingLoop
from cnnlib.train.multihost import ALONE, Hosts
from cnnlib.train.programs import Programs, numbers_of, size_text, state_shapes
from cnnlib.train.types import Keys, State, Sums


class Pace:
    """Limit the share of the run time that is spent on writing checkpoints."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._last: Checkpoints | None = None
        self._ready_at = 0.0

    def begins(self, checkpoints: Checkpoints) -> None:
        """Record that `checkpoints` has begun to write."""
        self._last = checkpoints

    def is_ready(self) -> bool:
        """Return whether the last checkpoint is written, and whether another checkpoint would keep within the share."""
        if self._share == 1.0:
            return True
        if self._last is not None:
            if self._last.seconds is None:
                return False
            self._ready_at = self._last.written_at + self._last.seconds * (1.0 / self._share - 1.0)
            self._last = None
        return time.monotonic() >= self._ready_at


class Training(NamedTuple):
    """What all arms of a session share."""

    experiment: Experiment
    fed: dict[Data, Feed]
    folder: RunFolder
    watcher: Watcher
    stop: Callable[[], bool]
    seconds: Callable[[], float]
    """Returns the seconds that the run has taken so far, over all sessions."""
    out: Path
    """The run's folder, which all hosts see. On process 0, `folder` is this folder. On other processes, `folder` is a
    temporary folder."""
    pace: Pace
    """Limits how often checkpoints are written."""
    unwritten: list[tuple[FinishedArm, Checkpoints | None]]
    """Finished arms. A background task may still be writing the last checkpoint of each arm."""
    hosts: Hosts = ALONE
    profiles: Path | None = None
    """The folder for traces. One epoch per arm is traced. None: no traces."""

    def is_due(self, epoch: int) -> bool:
        """Return whether to write a checkpoint after `epoch`. Process 0 decides for all processes.

        `epoch` must not be the last epoch.
        """
        every = self.experiment.checkpoint.every
        if every == 0 or epoch % every:
            return False
        return self.hosts.from_first(b"due" if self.pace.is_ready() else b"no") == b"due"

    def is_to_stop(self) -> bool:
        """Return whether any host was asked to stop the run."""
        return self.hosts.agreed(self.stop())


def train_arm(
    training: Training, arm: TrainedArm, programs: Programs | None, left: Left, metrics: files.JsonLines
) -> FinishedArm:
    """Train the remaining epochs of an arm and return its results. If no epochs remain, only call the callback."""
    if (before := left.finished.get(arm.name)) is not None:
        training.watcher.arm_ends(arm.name, before.result, arm.experiment.epochs)
        return before
    in_flight = left.in_flight.get(arm.name)
    assert programs is not None, "an arm that is not finished has programs"
    with contextlib.ExitStack() as stack:
        checkpoints = None
        if arm.experiment.checkpoint.every:
            checkpoints = Checkpoints(checkpoints_folder(training.out, arm.name), training.experiment.checkpoint.keep)
            stack.callback(checkpoints.close)
        with memory_errors(arm, programs):
            finished = run_arm(training, arm, programs, checkpoints, in_flight, metrics)
        stack.pop_all()
    training.unwritten.append((finished, checkpoints))
    training.watcher.arm_ends(arm.name, finished.result, in_flight.epoch if in_flight else 0)
    return finished


def write_finished(training: Training) -> None:
    """Write the results of finished arms. First wait until each arm's last checkpoint is on the disk."""
    while training.unwritten:
        finished, checkpoints = training.unwritten.pop(0)
        if checkpoints is not None:
            checkpoints.close()
        write_arm(training.folder, finished)


@contextlib.contextmanager
def memory_errors(arm: TrainedArm, programs: Programs) -> Iterator[None]:
    """Turn an out-of-memory error into a UserError. Its message says which setting needs less memory."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in text and "bad_alloc" not in text:
            raise
        fewer = programs.at_a_time // 2
        advice = (
            f"{fewer} at a time take half: lanes.at_a_time={fewer}" if fewer else "fewer lanes (lanes.seed) may fit"
        )
        raise UserError(
            f"arm {arm.name}: out of memory with {programs.at_a_time} lanes at a time, which need "
            f"{size_text(programs.memory_bytes)}; {advice}"
        ) from error


def run_arm(
    training: Training,
    arm: TrainedArm,
    programs: Programs,
    checkpoints: Checkpoints | None,
    in_flight: Progress | None,
    metrics: files.JsonLines,
) -> FinishedArm:
    """Train all lanes of one arm, then test them.

    Training begins at the start of the arm, or continues from its last checkpoint. Raise Stopped if the run was asked
    to stop.
    """
    spread = programs.spread
    numbers = spread.put(numbers_of(arm))
    so_far = SoFar()
    states, keys = programs.initialize(numbers)
    if in_flight is not None:
        assert checkpoints is not None, "a run without checkpoints is not resumed from one"
        states = put_back(arm, programs, keys, checkpoints, in_flight.epoch)
        so_far = SoFar(
            in_flight.epoch,
            list(in_flight.lines),
            in_flight.best,
            in_flight.train_seconds,
            in_flight.waited_seconds,
            in_flight.stream,
        )
    training.watcher.training_begins(arm.name, so_far.epoch)
    feed = training.fed[arm.data].to(arm, programs, so_far.stream, so_far.waited_seconds)
    with contextlib.closing(feed):
        last = arm.experiment.epochs
        is_due = lambda epoch: epoch == last or training.is_due(epoch)  # noqa: E731
        trace = partial(profiled, training, arm)
        loop = TrainingLoop(programs, feed, numbers, states, keys, is_due, training.is_to_stop, trace)
        validation = None
        for epoch in loop.epochs(so_far.epoch, last):
            validation = epoch.validation
            accuracy = tell(training, arm, epoch, so_far, metrics)
            is_to_stop = training.is_to_stop()
            taken = epoch.snapshot
            if is_to_stop and taken is None and not epoch.has_next_begun:
                taken = loop.snapshot()
            if taken is not None and checkpoints is not None:
                save(training, arm, programs, checkpoints, taken, so_far, accuracy)
            write_finished(training)
            if is_to_stop and (taken is not None or not epoch.has_next_begun):
                how = "which is saved" if taken is not None else "of which nothing is saved: checkpoint.every=0"
                raise Stopped(f"stopped after epoch {epoch.number} of {last} of {arm.name}, {how}")
        return finish_arm(training, arm, programs, feed, loop.states, validation, so_far)


def tell(training: Training, arm: TrainedArm, epoch: Epoch, so_far: SoFar, metrics: files.JsonLines) -> float | None:
    """Write the metrics of an epoch and call the callback. Return the mean validation accuracy, or None."""
    sums = {"train": epoch.train, "validation": epoch.validation}
    told = [means_of_lane(sums, lane, bool(epoch.diverged[lane])) for lane in range(len(arm.lanes))]
    report = report_of(arm, epoch, told)
    metrics.write([vars(line) for line in report.lines])
    so_far.epoch, so_far.train_seconds = epoch.number, so_far.train_seconds + epoch.seconds
    so_far.lines += report.lines
    so_far.stream, so_far.waited_seconds = epoch.position, epoch.waited
    training.watcher.epoch_ends(report)
    return report.means.get("validation_accuracy")


def finish_arm(
    training: Training,
    arm: TrainedArm,
    programs: Programs,
    feed: ArmFeed,
    states: State,
    validation: Sums | None,
    so_far: SoFar,
) -> FinishedArm:
    """Test the trained models and write their answers to the test examples. Return the finished arm."""
    spread = programs.spread
    if validation is None:
        validation = spread.fetched(feed.validate(states))
    tested = feed.test(states)
    known = spread.fetched(feed.fit(states, spread.put(numbers_of(arm))))
    distances = None if programs.distance is None else spread.fetched(programs.distance(states.parameters))
    sums = {"test": sums_of(tested), "train": known, "validation": validation}
    models = trained_models(training.hosts, arm, spread.own(states))
    result = result_of(arm, programs, models, distances, sums, so_far)
    diverged = np.array([model.diverged for model in models])
    predicted, loss = map(np.asarray, tested.answers)
    write_answers(training.folder, arm.name, answers_of(tested.labels, feed.test_examples, predicted, loss, diverged))
    return FinishedArm(result, tuple(so_far.lines), training.seconds())


@contextlib.contextmanager
def profiled(training: Training, arm: TrainedArm, epoch: int) -> Iterator[bool]:
    """If `--profile` is set, trace the second epoch of an arm, or its only epoch. Tell the user where the trace is."""
    if training.profiles is None or epoch != min(2, arm.experiment.epochs):
        yield False
        return
    place = training.profiles / arm.name
    with jax.profiler.trace(str(place), create_perfetto_trace=True):
        yield True
    trace = next(place.rglob("perfetto_trace.json.gz"))
    training.watcher.says(f"profile of {arm.name}: open {trace} at https://ui.perfetto.dev")


def report_of(arm: TrainedArm, epoch: Epoch, told: list[LaneMeans]) -> EpochReport:
    """Return the report of an epoch for callbacks. `told` holds the metrics of each lane."""
    epochs, seconds = arm.experiment.epochs, epoch.seconds
    lines = [
        MetricsLine(
            **numbers._asdict(),
            arm=arm.name,
            lane=lane,
            epoch=epoch.number,
            status=means.status,
            train_loss=means.loss["train"],
            train_accuracy=means.accuracy["train"],
            validation_loss=means.loss.get("validation"),
            validation_accuracy=means.accuracy.get("validation"),
            seconds=seconds,
        )
        for lane, (numbers, means) in enumerate(zip(arm.lanes, told, strict=True))
    ]
    found = means_of(lines, METRICS)
    over_lanes = {metric: mean for metric in METRICS if (mean := found[metric]) is not None}
    steps = len(told) * arm.steps // epochs
    gone = sum(means.status == "diverged" for means in told)
    return EpochReport(arm.name, epoch.number, epochs, len(told), gone, over_lanes, steps / seconds, lines)


def save(
    training: Training,
    arm: TrainedArm,
    programs: Programs,
    checkpoints: Checkpoints,
    taken: Snapshot,
    so_far: SoFar,
    accuracy: float | None,
) -> None:
    """Begin to write a checkpoint of the arm. Mark it as the best if `accuracy` is the highest so far."""
    if accuracy is not None and (so_far.best is None or accuracy > so_far.best[1]):
        so_far.best = (float(so_far.epoch), accuracy)
    checkpoints.best = None if so_far.best is None else int(so_far.best[0])
    assert training.folder.record is not None, "the session has begun"
    progress = Progress(
        format=FORMAT,
        run=training.folder.record.id,
        arm=arm.name,
        epoch=so_far.epoch,
        lanes=tuple(tuple(float(number) for number in numbers) for numbers in arm.lanes),
        lanes_at_a_time=programs.at_a_time,
        lines=tuple(so_far.lines),
        best=so_far.best,
        train_seconds=so_far.train_seconds,
        waited_seconds=so_far.waited_seconds,
        stream=so_far.stream,
        wall_seconds=training.seconds(),
    )
    checkpoints.save(so_far.epoch, taken, files.plain(to_dict(progress)))
    training.pace.begins(checkpoints)
    if training.experiment.checkpoint.share == 1.0:
        checkpoints.wait()


def put_back(arm: TrainedArm, programs: Programs, keys: Keys, checkpoints: Checkpoints, epoch: int) -> State:
    """Return the states of a checkpoint. Raise UserError if this JAX makes other random keys from the same seeds."""
    spread = programs.spread
    states: State
    states, kept_keys = checkpoints.state(epoch, state_shapes(arm, spread), len(arm.lanes))
    own_keys, kept_keys = spread.fetched((keys, kept_keys))
    if not all(np.array_equal(own, kept) for own, kept in zip(own_keys, kept_keys, strict=True)):
        raise UserError(f"arm {arm.name}: from its seeds other keys are drawn here than in its checkpoint")
    return states
