"""Implement the commands `runs` (list runs and their state) and `compare` (finished runs side by side) without JAX.

A folder may come from another person. So its content is checked before use, and never executed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from cnnlib.config.fields import flat, to_dict
from cnnlib.errors import UserError
from cnnlib.report.columns import COLUMNS, Cell, accuracy_text
from cnnlib.runs import folder
from cnnlib.runs.metrics import MetricsLine, read_metrics
from cnnlib.runs.record import RECORD, read_record
from cnnlib.runs.results import ArmResult, RunResults, results_in
from cnnlib.system.files import read_json
from cnnlib.system.tables import print_table

RUN_COLUMNS = ("run", "state", "began", "done", "result")
MARKS = (RECORD, "results.json")
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
    print_table(console, RUN_COLUMNS, [described(run, place) for run in found_runs(place)], left=5)


def described(run: Path, place: Path) -> tuple[str, ...]:
    """Return the table cells of a run, one per entry of `RUN_COLUMNS`."""
    config = folder_config(run)
    try:
        record = read_record(run)
    except UserError:  # of another version, or damaged
        record = None
    name = str(run.relative_to(place)) if run != place else str(run)
    experiment = _text(config.get("experiment")) or ("" if record is None else record.experiment)
    began = "" if record is None else record.sessions[0].began[5:16].replace("T", " ")
    lines = read_metrics(run / "metrics.jsonl")
    state = folder.state(run)
    result = record.sessions[-1].message if state == "failed" and record is not None else headline(run)
    result = so_far(lines, config) if result is None else result
    shown = name if not experiment or experiment in name else f"{name} ({experiment})"
    return (shown, state, began or "-", progress(lines, config), result or "-")


def folder_config(run: Path) -> dict[str, object]:
    """Return the content of `config.json`; empty if the file is missing or damaged."""
    config = read_json(run / "config.json")
    return config if isinstance(config, dict) else {}


def progress(lines: Sequence[MetricsLine], config: dict[str, object]) -> str:
    """Return which share of the epochs of all arms is done, such as `58 %`."""
    arms, epochs = _list(config.get("arms")), config.get("epochs")
    if not isinstance(epochs, int) or epochs < 1 or not arms:
        return "-"
    done = {(line.arm, line.epoch) for line in lines}
    return f"{100 * len(done) // (len(arms) * epochs)} %"


def so_far(lines: Sequence[MetricsLine], config: dict[str, object]) -> str:
    """Return the latest arm with its epoch and mean accuracy, such as `lenet5 9/12, validation 96.96 %`."""
    if not lines:
        return ""
    arm, epoch = lines[-1].arm, lines[-1].epoch
    last = [line for line in lines if (line.arm, line.epoch) == (arm, epoch)]
    values = [line.validation_accuracy for line in last if line.validation_accuracy is not None]
    mean = f", validation {100 * sum(values) / len(values):.2f} %" if values else ""
    return f"{arm} {epoch}/{config.get('epochs')}{mean}"


def headline(run: Path) -> str | None:
    """Return the arm with the highest mean test accuracy, and that accuracy; None if there is none that can be read."""
    try:
        results = results_in(run)
    except UserError:
        return None
    best = None if results is None else best_arm(results)
    return None if best is None else f"{best.name} {accuracy_text(best.test_accuracy)}"


def best_arm(results: RunResults) -> ArmResult | None:
    """Return the arm with the highest mean test accuracy; None if no arm has an accuracy."""
    rated = [(arm.test_accuracy.mean, arm) for arm in results.arms if arm.test_accuracy.mean is not None]
    return max(rated, key=lambda entry: entry[0])[1] if rated else None


def compare(runs: Sequence[Path], console: Console, mixed: bool = False) -> None:
    """Print finished runs side by side: each arm's test accuracy and time, and the fields that differ between runs.

    Raises UserError if a folder has no results, or if devices or precisions differ and `mixed` is False.
    """
    names = labels(runs)
    found = [finished_results(run) for run in runs]
    computed = [f"{results.device.kind}, precision {results.device.precision}" for results in found]
    if not mixed and len(set(computed)) > 1:
        told = ", ".join(f"{name} on {text}" for name, text in zip(names, computed, strict=True))
        raise UserError(f"these runs were computed in different ways: {told}; --mixed compares them all the same")
    by_name = [{arm.name: arm for arm in results.arms} for results in found]
    columns = ("parameters", "multiply-adds", "test accuracy %, 95 % interval", "n", "seconds per lane")
    rows = [
        (arm, label, *(cell.shown for cell in arm_cells(arms[arm], columns)))
        for arm in dict.fromkeys(name for arms in by_name for name in arms)
        for label, arms in zip(names, by_name, strict=True)
        if arm in arms
    ]
    print_table(console, ("arm", "run", *columns), rows, left=2)
    for text in (*disagreements(names, found), *fingerprints(found)):
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def finished_results(run: Path) -> RunResults:
    """Read the results of a run. Raise UserError, with the state of the run, if it has none."""
    results = results_in(run)
    if results is None:
        how = folder.state(run) if run.is_dir() else "not there"
        raise UserError(f"there are no results in {run}: its run is {how}")
    return results


def arm_cells(arm: ArmResult, columns: Sequence[str]) -> list[Cell]:
    """Return the cells of an arm in the given columns, for the setting that validation chose."""
    if arm.chosen_setting is not None:
        setting = arm.settings[arm.chosen_setting]
    else:  # nothing was chosen, so there is no accuracy
        setting = replace(arm.settings[0], test_accuracy=arm.test_accuracy, diverged=0)
    return [COLUMNS[name](arm, setting) for name in columns]


def labels(runs: Sequence[Path]) -> list[str]:
    """Return a short label per run: the shortest ending of its path that no other run has.

    Raises UserError if a run is given twice.
    """
    for length in range(1, max(len(run.absolute().parts) for run in runs) + 1):
        names = [str(Path(*run.absolute().parts[-length:])) for run in runs]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"report and compare need different runs, not {', '.join(map(str, runs))}")


def disagreements(names: Sequence[str], found: Sequence[RunResults]) -> list[str]:
    """Return one line per field that differs between the runs. Versions and device count as fields."""
    described = [
        flat(results.config)
        | {"experiment": results.experiment, "commit": results.commit}
        | {f"data.{key}": value for key, value in to_dict(results.data).items()}
        | results.versions
        | {f"device.{key}": value for key, value in to_dict(results.device).items()}
        | {"resumed": len(results.resumed)}
        for results in found
    ]
    lines = []
    for field in dict.fromkeys(field for one in described for field in one):
        values = [one.get(field) for one in described]
        if any(value != values[0] for value in values):
            lines.append(f"{field}: " + ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True)))
    return lines


def fingerprints(found: Sequence[RunResults]) -> list[str]:
    """Say whether all runs ended with the same parameters. Return no lines if the runs have different arms."""
    sums = [{arm.name: [lane.parameters_sha256 for lane in arm.lanes] for arm in results.arms} for results in found]
    if any(one.keys() != sums[0].keys() for one in sums):
        return []
    equal = [name for name in sums[0] if all(one[name] == sums[0][name] for one in sums)]
    if len(equal) == len(sums[0]):
        return ["the parameters of every lane are the same, bit for bit"]
    return [f"the same parameters, bit for bit: {', '.join(equal)}"] if equal else ["no arm has the same parameters"]


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
