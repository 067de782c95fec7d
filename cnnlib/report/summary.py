"""The table of a run's results, on the screen and in Markdown, and the figure of its accuracies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cnnlib.report import columns
from cnnlib.report.labels import Label, raised
from cnnlib.report.style import STYLE
from cnnlib.runs.callbacks import Watcher
from cnnlib.runs.results import RunResults
from cnnlib.system.files import write_whole
from cnnlib.system.tables import markdown_table, print_table

if TYPE_CHECKING:  # at run time, import only when drawing: the import takes half a second
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = tuple(name for name in columns.COLUMNS if name != "train accuracy %")


def rows(results: RunResults) -> list[list[str]]:
    """Return the rows of the table: one per setting of each arm."""
    return [[cell.shown for cell in row] for row in columns.rows(results, COLUMNS)]


def caption(results: RunResults) -> str:
    """Say what the numbers are based on: data, training, kind of interval, what is counted, and device."""
    data, config, device = results.data, results.config, results.device
    products = "" if device.precision == "default" else f", products in precision {device.precision}"
    told = (
        f"{data.name}: {data.train:,} training, {data.validation:,} validation, {data.test:,} test; "
        f"{config.get('epochs')} epochs in {config.get('compute_dtype')}{products}. "
        f"Interval: Student's t over n lanes. "
        f"Counts are per example. They include padded taps and exclude biases. "
        f"{device.count} x {device.kind}, {device.kernels} kernels, jax {results.versions.get('jax')}, "
        f"{results.wall_seconds:.0f} s in all."
    )
    if not device.checked:
        told += " The backend was not checked."
    matched = matched_text(results)
    return f"{told} {matched}" if matched else told


def matched_text(results: RunResults) -> str:
    """Say how the widths of arms were scaled to match a budget, and the remaining errors. Empty if none were."""
    texts = []
    for arm in results.arms:
        if (match := arm.match) is not None:
            error = 100 * (match.value - match.target) / match.target
            near = "exactly" if error == 0 else f"to {error:+.2g} %"
            texts.append(f"{arm.name} has widths x {match.width:.3g} for {match.target:,} {match.by}, {near}")
    return f"Matched: {'; '.join(texts)}." if texts else ""


def print_results(results: RunResults, console: Console) -> None:
    """Print the table and, below it, its caption."""
    print_table(console, COLUMNS, rows(results), left=2)
    console.print(caption(results), markup=False, highlight=False)


def markdown(results: RunResults) -> str:
    """Return the table of `rows` in Markdown, with the caption below."""
    return f"{markdown_table(COLUMNS, rows(results), left=2)}\n{caption(results)}\n"


class ReportWriter(Watcher):
    """Callback that writes `table.md` and `accuracy.png` beside the results of a run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run_ends(self, results: RunResults) -> None:
        """Write the table and the figure of the results."""
        write_whole(self._folder / "table.md", lambda path: path.write_text(markdown(results), encoding="utf-8"))
        write_whole(self._folder / "accuracy.png", accuracy_figure(results).savefig)


MOST_NAMED = 8
"""With more arms than this, names do not fit beside the points of a figure."""


def accuracy_figure(results: RunResults) -> Figure:
    """Draw test accuracy: one dot per lane, and the mean of each setting with its interval.

    The other axis is the number of parameters (log). If there are more than `MOST_NAMED` arms, the other axis has one
    row per setting.
    """
    return parameters_figure(results) if len(results.arms) <= MOST_NAMED else rows_figure(results)


