"""Build an arm's part of `results.json`. A lane is one model of the arm."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cnnlib.config.resolve import TrainedArm
from cnnlib.config.schema import SETTING_FIELDS, LaneNumbers
from cnnlib.stats.intervals import mean_interval
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
    lines: list[dict[str, Any]] = field(default_factory=list)
    best: list[float] | None = None
    train_seconds: float = 0.0
    waited_seconds: float = 0.0
    """Upper bound of the part of `train_seconds` in which training waited for examples."""
    stream: Any = None
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
) -> dict[str, Any]:
    """Return the arm's part of `results.json`. `distances` is a host array: each lane's distance from a convolution."""
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
    """Return the sums over all examples, one entry per lane. The loss is summed in float64 on the host."""
    predicted, loss = tested.answers
    correct = (predicted == tested.labels).sum(axis=1)
    return Sums(loss.sum(axis=1, dtype=np.float64), correct, np.full(len(correct), loss.shape[1]))  # type: ignore[arg-type]


def metrics_of_lane(sums: dict[str, Sums | None], lane: int, diverged: bool) -> dict[str, Any]:
    """Return one lane's mean metrics and status. All means are NaN if the lane diverged or a loss is not finite."""
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
        means = metrics_of_lane(sums, lane, model.diverged)
        known = {"epochs": model.epochs, "parameters_sha256": model.fingerprint}
        results.append({**numbers._asdict(), **means, **known})
        if model.sparsity is not None:
            results[-1]["sparsity"] = model.sparsity
    return results


def settings_of(lanes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Group the lanes that differ only in their seeds. Each group is a setting: one choice of hyperparameters.

    Return the accuracies of each setting, over the lanes whose status is `ok`.
    """
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
    """Return the arm's test accuracy: the accuracy of its only setting, or of the setting chosen on validation data.

    The setting with the fewest diverged lanes is chosen. Among equals, the highest mean validation accuracy decides. If
    there are no validation examples, no setting is chosen and the accuracy is null: a choice by test accuracy would
    make the test accuracy invalid.
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
    """Return what is known about an arm before it trains."""
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
