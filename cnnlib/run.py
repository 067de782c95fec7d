"""run(experiment): the loop over arms and epochs, and what comes out of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from cnnlib import backend, feeds, folder, kernels, mesh, tracking
from cnnlib.arms import Pace, Training, described_arm, train_arm, write_finished
from cnnlib.config import Data, Experiment
from cnnlib.data import DataSet, StreamedSet, describe
from cnnlib.errors import Stopped, UserError
from cnnlib.feeds import Feed
from cnnlib.fields import to_dict
from cnnlib.folder import FORMAT, JOBS, PROFILES, RunFolder, inside, require_format
from cnnlib.multihost import ALONE, Hosts
from cnnlib.predictions import write_answers
from cnnlib.programs import (
    Programs,
    check_parameters_fit,
    compile_cache,
    compile_programs,
    free_memory,
    spread_of,
    state_shapes,
)
from cnnlib.resolve import Part, TrainedArm, resolve
from cnnlib.resume import (
    FinishedArm,
    Left,
    check_alike,
    differences,
    fingerprint,
    identity,
    latest,
    read_arm,
    refusal,
    streamed_in,
    write_arm,
)
from cnnlib.spec import Conv, Local, MaxPool, shape_text, walk
from cnnlib.watcher import Beginning, Watcher, Watchers

if TYPE_CHECKING:
    from cnnlib.launch.merge import Merged


def run(
    experiment: Experiment,
    name: str,
    out: Path,
    watcher: Watcher,
    *,
    resume: bool = False,
    force: bool = False,
    stop: Callable[[], bool] = lambda: False,
    part: Part | None = None,
    hosts: Hosts = ALONE,
    check: bool = True,
    profile: bool = False,
    merged: Merged | None = None,
) -> dict[str, Any]:
    """Train every lane of every arm, and write `folder.RUN_FILES`, but for the report, to `out`.

    Args:
        experiment: What to train.
        name: Of the experiment.
        out: The folder of the run. With `hosts` all processes must see it.
        watcher: Is told how it goes.
        resume: Go on with the run in `out`; a finished one is only read.
        force: Go on even where the results would be of two kinds of runs.
        stop: Is asked after every epoch whether to end early. Then what there is is saved.
        part: Train only this part, as one job of several. The results are those of its arm.
        hosts: The processes of a run on several hosts, which all call this together.
        check: Check the backend before training. The results say whether it was.
        profile: Write a trace of one epoch of each arm into the folder `profile`; that epoch takes longer.
        merged: The results of the jobs in `out`. Nothing is trained; they become the results of the run.

    Returns what `results.json` holds.

    Raises:
        Stopped: `stop` asked for it.
        UserError: With nothing written, for what does not fit together or does not fit in the memory, and for a backend
            that computes wrong numbers; later for a disk that takes no more: what was saved before stays.
    """
    began = time.perf_counter()
    chosen = part.of if part else tuple
    asked = chosen(resolve(experiment))
    devices = most_devices(asked, mesh.devices(experiment.devices), hosts)
    device = next(device for device in devices if device.process_index == hosts.process)
    with contextlib.ExitStack() as stack:
        log = tracking.Log()
        stack.callback(log.close)
        watcher = Watchers((watcher, log))
        # Process 0 writes the files of the run; what the others write, but for checkpoints, is for nobody to read.
        written = out
        if not hosts.is_first:
            written = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cnnlib-")))
        held = earlier_run(out, watcher) if resume and hosts.is_first else None
        if held is None:
            folder.check(written)
        else:
            stack.enter_context(held)
        streamed = None if held is None else streamed_in(held.record)
        if merged is not None:
            streamed = merged.streamed
        # What is free changes from session to session and from host to host, and the examples' order with it.
        free = hosts.lowest(free_memory(device))
        streamed = json.loads(hosts.from_first(json.dumps(None if streamed is None else list(streamed)).encode()))
        data_sets = feeds.read_or_open_all((arm.data for arm in asked), free, watcher.says, streamed)
        arms = chosen(
            resolve(
                experiment,
                # Of arms of other jobs only what is known without reading.
                lambda data: (
                    data_sets[replace(data, train=None)].description.with_training(data.train)
                    if replace(data, train=None) in data_sets
                    else describe(data)
                ),
            )
        )
        for arm in arms:
            feeds.check_streamable(arm, data_sets[arm.data])
            check_parameters_fit(arm, devices, hosts)
        changes: list[str] = []
        cpu_kernels = kernels_for(arms, device, watcher)
        this = identity_with_data(identity(name, experiment, device, len(devices), cpu_kernels), data_sets.values())
        if merged is not None:
            changes += changes_in_jobs(merged, identities_of_parts(this, arms, data_sets, device), force, watcher)
        check_alike(hosts, this)
        results = None
        if held is not None:
            changes, results = changes_since(held, this, arms, force, watcher)
        if hosts.agreed(results is not None):
            return results or {}
        fed = {data: feeds.feed_of(data_set, devices) for data, data_set in data_sets.items()}
        for data_set in data_sets.values():
            known, count = data_set.description, data_set.description.counts["train"]
            watcher.says(f"{name} on {known.name}: {count:,} training examples of {shape_text(known.input_shape)}")
        if merged is not None:
            left = Left(merged.finished, {})
        else:
            left = what_is_left(out, held, arms, devices, hosts, watcher) if resume else Left({}, {})
        if check and len(left.finished) < len(arms):
            for precision in dict.fromkeys(arm.experiment.precision for arm in arms):
                backend.require_right(device, precision, experiment.compile_cache, watcher.says)
        programs = Compiled(experiment.compile_cache, fed, devices, hosts, left, watcher)
        programs.compile(arms[:MOST_AHEAD])
        if held is None:
            held = stack.enter_context(RunFolder(written))
            if (earlier := held.make_room(keep=[JOBS] if merged else [])) is not None:
                watcher.says(f"the files of an earlier run moved to {earlier}")
            if merged is not None:
                keep_merged(held, merged)
        seconds = left.seconds - began
        clock = lambda: time.perf_counter() + seconds  # noqa: E731
        training = Training(
            experiment=experiment,
            fed=fed,
            folder=held,
            watcher=watcher,
            stop=stop,
            seconds=clock,
            out=out,
            pace=Pace(experiment.checkpoint.share),
            unwritten=[],
            hosts=hosts,
            profiles=out / PROFILES if profile else None,
        )
        try:
            beginning = begin(held, name, experiment, this, left, changes, force, check, arms)
            if hosts.count > 1:  # JAX ends all others when one dies, and they have no time to say it
                watcher.says("if a host dies, the same commands with --resume, on all hosts, go on with what is saved")
            with tracking.JsonLines(held / "metrics.jsonl", left.lines(arms)) as metrics:
                watcher.run_begins(beginning)
                finished = []
                for index, arm in enumerate(arms):
                    own = None if arm.name in left.finished else programs.of(arm)
                    finished.append(train_arm(training, arm, own, left, metrics))
                    programs.drop(arm, arms[index + 1 :])
            write_finished(training)
            results = {
                "experiment": name,
                "config": to_dict(experiment),
                "data": finished[0].result["data"],
                "device": {
                    "platform": device.platform,
                    "kind": device.device_kind,
                    "count": len(devices),
                    "hosts": hosts.count,
                    "kernels": cpu_kernels,
                    "precision": experiment.precision,
                    "flags": os.environ.get("XLA_FLAGS", ""),
                    "checked": held.record["checked"],
                },
                "machine": tracking.machine(),
                "finished": tracking.now(),
                "versions": tracking.versions(),
                "commit": tracking.commit(),
                "wall_seconds": training.seconds(),
                "resumed": held.record["resumed"],
                "arms": [arm.result for arm in finished],
            }
            results = dict(tracking.plain(results))  # as the file says it: what is not finite is None
            tracking.write_whole(held / "results.json", lambda path: path.write_text(tracking.to_json(results)))
            if merged is not None:
                shutil.rmtree(inside(held.path, held / JOBS))
            watcher.run_ends(results)
            held.end_session("finished")
            return results
        except Exception as error:
            state = "interrupted" if isinstance(error, Stopped) else "failed"
            with contextlib.suppress(UserError):  # on a full disk there is no place for these either
                watcher.says(f"{state}: {error}")
            held.end_session(state, " ".join(str(error).split())[:500])
            raise


def identity_with_data(known: dict[str, Any], data_sets: Iterable[DataSet | StreamedSet]) -> dict[str, Any]:
    """The identity of a run on these data."""
    sets = list(data_sets)
    streamed = [one.description.name for one in sets if feeds.is_streamed(one)]
    return {**known, "settings": {**known["settings"], "streamed": streamed}, "data_sha256": fingerprint(sets)}


def identities_of_parts(
    this: dict[str, Any],
    arms: tuple[TrainedArm, ...],
    data_sets: Mapping[Data, DataSet | StreamedSet],
    device: jax.Device,
) -> dict[str, dict[str, Any]]:
    """The identity that a run of one of the arms has, by its name; `this` is that of the run of all."""
    of_data = {data: identity_with_data(this, [data_set]) for data, data_set in data_sets.items()}
    own_kernels = {arm.name: kernels_for((arm,), device, Watcher()) for arm in arms}
    return {
        arm.name: {**of_data[arm.data], "device": {**this["device"], "kernels": own_kernels[arm.name]}} for arm in arms
    }


def earlier_run(out: Path, watcher: Watcher) -> RunFolder | None:
    """The run to go on with, held by this process; None, and the user is told, where there is none."""
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
    """What has changed since the run began, and its results where it is finished; the user is told.

    Raises UserError where the results would be of two kinds of runs, without `force`.
    """
    found = differences(held.record["identity"], this)
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
    """What a finished run came to; None for one that has not finished, or not with these arms."""
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
    """Read what earlier sessions kept of each arm, on all hosts; the user is told from where it goes on.

    `held` is the folder `out` on process 0, where there is a run, and None on others.
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
    known, begun, run = json.loads(hosts.from_first(json.dumps(tracking.plain(known)).encode()))
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


