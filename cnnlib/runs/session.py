"""One session of a run: its folder, its log and its record, from beginning to end."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

from cnnlib.config.command import command_for
from cnnlib.config.fields import to_dict
from cnnlib.config.resolve import Part, TrainedArm
from cnnlib.config.schema import Experiment
from cnnlib.errors import Stopped, UserError
from cnnlib.runs import folder
from cnnlib.runs.arm_results import described_arm
from cnnlib.runs.callbacks import Beginning, Watcher, Watchers
from cnnlib.runs.earlier import earlier_run, keep_merged
from cnnlib.runs.folder import JOBS, RunFolder, inside
from cnnlib.runs.log import Log
from cnnlib.runs.merged import Merged
from cnnlib.runs.record import Identity, RecordedArm, RunRecord, Session, State
from cnnlib.runs.results import FORMAT, Resumption, RunResults
from cnnlib.runs.resume import Left
from cnnlib.system import files, provenance
from cnnlib.train.multihost import Hosts


@dataclass(frozen=True)
class Options:
    """Options of one session of a run."""

    resume: bool = False
    """Resume the run in the folder. A finished run is only read."""
    force: bool = False
    """Resume or merge even if the results are not comparable."""
    check: bool = True
    """Check the backend before training. The results say whether the backend was checked."""
    profile: bool = False
    """Write a trace of one epoch per arm into the folder `profile`. That epoch takes longer."""
    part: Part | None = None
    """Train only this part of the run, as one job of several. The results contain only the arm of this part."""
    merged: Merged | None = None
    """The merged results of the jobs in the folder. These become the results of the run, and nothing is trained."""


class RunSession:
    """The folder of a run, its log and its record, as a context manager.

    If an exception ends the session after `begin`, the record stores its message. On hosts other than the first, all
    files except checkpoints go to a temporary folder, because nobody reads them.
    """

    def __init__(
        self, name: str, experiment: Experiment, out: Path, watcher: Watcher, options: Options, hosts: Hosts
    ) -> None:
        self.name, self.experiment, self.out = name, experiment, out
        self.options, self.hosts = options, hosts
        self.watcher: Watcher = watcher
        self.earlier: RunFolder | None = None
        """The folder of the run to resume; None without such a run, and on hosts other than the first."""
        self._folder: RunFolder | None = None
        self._is_begun = False
        self._zero = time.perf_counter()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> RunSession:
        with contextlib.ExitStack() as stack:
            log = Log()
            stack.callback(log.close)
            self.watcher = Watchers((self.watcher, log))
            self._written = self.out
            if not self.hosts.is_first:
                self._written = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cnnlib-")))
            elif self.options.resume:
                self.earlier = earlier_run(self.out, self.watcher)
            if self.earlier is None:
                folder.check(self._written)
            else:
                self._folder = stack.enter_context(self.earlier)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if self._is_begun and isinstance(error, Exception):
                state: State = "interrupted" if isinstance(error, Stopped) else "failed"
                with contextlib.suppress(UserError):  # a full disk has no space for this line either
                    self.watcher.says(f"{state}: {error}")
                self.folder.end_session(state, " ".join(str(error).split())[:500])

    @property
    def folder(self) -> RunFolder:
        """The folder that this process writes to. It exists after `begin`, or if a run is resumed."""
        assert self._folder is not None
        return self._folder

    @property
    def record(self) -> RunRecord:
        """The record of the run. It exists after `begin`, or if a run is resumed."""
        assert self.folder.record is not None
        return self.folder.record

    def seconds(self) -> float:
        """Return the seconds that the run has taken so far, over all sessions."""
        return time.perf_counter() - self._zero

    def begin(self, arms: Sequence[TrainedArm], identity: Identity, left: Left, changes: list[str]) -> None:
        """Write the configuration, the environment and the record of the session, before training begins.

        Args:
            arms: The arms to train.
            identity: What the results depend on (`resume.identity`).
            left: What earlier sessions or jobs have saved.
            changes: How this session differs from earlier sessions or jobs, in words.
        """
        self._zero -= left.seconds
        if self._folder is None:
            self._folder = self._stack.enter_context(RunFolder(self._written))
            merged = self.options.merged
            if (earlier := self._folder.make_room(keep=[JOBS] if merged else [])) is not None:
                self.watcher.says(f"the files of an earlier run moved to {earlier}")
            if merged is not None:
                keep_merged(self._folder, merged)
        self._is_begun = True
        beginning = self._write_beginning(arms, identity, left, changes)
        if self.hosts.count > 1:  # after a host has died, JAX ends the others without a message
            self.watcher.says("if a host dies, the same commands with --resume, on all hosts, go on with what is saved")
        self.watcher.run_begins(beginning)

    def _write_beginning(
        self, arms: Sequence[TrainedArm], identity: Identity, left: Left, changes: list[str]
    ) -> Beginning:
        held, config, command = self.folder, to_dict(self.experiment), command_for(self.name, self.experiment)
        before, merged, platform = held.record, self.options.merged, identity.device["platform"]
        resumed: tuple[Resumption, ...] = () if before is None else before.resumed
        if before is not None:
            in_flight = {arm: found.epoch for arm, found in left.in_flight.items()}
            kept = (tuple(left.finished), in_flight, tuple(changes))
            resumed = (*resumed, Resumption(provenance.now(), *kept, self.options.force))
        record = RunRecord(
            format=FORMAT,
            id=secrets.token_hex(4) if before is None else before.id,
            experiment=self.name,
            identity=identity,
            command=command,
            resumed=resumed,
            checked=self.options.check and (before is None or before.checked),
            arms={arm.name: RecordedArm(**vars(described_arm(arm)), config=to_dict(arm.experiment)) for arm in arms},
            tags=("+".join(dict.fromkeys(arm.description.name for arm in arms))[:64], platform),
            sessions=(*(() if before is None else before.sessions), Session.of_this_process()),
            jobs=merged.jobs if merged is not None else {} if before is None else before.jobs,
        )
        held.write(record)
        where = provenance.environment(command)
        texts = {"config.json": {"experiment": self.name, **config}, "environment.json": where}
        for file, values in texts.items():
            files.write_whole(held / file, partial(_write_json, values))
        if where["diff"]:
            files.write_whole(held / where["diff"], lambda path: path.write_text(provenance.diff(), encoding="utf-8"))
        return Beginning(held.path, record, is_resumed=before is not None)

    def finish(self, results: RunResults) -> RunResults:
        """Write the results of the run and call the callback. Return the results."""
        files.write_whole(self.folder / "results.json", partial(_write_json, to_dict(results)))
        if self.options.merged is not None:
            shutil.rmtree(inside(self.folder.path, self.folder / JOBS))
        self.watcher.run_ends(results)
        self.folder.end_session("finished")
        return results


def _write_json(values: Mapping[str, object], path: Path) -> None:
    path.write_text(files.to_json(values), encoding="utf-8")
