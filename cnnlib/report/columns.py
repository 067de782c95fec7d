"""The columns of all tables of results. One row is one setting of an arm, or the whole arm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from cnnlib.config.schema import SETTING_FIELDS
from cnnlib.runs.results import Accuracy, ArmResult, RunResults, Setting


class Cell(NamedTuple):
    """A cell of a table: the text to show, and the value (a number or text) by which to sort."""

    shown: str
    value: float | str | None = None
    """None means unknown. Rows with None stay at the bottom, whether the order is ascending or descending."""


def number_cell(value: float | None, form: str, scale: int = 1) -> Cell:
    """Return a cell that shows `scale * value` in a format such as `.2f`, or a dash for None. Sort it by `value`."""
    return Cell("-") if value is None else Cell(format(scale * value, form), value)


def setting_text(arm: ArmResult, setting: Setting) -> str:
    """Say how a setting differs from other settings of the arm, and whether validation chose it.

    Return an empty text if the arm has only one setting.
    """
    if len(arm.settings) == 1:
        return ""
    varied = [name for name in SETTING_FIELDS if len({getattr(other, name) for other in arm.settings}) > 1]
    text = ", ".join(f"{name}={getattr(setting, name):g}" for name in varied)
    is_chosen = arm.chosen_setting is not None and setting is arm.settings[arm.chosen_setting]
    return f" {text}" + (" (chosen)" if is_chosen else "")


def accuracy_text(accuracy: Accuracy) -> str:
    """Return percent as `97.40 [96.80, 98.00]`. For one lane, return the mean only; for no lanes, a dash."""
    if accuracy.mean is None:
        return "-"
    mean, low, high = accuracy.percent()
    return f"{mean:.2f}" if None in accuracy.ci95 else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def lanes_cell(setting: Setting) -> Cell:
    """Show the number of lanes whose accuracies count, and the number of diverged lanes if there are any."""
    n = setting.test_accuracy.n
    return Cell(f"{n} ({setting.diverged} diverged)" if setting.diverged else str(n), n)


COLUMNS: dict[str, Callable[[ArmResult, Setting], Cell]] = {
    "arm": lambda arm, setting: Cell(name := arm.name + setting_text(arm, setting), name),
    "connectivity": lambda arm, _: Cell(arm.connectivity, arm.connectivity),
    "parameters": lambda arm, _: number_cell(arm.parameters, ","),
    "connections": lambda arm, _: number_cell(arm.connections, ","),
    "multiply-adds": lambda arm, _: number_cell(arm.macs, ","),
    "train accuracy %": lambda _, setting: number_cell(setting.train_accuracy, ".2f", 100),
    "test accuracy %, 95 % interval": lambda _, setting: Cell(
        accuracy_text(setting.test_accuracy), setting.test_accuracy.mean
    ),
    "n": lambda _, setting: lanes_cell(setting),
    "seconds per lane": lambda arm, _: number_cell(arm.train_seconds_per_lane, ".2f"),
}
"""For each column name, a function that returns the cell."""


def settings(results: RunResults) -> Iterator[tuple[ArmResult, Setting]]:
    """Yield each setting of each arm: the rows of a table."""
    for arm in results.arms:
        for setting in arm.settings:
            yield arm, setting


def rows(results: RunResults, columns: Sequence[str] = tuple(COLUMNS)) -> list[tuple[Cell, ...]]:
    """Return the rows of a table with the given columns."""
    return [tuple(COLUMNS[name](arm, setting) for name in columns) for arm, setting in settings(results)]