MOST_AHEAD = 24
"""Arms whose programs are compiled before the run begins, so that what does not fit is known before anything is
written. The programs of hundreds would not fit in memory together: the others are compiled when their turn comes."""


class Compiled:
    """The compiled programs of arms that are not finished; arms of one program share it."""

    def __init__(
        self,
        keep: bool,
        fed: dict[Data, Feed],
        devices: tuple[jax.Device, ...],
        hosts: Hosts,
        left: Left,
        watcher: Watcher,
    ) -> None:
        self._keep, self._fed, self._devices, self._hosts = keep, fed, devices, hosts
        self._left, self._watcher = left, watcher
        self._made: dict[Hashable, Programs] = {}
        self._told: set[str] = set()

    def compile(self, arms: Sequence[TrainedArm]) -> None:
        """Compiles what these arms need and is not there."""
        with compile_cache(self._keep, self._watcher.says):
            for arm in arms:
                if arm.name not in self._left.finished and arm.name not in self._told:
                    self._told.add(arm.name)
                    self._watcher.arm_begins(arm.name, len(arm.lanes), arm.experiment.epochs)
                    self._compile(arm)

    def of(self, arm: TrainedArm) -> Programs:
        """An arm's programs."""
        if self._key(arm) not in self._made or arm.name not in self._told:
            self.compile([arm])
        return self._made[self._key(arm)]

    def drop(self, arm: TrainedArm, coming: Sequence[TrainedArm]) -> None:
        """Gives an arm's programs back, unless one that comes needs them."""
        key = self._key(arm)
        if all(self._key(other) != key for other in coming):
            self._made.pop(key, None)

    def _key(self, arm: TrainedArm) -> Hashable:
        return (arm.program, self._before(arm))

    def _before(self, arm: TrainedArm) -> int | None:
        """How many of its lanes ran at a time in an earlier session."""
        found = self._left.in_flight.get(arm.name)
        return None if found is None else found.lanes_at_a_time

    def _compile(self, arm: TrainedArm) -> None:
        key, before = self._key(arm), self._before(arm)
        if key not in self._made:
            self._made[key] = compile_programs(arm, self._fed[arm.data], self._devices, before, self._hosts)
        now = self._made[key].at_a_time
        if before is not None and now != before:
            self._watcher.says(
                f"{arm.name}: {now} lanes at a time, {before} before: "
                "the results agree to rounding, not to the last bit"
            )


