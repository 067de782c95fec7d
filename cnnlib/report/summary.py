"""The table of a run's results, on the screen and in Markdown, and the figure of its accuracies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cnnlib.config.schema import SETTING_FIELDS
from cnnlib.report.style import STYLE
from cnnlib.runs.callbacks import Watcher
from cnnlib.system.files import write_whole
from cnnlib.system.tables import markdown_table, print_table

if TYPE_CHECKING:  # at run time, import only when drawing: the import takes half a second
    from matplotlib.figure import Figure

COLUMNS = (
    "arm",
    "connectivity",
    "parameters",
    "connections",
    "multiply-adds",
    "test accuracy %, 95 % interval",
    "n",
    "seconds per lane",
)
HEADERS = {  # with line breaks, so that the table fits 80 columns
    "connectivity": "connec-\ntivity",
    "parameters": "para-\nmeters",
    "connections": "connec-\ntions",
    "multiply-adds": "multiply-\nadds",
    "test accuracy %, 95 % interval": "test accuracy %,\n95 % interval",
    "seconds per lane": "s /\nlane",
}


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the table: one per setting of each arm."""
    table: list[tuple[str, ...]] = []
    for arm in results["arms"]:
        for index, setting in enumerate(arm["settings"]):
            accuracy = setting["test_accuracy"]
            counts = (f"{arm['parameters']:,}", f"{arm['connections']:,}", f"{arm['macs']:,}")
            table.append(
                (
                    arm["name"] + setting_text(results, arm, index),
                    arm["connectivity"],
                    *counts,
                    accuracy_text(accuracy),
                    str(accuracy["n"]) + (f" ({setting['diverged']} diverged)" if setting["diverged"] else ""),
                    f"{arm['train_seconds_per_lane']:.2f}",
                )
            )
    return table


def setting_text(results: dict[str, Any], arm: dict[str, Any], index: int) -> str:
    """Say how a setting differs from other settings of the arm, and whether validation chose it.

    Return an empty text if the arm has only one setting.
    """
    if len(arm["settings"]) == 1:
        return ""
    varied = [name for name in SETTING_FIELDS if len({setting[name] for setting in arm["settings"]}) > 1]
    text = ", ".join(f"{name}={arm['settings'][index][name]:g}" for name in varied)
    return f" {text}" + (" (chosen)" if index == arm["chosen_setting"] else "")


def accuracy_text(accuracy: dict[str, Any]) -> str:
    """Return percent as `97.40 [96.80, 98.00]`. For one lane, return the mean only; for no lanes, a dash."""
    if accuracy["mean"] is None:
        return "-"
    low, high = accuracy["ci95"]
    text = f"{100 * accuracy['mean']:.2f}"
    return text if low is None else f"{text} [{100 * low:.2f}, {100 * high:.2f}]"


def caption(results: dict[str, Any]) -> str:
    """Say what the numbers are based on: data, training, kind of interval, what is counted, and device."""
    data, config, device = results["data"], results["config"], results["device"]
    matched = [f"{arm['name']} {match_text(arm)}" for arm in results["arms"] if arm["match"]]
    told = (
        f"{data['name']}: {data['train']:,} training, {data['validation']:,} validation, {data['test']:,} test; "
        f"{config['epochs']} epochs in {config['compute_dtype']}{precision_text(config)}. "
        f"Interval: Student's t over n lanes. "
        f"Counts are per example. They include padded taps and exclude biases. "
        f"{device['count']} x {device['kind']}, {device['kernels']} kernels, jax {results['versions']['jax']}, "
        f"{results['wall_seconds']:.0f} s in all."
    )
    if not device.get("checked", True):
        told += " The backend was not checked."
    return told + (f" Matched: {'; '.join(matched)}." if matched else "")


def precision_text(config: dict[str, Any]) -> str:
    """Return the precision of products in words; empty if it is the default."""
    precision = config.get("precision", "default")
    return "" if precision == "default" else f", products in precision {precision}"


def match_text(arm: dict[str, Any]) -> str:
    """Return how an arm's widths were scaled to match a budget, and the remaining error."""
    match = arm["match"]
    error = 100 * (match["value"] - match["target"]) / match["target"]
    near = "exactly" if error == 0 else f"to {error:+.2g} %"
    return f"has widths x {match['width']:.3g} for {match['target']:,} {match['by']}, {near}"


def print_results(results: dict[str, Any], console: Console) -> None:
    """Print the table and, below it, its caption."""
    print_table(console, COLUMNS, rows(results), left=2, headers=HEADERS)
    console.print(caption(results), markup=False, highlight=False)


def markdown(results: dict[str, Any]) -> str:
    """Return the table of `rows` in Markdown, with the caption below."""
    return f"{markdown_table(COLUMNS, rows(results), left=2)}\n{caption(results)}\n"


