"""The record of a run, `run.json`: what its results depend on, and when and where each session trained it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cnnlib.config.fields import from_dict
from cnnlib.errors import UserError, require
from cnnlib.runs.results import DescribedArm, Machine, Resumption, require_format
from cnnlib.system import provenance
from cnnlib.system.files import read_json

RECORD = "run.json"
State = Literal["running", "finished", "interrupted", "failed"]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What the results of a run depend on. Equal identities give equal results."""

    experiment: str
    config: dict[str, object]
    """The configuration, flattened by `config.fields.flat`."""
    code_sha256: str
    data_sha256: str
    streamed: tuple[str, ...]
    """Names of the data sets that are streamed."""
    versions: dict[str, str]
    device: dict[str, str]
    """`platform` and `kind` of the device, and the `kernels` for convolution and pooling."""
    settings: dict[str, object]
    """Settings of JAX and XLA."""
    machine: Machine
    devices: int
    """Number of devices."""


@dataclass(frozen=True, kw_only=True)
class RecordedArm(DescribedArm):
    """An arm and its configuration."""

    config: dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Session:
    """One process that trains or has trained the run."""

    began: str
    host: str
    pid: int
    state: State = "running"
    ended: str | None = None
    message: str | None = None
    """The error that ended the session."""

    @classmethod
    def of_this_process(cls) -> Session:
        """Return a session that begins now, in this process."""
        return cls(began=provenance.now(), host=platform.node(), pid=os.getpid())


@dataclass(frozen=True)
class Job:
    """A job whose results were merged into the run."""

    sessions: tuple[Session, ...]
    resumed: tuple[Resumption, ...]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The content of `run.json`."""

    format: int
    id: str
    experiment: str
    identity: Identity
    command: str | None
    """The command that repeats the run."""
    resumed: tuple[Resumption, ...] = ()
    checked: bool
    """Whether the backend was checked before every session."""
    arms: dict[str, RecordedArm]
    tags: tuple[str, ...]
    """Tags of the run in W&B."""
    sessions: tuple[Session, ...]
    jobs: dict[str, Job] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.id.isalnum() and len(self.id) <= 32, "the id of a run has letters and digits only")
        require(len(self.sessions) > 0, "a run has a session")

    @property
    def state(self) -> State:
        """Return the state of the last session."""
        return self.sessions[-1].state


def read_record(folder: Path) -> RunRecord:
    """Read the record of a run. Raise UserError if it is missing or damaged, or if it has another format."""
    path = folder / RECORD
    values = read_json(path)
    require_format(folder, values)
    try:
        record: RunRecord = from_dict(values, RunRecord, str(path))
    except UserError as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    return record
