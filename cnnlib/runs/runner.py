"""Run an experiment: prepare, compile, train, finish."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from cnnlib.check import backend
from cnnlib.config.fields import to_dict
from cnnlib.config.resolve import TrainedArm, resolve
from cnnlib.config.schema import Experiment
from cnnlib.data.declaration import Data
from cnnlib.data.sets import DataSet, StreamedSet, describe
from cnnlib.runs.arms import Pace, Training, train_arm, write_finished
from cnnlib.runs.callbacks import Watcher
from cnnlib.runs.compiled import MOST_AHEAD, Compiled, kernels_for
from cnnlib.runs.earlier import changes_in_jobs, changes_since, identities_of_parts, what_is_left
from cnnlib.runs.folder import PROFILES
from cnnlib.runs.identity import check_alike, identity
from cnnlib.runs.record import Identity
from cnnlib.runs.results import FORMAT, DeviceResult, Machine, RunResults, read_results
from cnnlib.runs.resume import FinishedArm, Left
from cnnlib.runs.session import Options, RunSession
from cnnlib.spec.window import shape_text
from cnnlib.system import files, provenance
from cnnlib.train import feeds, sharding
from cnnlib.train.multihost import ALONE, Hosts
from cnnlib.train.programs import check_parameters_fit, free_memory, spread_of


def run(
    experiment: Experiment,
    name: str,
    out: Path,
    watcher: Watcher,
    options: Options = Options(),
    stop: Callable[[], bool] = lambda: False,
    hosts: Hosts = ALONE,
) -> RunResults:
    """Train every lane of every arm. Write `folder.RUN_FILES` to `out`, except the report.

    Args:
        experiment: What to train.
        name: The name of the experiment.
        out: The run's folder. In a run on several hosts, all processes must see it.
        watcher: The callback that receives the events of the run.
        options: Options of this session, such as whether to resume.
        stop: Called after every epoch. If it returns True, the run saves its progress and ends.
        hosts: The processes of a run on several hosts. All of them call this function together.

    Returns the results, as stored in `results.json`.

    Raises:
        Stopped: If `stop` returned True.
        UserError: If settings conflict, something does not fit in memory, or the backend computes wrong results. In
            these cases, nothing is written. If the disk becomes full later, UserError is raised too, and all files that
            were saved before stay.
    """
    with RunSession(name, experiment, out, watcher, options, hosts) as session:
        prepared = prepare(session)
        changes, results = compared(session, prepared)
        if hosts.agreed(results is not None):
            return results or read_results(out)
        left = left_behind(session, prepared)
        programs = compile_first_arms(session, prepared, left)
        session.begin(prepared.arms, prepared.identity, left, changes)
        finished = train(session, prepared, programs, left, stop)
        return session.finish(results_of(session, prepared, finished))


@dataclass(frozen=True)
class PreparedRun:
    """An experiment with its data and devices: everything that is known before compilation."""

    arms: tuple[TrainedArm, ...]
    data_sets: dict[Data, DataSet | StreamedSet]
    fed: dict[Data, feeds.Feed]
    devices: tuple[jax.Device, ...]
    device: jax.Device
    """The first device of this process."""
    kernels: str
    """The kernels for convolution and pooling, from `kernels_for`."""
    identity: Identity


def prepare(session: RunSession) -> PreparedRun:
    """Read the data and check that everything fits. Raise UserError if something does not fit."""
    experiment, options, hosts, says = session.experiment, session.options, session.hosts, session.watcher.says
    chosen = options.part.of if options.part else tuple
    asked = chosen(resolve(experiment))
    devices = most_devices(asked, sharding.devices(experiment.devices), hosts)
    device = next(device for device in devices if device.process_index == hosts.process)
    earlier = None if session.earlier is None else session.earlier.record
    streamed = None if earlier is None else list(earlier.identity.streamed)
    if options.merged is not None:
        streamed = options.merged.streamed
    # Free memory decides which data sets are streamed, and streaming changes the order of examples. All hosts and
    # sessions must agree, so use the lowest free memory of all hosts, and the choice of earlier sessions.
    free = hosts.lowest(free_memory(device))
    streamed = json.loads(hosts.from_first(json.dumps(None if streamed is None else list(streamed)).encode()))
    data_sets = feeds.read_or_open_all((arm.data for arm in asked), free, says, streamed)

    def described(data: Data) -> Any:
        whole = replace(data, train=None)
        if whole in data_sets:
            return data_sets[whole].description.with_training(data.train)
        return describe(data)  # arms of other jobs: describe their data without reading it

    arms = chosen(resolve(experiment, described))
    for arm in arms:
        feeds.check_streamable(arm, data_sets[arm.data])
        check_parameters_fit(arm, devices, hosts)
    kernels = kernels_for(arms, device, session.watcher)
    this = identity(session.name, experiment, device, len(devices), kernels, data_sets.values())
    fed = {data: feeds.feed_of(data_set, devices) for data, data_set in data_sets.items()}
    return PreparedRun(arms, data_sets, fed, devices, device, kernels, this)


def compared(session: RunSession, prepared: PreparedRun) -> tuple[list[str], RunResults | None]:
    """Return how this session differs from earlier sessions and jobs. If the run is finished, return its results too.

    Raise UserError if a difference makes the results incomparable, unless `--force` is set.
    """
    merged, force = session.options.merged, session.options.force
    changes: list[str] = []
    if merged is not None:
        expected = identities_of_parts(prepared.identity, prepared.arms, prepared.data_sets, prepared.device)
        changes += changes_in_jobs(merged, expected, force, session.watcher)
    check_alike(session.hosts, prepared.identity)
    if session.earlier is None or session.earlier.record is None:
        return changes, None
    held, record = session.earlier, session.earlier.record
    return changes_since(held, record, prepared.identity, prepared.arms, force, session.watcher)


def left_behind(session: RunSession, prepared: PreparedRun) -> Left:
    """Return what jobs and earlier sessions have saved of each arm."""
    for data_set in prepared.data_sets.values():
        known, count = data_set.description, data_set.description.counts["train"]
        shape = shape_text(known.input_shape)
        session.watcher.says(f"{session.name} on {known.name}: {count:,} training examples of {shape}")
    if session.options.merged is not None:
        return Left(session.options.merged.finished, {})
    if not session.options.resume:
        return Left({}, {})
    arms, devices = prepared.arms, prepared.devices
    return what_is_left(session.out, session.earlier, arms, devices, session.hosts, session.watcher)


def compile_first_arms(session: RunSession, prepared: PreparedRun, left: Left) -> Compiled:
    """Check the backend and compile the first arms, so that an arm that does not fit fails early."""
    experiment, watcher = session.experiment, session.watcher
    if session.options.check and len(left.finished) < len(prepared.arms):
        for precision in dict.fromkeys(arm.experiment.precision for arm in prepared.arms):
            backend.require_right(prepared.device, precision, experiment.compile_cache, watcher.says)
    programs = Compiled(experiment.compile_cache, prepared.fed, prepared.devices, session.hosts, left, watcher)
    programs.compile(prepared.arms[:MOST_AHEAD])
    return programs


def train(
    session: RunSession, prepared: PreparedRun, programs: Compiled, left: Left, stop: Callable[[], bool]
) -> list[FinishedArm]:
    """Train one arm after another, each from its start or its last checkpoint. Raise Stopped if `stop` returns True."""
    experiment, held, arms = session.experiment, session.folder, prepared.arms
    training = Training(
        experiment=experiment,
        fed=prepared.fed,
        folder=held,
        watcher=session.watcher,
        stop=stop,
        seconds=session.seconds,
        out=session.out,
        pace=Pace(experiment.checkpoint.share),
        unwritten=[],
        hosts=session.hosts,
        profiles=session.out / PROFILES if session.options.profile else None,
    )
    finished = []
    with files.JsonLines(held / "metrics.jsonl", [vars(line) for line in left.lines(arms)]) as metrics:
        for index, arm in enumerate(arms):
            own = None if arm.name in left.finished else programs.of(arm)
            finished.append(train_arm(training, arm, own, left, metrics))
            programs.drop(arm, arms[index + 1 :])
    write_finished(training)
    return finished


def results_of(session: RunSession, prepared: PreparedRun, finished: list[FinishedArm]) -> RunResults:
    """Return the results of the run."""
    device, record = prepared.device, session.record
    return RunResults(
        format=FORMAT,
        experiment=session.name,
        config=to_dict(session.experiment),
        data=finished[0].result.data,
        device=DeviceResult(
            platform=device.platform,
            kind=device.device_kind,
            count=len(prepared.devices),
            hosts=session.hosts.count,
            kernels=prepared.kernels,
            precision=session.experiment.precision,
            flags=os.environ.get("XLA_FLAGS", ""),
            checked=record.checked,
        ),
        machine=Machine(*provenance.machine()),
        finished=provenance.now(),
        versions=provenance.versions(),
        commit=provenance.commit(),
        wall_seconds=session.seconds(),
        resumed=record.resumed,
        arms=tuple(arm.result for arm in finished),
    )


def most_devices(
    arms: tuple[TrainedArm, ...], devices: tuple[jax.Device, ...], hosts: Hosts = ALONE
) -> tuple[jax.Device, ...]:
    """Return the devices of the arm that uses the most devices."""
    return max((spread_of(arm, devices, hosts).devices for arm in arms), key=len)
