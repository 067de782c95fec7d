"""Merge the results of jobs into the results of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cnnlib.config.fields import from_dict
from cnnlib.config.resolve import Part, TrainedArm, resolve
from cnnlib.config.schema import Experiment
from cnnlib.data.sets import open_splits
from cnnlib.errors import UserError
from cnnlib.runs.arm_results import chosen_setting, settings_of
from cnnlib.runs.folder import JOBS, RunFolder, inside, state
from cnnlib.runs.merged import Merged
from cnnlib.runs.predictions import Predictions, answers_of, read_answers
from cnnlib.runs.record import RECORD, Job, read_record
from cnnlib.runs.results import NO_ACCURACY, DescribedArm
from cnnlib.runs.resume import FinishedArm, read_arm
from cnnlib.system.files import read_json


def read_jobs(out: Path) -> Merged:
    """Read and merge the finished jobs of a run. Raise UserError if a job is missing, running or damaged."""
    places = sorted(path.parent for path in (out / JOBS).glob(f"*/{RECORD}"))
    if not places:
        raise UserError(f"there are no jobs in {out / JOBS}")
    records = {}
    for place in places:
        records[place.name] = read_record(inside(out, place))
        if (how := state(place)) != "finished":
            raise UserError(f"job {place.name} is {how}: only finished jobs are merged")
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
    identities = {job: record.identity for job, record in records.items()}
    known = {job: Job(record.sessions, record.resumed) for job, record in records.items()}
    return Merged(name, experiment, finished, answers, identities, known)


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
    own = [[place.get(lane.numbers, -1) for lane in result.lanes] for result in results]
    if sorted(lane for lanes in own for lane in lanes) != list(range(len(arm.lanes))):
        raise UserError(f"arm {arm.name}: its jobs have other lanes than it has")
    by_place = {
        number: lane
        for result, where in zip(results, own, strict=True)
        for lane, number in zip(result.lanes, where, strict=True)
    }
    lanes = tuple(by_place[number] for number in range(len(arm.lanes)))
    settings = settings_of(lanes)
    chosen = chosen_setting(settings)
    seconds = sum(result.train_seconds_per_lane * len(result.lanes) for result in results)
    waited = [result.waited_seconds for result in results if result.waited_seconds is not None]
    first = results[0]
    whole = replace(
        first,
        compile_seconds=sum(result.compile_seconds for result in results),
        waited_seconds=sum(waited) if waited else None,
        lanes_at_a_time=max(result.lanes_at_a_time for result in results),
        devices=max(result.devices for result in results),
        mesh=max(result.mesh for result in results),
        memory_bytes=max(result.memory_bytes for result in results),
        train_seconds_per_lane=seconds / len(lanes),
        chosen_setting=chosen,
        test_accuracy=NO_ACCURACY if chosen is None else settings[chosen].test_accuracy,
        settings=settings,
        lanes=lanes,
    )
    for key in (*DescribedArm.__dataclass_fields__, "epochs"):
        if any(getattr(result, key) != getattr(first, key) for result in results):
            raise UserError(f"arm {arm.name}: its jobs disagree about {key}")
    lines = [
        replace(line, lane=where[line.lane]) for part, where in zip(parts, own, strict=True) for line in part.lines
    ]
    lines.sort(key=lambda line: (line.epoch, line.lane))
    return FinishedArm(whole, tuple(lines), wall_seconds)


def merged_answers(arm: TrainedArm, parts: Sequence[tuple[FinishedArm, Predictions]]) -> Predictions:
    """Merge the answers of an arm's parts, in the order of the lanes. Read the test examples from the data set."""
    rows = {
        lane.numbers: (answers.predicted[row], answers.loss[row])
        for finished, answers in parts
        for row, lane in enumerate(finished.result.lanes)
    }
    predicted, loss = (np.stack([rows[numbers][index] for numbers in arm.lanes]) for index in (0, 1))
    labels = parts[0][1].labels
    if any(not np.array_equal(answers.labels, labels) for _, answers in parts):
        raise UserError(f"arm {arm.name}: its jobs were tested on different examples")
    test = open_splits(arm.data).test
    return answers_of(labels, lambda indices: np.asarray(test.read(indices).x), predicted, loss, predicted[:, 0] == -1)
