"""The report: one self-contained HTML page about finished runs, which opens from the disk and loads nothing.

Everything that a run's files hold is data: it is escaped, and the page forbids itself the network.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cnnlib import charts
from cnnlib.comparisons import differences, spread_sentence, spreads
from cnnlib.config import assignments, from_dict
from cnnlib.errors import UserError
from cnnlib.folder import read_json
from cnnlib.overview import is_results, labels
from cnnlib.predictions import Answers, read_answers
from cnnlib.report import accuracy_text, setting_text
from cnnlib.tracking import command_for, read_json_lines, write_whole

MOST_ARMS = 24
"""Of a run whose curves, confusions and mistakes are shown."""
MOST_CLASSES = 20
"""Of a confusion matrix."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; img-src data:"


class Run(NamedTuple):
    """A finished run as its folder has it."""

    label: str
    folder: Path
    results: dict[str, Any]
    lines: list[dict[str, Any]]
    answers: dict[str, Answers]


def write_report(folders: Sequence[Path], out: Path, note_of: Callable[[str], str | None]) -> None:
    """Writes the page about runs; `note_of` is asked for the lab note of an experiment, and has none of unknown ones.

    Raises UserError, with nothing written, for a folder without results, and where the extra `report` is missing.
    """
    charts.check_extra()
    runs = [read_run(folder, label) for folder, label in zip(folders, labels(folders), strict=True)]
    try:
        text = page(runs, note_of)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        names = ", ".join(str(folder) for folder in folders)
        raise UserError(f"results of {names} are not what this version of cnnlib writes: {error!r}") from error
    write_whole(out, lambda path: path.write_text(text, encoding="utf-8"))


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


def text_of(value: Any) -> str:
    """Anything as text that is safe between tags and in quotes."""
    return html.escape(str(value), quote=True)


