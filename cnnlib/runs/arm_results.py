"""Compute the results of an arm from what its trained models answered. A lane is one model of the arm."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from cnnlib.config.resolve import TrainedArm
from cnnlib.config.schema import SETTING_FIELDS, LaneNumbers
from cnnlib.runs.metrics import MetricsLine
from cnnlib.runs.results import (
    NO_ACCURACY,
    Accuracy,
    ArmResult,
    DataResult,
    DescribedArm,
    LaneResult,
    MatchResult,
    Setting,
    Status,
)
from cnnlib.stats.intervals import mean_interval
from cnnlib.system import files
from cnnlib.train.checkpoint import sha256
from cnnlib.train.feeds import Tested
from cnnlib.train.multihost import Hosts
from cnnlib.train.optim import sparsity
from cnnlib.train.programs import Programs
from cnnlib.train.types import State, Sums


@dataclass
class SoFar:
    """The progress of an arm, without its model state."""

    epoch: int = 0
    lines: list[MetricsLine] = field(default_factory=list)
    best: tuple[float, float] | None = None
    train_seconds: float = 0.0
    waited_seconds: float = 0.0
    """Upper bound of the part of `train_seconds` in which training waited for examples."""
    stream: dict[str, int] | None = None
    """The arm's position in a stream of examples; None without a stream."""


class TrainedModel(NamedTuple):
    """What the results store about one lane's model."""

    epochs: int
    diverged: bool
    fingerprint: str
    sparsity: float | None
    """None if no lane of the arm has an L1 penalty."""


def trained_models(hosts: Hosts, arm: TrainedArm, own: list[State]) -> list[TrainedModel]:
    """Describe the models of all lanes. Each host describes only its `own` models: hosts exchange no weights."""
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
) -> ArmResult:
    """Return the results of an arm. `distances` is a host array: each lane's distance from a convolution."""
    lanes = lane_results_of(arm.lanes, sums, models, distances)
    settings = settings_of(lanes)
    chosen = chosen_setting(settings)
    return ArmResult(
        **vars(described_arm(arm)),
        compile_seconds=programs.compile_seconds,
        lanes_at_a_time=programs.at_a_time,
        devices=len(programs.spread.devices),
        mesh=(programs.spread.groups, programs.spread.shards),
        memory_bytes=programs.memory_bytes,
        epochs=arm.experiment.epochs,
        train_seconds_per_lane=so_far.train_seconds / len(lanes),
        waited_seconds=None if so_far.stream is None else so_far.waited_seconds,
        chosen_setting=chosen,
        test_accuracy=NO_ACCURACY if chosen is None else settings[chosen].test_accuracy,
        settings=settings,
        lanes=lanes,
    )


def sums_of(tested: Tested) -> Sums:
    """Return the sums over all examples, one entry per lane. The loss is summed in float64 on the host."""
    predicted, loss = tested.answers
    correct = (predicted == tested.labels).sum(axis=1)
    return Sums(loss.sum(axis=1, dtype=np.float64), correct, np.full(len(correct), loss.shape[1]))  # type: ignore[arg-type]


class LaneMeans(NamedTuple):
    """The mean metrics of one lane, by part of the data: `train`, `validation` and `test`. None if it diverged."""

    status: Status
    loss: dict[str, float | None]
    accuracy: dict[str, float | None]


def means_of_lane(sums: dict[str, Sums | None], lane: int, diverged: bool) -> LaneMeans:
    """Return one lane's status and mean metrics. The lane counts as diverged if it diverged or a loss is not finite."""
    given = {part: part_sums for part, part_sums in sums.items() if part_sums is not None}
    gone = diverged or not all(np.isfinite(part_sums.loss[lane]) for part_sums in given.values())
    found = LaneMeans("diverged" if gone else "ok", {}, {})
    for part, part_sums in given.items():
        count = part_sums.examples[lane]
        found.loss[part] = None if gone else float(part_sums.loss[lane] / count)
        found.accuracy[part] = None if gone else float(part_sums.correct[lane] / count)
    return found


def lane_results_of(
    lanes: tuple[LaneNumbers, ...],
    sums: dict[str, Sums | None],
    models: list[TrainedModel],
    distances: np.ndarray | None,
) -> tuple[LaneResult, ...]:
    """Return the results of each lane."""
    results = []
    for lane, (numbers, model) in enumerate(zip(lanes, models, strict=True)):
        means = means_of_lane(sums, lane, model.diverged)
        result = LaneResult(
            **numbers._asdict(),
            status=means.status,
            epochs=model.epochs,
            parameters_sha256=model.fingerprint,
            test_loss=means.loss["test"],
            test_accuracy=means.accuracy["test"],
            train_loss=means.loss["train"],
            train_accuracy=means.accuracy["train"],
            validation_loss=means.loss.get("validation"),
            validation_accuracy=means.accuracy.get("validation"),
            distance_from_conv=None if distances is None else files.plain(float(distances[lane])),
            sparsity=model.sparsity,
        )
        results.append(result)
    return tuple(results)


def settings_of(lanes: Sequence[LaneResult]) -> tuple[Setting, ...]:
    """Group the lanes that differ only in their seeds. Each group is a setting: one choice of hyperparameters."""
    groups: dict[tuple[float, ...], list[LaneResult]] = defaultdict(list)
    for lane in lanes:
        groups[lane.setting].append(lane)
    settings = []
    for values, members in groups.items():
        fine = [lane for lane in members if lane.status == "ok"]
        test, train, validation = (
            mean_interval([value for lane in fine if (value := getattr(lane, f"{part}_accuracy")) is not None])
            for part in ("test", "train", "validation")
        )
        settings.append(
            Setting(
                **dict(zip(SETTING_FIELDS, values, strict=True)),
                test_accuracy=Accuracy(test.mean, (test.low, test.high), test.n),
                train_accuracy=train.mean,
                validation_accuracy=validation.mean,
                diverged=len(members) - len(fine),
            )
        )
    return tuple(settings)


def chosen_setting(settings: Sequence[Setting]) -> int | None:
    """Return the index of the only setting, or of the setting chosen on validation data.

    The setting with the fewest diverged lanes is chosen. Among equals, the highest mean validation accuracy decides. If
    there are no validation examples, return None: a choice by test accuracy would make the test accuracy invalid.
    """
    if len(settings) == 1:
        return 0
    rated = [
        (setting.diverged, -setting.validation_accuracy, index)
        for index, setting in enumerate(settings)
        if setting.validation_accuracy is not None
    ]
    return min(rated)[-1] if rated else None


def described_arm(arm: TrainedArm) -> DescribedArm:
    """Return what is known about an arm before it trains."""
    return DescribedArm(
        name=arm.name,
        connectivity=arm.model.connectivity,
        model=str(arm.model),
        parameters=arm.count.parameters,
        connections=arm.count.connections,
        macs=arm.count.macs,
        match=None if arm.match is None else MatchResult(**arm.match.plain()),
        start=arm.start,
        data=DataResult(arm.description.name, **arm.description.counts, class_names=arm.description.class_names),
        batch_size=arm.experiment.batch_size,
        steps=arm.steps,
    )