def changes_in_jobs(merged: Merged, expected: Mapping[str, dict[str, Any]], force: bool, watcher: Watcher) -> list[str]:
    """Return, in words, how jobs differ from what this process would compute, and tell the user.

    `expected` is the identity that a job of an arm must have, by the name of the arm. Raises UserError where the
    results would be of two kinds of runs, without `force`.
    """
    changes: list[str] = []
    for job, own in merged.identities.items():
        found = differences(own, expected[Part.named(job).arm])
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


def begin(
    held: RunFolder,
    name: str,
    experiment: Experiment,
    this: dict[str, Any],
    left: Left,
    changes: list[str],
    force: bool,
    check: bool,
    arms: Sequence[TrainedArm],
) -> Beginning:
    """Writes what a session writes before it trains: its configuration, where it runs, that it does."""
    is_resumed = "sessions" in held.record
    resumed = list(held.record.get("resumed", []))
    if is_resumed:
        in_flight = {arm: found.epoch for arm, found in left.in_flight.items()}
        kept = {"finished": list(left.finished), "in_flight": in_flight}
        resumed.append({"time": tracking.now(), **kept, "changes": changes, "forced": force})
    command = tracking.command_for(name, experiment)
    checked = check and bool(held.record.get("checked", True))  # in all sessions
    described = {arm.name: {**described_arm(arm), "config": to_dict(arm.experiment)} for arm in arms}
    data, platform = "+".join(dict.fromkeys(arm.description.name for arm in arms)), this["device"]["platform"]
    known = {"format": FORMAT, "experiment": name, "identity": this, "command": command, "resumed": resumed}
    known |= {"checked": checked, "arms": described, "tags": [data[:64], platform]}
    held.begin_session(known)
    config = to_dict(experiment)
    where = tracking.environment(command)
    texts = {"config.json": {"experiment": name, **config}, "environment.json": where}
    for file, values in texts.items():
        tracking.write_whole(held / file, partial(_write_json, values))
    if where["diff"]:
        tracking.write_whole(held / where["diff"], lambda path: path.write_text(tracking.diff(), encoding="utf-8"))
    lanes = {arm.name: [numbers._asdict() for numbers in arm.lanes] for arm in arms}
    return Beginning(held.record["id"], name, held.path, config, data, platform, described, lanes, is_resumed, command)


