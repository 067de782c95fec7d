"""`cnnlib runs`, `compare`, `report`, `results` and `wandb`: use existing runs, without importing JAX."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cnnlib.cli.declarations import lab_note
from cnnlib.config.schema import EXPERIMENTS, Experiment
from cnnlib.errors import UserError

if TYPE_CHECKING:
    from cnnlib.report.results_page import Asked


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `runs`."""
    parser.add_argument(
        "folder", metavar="DIR", nargs="?", default="runs", help="folder in which to look for runs (default: runs)"
    )


def command_runs(options: argparse.Namespace) -> int:
    """Print all runs in a folder, with the state of each run."""
    from cnnlib.report.overview import print_runs

    print_runs(Path(options.folder), Console(highlight=False))
    return 0


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `compare`."""
    parser.add_argument("folders", metavar="DIR", nargs="+", help="folders of finished runs")
    parser.add_argument("--mixed", action="store_true", help="allow runs that differ in device or precision")


def command_compare(options: argparse.Namespace) -> int:
    """Print finished runs side by side."""
    from cnnlib.report.overview import compare

    if len(options.folders) < 2:
        raise UserError("compare needs two runs or more; usage: cnnlib compare DIR DIR [DIR ...] [--mixed]")
    compare([Path(folder) for folder in options.folders], Console(highlight=False), options.mixed)
    return 0


def add_report(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `report`."""
    parser.add_argument("folders", metavar="DIR", nargs="+", help="folders of finished runs")
    parser.add_argument("--out", metavar="FILE", default="report.html", help="file of the page (default: report.html)")


def command_report(options: argparse.Namespace) -> int:
    """Write an HTML page about finished runs."""
    from cnnlib.report.page import write_report

    if options.out == "":
        raise UserError("--out needs a file")
    note = lambda name: lab_note(name) if name in EXPERIMENTS else None  # noqa: E731
    write_report([Path(folder) for folder in options.folders], Path(options.out), note)
    print(f"written: {options.out}")
    return 0


def add_results(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `results`."""
    parser.add_argument(
        "folder",
        metavar="DIR",
        nargs="?",
        default="docs",
        help="folder that has one folder per stored run (default: docs)",
    )


def command_results(options: argparse.Namespace) -> int:
    """Write RESULTS.md from stored results."""
    from cnnlib.report.results_page import write_page

    if not Path(options.folder).is_dir():
        raise UserError(f"there is no folder {options.folder}")
    print(f"written: {write_page(Path(options.folder), asked)}")
    return 0


def asked(name: str) -> Asked:
    """Return the question and the planned comparisons of a registered experiment."""
    from cnnlib.report.results_page import Asked

    experiment = EXPERIMENTS.get(name)
    planned = experiment.comparisons if isinstance(experiment, Experiment) else ()
    return Asked(lab_note(name).splitlines()[0], planned)


def add_wandb(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `wandb`."""
    parser.add_argument("folder", metavar="DIR", help="folder of a run, finished or not")
    parser.add_argument(
        "--wandb", choices=("auto", "online", "offline"), default="auto", help="W&B mode (default: auto)"
    )


def command_wandb(options: argparse.Namespace) -> int:
    """Send a run to Weights & Biases."""
    from cnnlib.runs.folder import inside, state
    from cnnlib.runs.metrics import read_metrics
    from cnnlib.runs.record import read_record
    from cnnlib.tracking.wandb_copy import chosen_mode, send

    folder = Path(options.folder)
    read_record(folder)
    inside(folder, folder / "wandb")
    mode, hint = chosen_mode(options.wandb)
    if mode is None:
        raise UserError(hint or "W&B is off: WANDB_MODE is disabled")
    send(folder, mode, iter([read_metrics(folder / "metrics.jsonl")]), lambda: int(state(folder) != "finished"))
    return 0
