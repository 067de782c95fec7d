"""Training one arm, all lanes together: epoch after epoch, with checkpoints, up to its part of the results."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cnnlib import tracking
from cnnlib.checkpoint import Checkpoints, Snapshot, sha256
from cnnlib.config import SETTING_FIELDS, Data, Experiment, LaneNumbers
from cnnlib.errors import Stopped, UserError
from cnnlib.feeds import ArmFeed, Feed, Tested
from cnnlib.folder import FORMAT, RunFolder
from cnnlib.multihost import ALONE, Hosts
from cnnlib.optim import sparsity
from cnnlib.predictions import answers_of, write_answers
from cnnlib.programs import Programs, numbers_of, size_text, state_shapes
from cnnlib.resolve import TrainedArm
from cnnlib.resume import FinishedArm, Left, Progress, checkpoints_folder, write_arm
from cnnlib.stats import mean_interval
from cnnlib.train import Keys, State, Sums
from cnnlib.watcher import EpochReport, Watcher


class Pace:
    """Keeps the writing of checkpoints to its share of the time."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._last: Checkpoints | None = None
        self._ready_at = 0.0

    def begins(self, checkpoints: Checkpoints) -> None:
        """Note that a checkpoint is being written."""
        self._last = checkpoints

    def is_ready(self) -> bool:
        """Whether the last checkpoint is written, and long enough ago for its share of the time."""
        if self._share == 1.0:
            return True
        if self._last is not None:
            if self._last.seconds is None:
                return False
            self._ready_at = self._last.written_at + self._last.seconds * (1.0 / self._share - 1.0)
            self._last = None
        return time.monotonic() >= self._ready_at


class Training(NamedTuple):
    """What every arm of a session trains with."""

    experiment: Experiment
    fed: dict[Data, Feed]
    folder: RunFolder
    watcher: Watcher
    stop: Callable[[], bool]
    seconds: Callable[[], float]
    """That the run has taken so far, all sessions together."""
    out: Path
    """The folder of the run, which all hosts see. `folder` is the same on process 0, and a temporary one on others."""
    pace: Pace
    """Of checkpoints."""
    unwritten: list[tuple[FinishedArm, Checkpoints | None]]
    """Arms whose last checkpoint may still be written in the background."""
    hosts: Hosts = ALONE
    profiles: Path | None = None
    """The folder for a trace of an epoch of each arm."""

    def is_due(self, epoch: int) -> bool:
        """Whether there is to be a checkpoint after an epoch that is not the last; process 0 decides."""
        every = self.experiment.checkpoint.every
        if every == 0 or epoch % every:
            return False
        return self.hosts.from_first(b"due" if self.pace.is_ready() else b"no") == b"due"

    def is_to_stop(self) -> bool:
        """Whether somebody, on any host, wants the run to end."""
        return self.hosts.agreed(self.stop())


def train_arm(
    training: Training, arm: TrainedArm, programs: Programs | None, left: Left, metrics: tracking.JsonLines
) -> FinishedArm:
    """Trains an arm, or what is left of it, and keeps what it came to; of one that is finished, only says so."""
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
    """Write the results of finished arms, each after its last checkpoint is on the disk."""
    while training.unwritten:
        finished, checkpoints = training.unwritten.pop(0)
        if checkpoints is not None:
            checkpoints.close()
        write_arm(training.folder, finished)


@contextlib.contextmanager
def memory_errors(arm: TrainedArm, programs: Programs) -> Iterator[None]:
    """Turns memory that runs out in spite of the compiler's account into a UserError that says what would take less."""
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


@dataclass
class SoFar:
    """What an arm has come to beside its state."""

    epoch: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)
    best: list[float] | None = None
    train_seconds: float = 0.0
    waited_seconds: float = 0.0
    """Of these, for examples; at most."""
    stream: Any = None
    """Where the arm is in a stream of examples."""


def run_arm(
    training: Training,
    arm: TrainedArm,
    programs: Programs,
    checkpoints: Checkpoints | None,
    in_flight: Progress | None,
    metrics: tracking.JsonLines,
) -> FinishedArm:
    """Trains all lanes of one arm, from its start or its last checkpoint, and tests them; raises Stopped."""
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
        states, validation = train_epochs(training, arm, programs, checkpoints, feed, states, keys, so_far, metrics)
        if validation is None:
            validation = spread.fetched(feed.validate(states))
        tested = feed.test(states)
        known = spread.fetched(feed.fit(states, numbers))
        distances = programs.distance and spread.fetched(programs.distance(states.parameters))
        sums = {"test": sums_of(tested), "train": known, "validation": validation}
        models = trained_models(training.hosts, arm, spread.own(states))
        result = result_of(arm, programs, models, distances, sums, so_far)
        diverged = np.array([model.diverged for model in models])
        predicted, loss = map(np.asarray, tested.answers)
        kept = answers_of(tested.labels, feed.test_examples, predicted, loss, diverged)
        write_answers(training.folder, arm.name, kept)
    return FinishedArm(tracking.plain(result), tracking.plain(so_far.lines), training.seconds())


