"""Read what an interrupted run saved, and check that resuming gives the results of an uninterrupted run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cnnlib.config.fields import flat, to_dict
from cnnlib.config.resolve import TrainedArm
from cnnlib.config.schema import Experiment, LaneNumbers
from cnnlib.data.sets import DataSet, StreamedSet, fingerprint_of_stream
from cnnlib.errors import UserError
from cnnlib.ops import kernels
from cnnlib.runs.folder import ARMS, CHECKPOINTS, UNREADABLE, RunFolder, inside, read_json, require_format
from cnnlib.system import files, provenance
from cnnlib.train.checkpoint import Checkpoints, Unreadable
from cnnlib.train.multihost import Hosts

Says = Callable[[str], None]
SETTINGS = ("jax_enable_x64", "jax_threefry_partitionable", "jax_numpy_dtype_promotion")
"""JAX settings that change results."""
NEVER_IN_THE_NUMBERS = (
    "checkpoint",
    "wandb",
    "compile_cache",
    "data.data_dir",
    "data.workers",
    "data.stream",
    "comparisons",
)
"""Fields that may differ on resume. For `data.stream`, the identity compares the streamed data sets."""
ON_EACH_HOST = ("wandb", "compile_cache", "data.data_dir", "data.workers")
"""Fields that may differ between hosts."""

ONLY_ROUNDING = ("lanes.at_a_time", "devices", "mesh", "accumulate", "remat")
"""Fields that change results only by rounding."""


def identity(name: str, experiment: Experiment, device: jax.Device, devices: int, cpu_kernels: str) -> dict[str, Any]:
    """Return the identity of a session: what its results depend on. Equal identities give equal results."""
    return {
        "experiment": name,
        "config": flat(to_dict(experiment)),
        "code_sha256": provenance.code_sha256(),
        "versions": {**provenance.versions(), "numpy": np.__version__},
        "device": {"platform": device.platform, "kind": device.device_kind, "kernels": cpu_kernels},
        "settings": {
            "XLA_FLAGS": os.environ.get("XLA_FLAGS"),
            **{name: getattr(jax.config, name) for name in SETTINGS},
        },
        "machine": {"processor": kernels.processor()[:200], "cores": os.cpu_count(), "devices": devices},
    }


def fingerprint(data_sets: Iterable[DataSet | StreamedSet]) -> str:
    """Return one SHA-256 of all examples and classes. A streamed data set counts by its `fingerprint_of_stream`."""
    digest = hashlib.sha256()
    known = list(data_sets)
    for one in known:
        if isinstance(one, StreamedSet):
            digest.update(fingerprint_of_stream(one).encode())
    resident = [one for one in known if isinstance(one, DataSet)]
    arrays = (array for one in resident for split in (one.train, one.validation, one.test) for array in split)
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data if array.size else b"")
    return digest.hexdigest()


class IdentityChanges(NamedTuple):
    """What has changed since the run began, in words."""

    refused: list[str]
    """Changes that make the results incomparable."""
    told: list[str]
    """Changes after which results agree up to rounding, but perhaps not to the last bit."""


def identity_changes(before: dict[str, Any], after: dict[str, Any]) -> IdentityChanges:
    """Return the differences between two identities, in words."""
    refused: list[str] = []
    told: list[str] = []
    for field, text in changed_fields(before, after, but=NEVER_IN_THE_NUMBERS):
        (told if field in ONLY_ROUNDING else refused).append(text)
    # The SHA-256 of a stream differs from the SHA-256 of the same examples in memory.
    is_streamed_alike = _part(before, "settings").get("streamed") == _part(after, "settings").get("streamed")
    for part in ("experiment", "code_sha256", *(["data_sha256"] if is_streamed_alike else [])):
        if before.get(part) != after.get(part):
            what = {"experiment": "the experiment", "code_sha256": "cnnlib's code", "data_sha256": "the data"}[part]
            refused.append(f"{what} was {_short(before.get(part), 12)}, is {_short(after.get(part), 12)}")
    parts = (("versions", refused), ("device", refused), ("settings", refused), ("machine", told))
    for part, where in parts:
        old, new = (_part(side, part) for side in (before, after))
        for name in dict.fromkeys((*old, *new)):
            if old.get(name) != new.get(name):
                text = f"{name} was {_short(old.get(name))}, is {_short(new.get(name))}"
                (told if name == "python" else where).append(text)
    return IdentityChanges(refused, told)


def streamed_in(record: dict[str, Any]) -> list[str] | None:
    """Return the names of the data sets that a run has streamed since it began; None if `record` does not list them."""
    found = _part(_part(record, "identity"), "settings").get("streamed")
    return found if isinstance(found, list) else None


def changed_fields(before: dict[str, Any], after: dict[str, Any], but: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """For each field that differs, yield its name and the change in words.

    The name is without the prefix `arms.NAME.`. Skip fields whose name begins with an entry of `but`.
    """
    old, new = (_fields(_part(side, "config")) for side in (before, after))
    for name in dict.fromkeys((*old, *new)):
        field = re.sub(r"^arms\.[^.]+\.", "", name)
        if old.get(name) != new.get(name) and not field.startswith(but):
            yield field, f"{name} was {_short(old.get(name))}, is {_short(new.get(name))}"


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return a flat configuration with one entry per override of an arm."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if name.startswith("arms.") and name.endswith(".own") and isinstance(value, list):
            own = (str(text).partition("=") for text in value)
            found |= {f"{name.removesuffix('own')}{field}": text for field, _, text in own}
        else:
            found[name] = value
    return found


def _part(identity: dict[str, Any], name: str) -> dict[str, Any]:
    found = identity.get(name)
    return found if isinstance(found, dict) else {}


def _short(value: Any, length: int = 60) -> str:
    text = (",".join(map(str, value)) or "nothing") if isinstance(value, list) else str(value)
    return text if len(text) <= length else text[:length] + "..."


class FinishedArm(NamedTuple):
    """A finished arm, which is not trained again."""

    result: dict[str, Any]
    lines: list[dict[str, Any]]
    wall_seconds: float


LANE_KEYS = {*LaneNumbers._fields, "test_accuracy", "test_loss", "status", "epochs", "parameters_sha256"}
ARM_KEYS = {"name", "connectivity", "model", "parameters", "connections", "macs", "match", "start", "chosen_setting"}
ARM_KEYS |= {
    "compile_seconds",
    "lanes_at_a_time",
    "train_seconds_per_lane",
    "test_accuracy",
    "settings",
    "lanes",
    "epochs",
}


def write_arm(folder: RunFolder, finished: FinishedArm) -> None:
    """Write a finished arm to `arms/ARM.json`, with a SHA-256 that shows whether the file is complete."""
    content = {**finished._asdict(), "sha256": _sum_of(finished)}
    place = inside(folder.path, folder / ARMS)
    with files.cannot_write(place):
        place.mkdir(exist_ok=True)
    path = place / f"{finished.result['name']}.json"
    files.write_whole(path, lambda beside: beside.write_text(files.to_json(content), encoding="utf-8"))


def read_arm(folder: RunFolder, arm: TrainedArm) -> FinishedArm | None:
    """Return a finished arm; None if the arm has not finished or its file is damaged."""
    found = read_json(inside(folder.path, folder / ARMS / f"{arm.name}.json"))
    if not isinstance(found, dict) or found.keys() != {*FinishedArm._fields, "sha256"}:
        return None
    finished = FinishedArm(found["result"], found["lines"], found["wall_seconds"])
    result = finished.result
    numbers = [list(lane) for lane in arm.lanes]
    is_ours = (
        isinstance(result, dict)
        and result.keys() >= ARM_KEYS
        and result["name"] == arm.name
        and result["model"] == str(arm.model)
        and isinstance(result["lanes"], list)
        and len(result["lanes"]) == len(arm.lanes)
        and all(isinstance(lane, dict) and lane.keys() >= LANE_KEYS for lane in result["lanes"])
        and [[lane[name] for name in LaneNumbers._fields] for lane in result["lanes"]] == numbers
        and result["epochs"] == arm.experiment.epochs
        and isinstance(finished.lines, list)
        and all(isinstance(line, dict) for line in finished.lines)
        and files.is_number(finished.wall_seconds)
    )
    return finished if is_ours and found["sha256"] == _sum_of(finished) else None


def _sum_of(finished: FinishedArm) -> str:
    return hashlib.sha256(json.dumps(files.plain(finished._asdict()), sort_keys=True).encode()).hexdigest()


class Progress(NamedTuple):
    """The JSON part of a checkpoint: the progress of an arm, without its model state."""

    format: int
    """`folder.FORMAT` of the version that wrote the checkpoint."""
    run: str
    """The run's ID."""
    arm: str
    epoch: int
    lanes: list[list[float]]
    """The seed and hyperparameters of each lane, in the order of `LaneNumbers`. The seeds of a lane and its
    number of finished epochs determine its random keys and data order. The state has the keys too, for comparison."""
    lanes_at_a_time: int
    lines: list[dict[str, Any]]
    """The lines of this arm in `metrics.jsonl`."""
    best: list[float] | None
    """The epoch of the highest mean validation accuracy so far, and that accuracy."""
    train_seconds: float
    waited_seconds: float
    """Upper bound of the part of `train_seconds` in which training waited for examples of a stream."""
    stream: Any
    """The arm's position in a stream of examples (`feeds.StreamedFeed.position`); None without a stream."""
    wall_seconds: float
    """Seconds of the whole run, over all sessions. Finished arms are stored separately, in `arms/`."""


