"""Write the report: one self-contained HTML page about finished runs. The page opens from disk and loads nothing.

The files of a run may contain anything, even HTML. So all text is escaped, and the page's security policy forbids
network access.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from cnnlib.config.command import command_to_repeat
from cnnlib.config.fields import from_dict
from cnnlib.config.overrides import assignments
from cnnlib.config.schema import Experiment
from cnnlib.errors import UserError
from cnnlib.report import charts, columns
from cnnlib.report.columns import Cell, accuracy_text, number_cell, setting_text
from cnnlib.report.comparisons import differences, spread_sentence, spreads
from cnnlib.report.mistakes import confusions, mistakes
from cnnlib.report.overview import best_arm, labels
from cnnlib.runs.metrics import MetricsLine, read_metrics
from cnnlib.runs.predictions import Predictions, read_answers
from cnnlib.runs.results import RunResults, read_results
from cnnlib.system.files import write_whole

MOST_ARMS = 24
"""The page shows curves, confusions and mistakes for at most this many arms of a run."""
MOST_BYTES = 5_000_000
"""Largest size of a page in bytes."""


class Table(NamedTuple):
    """A sortable table. Each row has a name and more cells."""

    label: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]


class Plot(NamedTuple):
    """A Vega-Lite plot. The attribute `label` is the text for screen readers."""

    name: str
    spec: dict[str, object]
    label: str
    caption: str


class Run(NamedTuple):
    """A finished run, as read from its folder."""

    label: str
    folder: Path
    results: RunResults
    lines: tuple[MetricsLine, ...]
    answers: dict[str, Predictions]


class Detail(NamedTuple):
    """How much detail is shown of each run."""

    epochs: int
    """Largest number of epochs per learning curve. The epochs are evenly spaced."""
    mistakes: int
    """Largest number of pictures of mistakes per arm."""
    lanes: bool
    """Whether to show each lane's learning curve and a table row for each lane."""


DETAILS = (Detail(40, 24, True), Detail(20, 12, True), Detail(20, 6, False), Detail(10, 0, False))
"""Levels of detail, the most detailed first. The page uses the first level that needs at most `MOST_BYTES` bytes."""


def write_report(folders: Sequence[Path], out: Path, note_of: Callable[[str], str | None]) -> None:
    """Write the page about the runs in `folders` to the file `out`.

    `note_of` returns the lab note of an experiment, or None if the note is unknown. Raises UserError, and writes
    nothing, if a folder has no results, if the page exceeds `MOST_BYTES` at every level of detail, or if the extra
    `report` is not installed.
    """
    charts.check_extra()
    names = ", ".join(str(folder) for folder in folders)
    runs = [read_run(folder, label) for folder, label in zip(folders, labels(folders), strict=True)]
    for detail in DETAILS:
        text = page(runs, note_of, detail).encode()
        if len(text) <= MOST_BYTES:
            break
    else:
        raise UserError(f"a page about {names} has {len(text) / 1e6:.1f} MB, more than 5: report fewer runs")
    write_whole(out, lambda path: path.write_bytes(text))


def read_run(folder: Path, label: str) -> Run:
    """Read a run from its folder; raise UserError if the folder has no results."""
    results = read_results(folder)
    lines = read_metrics(folder / "metrics.jsonl")
    found = {}
    if len(results.arms) <= MOST_ARMS:
        for arm in results.arms:
            if (answers := read_answers(folder, arm.name)) is not None:
                found[arm.name] = answers
    return Run(label, folder, results, lines, found)


