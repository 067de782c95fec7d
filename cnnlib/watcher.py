"""Who is told how a run goes: the terminal, the log, Weights & Biases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple


class Beginning(NamedTuple):
    """A run whose folder is open: nothing is wrong with what was asked for, and training is about to begin."""

    identity: str
    """Of the run, kept when it is resumed."""
    experiment: str
    folder: Path
    config: dict[str, Any]
    data: str
    platform: str
    arms: dict[str, dict[str, Any]]
    """Connectivity, counts, and the configuration with the arm's own fields, by the name of the arm."""
    lanes: dict[str, list[dict[str, Any]]]
    """The numbers of each lane, its seed, learning rate and so on, by the name of the arm."""
    is_resumed: bool
    command: str | None


class EpochReport(NamedTuple):
    """What an epoch of an arm came to."""

    arm: str
    epoch: int
    epochs: int
    lanes: int
    diverged: int
    means: dict[str, float]
    """`train_loss`, `validation_accuracy` and so on, over the lanes that have not diverged."""
    lane_steps_per_second: float
    lines: list[dict[str, Any]]
    """As `metrics.jsonl` has them, one a lane."""


class Watcher:
    """A watcher that does not care; others override what they want to know."""

    def says(self, text: str) -> None:
        """Something that the user should know, in one line."""

    def arm_begins(self, name: str, lanes: int, epochs: int) -> None:
        """The arm's programs are to be compiled; every arm's are before the first one trains."""

    def run_begins(self, beginning: Beginning) -> None:
        """Everything fits, is compiled, and the folder is open."""

    def training_begins(self, name: str, epoch: int) -> None:
        """The arm has `epoch` epochs behind it, more than none where a run is resumed."""

    def epoch_ends(self, report: EpochReport) -> None:
        """Of one arm; the device is at the next one already."""

    def arm_ends(self, name: str, result: dict[str, Any], epoch: int) -> None:
        """`result` is the arm's part of `results.json`; `epoch` how many of its epochs were told before."""

    def run_ends(self, results: dict[str, Any]) -> None:
        """What `results.json` holds; it has been written."""


class Notice(Watcher):
    """Says something to the user once it is known that the run begins."""

    def __init__(self, text: str, says: Callable[[str], None]) -> None:
        self._text, self._says = text, says

    def run_begins(self, beginning: Beginning) -> None:
        """Says it."""
        self._says(self._text)


class Watchers(Watcher):
    """Several at once, told in their order."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        def told(name: str, *what: Any) -> None:
            for watcher in watchers:
                getattr(watcher, name)(*what)

        for name in EVENTS:
            setattr(self, name, partial(told, name))


EVENTS = tuple(name for name in vars(Watcher) if not name.startswith("_"))
