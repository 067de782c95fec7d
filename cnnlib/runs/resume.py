"""Read what an interrupted run has saved: finished arms and checkpoints."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cnnlib.config.fields import from_dict, to_dict
from cnnlib.config.resolve import TrainedArm
from cnnlib.errors import UserError
from cnnlib.runs.folder import ARMS, CHECKPOINTS, UNREADABLE, RunFolder, inside
from cnnlib.runs.metrics import MetricsLine
from cnnlib.runs.results import ArmResult, require_format
from cnnlib.system import files, provenance
from cnnlib.train.checkpoint import Checkpoints, Unreadable
from cnnlib.train.multihost import Hosts

Says = Callable[[str], None]


@dataclass(frozen=True)
class FinishedArm:
    """A finished arm, which is not trained again."""

    result: ArmResult
    lines: tuple[MetricsLine, ...]
    """The lines of this arm in `metrics.jsonl`."""
    wall_seconds: float


def write_arm(folder: RunFolder, finished: FinishedArm) -> None:
    """Write a finished arm to `arms/ARM.json`, with a SHA-256 that shows whether the file is complete."""
    content = files.plain(to_dict(finished))
    place = inside(folder.path, folder / ARMS)
    with files.cannot_write(place):
        place.mkdir(exist_ok=True)
    text = files.to_json({**content, "sha256": _sum_of(content)})
    files.write_whole(place / f"{finished.result.name}.json", lambda path: path.write_text(text, encoding="utf-8"))


def read_arm(folder: RunFolder, arm: TrainedArm) -> FinishedArm | None:
    """Return a finished arm; None if the arm has not finished, or its file is damaged or of another arm."""
    found = files.read_json(inside(folder.path, folder / ARMS / f"{arm.name}.json"))
    if not isinstance(found, dict) or found.pop("sha256", None) != _sum_of(found):
        return None
    try:
        finished: FinishedArm = from_dict(found, FinishedArm, "arm")
    except UserError:
        return None
    result = finished.result
    own = (arm.name, str(arm.model), arm.experiment.epochs, list(arm.lanes))
    known = (result.name, result.model, result.epochs, [lane.numbers for lane in result.lanes])
    return finished if known == own else None


def _sum_of(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The JSON part of a checkpoint: the progress of an arm, without its model state."""

    format: int
    """`results.FORMAT` of the version that wrote the checkpoint."""
    run: str
    """The run's ID."""
    arm: str
    epoch: int
    lanes: tuple[tuple[float, ...], ...]
    """The seed and hyperparameters of each lane, in the order of `LaneNumbers`. The seeds of a lane and its
    number of finished epochs determine its random keys and data order. The state has the keys too, for comparison."""
    lanes_at_a_time: int
    lines: tuple[MetricsLine, ...]
    """The lines of this arm in `metrics.jsonl`."""
    best: tuple[float, float] | None
    """The epoch of the highest mean validation accuracy so far, and that accuracy."""
    train_seconds: float
    waited_seconds: float
    """Upper bound of the part of `train_seconds` in which training waited for examples of a stream."""
    stream: dict[str, int] | None
    """The arm's position in a stream of examples (`feeds.StreamedFeed.position`); None without a stream."""
    wall_seconds: float
    """Seconds of the whole run, over all sessions. Finished arms are stored separately, in `arms/`."""


class Left(NamedTuple):
    """What earlier sessions saved. The keys are the names of the arms."""

    finished: dict[str, FinishedArm]
    in_flight: dict[str, Progress]

    def lines(self, arms: tuple[TrainedArm, ...]) -> list[MetricsLine]:
        """Return the lines of `metrics.jsonl` for the saved epochs, which are not trained again."""
        known = {name: arm.lines for name, arm in self.finished.items()}
        known |= {name: progress.lines for name, progress in self.in_flight.items()}
        return [line for arm in arms for line in known.get(arm.name, [])]

    @property
    def seconds(self) -> float:
        """Return the seconds that earlier sessions took, up to the last saved progress."""
        finished = [arm.wall_seconds for arm in self.finished.values()]
        in_flight = [progress.wall_seconds for progress in self.in_flight.values()]
        return float(max((*finished, *in_flight), default=0.0))


def checkpoints_folder(out: Path, arm: str) -> Path:
    """Return `checkpoints/ARM/` of a run. Raise UserError if this path leads out of the folder."""
    return inside(out, out / CHECKPOINTS / arm).absolute()


def latest(out: Path, run: str, arm: TrainedArm, state: Any, hosts: Hosts, says: Says) -> Progress | None:
    """Find the newest readable checkpoint of an arm. All hosts call this function together.

    Args:
        out: The run's folder, which all hosts see.
        run: The run's ID.
        arm: The arm.
        state: The shapes and shardings of the arm's state and keys.
        hosts: The processes of the run.
        says: Called with a message for each unreadable checkpoint, which moves to `unreadable/`.

    Return the checkpoint's JSON part, or None if no checkpoint is readable. Raise UserError if its format is not
    `FORMAT`.
    """
    place = checkpoints_folder(out, arm.name)
    for path in place.rglob("*"):  # at this point no process writes there
        inside(out, path)
    with contextlib.closing(Checkpoints(place)) as kept:
        for epoch in reversed(json.loads(hosts.from_first(json.dumps(kept.epochs()).encode()))):
            progress, reason = None, ""
            try:
                progress = checked(kept.progress(epoch), run, arm, epoch)
                kept.state(epoch, state, len(arm.lanes))  # only a test; `arms.put_back` reads the state again
            except Unreadable as error:
                reason = str(error)
            if not hosts.agreed(bool(reason)):
                return progress
            if hosts.is_first:
                aside = inside(out, out / UNREADABLE) / f"{arm.name}-{epoch}-{provenance.now()}"
                says(f"the checkpoint of {arm.name} after epoch {epoch} cannot be read ({reason}); it moved to {aside}")
                with files.cannot_write(aside):
                    aside.parent.mkdir(exist_ok=True)
                    (place / str(epoch)).rename(aside)
            hosts.agreed(False)  # wait until process 0 has moved the checkpoint
    return None


def checked(found: Mapping[str, object], run: str, arm: TrainedArm, epoch: int) -> Progress:
    """Return the JSON part of a checkpoint. Raise Unreadable if it is incomplete or is not of this run and arm."""
    require_format(f"the checkpoint of {arm.name} after epoch {epoch}", found)
    try:
        progress: Progress = from_dict(found, Progress, "progress")
    except UserError as error:
        raise Unreadable(str(error)) from error
    lanes = tuple(tuple(float(number) for number in lane) for lane in arm.lanes)
    for name, value in {"run": run, "arm": arm.name, "epoch": epoch, "lanes": lanes}.items():
        if getattr(progress, name) != value:
            raise Unreadable(f"its {name} is not that of this run")
    if not 1 <= progress.lanes_at_a_time <= len(lanes):
        raise Unreadable(f"it has {progress.lanes_at_a_time} lanes at a time, of {len(lanes)}")
    return progress