def _write_json(values: dict[str, Any], path: Path) -> None:
    path.write_text(tracking.to_json(values), encoding="utf-8")


def kernels_for(arms: tuple[TrainedArm, ...], device: jax.Device, watcher: Watcher) -> str:
    """Choose what convolves and pools (`kernels.chosen`), and tell the user what takes time or costs it.

    Raises UserError for a `CNNLIB_KERNELS` that cannot be followed.
    """
    asked = kernels.asked()
    layers = [layer for arm in arms for layer in walk(arm.model.layers)]
    if device.platform != "cpu" or not any(isinstance(layer, (Conv, Local, MaxPool)) for layer in layers):
        return "xla"
    if asked in (None, "native") and not kernels.is_compiled():
        reason = kernels.not_kept()
        how_often = f"for this process only: {reason}" if reason else "once"
        watcher.says(f"compiling the convolutions for this processor, {how_often}")
    choice = kernels.chosen()
    if (asked, choice) == (None, "xla"):
        watcher.says(f"{kernels.register()}: convolutions run on XLA's own kernels, 2 to 4 times as long")
    return choice


def most_devices(
    arms: tuple[TrainedArm, ...], devices: tuple[jax.Device, ...], hosts: Hosts = ALONE
) -> tuple[jax.Device, ...]:
    """Those of the devices that some arm has lanes for."""
    return max((spread_of(arm, devices, hosts).devices for arm in arms), key=len)