class Left(NamedTuple):
    """What earlier sessions saved. The keys are the names of the arms."""

    finished: dict[str, FinishedArm]
    in_flight: dict[str, Progress]

    def lines(self, arms: tuple[TrainedArm, ...]) -> list[dict[str, Any]]:
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


def checked(found: dict[str, Any], run: str, arm: TrainedArm, epoch: int) -> Progress:
    """Return the JSON part of a checkpoint. Raise Unreadable if it is incomplete or is not of this run and arm."""
    require_format(f"the checkpoint of {arm.name} after epoch {epoch}", found)
    if found.keys() != set(Progress._fields):
        raise Unreadable(f"it has the fields {', '.join(map(str, found))}")
    progress = Progress(**found)
    lanes = [[float(number) for number in lane] for lane in arm.lanes]
    for name, value in {"run": run, "arm": arm.name, "epoch": epoch, "lanes": lanes}.items():
        if found[name] != value:
            raise Unreadable(f"its {name} is not that of this run")
    is_whole = (
        isinstance(progress.lanes_at_a_time, int)
        and 1 <= progress.lanes_at_a_time <= len(lanes)
        and isinstance(progress.lines, list)
        and all(isinstance(line, dict) for line in progress.lines)
        and files.is_number(progress.train_seconds)
        and files.is_number(progress.waited_seconds)
        and files.is_number(progress.wall_seconds)
        and (progress.best is None or (isinstance(progress.best, list) and all(map(files.is_number, progress.best))))
        and len(progress.best or (0, 0)) == 2
    )
    if not is_whole:
        raise Unreadable("its progress is not whole")
    return progress


def refusal(folder: Path, found: IdentityChanges) -> UserError:
    """Return the error that says in one line why a run is not resumed."""
    return UserError(
        f"the run in {folder} cannot be resumed to the same numbers: {'; '.join(found.refused)}; --force goes on with "
        f"it all the same, and the results say so; without --resume it is moved aside and a new one begins"
    )


def check_alike(hosts: Hosts, this: dict[str, Any]) -> None:
    """Raise UserError on all hosts if any host's results would differ from the results of process 0."""
    first, this = json.loads(hosts.from_first(json.dumps(this).encode())), json.loads(json.dumps(this))
    found = [text for _, text in changed_fields(first, this, but=ON_EACH_HOST)]
    found += [text for text in identity_changes(first, this).refused if text not in found]
    hosts.same("differences from process 0:", "; ".join(found) or "none")