def page(runs: Sequence[Run], note_of: Callable[[str], str | None]) -> str:
    """The whole page."""
    read = resources.files("cnnlib").joinpath
    style, script = (read(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    links = "".join(f'<li><a href="#run-{i}">{text_of(run.label)}</a></li>' for i, run in enumerate(runs))
    body = "".join(section(f"run-{i}", run, note_of(run.results["experiment"])) for i, run in enumerate(runs))
    return (
        '<!doctype html>\n<html lang="en" data-theme="light">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>cnnlib: {text_of(', '.join(run.label for run in runs))}</title>\n<style>\n{style}</style>\n</head>\n"
        '<body>\n<a class="skip" href="#content">Skip to the results</a>\n<header><h1>cnnlib report</h1>\n'
        f'<nav aria-label="Runs"><ul>{links}</ul></nav>\n<button type="button" id="theme">Dark</button></header>\n'
        f'<main id="content">\n{body}</main>\n'
        "<footer><p class='quiet'>Intervals are Student's t over the lanes of an arm, 95 %: they speak of other seeds, "
        "not of other test sets. Points of lanes that diverged are not drawn.</p></footer>\n"
        f"<script>{charts.library()}</script>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def section(name: str, run: Run, note: str | None) -> str:
    """All about one run."""
    results = run.results
    question = note.splitlines()[0] if note else f"What do the arms of {results['experiment']} reach?"
    parts = [
        f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{text_of(run.label)}</h2>',
        f'<p class="question">{text_of(question)}</p>',
        f"<h3>Answer</h3>\n{answer(results)}",
        f"<h3>Arms</h3>\n{table(results)}",
        f"<h3>Accuracy against cost</h3>\n{cost_plots(name, results)}",
        curves(name, run),
        confusions(run),
        mistakes(run),
        f"<h3>How to repeat it</h3>\n{provenance(results)}",
    ]
    if note:
        parts.append(f"<details><summary>The lab note</summary><pre>{text_of(note)}</pre></details>")
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
            f"<p>Compared seed by seed, {len(settled)} of {len(found)} differences are settled; the interval of the "
            "others holds zero, which is no proof that there is none.</p>"
        )
        sentences = "".join(f"<li>{text_of(difference.sentence())}</li>" for difference in found)
        is_open = " open" if len(found) <= 10 else ""
        told.append(f"<details{is_open}><summary>Differences</summary><ul>{sentences}</ul></details>")
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
    head = "".join(f'<th scope="col"><button type="button">{text_of(column)}</button></th>' for column in COLUMNS)
    rows = []
    for arm in results["arms"]:
        for index, setting in enumerate(arm["settings"]):
            accuracy, train = setting["test_accuracy"], setting.get("train_accuracy")
            low, high = accuracy["ci95"]
            known = accuracy["mean"] is not None
            cells: list[tuple[Any, str]] = [
                (arm["connectivity"], arm["connectivity"]),
                *((arm[count], f"{arm[count]:,}") for count in ("parameters", "connections", "macs")),
                ("" if train is None else train, "-" if train is None else f"{100 * train:.2f}"),
                (accuracy["mean"] if known else "", f"{100 * accuracy['mean']:.2f}" if known else "-"),
                ("" if low is None else low, "-" if low is None else f"{100 * low:.2f} to {100 * high:.2f}"),
                (accuracy["n"], str(accuracy["n"])),
                (arm["train_seconds_per_lane"], f"{arm['train_seconds_per_lane']:.2f}"),
            ]
            name = arm["name"] + setting_text(results, arm, index)
            row = "".join(f'<td data-value="{text_of(value)}">{text_of(shown)}</td>' for value, shown in cells)
            rows.append(f'<tr><th scope="row">{text_of(name)}</th>{row}</tr>')
    caption = (
        "Counts are for one example, taps on padding counted; training % is the final models' accuracy on what they "
        "were trained on; n is the number of lanes that have not diverged. Headings sort."
    )
    return (
        f'<p class="quiet">{caption}</p><div class="wide" tabindex="0" role="region" aria-label="Table of arms">'
        f'<table><caption class="unseen">Arms, with counts and accuracies</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def plot(name: str, spec: dict[str, Any], label: str, caption: str) -> str:
    """A place for a plot and its specification; `label` is what a screen reader says of it."""
    data = json.dumps(spec).replace("<", "\\u003c")
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


def curves(name: str, run: Run) -> str:
    """Learning curves with bands, training and validation."""
    arms = [arm["name"] for arm in run.results["arms"]]
    if len(arms) > MOST_ARMS:
        return f"<h3>Learning curves</h3>\n<p>Left out: {len(arms)} arms are more than a plot can tell apart.</p>"
    figures = []
    for metric in ("train_accuracy", "validation_accuracy"):
        spec = charts.curves_chart(run.lines, arms, metric)
        if spec is not None:
            words = metric.replace("_", " ")
            caption = f"{words.capitalize()}: means with 95 % bands, every lane a thin line."
            if metric == "train_accuracy":
                caption += " Measured while the parameters change, on augmented examples."
            figures.append(plot(f"{name}-{metric}", spec, f"{words} against the epoch, a line an arm", caption))
    if not figures:
        return "<h3>Learning curves</h3>\n<p>There is no metrics.jsonl in the folder.</p>"
    return f'<h3>Learning curves</h3>\n<div class="plots">{"".join(figures)}</div>'


def confusions(run: Run) -> str:
    """What each arm takes for what: a matrix an arm, means over its lanes."""
    if not run.answers:
        return "<h3>Confusions and mistakes</h3>\n<p>This run keeps no predictions, or has too many arms to show.</p>"
    parts = ["<h3>Confusions</h3>"]
    for arm, found in run.answers.items():
        fine = found.predicted[(found.predicted >= 0).all(axis=1)]
        classes = int(max(found.labels.max(), fine.max(initial=0))) + 1
        if not len(fine) or classes > MOST_CLASSES:
            parts.append(f"<p>{text_of(arm)}: no matrix, of {classes} classes and {len(fine)} lanes.</p>")
            continue
        counts = np.zeros((classes, classes))
        np.add.at(counts, (np.broadcast_to(found.labels, fine.shape), fine), 1.0 / len(fine))
        totals = np.maximum(counts.sum(axis=1, keepdims=True), 1e-9)
        head = "".join(f'<th scope="col">{column}</th>' for column in range(classes))
        rows = "".join(
            f'<tr><th scope="row">{row}</th>'
            + "".join(
                f'<td{" class=right" if row == column else ""} style="--share:{share:.3f}">{100 * share:.1f}</td>'
                for column, share in enumerate(counts[row] / totals[row])
            )
            + "</tr>"
            for row in range(classes)
        )
        caption = f"{arm}: percent of a true class (row) that is taken for a class (column), mean of {len(fine)} lanes"
        parts.append(
            f'<details><summary>{text_of(arm)}</summary><div class="wide" tabindex="0" role="region" '
            f'aria-label="Confusions of {text_of(arm)}"><table class="confusion"><caption>{text_of(caption)}</caption>'
            f"<thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>"
        )
    return "\n".join(parts)


def mistakes(run: Run) -> str:
    """The examples that most lanes of an arm get wrong, of the highest mean loss first."""
    parts = []
    for arm, found in run.answers.items():
        fine = (found.predicted >= 0).all(axis=1)
        figures = []
        for index, example in zip(found.worst, found.worst_examples, strict=True):
            votes = found.predicted[fine, index]
            classes, counts = np.unique(votes, return_counts=True)
            most = int(counts.argmax())
            told = f"is {found.labels[index]}; {counts[most]} of {len(votes)} say {classes[most]}"
            picture = drawing(example, f"Test example {index}: it {told}")
            figures.append(f"<figure>{picture}<figcaption>{text_of(told)}</figcaption></figure>")
        if figures:
            parts.append(
                f"<details><summary>{text_of(arm)}: {len(figures)}</summary>"
                f'<div class="mistakes">{"".join(figures)}</div></details>'
            )
    return "\n".join(["<h3>Worst mistakes</h3>", *parts]) if parts else ""


def drawing(example: np.ndarray, label: str) -> str:
    """An image as a PNG inside the page, a signal as a line; `example` is `(*spatial, channel)`."""
    low, high = float(example.min()), float(example.max())
    scaled = (example.astype(np.float64) - low) / (high - low or 1.0)
    if example.ndim == 2:
        lines = []
        for channel in scaled.T:
            points = " ".join(f"{x},{38 - 36 * y:.1f}" for x, y in enumerate(channel))
            lines.append(f'<polyline points="{points}" fill="none" stroke="#0057a8" stroke-width="1"/>')
        box = f"0 0 {max(1, len(scaled) - 1)} 40"
        return f'<svg viewBox="{box}" role="img" aria-label="{text_of(label)}">{"".join(lines)}</svg>'
    from PIL import Image

    pixels = example if example.dtype == np.uint8 else np.round(255 * scaled).astype(np.uint8)
    mode = pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]
    file = io.BytesIO()
    Image.fromarray(mode).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{text_of(label)}" src="data:image/png;base64,{data}">'


def provenance(results: dict[str, Any]) -> str:
    """The command, the machine and versions, the whole configuration."""
    experiment = from_dict(results["config"])
    command = command_for(results["experiment"], experiment) or "not a registered experiment"
    device, machine = results["device"], results.get("machine", {})
    where = {
        "finished": results.get("finished", "unknown"),
        "commit": results["commit"] or "unknown",
        "device": f"{device['count']} x {device['kind']}, {device['kernels']} kernels",
        "machine": f"{machine.get('cores', '?')} cores, {machine.get('processor', 'unknown')}",
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        "data": ", ".join(f"{key} {value}" for key, value in results["data"].items()),
        "seconds": f"{results['wall_seconds']:.0f}",
        "resumed": f"{len(results.get('resumed', []))} times",
    }
    rows = "".join(
        f'<tr><th scope="row">{text_of(key)}</th><td>{text_of(value)}</td></tr>' for key, value in where.items()
    )
    fields = text_of("\n".join(assignments(experiment)))
    return (
        f"<pre>{text_of(command)}</pre>\n<div class='wide' tabindex='0' role='region' aria-label='Provenance'><table>"
        f"<caption>Where the numbers come from</caption><tbody>{rows}</tbody></table></div>\n"
        f"<details><summary>The configuration</summary><pre>{fields}</pre></details>"
    )
