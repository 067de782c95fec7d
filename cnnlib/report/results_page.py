"""Write RESULTS.md, one section per stored run. Numbers come from its `results.json`, words from its `note.md`."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cnnlib.config.command import command_to_repeat
from cnnlib.errors import UserError
from cnnlib.report import columns
from cnnlib.report.comparisons import accuracies, differences, spread_sentence, spreads
from cnnlib.report.style import STYLE
from cnnlib.report.summary import accuracy_figure, matched_text
from cnnlib.runs.results import RunResults, results_in
from cnnlib.stats import fits
from cnnlib.stats.intervals import mean_interval
from cnnlib.system.files import read_json, write_whole
from cnnlib.system.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "arm",
    "connectivity",
    "parameters",
    "multiply-adds",
    "train accuracy %",
    "test accuracy %, 95 % interval",
    "n",
)
"""Columns of the table of a run. `train accuracy %` is the accuracy of the final models on training examples."""
MOST_ROWS = 40
"""Largest number of arms in a table. If a sweep has more, the page shows only the curves fitted to the results."""
Analysis = Callable[[RunResults], str]


def table(results: RunResults, published: dict[str, str]) -> str:
    """Return the table of a run in Markdown. `published` has published accuracies by arm; empty: no such column."""
    rows = [[cell.shown for cell in row] for row in columns.rows(results, COLUMNS)]
    names = list(COLUMNS)
    if published:
        names.append("published %")
        for row, (arm, setting) in zip(rows, columns.settings(results), strict=True):
            is_headline = setting is arm.settings[arm.chosen_setting or 0]
            row.append(published.get(arm.name, "") if is_headline else "")
    return markdown_table(names, rows, left=2).rstrip()


def facts(results: RunResults, command: str | None) -> str:
    """Say in one line where the numbers come from: command, machine, versions, commit, date, data and time."""
    device, versions, data, machine = results.device, results.versions, results.data, results.machine
    where = f"{machine.cores or '?'} cores of {machine.processor}"
    if device.platform != "cpu":
        where = f"{device.count} x {device.kind}"
    used = ", ".join(f"{name} {versions[name]}" for name in ("python", "jax", "flax", "cnnlib") if name in versions)
    return (
        f"`{command or 'not a registered experiment'}` on {where}, {device.kernels} kernels; {used}; commit "
        f"{(results.commit or 'unknown')[:12]}; {results.finished[:10]}; {data.name}, "
        f"{data.train:,} training, {data.validation:,} validation and {data.test:,} test examples; "
        f"{results.wall_seconds:.0f} s."
    )


class Asked(NamedTuple):
    """The question of an experiment."""

    question: str
    comparisons: tuple[str, ...]
    """The pairs of arms to compare, FIRST:SECOND."""


def section(folder: Path, asked_of: Callable[[str], Asked], published: dict[str, str]) -> str:
    """Return the section of one stored run. If the experiment could not be run, the section has only a note.

    Raises UserError if the folder has no note.
    """
    note = folder / "note.md"
    if not note.is_file():
        raise UserError(f"there is no {note}: what the results mean is for people to say")
    results = results_in(folder)
    if results is None:
        return f"## {folder.name}\n\n*{asked_of(folder.name).question}*\n\n{note.read_text(encoding='utf-8').strip()}\n"
    name = results.experiment
    command = command_to_repeat(name, results.config)
    words = note.read_text(encoding="utf-8").strip()
    parts = [f"## {folder.name}", f"*{asked_of(name).question}*", words, facts(results, command)]
    if len(results.arms) <= MOST_ROWS:
        parts += filter(None, (table(results, published), matched_text(results)))
    parts += [ANALYSES[name](results)] if name in ANALYSES else []
    parts += [f"Spread of {spread_sentence(arm, found)}." for arm, found in spreads(results).items()]
    told = [f"- {difference.sentence()}" for difference in differences(results, asked_of(name).comparisons)]
    if told and len(results.arms) <= MOST_ROWS:
        parts.append("\n".join(told))
    picture = "curves.png" if name in ANALYSES else "accuracy.png"
    parts.append(f"![{folder.name}]({folder.name}/{picture})")
    return "\n\n".join(parts) + "\n"


HEAD = """# Results

