"""Read what earlier sessions and jobs left of a run, and check that resuming keeps the results comparable."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from cnnlib.config.resolve import Part, TrainedArm
from cnnlib.data.declaration import Data
from cnnlib.data.sets import DataSet, StreamedSet
from cnnlib.errors import UserError
from cnnlib.runs import folder
from cnnlib.runs.callbacks import Watcher
from cnnlib.runs.compiled import kernels_for
from cnnlib.runs.folder import JOBS, RunFolder, require_format
from cnnlib.runs.merged import Merged
from cnnlib.runs.predictions import write_answers
from cnnlib.runs.resume import FinishedArm, Left, fingerprint, identity_changes, latest, read_arm, refusal, write_arm
from cnnlib.system import files
from cnnlib.train import feeds
from cnnlib.train.multihost import Hosts
from cnnlib.train.programs import spread_of, state_shapes


def identity_with_data(known: dict[str, Any], data_sets: Iterable[DataSet | StreamedSet]) -> dict[str, Any]:
    """Extend the identity `known` (what the results depend on) with the data sets of the run."""
    sets = list(data_sets)
    streamed = [one.description.name for one in sets if feeds.is_streamed(one)]
    return {**known, "settings": {**known["settings"], "streamed": streamed}, "data_sha256": fingerprint(sets)}


def identities_of_parts(
    this: dict[str, Any],
    arms: tuple[TrainedArm, ...],
    data_sets: Mapping[Data, DataSet | StreamedSet],
    device: jax.Device,
) -> dict[str, dict[str, Any]]:
    """For each arm name, return the identity that a run of only this arm would have.

    `this` is the identity of the whole run.
    """
    of_data = {data: identity_with_data(this, [data_set]) for data, data_set in data_sets.items()}
    own_kernels = {arm.name: kernels_for((arm,), device, Watcher()) for arm in arms}
    return {
        arm.name: {**of_data[arm.data], "device": {**this["device"], "kernels": own_kernels[arm.name]}} for arm in arms
    }


def earlier_run(out: Path, watcher: Watcher) -> RunFolder | None:
    """Return the run to resume, locked by this process. If there is no run, tell the user and return None."""
    if not os.path.lexists(out / folder.RECORD):
        if (out / JOBS).is_dir():
            raise UserError(f"{out} has jobs: --resume with --executor, as before, goes on with them")
        watcher.says(f"there is no run in {out} to resume: a new one begins")
        return None
    held = RunFolder(out)
    if not held.read_record():
        held.__exit__(None, None, None)
        raise UserError(f"{out / folder.RECORD} cannot be read; without --resume what is there is moved aside")
    try:
        require_format(f"the run in {out}", held.record)
    except UserError:
        held.__exit__(None, None, None)
        raise
    return held


def changes_since(
    held: RunFolder, this: dict[str, Any], arms: tuple[TrainedArm, ...], force: bool, watcher: Watcher
) -> tuple[list[str], dict[str, Any] | None]:
    """Return the changes since the run began. If the run is finished, return its results too.

    Print the changes to the user, and whether the run is finished.

    Raise UserError if a change makes the results incomparable and `force` is false.
    """
    found = identity_changes(held.record["identity"], this)
    if found.refused and not force:
        raise refusal(held.path, found)
    changes = [*found.refused, *found.told]
    for text in changes:
        watcher.says(f"since the run began: {text}")
    results = None if found.refused else finished_results(held, arms)
    if results is not None:
        watcher.says(f"the run in {held.path} is finished: there is nothing left to do")
    return changes, results


def finished_results(held: RunFolder, arms: tuple[TrainedArm, ...]) -> dict[str, Any] | None:
    """Return the results of a finished run; None if the run is not finished or has other arms."""
    results = folder.read_json(held / "results.json")
    if not isinstance(results, dict) or held.record["sessions"][-1]["state"] != "finished":
        return None
    found = results.get("arms")
    names = [arm.get("name") for arm in found if isinstance(arm, dict)] if isinstance(found, list) else []
    return results if names == [arm.name for arm in arms] else None


def what_is_left(
    out: Path,
    held: RunFolder | None,
    arms: tuple[TrainedArm, ...],
    devices: tuple[jax.Device, ...],
    hosts: Hosts,
    watcher: Watcher,
) -> Left:
    """Read what earlier sessions saved of each arm. Tell the user after which epoch each arm resumes.

    All hosts call this function together and return the same. On process 0, `held` is the folder `out` if `out` has a
    run to resume, else None. On other hosts, `held` is None.
    """
    finished: dict[str, FinishedArm] = {}
    begun: list[str] = []
    for arm in arms:
        if held is None:
            break
        if (before := read_arm(held, arm)) is not None:
            finished[arm.name] = before
            continue
        if (held / folder.CHECKPOINTS / arm.name).exists():
            begun.append(arm.name)
    known = [
        {name: list(before) for name, before in finished.items()},
        begun,
        "" if held is None else held.record["id"],
    ]
    known, begun, run = json.loads(hosts.from_first(json.dumps(files.plain(known)).encode()))
    left = Left({name: FinishedArm(*before) for name, before in known.items()}, {})
    for arm in arms:
        if arm.name not in begun:
            continue
        state = state_shapes(arm, spread_of(arm, devices, hosts))
        found = latest(out, run, arm, state, hosts, watcher.says)
        if found is None:
            watcher.says(f"{arm.name} has no checkpoint to go on from: it starts anew")
        else:
            left.in_flight[arm.name] = found
            watcher.says(f"{arm.name} goes on after epoch {found.epoch} of {arm.experiment.epochs}")
    if left.finished:
        watcher.says(f"finished before: {', '.join(left.finished)}")
    return left


def changes_in_jobs(merged: Merged, expected: Mapping[str, dict[str, Any]], force: bool, watcher: Watcher) -> list[str]:
    """Describe how the results of the jobs differ from what this process would compute. Print the differences.

    `expected` maps the name of an arm to the identity that its jobs must have. Raise UserError if a difference makes
    the results incomparable and `force` is false.
    """
    changes: list[str] = []
    for job, own in merged.identities.items():
        found = identity_changes(own, expected[Part.named(job).arm])
        if found.refused and not force:
            raise UserError(
                f"job {job} has computed something else than this run: {'; '.join(found.refused)}; --force merges it"
            )
        changes += [f"{job}: {text}" for text in (*found.refused, *found.told) if not text.startswith("devices ")]
    for text in changes:
        watcher.says(text)
    return changes


def keep_merged(held: RunFolder, merged: Merged) -> None:
    """Write the results of jobs as finished arms of the run."""
    for arm, finished in merged.finished.items():
        write_answers(held, arm, merged.answers[arm])
        write_arm(held, finished)
    held.record[JOBS] = merged.sessions
