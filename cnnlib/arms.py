"""Training one arm, all lanes together: epoch after epoch, with checkpoints, up to its part of the results."""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cnnlib import tracking
from cnnlib.checkpoint import Checkpoints, Snapshot, layout, restored, sha256
from cnnlib.config import Experiment, LaneNumbers, lane_numbers
from cnnlib.errors import Stopped, UserError
from cnnlib.folder import RunFolder
from cnnlib.programs import Programs, size_text
from cnnlib.resolve import ResolvedArm
from cnnlib.resume import FinishedArm, InFlight, Left, Progress, checkpoints_of, write_arm
from cnnlib.stats import mean_interval
from cnnlib.train import Examples, State, Sums
from cnnlib.watcher import EpochReport, Watcher


class Training(NamedTuple):
    """What every arm of a session trains with."""

    experiment: Experiment
    numbers: LaneNumbers
    splits: dict[str, Examples]
    folder: RunFolder
    watcher: Watcher
    stop: Callable[[], bool]
    seconds: Callable[[], float]
    """That the run has taken so far, all sessions together."""


def train_arm(
    training: Training, arm: ResolvedArm, programs: dict[str, Programs], left: Left, metrics: tracking.JsonLines
) -> FinishedArm:
    """Trains an arm, or what is left of it, and keeps what it came to; of one that is finished, only says so."""
    if (before := left.finished.get(arm.name)) is not None:
        training.watcher.arm_ends(arm.name, before.result, training.experiment.epochs)
        return before
    own, in_flight = programs[arm.name], left.in_flight.get(arm.name)
    with memory_errors(arm, own):
        kept = left.checkpoints.get(arm.name)
        if kept is None and training.experiment.checkpoint.every:
            kept = checkpoints_of(training.folder, training.experiment, arm)
        with contextlib.closing(kept) if kept is not None else contextlib.nullcontext():
            finished = run_arm(training, arm, own, in_flight, kept, metrics)
    write_arm(training.folder, finished)
    training.watcher.arm_ends(arm.name, finished.result, in_flight.progress.epoch if in_flight else 0)
    return finished


@contextlib.contextmanager
def memory_errors(arm: ResolvedArm, programs: Programs) -> Iterator[None]:
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


def run_arm(
    training: Training,
    arm: ResolvedArm,
    programs: Programs,
    in_flight: InFlight | None,
    kept: Checkpoints | None,
    metrics: tracking.JsonLines,
) -> FinishedArm:
    """Trains all lanes of one arm, from its start or its last checkpoint, and tests them; raises Stopped."""
    experiment, numbers, splits = training.experiment, training.numbers, training.splits
    lanes, so_far = lane_numbers(experiment), SoFar()
    if in_flight is None:
        states = programs.initialize(numbers)
    else:
        states = put_back(arm, programs, numbers, in_flight)
        known = in_flight.progress
        so_far = SoFar(known.epoch, list(known.lines), known.best, known.train_seconds)
    training.watcher.training_begins(arm.name, so_far.epoch)
    jax.block_until_ready(states)  # type: ignore[no-untyped-call]
    idle_since = time.perf_counter()
    validation: Sums | None = None

    def dispatch(states: State, epoch: int) -> tuple[State, EpochSums]:
        """Sets an epoch going; what it leaves outlives the states, which the next epoch overwrites."""
        states, sums = programs.epoch(states, numbers, splits["train"])
        validated = programs.validate and programs.validate(states.parameters, splits["validation"])
        is_due = kept is not None and (epoch % experiment.checkpoint.every == 0 or epoch == experiment.epochs)
        taken = programs.snapshot(states, numbers) if is_due else None
        return states, EpochSums(sums, jnp.copy(states.diverged), validated, taken)

    if so_far.epoch < experiment.epochs:
        states, going = dispatch(states, so_far.epoch + 1)
    while so_far.epoch < experiment.epochs:
        epoch, ended = so_far.epoch + 1, going
        # The device has the next epoch to do while this one's sums are fetched, written and shown.
        is_last = epoch == experiment.epochs or training.stop()
        if not is_last:
            states, going = dispatch(states, epoch + 1)
        sums, diverged = jax.device_get((ended.train, ended.diverged))
        seconds = time.perf_counter() - idle_since
        validation = jax.device_get(ended.validation)
        idle_since = time.perf_counter()
        told = [
            _metrics({"train": sums, "validation": validation}, lane, bool(diverged[lane]))
            for lane in range(len(lanes))
        ]
        report = report_of(training, arm, epoch, told, seconds)
        metrics.write(report.lines)
        so_far.epoch, so_far.train_seconds = epoch, so_far.train_seconds + seconds
        so_far.lines += report.lines
        training.watcher.epoch_ends(report)
        wants_to_stop = training.stop()
        taken = programs.snapshot(states, numbers) if kept and is_last and not ended.snapshot else ended.snapshot
        if kept and taken and (is_last or wants_to_stop or not kept.is_saving()):
            save(training, arm, programs, kept, taken, so_far, report.means.get("validation_accuracy"))
            if wants_to_stop:
                kept.wait()
                raise Stopped(f"stopped after epoch {epoch} of {experiment.epochs} of {arm.name}, which is saved")
        elif wants_to_stop and not kept:
            raise Stopped(f"stopped after epoch {epoch} of {experiment.epochs} of {arm.name}, without a checkpoint")
    if validation is None and programs.validate is not None:
        validation = jax.device_get(programs.validate(states.parameters, splits["validation"]))
    result = result_of(arm, programs, lanes, states, validation, splits["test"], so_far.train_seconds)
    if kept:
        kept.wait()
    return FinishedArm(tracking.plain(result), tracking.plain(so_far.lines), training.seconds())