def page(runs: Sequence[Run], note_of: Callable[[str], str | None], detail: Detail = DETAILS[0]) -> str:
    """Return the whole page as HTML. The argument `note_of` is the same as in `write_report`."""
    import jinja2

    read = resources.files("cnnlib.report").joinpath
    template, style, script = (read(f"page.{end}").read_text(encoding="utf-8") for end in ("html", "css", "js"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment.from_string(template).render(
        sections=[section(f"run-{i}", run, note_of(run.results.experiment), detail) for i, run in enumerate(runs)],
        shorter="" if detail == DETAILS[0] else f" To keep the page below 5 MB it shows {detail_text(detail)}.",
        style=style,
        script=script,
        library=charts.library(),
    )


def detail_text(detail: Detail) -> str:
    """Say in words how much a page with a reduced level of detail shows."""
    curves = "" if detail.lanes else " without single lanes"
    return f"{detail.epochs} epochs per learning curve{curves}, and {detail.mistakes or 'no'} mistakes per arm"


def section(name: str, run: Run, note: str | None, detail: Detail) -> dict[str, object]:
    """Return what `page.html` shows of one run."""
    results, data = run.results, run.results.data
    return {
        "name": name,
        "label": run.label,
        "question": note.splitlines()[0] if note else f"What do the arms of {results.experiment} reach?",
        "answer": answer(results),
        "arms": table(results),
        "cost_plots": cost_plots(name, results),
        "lanes": lane_table(results) if detail.lanes else None,
        "curves": curves(name, run, detail),
        "confusions": confusions(run.answers, data) if run.answers else None,
        "mistakes": mistakes(run.answers, data, detail.mistakes),
        "provenance": provenance(results),
        "note": note,
    }


class Answer(NamedTuple):
    """The result in words: paragraphs, a list of differences between arms, and more paragraphs."""

    before: list[str]
    differences: list[str]
    after: list[str]


def answer(results: RunResults) -> Answer:
    """Describe the result in words. The text uses only the stored numbers."""
    best = best_arm(results)
    if best is None:
        told = "No arm has a test accuracy: nothing was chosen without validation data, or every lane diverged."
        return Answer([told], [], [])
    before = [
        f"Of {len(results.arms)} arms on {results.data.name}, {best.name} has the highest mean test "
        f"accuracy: {accuracy_text(best.test_accuracy)} %, n = {best.test_accuracy.n}."
    ]
    found = differences(results)
    settled = [difference for difference in found if difference.verdict != "undecided"]
    if found:
        before.append(
            f"Paired by seed, {len(settled)} of {len(found)} comparisons show a clear difference. The others show no "
            "clear difference, which does not prove that the arms are equal."
        )
    after = [f"Spread of {spread_sentence(arm, parts)}." for arm, parts in spreads(results).items()]
    gone = sum(setting.diverged for arm in results.arms for setting in arm.settings)
    if gone:
        after.append(f"{gone} lanes diverged; means are over the others.")
    return Answer(before, [difference.sentence() for difference in found], after)


def table(results: RunResults) -> Table:
    """Return the table of arms. It has one row per setting of each arm."""
    rows = [(name.shown, cells) for name, *cells in columns.rows(results)]
    return Table("Arms, with counts and accuracies", tuple(columns.COLUMNS), rows)


def lane_table(results: RunResults) -> Table:
    """Return a table with one row per lane, for readers who cannot see the points of the lanes in the plots."""
    rows = [
        (
            arm.name + setting_text(arm, setting),
            [
                number_cell(lane.seed, "d"),
                *(
                    number_cell(share, ".2f", 100)
                    for share in (lane.train_accuracy, lane.validation_accuracy, lane.test_accuracy)
                ),
                Cell(lane.status, lane.status),
            ],
        )
        for arm, setting in columns.settings(results)
        for lane in arm.lanes_of(setting)
    ]
    names = ("arm", "seed", "train accuracy %", "validation accuracy %", "test accuracy %", "status")
    return Table("Lanes", names, rows)


def cost_plots(name: str, results: RunResults) -> list[Plot]:
    """Plot accuracy against parameters, multiply-adds and seconds."""
    found = []
    for cost, words in charts.COSTS.items():
        if all(getattr(arm, cost) > 0 for arm in results.arms):
            label = f"Test accuracy against {words}, on a log axis; the numbers are in the table of arms"
            caption = f"Against {words}: small points are lanes, large ones means with 95 % intervals."
            found.append(Plot(f"{name}-{cost}", charts.accuracy_chart(results, cost), label, caption))
    return found


class Curves(NamedTuple):
    """Plots of learning curves, and titled tables of the mean curves. If there are no curves, `missing` says why."""

    plots: list[Plot]
    tables: list[tuple[str, Table]]
    missing: str = "No metrics.jsonl with accuracies is in the folder."


def curves(name: str, run: Run, detail: Detail) -> Curves:
    """Plot training and validation accuracy against the epoch. Each mean curve has a band."""
    arms = [arm.name for arm in run.results.arms]
    if len(arms) > MOST_ARMS:
        return Curves([], [], f"Left out: {len(arms)} arms are more than a plot can tell apart.")
    plots, tables = [], []
    for metric in ("train_accuracy", "validation_accuracy"):
        found = charts.curve_points(run.lines, arms, metric, detail.epochs)
        if not found.means:
            continue
        words = metric.replace("train_", "training_").replace("_", " ")
        every = ", every lane a thin line" if detail.lanes else ""
        caption = f"{words.capitalize()}: means with 95 % bands{every}. An arm clicked in the legend stands out."
        if metric == "train_accuracy":
            caption += " Measured while the parameters change, on augmented examples."
        label = f"{words} against the epoch, a line per arm; the means are in a table below the plots"
        spec = charts.curves_chart(found if detail.lanes else found._replace(lanes=[]), words)
        plots.append(Plot(f"{name}-{metric}", spec, label, caption))
        means = {(mean["arm"], mean["epoch"]): mean["value"] for mean in found.means}
        rows = [
            (str(epoch), [number_cell(means.get((arm, epoch)), ".2f") for arm in arms])
            for epoch in sorted({epoch for _, epoch in means})
        ]
        title = f"{words.capitalize()} by epoch, %, as a table"
        tables.append((title, Table(title, ("epoch", *arms), rows)))
    return Curves(plots, tables)


class Provenance(NamedTuple):
    """Where the numbers of a run come from: command, machine, versions and configuration."""

    command: str
    facts: list[tuple[str, str]]
    fields: str


def provenance(results: RunResults) -> Provenance:
    """Return the command, the machine and versions, and the whole configuration."""
    try:
        command = command_to_repeat(results.experiment, results.config) or "not a registered experiment"
        fields = "\n".join(assignments(from_dict(results.config, Experiment)))
    except UserError as error:  # the results come from another version of cnnlib
        command = f"not known to this version of cnnlib: {error}"
        fields = json.dumps(results.config, indent=2)
    device, machine, data = results.device, results.machine, results.data
    where = {
        "finished": results.finished,
        "commit": results.commit or "unknown",
        "device": f"{device.count} x {device.kind}, {device.kernels} kernels",
        "machine": f"{machine.cores or '?'} cores, {machine.processor}",
        "versions": ", ".join(f"{name} {version}" for name, version in results.versions.items()),
        "data": f"name {data.name}, train {data.train}, validation {data.validation}, test {data.test}",
        "seconds": f"{results.wall_seconds:.0f}",
        "resumed": f"{len(results.resumed)} times",
    }
    return Provenance(command, list(where.items()), fields)
