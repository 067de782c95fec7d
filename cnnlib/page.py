"""The report: one self-contained HTML page about finished runs, which opens from the disk and loads nothing.

Everything that a run's files hold is data: it is escaped, and the page forbids itself the network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from cnnlib import charts
from cnnlib.comparisons import differences, spread_sentence, spreads
from cnnlib.config import Experiment, assignments
from cnnlib.errors import UserError
from cnnlib.fields import from_dict
from cnnlib.folder import read_json
from cnnlib.markup import Cell, folded, number_cell, sortable, text_of
from cnnlib.mistakes import confusions, mistakes
from cnnlib.overview import is_results, labels
from cnnlib.predictions import Answers, read_answers
from cnnlib.report import accuracy_text, setting_text
from cnnlib.tracking import command_to_repeat, read_json_lines, write_whole

MOST_ARMS = 24
"""Of a run whose curves, confusions and mistakes are shown."""
MOST_BYTES = 5_000_000
"""Of a page."""
NO_ANSWERS = "<h3>Confusions and mistakes</h3>\n<p>This run keeps no predictions, or has too many arms to show.</p>"
EARLY = 'document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"'
"""Runs before anything is drawn, so that no dark page begins white."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; img-src data:"


class Run(NamedTuple):
    """A finished run as its folder has it."""

    label: str
    folder: Path
    results: dict[str, Any]
    lines: list[dict[str, Any]]
    answers: dict[str, Answers]


class Detail(NamedTuple):
    """How much of each run is shown."""

    epochs: int
    """Of a learning curve, evenly chosen."""
    mistakes: int
    """Pictures an arm."""
    lanes: bool
    """Whether every lane has its learning curve and its row in a table."""