def train_epochs(
    training: Training,
    arm: TrainedArm,
    programs: Programs,
    checkpoints: Checkpoints | None,
    feed: ArmFeed,
    states: State,
    keys: Keys,
    so_far: SoFar,
    metrics: tracking.JsonLines,
) -> tuple[State, Sums | None]:
    """Trains all lanes from what they have come to up to the last epoch, each of them told, written and maybe kept.

    Returns the states, and what they are worth on the validation examples where that is known. Raises Stopped.
    """
    experiment, spread = arm.experiment, programs.spread
    numbers = spread.put(numbers_of(arm))
    jax.block_until_ready(states)  # type: ignore[no-untyped-call]
    idle_since = time.perf_counter()
    validation: Sums | None = None

    def dispatch(states: State, epoch: int) -> tuple[State, EpochSums]:
        """Sets an epoch going; what it leaves outlives the states, which the next epoch overwrites."""
        began, seconds = time.perf_counter(), None
        with profiled(training, arm, epoch):
            states, sums = feed.train(states, numbers)
            if is_profiled(training, arm, epoch):
                jax.block_until_ready(states)  # type: ignore[no-untyped-call]
        if not feed.runs_ahead:  # validating reads as well, and is no part of training
            jax.block_until_ready(states)  # type: ignore[no-untyped-call]
            seconds = time.perf_counter() - began
        validated = feed.validate(states)
        is_due = epoch == experiment.epochs or training.is_due(epoch)
        taken = programs.snapshot((states, keys)) if is_due and programs.snapshot else None
        return states, EpochSums(sums, jnp.copy(states.diverged), validated, taken, seconds)

    if so_far.epoch < experiment.epochs:
        states, going = dispatch(states, so_far.epoch + 1)
    while so_far.epoch < experiment.epochs:
        epoch, ended = so_far.epoch + 1, going
        is_last = epoch == experiment.epochs or training.is_to_stop()
        if feed.runs_ahead and not is_last:
            # The device has the next epoch to do while this one's sums are fetched, written and shown.
            states, going = dispatch(states, epoch + 1)
        sums, diverged = spread.fetched((ended.train, ended.diverged))
        seconds = time.perf_counter() - idle_since if ended.seconds is None else ended.seconds
        validation = spread.fetched(ended.validation)
        idle_since = time.perf_counter()
        told = [
            _metrics({"train": sums, "validation": validation}, lane, bool(diverged[lane]))
            for lane in range(len(arm.lanes))
        ]
        report = report_of(training, arm, epoch, told, seconds)
        metrics.write(report.lines)
        so_far.epoch, so_far.train_seconds = epoch, so_far.train_seconds + seconds
        so_far.lines += report.lines
        so_far.stream, so_far.waited_seconds = feed.position, feed.waited
        training.watcher.epoch_ends(report)
        wants_to_stop, taken = training.is_to_stop(), ended.snapshot
        is_last = is_last or (wants_to_stop and not feed.runs_ahead)
        if is_last and taken is None and programs.snapshot is not None:
            taken = programs.snapshot((states, keys))
        if taken is not None and checkpoints is not None:
            save(training, arm, programs, checkpoints, taken, so_far, report.means.get("validation_accuracy"))
        write_finished(training)
        is_kept = programs.snapshot is not None and (is_last or ended.snapshot is not None)
        if wants_to_stop and (is_last or is_kept):
            how = "which is saved" if is_kept else "of which nothing is saved: checkpoint.every=0"
            raise Stopped(f"stopped after epoch {epoch} of {experiment.epochs} of {arm.name}, {how}")
        if not (feed.runs_ahead or is_last):
            states, going = dispatch(states, epoch + 1)
    return states, validation


def is_profiled(training: Training, arm: TrainedArm, epoch: int) -> bool:
    """Whether a trace is asked for, and this is the second epoch of an arm, or its only one."""
    return training.profiles is not None and epoch == min(2, arm.experiment.epochs)


@contextlib.contextmanager
def profiled(training: Training, arm: TrainedArm, epoch: int) -> Iterator[None]:
    """Write a trace of an epoch that `is_profiled`, and tell how to open it."""
    if training.profiles is None or not is_profiled(training, arm, epoch):
        yield
        return
    place = training.profiles / arm.name
    with jax.profiler.trace(str(place), create_perfetto_trace=True):
        yield
    trace = next(place.rglob("perfetto_trace.json.gz"))
    training.watcher.says(f"profile of {arm.name}: open {trace} at https://ui.perfetto.dev")


