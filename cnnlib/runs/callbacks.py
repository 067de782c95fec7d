"""Callbacks receive the events of a run. The terminal, the log and Weights & Biases each have a callback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cnnlib.runs.metrics import MetricsLine
from cnnlib.runs.record import RunRecord
from cnnlib.runs.results import ArmResult, RunResults


class Beginning(NamedTuple):
    """The facts about a run that is about to train: all checks have passed, and the run's folder is open."""

    folder: Path
    record: RunRecord
    is_resumed: bool


class EpochReport(NamedTuple):
    """The metrics of one epoch of one arm."""

    arm: str
    epoch: int
    epochs: int
    lanes: int
    diverged: int
    means: dict[str, float]
    """Means of `train_loss`, `validation_accuracy` and so on, over the lanes that have not diverged."""
    lane_steps_per_second: float
    lines: list[MetricsLine]
    """The lines of `metrics.jsonl`, one per lane."""


class Watcher:
    """Base class of callbacks. Its methods do nothing; subclasses override the methods that they need."""

    def says(self, text: str) -> None:
        """Called with one line of text that the user should read."""

    def arm_begins(self, name: str, lanes: int, epochs: int) -> None:
        """Called before an arm's programs compile. The first `MOST_AHEAD` arms compile before any arm trains."""

    def run_begins(self, beginning: Beginning) -> None:
        """Called when everything fits in memory, the first programs are compiled, and the folder is open."""

    def training_begins(self, name: str, epoch: int) -> None:
        """Called before an arm trains. `epoch` is the number of its finished epochs: above 0 if the arm is resumed."""

    def epoch_ends(self, report: EpochReport) -> None:
        """Called when an epoch of an arm has ended. The device already computes the next epoch."""

    def arm_ends(self, name: str, result: ArmResult, epoch: int) -> None:
        """Called when an arm is finished.

        `epoch` is the number of epochs that earlier sessions have trained.
        """

    def run_ends(self, results: RunResults) -> None:
        """Called after `results.json` is written."""


class Notice(Watcher):
    """A callback that gives the user one message when the run begins."""

    def __init__(self, text: str, says: Callable[[str], None]) -> None:
        self._text, self._says = text, says

    def run_begins(self, beginning: Beginning) -> None:
        """Give the message to the user."""
        self._says(self._text)


class Watchers(Watcher):
    """Several callbacks, called in order."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        def told(name: str, *what: object) -> None:
            for watcher in watchers:
                getattr(watcher, name)(*what)

        for name in EVENTS:
            setattr(self, name, partial(told, name))


EVENTS = tuple(name for name in vars(Watcher) if not name.startswith("_"))