Every number below is from the `results.json` beside its figure. `cnnlib results docs` writes this page, and a test
compares the page with these files. Intervals are Student's t over n lanes, 95 %: they describe other seeds, not other
test sets. Differences are paired by seed. A difference is clear if its interval does not contain zero; the intervals of
all comparisons in a section hold together. The machine was shared with other work, so the seconds are not a benchmark.
To train all experiments again, use `cnnlib all`; it can be interrupted and continued.
"""


def page(folders: Sequence[Path], asked_of: Callable[[str], Asked], published: dict[str, dict[str, str]]) -> str:
    """Return the page. `asked_of` takes the name of an experiment and returns the question of the experiment.

    `published` has the published accuracies: folder name, then arm, then the accuracy as text.

    Raises UserError if a folder has no note.
    """
    sections = [section(folder, asked_of, published.get(folder.name, {})) for folder in folders]
    return "\n".join((HEAD, *sections))


def stored(folder: Path) -> list[Path]:
    """Return the folders that get a section, sorted by name: those with results of trained models or with a note."""
    with_results = {path.parent for path in folder.glob("*/results.json") if results_in(path.parent) is not None}
    return sorted(with_results | {path.parent for path in folder.glob("*/note.md")})


def write_page(folder: Path, asked_of: Callable[[str], Asked]) -> Path:
    """Write RESULTS.md and its figures into `folder`, which has one folder per run. Return the path of RESULTS.md."""
    figures = read_json(folder / "published.json")
    if not isinstance(figures, dict):
        raise UserError(f"there is no {folder / 'published.json'}, with published figures by folder and arm")
    runs = stored(folder)
    for run in runs:
        results = results_in(run)
        if results is None:
            continue
        if results.experiment in ANALYSES:
            write_whole(run / "curves.png", curves_figure(results).savefig)
        else:
            write_whole(run / "accuracy.png", accuracy_figure(results).savefig)
    text = page(runs, asked_of, figures)
    write_whole(folder / "RESULTS.md", lambda path: path.write_text(text, encoding="utf-8"))
    return folder / "RESULTS.md"


def sample_sizes(results: RunResults) -> str:
    """Return a table of the training-set sizes that each connectivity needs for each accuracy, as means over seeds."""
    levels = (0.85, 0.9, 0.94)
    smallest = min(arm.data.train for arm in results.arms)
    curves = by_seed(results)
    lines = []
    for reading, seeds in curves.items():
        needed = [[fits.needed(sizes, values, level) for sizes, values in seeds] for level in levels]
        lines.append((reading, *(needed_text(sizes, smallest) for sizes in needed)))
    columns = ("connectivity", *(f"digits for {100 * level:.0f} %" for level in levels))
    return (
        markdown_table(columns, lines).rstrip()
        + "\n\nGeometric means over the seeds that are not told apart, with intervals of Student's t."
    )


def dsd_exponents(results: RunResults, level: float = 0.75) -> str:
    """Return how the training-set size grows that is needed for an accuracy of `level`.

    The size grows as a power of k (the number of patches) and of d (the length of a patch). The text has both exponents
    and their intervals. Some seeds need a size outside the range that was tried. The text has the number of these
    seeds, but the fit does not use them.
    """
    lines, needed_lines = [], []
    tasks: dict[str, list[tuple[int, int, float | None]]] = {}
    smallest = min(arm.data.train for arm in results.arms)
    for name, seeds in by_seed(results).items():
        reading, k, d = name.split("_")
        for sizes, values in seeds:
            tasks.setdefault(reading, []).append((int(k[1:]), int(d[1:]), fits.needed(sizes, values, level)))
    theory = {"conv": "k + d", "local": "k d", "full": "k^2 d"}
    for reading, found in tasks.items():
        known = [(k, d, size) for k, d, size in found if size is not None and size > smallest]
        design = {"k": [float(k) for k, _, _ in known], "d": [float(d) for _, d, _ in known]}
        cells = ["not to be told"] * 2
        if all(len(set(values)) > 1 for values in design.values()):
            fitted = fits.log_linear(design, [size for _, _, size in known]).exponents
            cells = [f"{each.value:.2f} [{each.low:.2f}, {each.high:.2f}]" for each in (fitted["k"], fitted["d"])]
        lines.append((reading, theory[reading], *cells, f"{len(known)} of {len(found)}"))
        for task in dict.fromkeys((patches, length) for patches, length, _ in found):
            of_task = [size for patches, length, size in found if (patches, length) == task]
            text = needed_text(of_task, smallest)
            needed_lines.append((reading, str(task[0]), str(task[1]), text))
    columns = ("connectivity", "theory", "exponent of k", "exponent of d", "seeds fitted")
    needed_columns = ("connectivity", "k", "d", f"examples for {100 * level:.0f} %")
    return "\n\n".join(
        (markdown_table(columns, lines, left=2).rstrip(), markdown_table(needed_columns, needed_lines).rstrip())
    )


def curves_figure(results: RunResults) -> Figure:
    """Draw test accuracy against the size of the training set, in one panel per task. Each connectivity is a line."""
    from matplotlib import ticker
    from matplotlib.figure import Figure

    names = list(by_seed(results))
    tasks = list(dict.fromkeys(name.partition("_")[2] for name in names))
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    size = (max(6.0, 3.0 * columns), 4.2 if lines == 1 else 2.6 * lines)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for panel in panels.flat[len(tasks) :]:
        panel.set_visible(False)
    for task, panel in zip(tasks, panels.flat, strict=False):
        for arms in (name for name in names if name.partition("_")[2] == task):
            reading = arms.partition("_")[0]
            own = [arm for arm in results.arms if arm.name.rpartition("_")[0] == arms and arm.test_accuracy.n]
            sizes = [arm.data.train for arm in own]
            found = [arm.test_accuracy.percent() for arm in own]
            spread = [[mean - low for mean, low, _ in found], [high - mean for mean, _, high in found]]
            color, marker = STYLE[reading]
            panel.errorbar(
                sizes,
                [mean for mean, *_ in found],
                spread,
                color=color,
                marker=marker,
                markersize=4,
                capsize=3,
                label=reading,
            )
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
        panel.set_title(task.replace("_", ", ").replace("k", "k = ").replace("d", "d = "), fontsize=10)
        panel.grid(alpha=0.3)
    figure.supxlabel("training examples", fontsize=10)
    figure.supylabel("test accuracy, %", fontsize=10)
    panels.flat[0].legend()
    return figure


def by_seed(results: RunResults) -> dict[str, list[tuple[list[float], list[float]]]]:
    """Join arms named CONNECTIVITY_..._SIZE into curves `(sizes, accuracies)`, one curve per seed.

    The keys of the returned dictionary are the names of the arms without the size.
    """
    values = accuracies(results)
    found: dict[str, dict[Hashable, tuple[list[float], list[float]]]] = {}
    sizes = {arm.name: float(arm.data.train) for arm in results.arms}
    for arm, seeds in values.items():
        for seed, value in seeds.items():
            curve = found.setdefault(arm.rpartition("_")[0], {}).setdefault(seed, ([], []))
            curve[0].append(sizes[arm])
            curve[1].append(value)
    return {name: list(seeds.values()) for name, seeds in found.items()}


def needed_text(needed: Sequence[float | None], smallest: float) -> str:
    """Return the geometric mean of the sizes in `needed`, and count the sizes that are `smallest` or None."""
    never, at_once = sum(size is None for size in needed), sum(size == smallest for size in needed)
    inside = [size for size in needed if size is not None and size > smallest]
    parts = [geometric(inside)] if inside else []
    parts += [f"{at_once} of {len(needed)} seeds with {smallest:g} or fewer"] if at_once else []
    parts += [f"not reached by {never} of {len(needed)} seeds"] if never else []
    return "; ".join(parts)


def geometric(sizes: Sequence[float]) -> str:
    """Return the geometric mean of sizes and the interval of this mean."""
    mean, low, high, _ = mean_interval(np.log(sizes))
    assert mean is not None, "there is a size"
    text = f"{math.exp(mean):.0f}"
    return text if low is None or high is None else f"{text} [{math.exp(low):.0f}, {math.exp(high):.0f}]"


ANALYSES: dict[str, Analysis] = {"sample_efficiency": sample_sizes, "dsd": dsd_exponents}
"""The function that fits the results, for each experiment that has a fit."""