def report_of(
    training: Training, arm: TrainedArm, epoch: int, told: list[dict[str, Any]], seconds: float
) -> EpochReport:
    """What an epoch came to, from the means of each lane."""
    experiment = arm.experiment
    lines = [
        {"arm": arm.name, "lane": lane, **numbers._asdict(), "epoch": epoch, **means, "seconds": seconds}
        for lane, (numbers, means) in enumerate(zip(arm.lanes, told, strict=True))
    ]
    fine = [means for means in told if means["status"] == "ok"]
    over_lanes = {key: float(np.mean([means[key] for means in fine])) for key in told[0] if key != "status" and fine}
    steps = len(told) * arm.steps // experiment.epochs
    gone = len(told) - len(fine)
    return EpochReport(arm.name, epoch, experiment.epochs, len(told), gone, over_lanes, steps / seconds, lines)


def save(
    training: Training,
    arm: TrainedArm,
    programs: Programs,
    checkpoints: Checkpoints,
    taken: Snapshot,
    so_far: SoFar,
    accuracy: float | None,
) -> None:
    """Begin to write a checkpoint of the arm; it may be the best one."""
    if accuracy is not None and (so_far.best is None or accuracy > so_far.best[1]):
        so_far.best = [float(so_far.epoch), accuracy]
    checkpoints.best = None if so_far.best is None else int(so_far.best[0])
    progress = Progress(
        format=FORMAT,
        run=training.folder.record["id"],
        arm=arm.name,
        epoch=so_far.epoch,
        lanes=[[float(number) for number in numbers] for numbers in arm.lanes],
        lanes_at_a_time=programs.at_a_time,
        lines=so_far.lines,
        best=so_far.best,
        train_seconds=so_far.train_seconds,
        waited_seconds=so_far.waited_seconds,
        stream=so_far.stream,
        wall_seconds=training.seconds(),
    )
    checkpoints.save(so_far.epoch, taken, tracking.plain(progress._asdict()))
    training.pace.begins(checkpoints)
    if training.experiment.checkpoint.share == 1.0:
        checkpoints.wait()


class TrainedModel(NamedTuple):
    """What is kept in the results of one lane's model."""

    epochs: int
    diverged: bool
    fingerprint: str
    sparsity: float | None
    """None where no weight is pushed to zero."""


def trained_models(hosts: Hosts, arm: TrainedArm, own: list[State]) -> list[TrainedModel]:
    """Describe the models of all lanes. Each host describes its `own` ones; no weights are sent."""
    is_sparse = any(arm.experiment.optim.l1)
    described = [
        TrainedModel(
            int(state.epochs),
            bool(state.diverged),
            sha256(state.parameters, state.statistics),
            sparsity(state.parameters) if is_sparse else None,
        )
        for state in own
    ]
    parts = hosts.gathered(json.dumps(described).encode())
    return [TrainedModel(*entry) for part in parts for entry in json.loads(part)]


def result_of(
    arm: TrainedArm,
    programs: Programs,
    models: list[TrainedModel],
    distances: np.ndarray | None,
    sums: dict[str, Sums | None],
    so_far: SoFar,
) -> dict[str, Any]:
    """Return the arm's part of `results.json`; `distances` (from a convolution) are on the host."""
    lanes = arm.lanes
    lane_results = lane_results_of(lanes, sums, models)
    if distances is not None:
        for result, distance in zip(lane_results, distances, strict=True):
            result["distance_from_conv"] = float(distance)
    settings = settings_of(lane_results)
    return {
        **described_arm(arm),
        "compile_seconds": programs.compile_seconds,
        "lanes_at_a_time": programs.at_a_time,
        "devices": len(programs.spread.devices),
        "mesh": [programs.spread.groups, programs.spread.shards],
        "memory_bytes": programs.memory_bytes,
        "epochs": arm.experiment.epochs,
        "train_seconds_per_lane": so_far.train_seconds / len(lanes),
        **({} if so_far.stream is None else {"waited_seconds": so_far.waited_seconds}),
        **headline_of(settings),
        "settings": settings,
        "lanes": lane_results,
    }


def sums_of(tested: Tested) -> Sums:
    """The sums over all examples, lane by lane, in the precision of the host."""
    predicted, loss = tested.answers
    correct = (predicted == tested.labels).sum(axis=1)
    return Sums(loss.sum(axis=1, dtype=np.float64), correct, np.full(len(correct), loss.shape[1]))  # type: ignore[arg-type]


