"""Read what earlier sessions and jobs left of a run, and check that resuming keeps the results comparable."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import jax

from cnnlib.config.fields import from_dict, to_dict
from cnnlib.config.resolve import Part, TrainedArm
from cnnlib.data.declaration import Data
from cnnlib.data.sets import DataSet, StreamedSet
from cnnlib.errors import UserError
from cnnlib.runs import folder
from cnnlib.runs.callbacks import Watcher
from cnnlib.runs.compiled import kernels_for
from cnnlib.runs.folder import JOBS, RunFolder
from cnnlib.runs.identity import identity_changes, of_part, refusal
from cnnlib.runs.merged import Merged
from cnnlib.runs.predictions import write_answers
from cnnlib.runs.record import RECORD, Identity, RunRecord, read_record
from cnnlib.runs.results import RunResults, read_results
from cnnlib.runs.resume import FinishedArm, Left, latest, read_arm, write_arm
from cnnlib.system import files
from cnnlib.train.multihost import Hosts
from cnnlib.train.programs import spread_of, state_shapes


def identities_of_parts(
    this: Identity,
    arms: tuple[TrainedArm, ...],
    data_sets: Mapping[Data, DataSet | StreamedSet],
    device: jax.Device,
) -> dict[str, Identity]:
    """For each arm name, return the identity that a run of only this arm would have.

    `this` is the identity of the whole run.
    """
    return {arm.name: of_part(this, data_sets[arm.data], kernels_for((arm,), device, Watcher())) for arm in arms}


def earlier_run(out: Path, watcher: Watcher) -> RunFolder | None:
    """Return the run to resume, locked by this process. If there is no run, tell the user and return None."""
    if not os.path.lexists(out / RECORD):
        if (out / JOBS).is_dir():
            raise UserError(f"{out} has jobs: --resume with --executor, as before, goes on with them")
        watcher.says(f"there is no run in {out} to resume: a new one begins")
        return None
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(RunFolder(out))
        try:
            held.record = read_record(out)
        except UserError as error:
            raise UserError(f"{error}; without --resume what is there is moved aside") from error
        stack.pop_all()
    return held


def changes_since(
    held: RunFolder, record: RunRecord, this: Identity, arms: tuple[TrainedArm, ...], force: bool, watcher: Watcher
) -> tuple[list[str], RunResults | None]:
    """Return the changes since the run began. If the run is finished, return its results too.

    Print the changes to the user, and whether the run is finished.

    Raise UserError if a change makes the results incomparable and `force` is false.
    """
    found = identity_changes(record.identity, this)
    if found.refused and not force:
        raise refusal(held.path, found)
    changes = [*found.refused, *found.told]
    for text in changes:
        watcher.says(f"since the run began: {text}")
    results = None if found.refused else finished_results(held, record, arms)
    if results is not None:
        watcher.says(f"the run in {held.path} is finished: there is nothing left to do")
    return changes, results


def finished_results(held: RunFolder, record: RunRecord, arms: tuple[TrainedArm, ...]) -> RunResults | None:
    """Return the results of a finished run; None if the run is not finished or has other arms."""
    if record.state != "finished":
        return None
    try:
        results = read_results(held.path)
    except UserError:  # the arms are read again from their own files
        return None
    return results if [arm.name for arm in results.arms] == [arm.name for arm in arms] else None


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
        to_dict(finished),
        begun,
        "" if held is None or held.record is None else held.record.id,
    ]
    known, begun, run = json.loads(hosts.from_first(json.dumps(files.plain(known)).encode()))
    left = Left(from_dict(known, dict[str, FinishedArm], "arms"), {})
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


def changes_in_jobs(merged: Merged, expected: Mapping[str, Identity], force: bool, watcher: Watcher) -> list[str]:
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
