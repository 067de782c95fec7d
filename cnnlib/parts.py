"""Parts of arms: an arm divided into blocks of its seeds, and its results put together from those of its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cnnlib import tracking
from cnnlib.arms import headline_of, settings_of
from cnnlib.config import LaneNumbers
from cnnlib.errors import UserError
from cnnlib.predictions import Answers, answers_of
from cnnlib.resolve import Part, TrainedArm
from cnnlib.resume import FinishedArm


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