def put_back(arm: TrainedArm, programs: Programs, keys: Keys, checkpoints: Checkpoints, epoch: int) -> State:
    """Return the states of a checkpoint; raises UserError where this JAX draws other keys from the seeds."""
    spread = programs.spread
    states: State
    states, kept_keys = checkpoints.state(epoch, state_shapes(arm, spread), len(arm.lanes))
    own_keys, kept_keys = spread.fetched((keys, kept_keys))
    if not all(np.array_equal(own, kept) for own, kept in zip(own_keys, kept_keys, strict=True)):
        raise UserError(f"arm {arm.name}: from its seeds other keys are drawn here than in its checkpoint")
    return states


class EpochSums(NamedTuple):
    """What one epoch leaves on the device to be reported, an entry a lane."""

    train: Sums
    diverged: jax.Array
    validation: Sums | None
    snapshot: Snapshot | None
    """Of the states, where they are to be saved."""
    seconds: float | None
    """That training took; None where it is not over yet."""


def _metrics(sums: dict[str, Sums | None], lane: int, diverged: bool) -> dict[str, Any]:
    """One lane's means; of a lane that has diverged, or has a loss that is not finite, nothing but that."""
    given = {part: part_sums for part, part_sums in sums.items() if part_sums is not None}
    gone = diverged or not all(np.isfinite(part_sums.loss[lane]) for part_sums in given.values())
    means: dict[str, Any] = {}
    for part, part_sums in given.items():
        count = part_sums.examples[lane]
        means[f"{part}_loss"] = math.nan if gone else float(part_sums.loss[lane] / count)
        means[f"{part}_accuracy"] = math.nan if gone else float(part_sums.correct[lane] / count)
    return {**means, "status": "diverged" if gone else "ok"}


def lane_results_of(
    lanes: tuple[LaneNumbers, ...], sums: dict[str, Sums | None], models: list[TrainedModel]
) -> list[dict[str, Any]]:
    """Return the results of each lane."""
    results = []
    for lane, (numbers, model) in enumerate(zip(lanes, models, strict=True)):
        means = _metrics(sums, lane, model.diverged)
        known = {"epochs": model.epochs, "parameters_sha256": model.fingerprint}
        results.append({**numbers._asdict(), **means, **known})
        if model.sparsity is not None:
            results[-1]["sparsity"] = model.sparsity
    return results


def settings_of(lanes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lanes grouped by their traced numbers, seeds aside, with the test accuracy of the seeds that are ok."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for lane in lanes:
        groups[tuple(lane[name] for name in SETTING_FIELDS)].append(lane)
    settings = []
    for values, members in groups.items():
        fine = [lane for lane in members if lane["status"] == "ok"]
        test = mean_interval([lane["test_accuracy"] for lane in fine])
        train = mean_interval([lane["train_accuracy"] for lane in fine])
        validation = mean_interval([lane["validation_accuracy"] for lane in fine if "validation_accuracy" in lane])
        settings.append(
            {
                **dict(zip(SETTING_FIELDS, values, strict=True)),
                "test_accuracy": {"mean": test.mean, "ci95": [test.low, test.high], "n": test.n},
                "train_accuracy": train.mean,
                "validation_accuracy": validation.mean,
                "diverged": len(members) - len(fine),
            }
        )
    return settings


def headline_of(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """The arm's test accuracy: that of its only setting, or of the one that validation chooses.

    The rule: fewest diverged lanes, then highest mean validation accuracy. Without validation examples nothing is
    chosen, and the arm's accuracy is null: a choice by test accuracy would be no measurement.
    """
    chosen: int | None = 0
    if len(settings) > 1:
        ranks = [
            (s["diverged"], -s["validation_accuracy"]) if s["validation_accuracy"] is not None else None
            for s in settings
        ]
        rated = [(rank, index) for index, rank in enumerate(ranks) if rank is not None]
        chosen = min(rated)[1] if rated else None
    nothing = {"mean": None, "ci95": [None, None], "n": 0}
    return {"chosen_setting": chosen, "test_accuracy": nothing if chosen is None else settings[chosen]["test_accuracy"]}


def described_arm(arm: TrainedArm) -> dict[str, Any]:
    """What is known of an arm before it trains."""
    names = list(arm.description.class_names)
    return {
        "name": arm.name,
        "connectivity": arm.model.connectivity,
        "model": str(arm.model),
        "parameters": arm.count.parameters,
        "connections": arm.count.connections,
        "macs": arm.count.macs,
        "match": arm.match and arm.match.plain(),
        "start": arm.start,
        "data": {"name": arm.description.name, **arm.description.counts, **({"class_names": names} if names else {})},
        "batch_size": arm.experiment.batch_size,
        "steps": arm.steps,
    }