def report_of(
    training: Training, arm: ResolvedArm, epoch: int, told: list[dict[str, Any]], seconds: float
) -> EpochReport:
    """What an epoch came to, from the means of each lane."""
    experiment = training.experiment
    lines = [
        {"arm": arm.name, "lane": lane, **numbers._asdict(), "epoch": epoch, **means, "seconds": seconds}
        for lane, (numbers, means) in enumerate(zip(lane_numbers(experiment), told, strict=True))
    ]
    fine = [means for means in told if means["status"] == "ok"]
    over_lanes = {key: float(np.mean([means[key] for means in fine])) for key in told[0] if key != "status" and fine}
    steps = len(told) * (len(training.splits["train"].y) // experiment.batch_size)
    gone = len(told) - len(fine)
    return EpochReport(arm.name, epoch, experiment.epochs, len(told), gone, over_lanes, steps / seconds, lines)


def save(
    training: Training,
    arm: ResolvedArm,
    programs: Programs,
    kept: Checkpoints,
    taken: Snapshot,
    so_far: SoFar,
    accuracy: float | None,
) -> None:
    """Begins to write a checkpoint of what the arm has come to; it may be the best one."""
    experiment = training.experiment
    if accuracy is not None and (so_far.best is None or accuracy > so_far.best[1]):
        so_far.best = [so_far.epoch, accuracy]
    kept.best = None if so_far.best is None else int(so_far.best[0])
    progress = Progress(
        arm=arm.name,
        epoch=so_far.epoch,
        lanes=[[float(number) for number in numbers] for numbers in lane_numbers(experiment)],
        layout=[list(leaf) for leaf in layout(programs.kept)],
        lanes_at_a_time=programs.at_a_time,
        lines=so_far.lines,
        best=so_far.best,
        train_seconds=so_far.train_seconds,
        wall_seconds=training.seconds(),
    )
    kept.save(so_far.epoch, taken, tracking.plain(progress._asdict()))


def result_of(
    arm: ResolvedArm,
    programs: Programs,
    lanes: tuple[LaneNumbers, ...],
    states: State,
    validation: Sums | None,
    test_examples: Examples,
    train_seconds: float,
) -> dict[str, Any]:
    """The arm's part of `results.json`."""
    test = jax.device_get(programs.test(states.parameters, test_examples))
    lane_results = _lane_results(lanes, test, validation, states)
    if programs.distance is not None:
        distances = jax.device_get(programs.distance(states.parameters))
        for result, distance in zip(lane_results, distances, strict=True):
            result["distance_from_conv"] = float(distance)
    settings = _settings(lane_results)
    return {
        **described_arm(arm),
        "compile_seconds": programs.compile_seconds,
        "lanes_at_a_time": programs.at_a_time,
        "memory_bytes": programs.memory_bytes,
        "train_seconds_per_lane": train_seconds / len(lanes),
        **_headline(settings),
        "settings": settings,
        "lanes": lane_results,
    }


def put_back(arm: ResolvedArm, programs: Programs, numbers: LaneNumbers, in_flight: InFlight) -> State:
    """The states of a checkpoint on the device; raises UserError where this JAX draws other keys from the seeds."""
    states: State = jax.device_put(restored(in_flight.words, programs.kept)["state"])
    if not np.array_equal(jax.device_get(programs.snapshot(states, numbers).words), in_flight.words):
        raise UserError(f"arm {arm.name}: from its seeds other keys are drawn here than in its checkpoint")
    return states


class EpochSums(NamedTuple):
    """What one epoch leaves on the device to be reported, an entry a lane."""

    train: Sums
    diverged: jax.Array
    validation: Sums | None
    snapshot: Snapshot | None
    """Of the states, where they are to be saved."""


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


def _lane_results(
    lanes: tuple[LaneNumbers, ...], test: Sums, validation: Sums | None, states: State
) -> list[dict[str, Any]]:
    epochs, diverged, parameters = jax.device_get((states.epochs, states.diverged, states.parameters))
    results = []
    for lane, numbers in enumerate(lanes):
        means = _metrics({"test": test, "validation": validation}, lane, bool(diverged[lane]))
        fingerprint = sha256(jax.tree.map(itemgetter(lane), parameters))
        results.append({**numbers._asdict(), **means, "epochs": int(epochs[lane]), "parameters_sha256": fingerprint})
    return results


def _settings(lanes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lanes grouped by their traced numbers, seeds aside, with the test accuracy of the seeds that are ok."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    names = [name for name in LaneNumbers._fields if name != "seed"]
    for lane in lanes:
        groups[tuple(lane[name] for name in names)].append(lane)
    settings = []
    for values, members in groups.items():
        fine = [lane for lane in members if lane["status"] == "ok"]
        test = mean_interval([lane["test_accuracy"] for lane in fine])
        validation = mean_interval([lane["validation_accuracy"] for lane in fine if "validation_accuracy" in lane])
        settings.append(
            {
                **dict(zip(names, values, strict=True)),
                "test_accuracy": {"mean": test.mean, "ci95": [test.low, test.high], "n": test.n},
                "validation_accuracy": validation.mean,
                "diverged": len(members) - len(fine),
            }
        )
    return settings


def _headline(settings: list[dict[str, Any]]) -> dict[str, Any]:
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


def described_arm(arm: ResolvedArm) -> dict[str, Any]:
    """What is known of an arm before it trains."""
    return {
        "name": arm.name,
        "connectivity": arm.model.connectivity,
        "model": str(arm.model),
        "parameters": arm.count.parameters,
        "connections": arm.count.connections,
        "macs": arm.count.macs,
        "match": arm.match and arm.match.plain(),
        "start": arm.start,
    }