DETAILS = (Detail(40, 24, True), Detail(20, 12, True), Detail(20, 6, False), Detail(10, 0, False))
"""From the fullest on: a page takes the first with which it stays within `MOST_BYTES`."""
UNLIKE_RESULTS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What files lead to that look like results and are none."""


def write_report(folders: Sequence[Path], out: Path, note_of: Callable[[str], str | None]) -> None:
    """Writes the page about runs; `note_of` is asked for the lab note of an experiment, and has none of unknown ones.

    Raises UserError, with nothing written, for a folder without results, for more than a page of `MOST_BYTES` can hold,
    and where the extra `report` is missing.
    """
    charts.check_extra()
    names = ", ".join(str(folder) for folder in folders)
    try:
        runs = [read_run(folder, label) for folder, label in zip(folders, labels(folders), strict=True)]
        for detail in DETAILS:
            text = page(runs, note_of, detail).encode()
            if len(text) <= MOST_BYTES:
                break
        else:
            raise UserError(f"a page about {names} has {len(text) / 1e6:.1f} MB, more than 5: report fewer runs")
    except UNLIKE_RESULTS as error:
        told = repr(error)[:200]
        raise UserError(f"results of {names} are not what this version of cnnlib writes: {told}") from error
    write_whole(out, lambda path: path.write_bytes(text))


def read_run(folder: Path, label: str) -> Run:
    """What a folder holds of a run; raises UserError where it has no results."""
    results = read_json(folder / "results.json")
    if not is_results(results):
        raise UserError(f"there are no results in {folder}")
    lines = read_json_lines(folder / "metrics.jsonl")
    found = {}
    if len(results["arms"]) <= MOST_ARMS:
        for arm in results["arms"]:
            if (answers := read_answers(folder, arm["name"])) is not None:
                found[arm["name"]] = answers
    return Run(label, folder, results, lines, found)


def page(runs: Sequence[Run], note_of: Callable[[str], str | None], detail: Detail = DETAILS[0]) -> str:
    """The whole page; `note_of` is that of `write_report`."""
    read = resources.files("cnnlib").joinpath
    style, script = (read(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    links = "".join(f'<li><a href="#run-{i}">{text_of(run.label)}</a></li>' for i, run in enumerate(runs))
    body = "".join(section(f"run-{i}", run, note_of(run.results["experiment"]), detail) for i, run in enumerate(runs))
    shorter = "" if detail == DETAILS[0] else f" To keep the page below 5 MB it shows {detail_text(detail)}."
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>cnnlib: {text_of(', '.join(run.label for run in runs))}</title>\n<style>\n{style}</style>\n"
        f"<script>{EARLY}</script>\n</head>\n"
        '<body>\n<a class="skip" href="#content">Skip to the results</a>\n<header><h1>cnnlib report</h1>\n'
        f'<nav aria-label="Runs"><ul>{links}</ul></nav>\n<button type="button" id="theme">Dark</button></header>\n'
        "<noscript><p>Without JavaScript there are no plots; their numbers are in the tables.</p></noscript>\n"
        f'<main id="content">\n{body}</main>\n'
        "<footer><p class='quiet'>Intervals are Student's t over the lanes of an arm, 95 %: they speak of other seeds, "
        f"not of other test sets. Points of lanes that diverged are not drawn.{shorter}</p></footer>\n"
        f"<script>{charts.library()}</script>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def detail_text(detail: Detail) -> str:
    """What less than everything is, in words."""
    curves = "" if detail.lanes else " without single lanes"
    return f"{detail.epochs} epochs of a learning curve{curves}, and {detail.mistakes or 'no'} mistakes an arm"


def section(name: str, run: Run, note: str | None, detail: Detail) -> str:
    """All about one run."""
    results = run.results
    question = note.splitlines()[0] if note else f"What do the arms of {results['experiment']} reach?"
    parts = [
        f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{text_of(run.label)}</h2>',
        f'<p class="question">{text_of(question)}</p>',
        f"<h3>Answer</h3>\n{answer(results)}",
        f"<h3>Arms</h3>\n{table(results)}",
        f"<h3>Accuracy against cost</h3>\n{cost_plots(name, results)}{lane_table(results) if detail.lanes else ''}",
        curves(name, run, detail),
        confusions(run.answers, results["data"]) if run.answers else NO_ANSWERS,
        mistakes(run.answers, results["data"], detail.mistakes),
        f"<h3>How to repeat it</h3>\n{provenance(results)}",
    ]
    if note:
        parts.append(folded("The lab note", f'<pre tabindex="0" role="region" aria-label="Note">{text_of(note)}</pre>'))
    return "\n".join(part for part in parts if part) + "\n</section>\n"


def answer(results: dict[str, Any]) -> str:
    """What came out, in words, from the numbers alone."""
    rated = [arm for arm in results["arms"] if arm["test_accuracy"]["mean"] is not None]
    if not rated:
        return "<p>No arm has a test accuracy: nothing was chosen without validation data, or every lane diverged.</p>"
    best = max(rated, key=lambda arm: float(arm["test_accuracy"]["mean"]))
    lanes = best["test_accuracy"]["n"]
    told = [
        f"<p>Of {len(results['arms'])} arms on {text_of(results['data']['name'])}, {text_of(best['name'])} has the "
        f"highest mean test accuracy: {accuracy_text(best['test_accuracy'])} %, n = {lanes}.</p>"
    ]
    found = differences(results)
    settled = [difference for difference in found if difference.verdict != "undecided"]
    if found:
        told.append(
            f"<p>Compared seed by seed, {len(settled)} of {len(found)} differences are settled; the others are "
            "undecided, which is no proof that there is no difference.</p>"
        )
        sentences = "".join(f"<li>{text_of(difference.sentence())}</li>" for difference in found)
        told.append(folded("Differences", f"<ul>{sentences}</ul>", is_open=len(found) <= 10))
    for arm, parts in spreads(results).items():
        told.append(f"<p>Spread of {text_of(spread_sentence(arm, parts))}.</p>")
    gone = sum(setting["diverged"] for arm in results["arms"] for setting in arm["settings"])
    if gone:
        told.append(f"<p>{gone} lanes diverged; means are over the others.</p>")
    return "\n".join(told)


COLUMNS = (
    "arm",
    "reading",
    "parameters",
    "connections",
    "multiply-adds",
    "training %",
    "test %",
    "95 % interval (t)",
    "n",
    "s a lane",
)


def table(results: dict[str, Any]) -> str:
    """A row a setting of an arm; every column sorts."""
    rows = []
    for arm in results["arms"]:
        for index, setting in enumerate(arm["settings"]):
            accuracy = setting["test_accuracy"]
            low, high = accuracy["ci95"]
            cells = [
                Cell(arm["connectivity"], arm["connectivity"]),
                *(number_cell(arm[count], ",") for count in ("parameters", "connections", "macs")),
                number_cell(setting.get("train_accuracy"), ".2f", 100),
                number_cell(accuracy["mean"], ".2f", 100),
                Cell("-") if low is None else Cell(f"{100 * low:.2f} to {100 * high:.2f}", low),
                number_cell(accuracy["n"], "d"),
                number_cell(arm["train_seconds_per_lane"], ".2f"),
            ]
            rows.append((arm["name"] + setting_text(results, arm, index), cells))
    told = (
        "Counts are for one example, taps on padding counted; training % is the final models' accuracy on what they "
        "were trained on; n is the number of lanes that have not diverged. Headings sort."
    )
    return f'<p class="quiet">{told}</p>{sortable("Arms, with counts and accuracies", COLUMNS, rows)}'


def lane_table(results: dict[str, Any]) -> str:
    """A row a lane: what the small points of the plots are, for those who do not see them."""
    rows = [
        (
            arm["name"] + setting_text(results, arm, index),
            [
                number_cell(lane["seed"], "d"),
                *(number_cell(lane.get(f"{part}_accuracy"), ".2f", 100) for part in ("train", "validation", "test")),
                Cell(str(lane["status"]), lane["status"]),
            ],
        )
        for arm in results["arms"]
        for index, setting in enumerate(arm["settings"])
        for lane in charts.lanes_of(arm, setting)
    ]
    columns = ("arm", "seed", "training %", "validation %", "test %", "status")
    return folded("Every lane, as a table", sortable("Lanes", columns, rows))


def plot(name: str, spec: dict[str, Any], label: str, caption: str) -> str:
    """A place for a plot and its specification; `label` is what a screen reader says of it."""
    data = json.dumps(spec, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<figure><div class="plot" role="img" aria-label="{text_of(label)}" data-spec="{name}"></div>'
        f"<figcaption>{text_of(caption)}</figcaption>"
        f'<script type="application/json" id="{name}">{data}</script></figure>'
    )


def cost_plots(name: str, results: dict[str, Any]) -> str:
    """Accuracy against parameters, multiply-adds and seconds."""
    figures = []
    for cost, words in charts.COSTS.items():
        if all(arm[cost] > 0 for arm in results["arms"]):
            label = f"Test accuracy against {words}, on a log axis; the numbers are in the table of arms"
            caption = f"Against {words}: small points are lanes, large ones means with 95 % intervals."
            figures.append(plot(f"{name}-{cost}", charts.accuracy_chart(results, cost), label, caption))
    return f'<div class="plots">{"".join(figures)}</div>'


def curves(name: str, run: Run, detail: Detail) -> str:
    """Learning curves with bands, training and validation, and the means as tables."""
    arms = [arm["name"] for arm in run.results["arms"]]
    if len(arms) > MOST_ARMS:
        return f"<h3>Learning curves</h3>\n<p>Left out: {len(arms)} arms are more than a plot can tell apart.</p>"
    figures, tables = [], []
    for metric in ("train_accuracy", "validation_accuracy"):
        found = charts.curve_points(run.lines, arms, metric, detail.epochs)
        if not found.means:
            continue
        words = metric.replace("train_", "training_").replace("_", " ")
        every = ", every lane a thin line" if detail.lanes else ""
        caption = f"{words.capitalize()}: means with 95 % bands{every}. An arm clicked in the legend stands out."
        if metric == "train_accuracy":
            caption += " Measured while the parameters change, on augmented examples."
        label = f"{words} against the epoch, a line an arm; the means are in a table below the plots"
        spec = charts.curves_chart(found if detail.lanes else found._replace(lanes=[]), words)
        figures.append(plot(f"{name}-{metric}", spec, label, caption))
        means = {(mean["arm"], mean["epoch"]): mean["value"] for mean in found.means}
        rows = [
            (str(epoch), [number_cell(means.get((arm, epoch)), ".2f") for arm in arms])
            for epoch in sorted({epoch for _, epoch in means})
        ]
        title = f"{words.capitalize()} by epoch, %, as a table"
        tables.append(folded(title, sortable(title, ("epoch", *arms), rows)))
    if not figures:
        return "<h3>Learning curves</h3>\n<p>No metrics.jsonl with accuracies is in the folder.</p>"
    return f'<h3>Learning curves</h3>\n<div class="plots">{"".join(figures)}</div>{"".join(tables)}'


def provenance(results: dict[str, Any]) -> str:
    """The command, the machine and versions, the whole configuration."""
    try:
        command = command_to_repeat(results) or "not a registered experiment"
        fields = "\n".join(assignments(from_dict(results["config"], Experiment)))
    except UserError as error:  # of another version: it is shown as it stands
        command = f"not known to this version of cnnlib: {error}"
        fields = json.dumps(results["config"], indent=2)
    device, machine = results["device"], results.get("machine", {})
    where = {
        "finished": results.get("finished", "unknown"),
        "commit": results["commit"] or "unknown",
        "device": f"{device['count']} x {device['kind']}, {device['kernels']} kernels",
        "machine": f"{machine.get('cores', '?')} cores, {machine.get('processor', 'unknown')}",
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        "data": ", ".join(f"{key} {value}" for key, value in results["data"].items() if key != "class_names"),
        "seconds": f"{results['wall_seconds']:.0f}",
        "resumed": f"{len(results.get('resumed', []))} times",
    }
    rows = "".join(
        f'<tr><th scope="row">{text_of(key)}</th><td>{text_of(value)}</td></tr>' for key, value in where.items()
    )
    facts = f'<table class="facts"><caption>Where the numbers come from</caption><tbody>{rows}</tbody></table>'
    return f'<pre tabindex="0" role="region" aria-label="Command">{text_of(command)}</pre>\n{facts}\n' + folded(
        "The configuration", f'<pre tabindex="0" role="region" aria-label="Fields">{text_of(fields)}</pre>'
    )
