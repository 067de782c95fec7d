"""Implement the commands `runs` (list runs and their state) and `compare` (finished runs side by side) without JAX.

A folder may come from another person. So its content is checked before use, and never executed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cnnlib.config.fields import flat
from cnnlib.errors import UserError
from cnnlib.report.summary import accuracy_text
from cnnlib.runs import folder
from cnnlib.system.files import is_number, read_json_lines
from cnnlib.system.tables import print_table

COLUMNS = ("run", "state", "began", "done", "result")
MARKS = (folder.RECORD, "results.json")
"""A folder that has one of these files holds a run."""


def found_runs(place: Path) -> list[Path]:
    """Return all folders of runs inside `place`, except those in `earlier`. Raise UserError if there are no runs."""
    if not place.is_dir():
        raise UserError(f"there is no folder {place}")
    found = []
    for root, folders, files in os.walk(place):
        if any(mark in files for mark in MARKS):
            found.append(Path(root))
            folders.clear()
        folders[:] = sorted(name for name in folders if name != "earlier" and not name.startswith("."))
    if not found:
        raise UserError(f"there are no runs in {place}")
    return found


def print_runs(place: Path, console: Console) -> None:
    """Print one line per run in `place`. A line has the state, the start, the progress and the result so far."""
    print_table(console, COLUMNS, [described(run, place) for run in found_runs(place)], left=5)


def described(run: Path, place: Path) -> tuple[str, ...]:
    """Return the table cells of a run, one per entry of `COLUMNS`."""
    record, config = (_object(folder.read_json(run / name)) for name in (folder.RECORD, "config.json"))
    sessions = [session for session in _list(record.get("sessions")) if isinstance(session, dict)]
    name = str(run.relative_to(place)) if run != place else str(run)
    experiment = _text(config.get("experiment")) or _text(record.get("experiment"))
    began = _text(sessions[0].get("began"))[5:16].replace("T", " ") if sessions else ""
    lines = [line for line in read_json_lines(run / "metrics.jsonl") if _is_line(line)]
    state, results = folder.state(run), folder.read_json(run / "results.json")
    if state == "failed" and sessions:
        result = _text(sessions[-1].get("message"))
    elif is_results(results):
        result = headline(results)
    else:
        result = so_far(lines, config)
    shown = name if not experiment or experiment in name else f"{name} ({experiment})"
    return (shown, state, began or "-", progress(lines, config), result or "-")


def progress(lines: Sequence[dict[str, Any]], config: dict[str, Any]) -> str:
    """Return which share of the epochs of all arms is done, such as `58 %`."""
    arms, epochs = _list(config.get("arms")), config.get("epochs")
    if not isinstance(epochs, int) or epochs < 1 or not arms:
        return "-"
    done = {(line["arm"], line["epoch"]) for line in lines}
    return f"{100 * len(done) // (len(arms) * epochs)} %"


def so_far(lines: Sequence[dict[str, Any]], config: dict[str, Any]) -> str:
    """Return the latest arm with its epoch and mean accuracy, such as `lenet5 9/12, validation 96.96 %`."""
    if not lines:
        return ""
    arm, epoch = (lines[-1][key] for key in ("arm", "epoch"))
    last = [line for line in lines if (line["arm"], line["epoch"]) == (arm, epoch)]
    values = [line["validation_accuracy"] for line in last if is_number(line.get("validation_accuracy"))]
    mean = f", validation {100 * sum(values) / len(values):.2f} %" if values else ""
    return f"{arm} {epoch}/{config.get('epochs')}{mean}"


def headline(results: dict[str, Any]) -> str:
    """Return the arm with the highest mean test accuracy, and that accuracy."""
    rated = [arm for arm in results["arms"] if arm["test_accuracy"]["mean"] is not None]
    if not rated:
        return ""
    best = max(rated, key=lambda arm: float(arm["test_accuracy"]["mean"]))
    return f"{best['name']} {accuracy_text(best['test_accuracy'])}"


def compare(runs: Sequence[Path], console: Console, mixed: bool = False) -> None:
    """Print finished runs side by side: each arm's test accuracy and time, and the fields that differ between runs.

    Raises UserError if a folder has no results, or if devices or precisions differ and `mixed` is False.
    """
    names = labels(runs)
    found = []
    for run in runs:
        results = folder.read_json(run / "results.json")
        if not is_results(results):
            raise UserError(
                f"there are no results in {run}: its run is {folder.state(run) if run.is_dir() else 'not there'}"
            )
        found.append(results)
    computed = [computed_on(results) for results in found]
    if not mixed and len(set(computed)) > 1:
        told = ", ".join(f"{name} on {text}" for name, text in zip(names, computed, strict=True))
        raise UserError(f"these runs were computed in different ways: {told}; --mixed compares them all the same")
    arms = dict.fromkeys(arm["name"] for results in found for arm in results["arms"])
    rows = []
    for name in arms:
        for label, results in zip(names, found, strict=True):
            for arm in results["arms"]:
                if arm["name"] == name:
                    accuracy, seconds = arm["test_accuracy"], arm["train_seconds_per_lane"]
                    counts = (f"{arm['parameters']:,}", f"{arm['macs']:,}")
                    rows.append((name, label, *counts, accuracy_text(accuracy), str(accuracy["n"]), f"{seconds:.2f}"))
    columns = ("arm", "run", "parameters", "multiply-adds", "test accuracy %, 95 % interval", "n", "seconds per lane")
    headers = {"multiply-adds": "multiply-\nadds", "test accuracy %, 95 % interval": "test accuracy %,\n95 % interval"}
    headers |= {"parameters": "para-\nmeters", "seconds per lane": "s /\nlane"}
    print_table(console, columns, rows, left=2, headers=headers, padding=0)
    for text in (*disagreements(names, found), *fingerprints(found)):
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def computed_on(results: dict[str, Any]) -> str:
    """Return a run's kind of device and its precision of products as text. Accuracies and times depend on both."""
    device, config = _object(results.get("device")), _object(results.get("config"))
    kind, precision = device.get("kind"), config.get("precision", "default")
    return f"{kind}, precision {precision}"


