"""Merge the results of jobs into the results of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnnlib.config.fields import from_dict
from cnnlib.config.resolve import Part, TrainedArm, resolve
from cnnlib.config.schema import Experiment, LaneNumbers
from cnnlib.data.sets import open_splits
from cnnlib.errors import UserError
from cnnlib.runs.arm_results import headline_of, settings_of
from cnnlib.runs.folder import JOBS, RECORD, RunFolder, inside, read_json, require_format, state
from cnnlib.runs.merged import Merged
from cnnlib.runs.predictions import Predictions, answers_of, read_answers
from cnnlib.runs.resume import FinishedArm, read_arm
from cnnlib.system import files


def read_jobs(out: Path) -> Merged:
    """Read and merge the finished jobs of a run. Raise UserError if a job is missing, running or damaged."""
    places = sorted(path.parent for path in (out / JOBS).glob(f"*/{RECORD}"))
    if not places:
        raise UserError(f"there are no jobs in {out / JOBS}")
    records = {}
    for place in places:
        require_format(place, read_json(inside(out, place / RECORD)))
        if (how := state(place)) != "finished":
            raise UserError(f"job {place.name} is {how}: only finished jobs are merged")
        records[place.name] = read_json(place / RECORD)
    config = read_json(places[0] / "config.json")
    if not isinstance(config, dict) or "experiment" not in config:
        raise UserError(f"{places[0] / 'config.json'} cannot be read")
    name = config.pop("experiment")
    experiment = from_dict(config, Experiment)
    arms = resolve(experiment)
    finished, answers = {}, {}
    for arm in arms:
        parts = [
            _part_of(out / JOBS / job, Part.named(job), arms) for job in records if Part.named(job).arm == arm.name
        ]
        finished[arm.name] = merged(
            arm, [part for part, _ in parts], max((part.wall_seconds for part, _ in parts), default=0)
        )
        answers[arm.name] = merged_answers(arm, parts)
    identities = {job: record["identity"] for job, record in records.items()}
    sessions = {
        job: {
            "sessions": [{key: one.get(key) for key in ("began", "host", "state")} for one in record["sessions"]],
            "resumed": record["resumed"],
        }
        for job, record in records.items()
    }
    return Merged(name, experiment, finished, answers, identities, sessions)


def _part_of(place: Path, part: Part, arms: Sequence[TrainedArm]) -> tuple[FinishedArm, Predictions]:
    (arm,) = part.of(arms)
    with RunFolder(place) as held:
        found, answers = read_arm(held, arm), read_answers(place, arm.name)
    if found is None or answers is None:
        raise UserError(f"{place} has lost its results: remove it, and --resume trains that job again")
    return found, answers


def merged(arm: TrainedArm, parts: Sequence[FinishedArm], wall_seconds: float) -> FinishedArm:
    """Merge the parts of an arm: put the lanes (models) in the arm's order, add up seconds, take the largest memory.

    Raise UserError if the parts do not have exactly the arm's lanes, or if they disagree about a shared value.
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
    return FinishedArm(files.plain({**first, **found}), lines, wall_seconds)


def numbers_of(lane: Mapping[str, Any]) -> LaneNumbers:
    """Return the seeds and hyperparameters of a lane in a result."""
    return LaneNumbers(*(lane[name] for name in LaneNumbers._fields))


def merged_answers(arm: TrainedArm, parts: Sequence[tuple[FinishedArm, Predictions]]) -> Predictions:
    """Merge the answers of an arm's parts, in the order of the lanes. Read the test examples from the data set."""
    rows = {
        numbers_of(lane): (answers.predicted[row], answers.loss[row])
        for finished, answers in parts
        for row, lane in enumerate(finished.result["lanes"])
    }
    predicted, loss = (np.stack([rows[numbers][index] for numbers in arm.lanes]) for index in (0, 1))
    labels = parts[0][1].labels
    if any(not np.array_equal(answers.labels, labels) for _, answers in parts):
        raise UserError(f"arm {arm.name}: its jobs were tested on different examples")
    test = open_splits(arm.data).test
    return answers_of(labels, lambda indices: np.asarray(test.read(indices).x), predicted, loss, predicted[:, 0] == -1)