def rows_figure(results: RunResults) -> Figure:
    """Draw one row per setting of each arm, in order from the top."""
    from matplotlib.figure import Figure

    points = list(columns.settings(results))
    figure = Figure(figsize=(7.0, 1.2 + 0.3 * len(points)), dpi=110, layout="constrained")
    axes = figure.subplots()
    labelled: set[str] = set()
    for row, (arm, setting) in enumerate(points):
        color, marker = STYLE[arm.connectivity]
        if setting.test_accuracy.mean is None:
            continue
        fine = [100 * accuracy for accuracy in arm.accuracies_of(setting)]
        axes.scatter(fine, [row] * len(fine), s=22, color=color, marker=marker, alpha=0.35, linewidths=0)
        mean, low, high = setting.test_accuracy.percent()
        label = None if arm.connectivity in labelled else arm.connectivity
        labelled.add(arm.connectivity)
        spread = [[mean - low], [high - mean]]
        axes.errorbar(mean, row, xerr=spread, color=color, marker=marker, markersize=6, capsize=4, label=label)
    names = [columns.COLUMNS["arm"](arm, setting).shown for arm, setting in points]
    axes.set_yticks(range(len(points)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, %")
    _finish(axes, results)
    return figure


def _finish(axes: Axes, results: RunResults) -> None:
    """Add the title, grid and legend to a figure of accuracies."""
    where = f"{results.experiment} on {results.data.name}"
    axes.set_title(f"{where}: every lane a dot, means with 95 % intervals", fontsize=10)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(title="connectivity", loc="best")


def parameters_figure(results: RunResults) -> Figure:
    """Draw test accuracy against parameters: one dot per lane, and the mean of each setting with its interval.

    The setting that validation chose has a filled marker; other settings of the arm have hollow ones.
    """
    from matplotlib import ticker
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    labelled: set[str] = set()
    names: list[tuple[float, float, str]] = []
    for arm in results.arms:
        color, marker = STYLE[arm.connectivity]
        top = 0.0
        for index, setting in enumerate(arm.settings):
            if setting.test_accuracy.mean is None:
                continue
            # Settings are side by side within 8 % of the arm's true position, and lanes slightly left of their mean.
            place = index / (len(arm.settings) - 1) - 0.5 if len(arm.settings) > 1 else 0.0
            x = arm.parameters * 1.16**place
            fine = [100 * accuracy for accuracy in arm.accuracies_of(setting)]
            axes.scatter(
                [(0.95 if place == 0.0 else 0.99) * x] * len(fine),
                fine,
                s=22,
                color=color,
                marker=marker,
                alpha=0.45,
                linewidths=0,
            )
            mean, low, high = setting.test_accuracy.percent()
            label = None if arm.connectivity in labelled else arm.connectivity
            labelled.add(arm.connectivity)
            face = color if index == arm.chosen_setting else "white"
            spread = [[mean - low], [high - mean]]
            axes.errorbar(
                x, mean, spread, color=color, marker=marker, markersize=7, markerfacecolor=face, capsize=5, label=label
            )
            top = max(top, high, *fine)
        if top:
            names.append((float(arm.parameters), top, arm.name))
    axes.set_xscale("log")
    axes.margins(x=0.2, y=0.15)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    low, high = axes.get_xlim()
    if high < 30 * low:  # on wider axes, labels between the powers of ten would overlap
        axes.xaxis.set_minor_locator(ticker.LogLocator(subs=(2, 3, 5)))
        axes.xaxis.set_minor_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    else:
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("parameters")
    axes.set_ylabel("test accuracy, %")
    _finish(axes, results)
    place_names(axes, names)
    return figure


def place_names(axes: Axes, names: list[tuple[float, float, str]]) -> None:
    """Write each name `(x, y, name)` above its point. If the name would cover another name, move it up."""
    figure = axes.get_figure(root=True)
    assert figure is not None, "the axes are in a figure"
    figure.draw_without_rendering()  # makes limits and layout final
    points = 72 / figure.dpi
    places = [points * axes.transData.transform((x, y)) for x, y, _ in names]
    widths = [6.5 * len(name) for *_, name in names]  # in points, for letters of 10 points
    boxes = [Label(x - width / 2, y, width) for (x, y), width in zip(places, widths, strict=True)]
    for (x, y, name), rise in zip(names, raised(boxes), strict=True):
        axes.annotate(name, (x, y), xytext=(0, 6 + rise), textcoords="offset points", ha="center")