def labels(runs: Sequence[Path]) -> list[str]:
    """Return a short label per run: the shortest ending of its path that no other run has.

    Raises UserError if a run is given twice.
    """
    for length in range(1, max(len(run.absolute().parts) for run in runs) + 1):
        names = [str(Path(*run.absolute().parts[-length:])) for run in runs]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"report and compare need different runs, not {', '.join(map(str, runs))}")


def disagreements(names: Sequence[str], found: Sequence[dict[str, Any]]) -> list[str]:
    """Return one line per field that differs between the runs. Versions and device count as fields."""
    described = [
        flat(results["config"])
        | {key: results.get(key) for key in ("experiment", "commit")}
        | {f"data.{key}": value for key, value in _object(results.get("data")).items()}
        | _object(results.get("versions"))
        | {f"device.{key}": value for key, value in _object(results.get("device")).items()}
        | {"resumed": len(_list(results.get("resumed")))}
        for results in found
    ]
    lines = []
    for field in dict.fromkeys(field for one in described for field in one):
        values = [one.get(field) for one in described]
        if any(value != values[0] for value in values):
            lines.append(f"{field}: " + ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True)))
    return lines


def fingerprints(found: Sequence[dict[str, Any]]) -> list[str]:
    """Say whether all runs ended with the same parameters. Return no lines if arms differ or checksums are missing."""
    sums = [
        {
            arm["name"]: [_object(lane).get("parameters_sha256") for lane in _list(arm.get("lanes"))]
            for arm in results["arms"]
        }
        for results in found
    ]
    if any(one.keys() != sums[0].keys() for one in sums) or None in (
        s for one in sums for arm in one.values() for s in arm
    ):
        return []
    equal = [name for name in sums[0] if all(one[name] == sums[0][name] for one in sums)]
    if len(equal) == len(sums[0]):
        return ["the parameters of every lane are the same, bit for bit"]
    return [f"the same parameters, bit for bit: {', '.join(equal)}"] if equal else ["no arm has the same parameters"]


def is_results(found: Any) -> bool:
    """Return whether `found` looks like the `results.json` of a run that trained. Check only the fields to be shown."""
    arms = found.get("arms") if isinstance(found, dict) else None
    if not isinstance(arms, list) or not isinstance(found.get("config"), dict) or not arms:
        return False
    return all(isinstance(arm, dict) and _is_arm(arm) for arm in arms)


def _is_line(line: dict[str, Any]) -> bool:
    arm = line.get("arm")
    return isinstance(arm, str) and arm.isprintable() and isinstance(line.get("epoch"), int)


def _is_arm(arm: dict[str, Any]) -> bool:
    accuracy = _object(arm.get("test_accuracy"))
    interval = accuracy.get("ci95")
    return (
        isinstance(arm.get("name"), str)
        and all(isinstance(arm.get(count), int) for count in ("parameters", "macs"))
        and is_number(arm.get("train_seconds_per_lane"))
        and isinstance(accuracy.get("n"), int)
        and "mean" in accuracy
        and (accuracy["mean"] is None or is_number(accuracy["mean"]))
        and isinstance(interval, list)
        and len(interval) == 2
        and (interval[0] is None) == (interval[1] is None)
        and all(end is None or is_number(end) for end in interval)
    )


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