class ReportWriter(Watcher):
    """Callback that writes `table.md` and `accuracy.png` beside the results of a run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run_ends(self, results: dict[str, Any]) -> None:
        """Write the table and the figure of the results."""
        write_whole(self._folder / "table.md", lambda path: path.write_text(markdown(results), encoding="utf-8"))
        write_whole(self._folder / "accuracy.png", accuracy_figure(results).savefig)


MOST_NAMED = 8
"""With more arms than this, names do not fit beside the points of a figure."""


def accuracy_figure(results: dict[str, Any]) -> Figure:
    """Draw test accuracy: one dot per lane, and the mean of each setting with its interval.

    The other axis is the number of parameters (log). If there are more than `MOST_NAMED` arms, the other axis has one
    row per setting.
    """
    return parameters_figure(results) if len(results["arms"]) <= MOST_NAMED else rows_figure(results)


def rows_figure(results: dict[str, Any]) -> Figure:
    """Draw one row per setting of each arm, in order from the top."""
    from matplotlib.figure import Figure

    points = [
        (arm, setting, arm["name"] + setting_text(results, arm, index))
        for arm in results["arms"]
        for index, setting in enumerate(arm["settings"])
    ]
    figure = Figure(figsize=(7.0, 1.2 + 0.3 * len(points)), dpi=110, layout="constrained")
    axes = figure.subplots()
    labelled: set[str] = set()
    for row, (arm, setting, _) in enumerate(points):
        color, marker = STYLE[arm["connectivity"]]
        accuracy = setting["test_accuracy"]
        if accuracy["mean"] is None:
            continue
        lanes = [lane for lane in arm["lanes"] if all(lane[name] == setting[name] for name in SETTING_FIELDS)]
        fine = [100 * lane["test_accuracy"] for lane in lanes if lane["status"] == "ok"]
        axes.scatter(fine, [row] * len(fine), s=22, color=color, marker=marker, alpha=0.35, linewidths=0)
        mean = 100 * accuracy["mean"]
        low, high = (mean if end is None else 100 * end for end in accuracy["ci95"])
        label = None if arm["connectivity"] in labelled else arm["connectivity"]
        labelled.add(arm["connectivity"])
        spread = [[mean - low], [high - mean]]
        axes.errorbar(mean, row, xerr=spread, color=color, marker=marker, markersize=6, capsize=4, label=label)
    axes.set_yticks(range(len(points)), [name for *_, name in points], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, %")
    _finish(axes, results)
    return figure


def _finish(axes: Any, results: dict[str, Any]) -> None:
    """Add the title, grid and legend to a figure of accuracies."""
    where = f"{results['experiment']} on {results['data']['name']}"
    axes.set_title(f"{where}: every lane a dot, means with 95 % intervals", fontsize=10)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(title="connectivity", loc="best")


def parameters_figure(results: dict[str, Any]) -> Figure:
    """Draw test accuracy against parameters: one dot per lane, and the mean of each setting with its interval.

    The setting that validation chose has a filled marker; other settings of the arm have hollow ones.
    """
    from matplotlib import ticker
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    labelled: set[str] = set()
    names: list[tuple[float, float, str]] = []
    for arm in results["arms"]:
        color, marker = STYLE[arm["connectivity"]]
        top = 0.0
        for index, setting in enumerate(arm["settings"]):
            accuracy = setting["test_accuracy"]
            if accuracy["mean"] is None:
                continue
            # Settings are side by side within 8 % of the arm's true position, and lanes slightly left of their mean.
            place = index / (len(arm["settings"]) - 1) - 0.5 if len(arm["settings"]) > 1 else 0.0
            x = arm["parameters"] * 1.16**place
            lanes = [lane for lane in arm["lanes"] if all(lane[name] == setting[name] for name in SETTING_FIELDS)]
            fine = [100 * lane["test_accuracy"] for lane in lanes if lane["status"] == "ok"]
            axes.scatter(
                [(0.95 if place == 0.0 else 0.99) * x] * len(fine),
                fine,
                s=22,
                color=color,
                marker=marker,
                alpha=0.45,
                linewidths=0,
            )
            mean = 100 * accuracy["mean"]
            low, high = (mean if end is None else 100 * end for end in accuracy["ci95"])
            label = None if arm["connectivity"] in labelled else arm["connectivity"]
            labelled.add(arm["connectivity"])
            face = color if index == arm["chosen_setting"] else "white"
            spread = [[mean - low], [high - mean]]
            axes.errorbar(
                x, mean, spread, color=color, marker=marker, markersize=7, markerfacecolor=face, capsize=5, label=label
            )
            top = max(top, high, *fine)
        if top:
            names.append((float(arm["parameters"]), top, arm["name"]))
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


def place_names(axes: Any, names: list[tuple[float, float, str]]) -> None:
    """Write each name `(x, y, name)` above its point. If the name would cover another name, move it up."""
    axes.figure.draw_without_rendering()  # makes limits and layout final
    points = 72 / axes.figure.dpi
    placed: list[tuple[float, float, float]] = []
    for x, y, name in sorted(names, key=lambda entry: entry[1]):
        center, bottom = points * axes.transData.transform((x, y))
        offset, width = 6, 6.5 * len(name)  # in points, for letters of 10 points
        while any(
            abs(center - other) < (width + other_width) / 2 and abs(bottom + offset - other_bottom) < 12
            for other, other_bottom, other_width in placed
        ):
            offset += 3
        placed.append((center, bottom + offset, width))
        axes.annotate(name, (x, y), xytext=(0, offset), textcoords="offset points", ha="center")
