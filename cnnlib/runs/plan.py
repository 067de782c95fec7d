"""Predict a run before it starts: programs, lanes, steps and approximate seconds. This module needs no JAX."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from cnnlib.config.fields import from_dict
from cnnlib.config.resolve import TrainedArm
from cnnlib.errors import UserError, require
from cnnlib.runs.callbacks import Watcher
from cnnlib.runs.results import RunResults
from cnnlib.system.cache import cache_folder, is_writable, keep_file
from cnnlib.system.files import read_json_lines
from cnnlib.system.tables import print_table

USUAL_RATE = 3e9
"""Multiply-adds of the forward pass, divided by the seconds of a whole training step, which includes the backward pass.
This rate is used if no run on this machine has measured one. It is the middle of the rates that the arms of fc_vs_conv
reach on 2 cores of an AVX-512 server processor."""
MOST_RATES = 500
"""Number of measured rates to keep. The latest are kept."""


@dataclass(frozen=True)
class Rate:
    """The measured time of one lane's step in a run on this machine."""

    connectivity: str
    macs: int
    """Multiply-adds of one step's forward pass over a batch."""
    seconds: float

    def __post_init__(self) -> None:
        require(self.macs >= 1 and self.seconds > 0, "a rate has multiply-adds and seconds")


class Cost(NamedTuple):
    """The expected cost of an arm."""

    lanes: int
    steps: int
    """Steps per lane."""
    seconds: float
    """Seconds for all lanes, without compilation."""
    is_measured: bool
    """True if `seconds` is computed from earlier runs on this machine; False if it is computed from `USUAL_RATE`."""


def rates_path() -> Path:
    """Return the path of the file with measured rates, in the user's cache folder."""
    return cache_folder("rates") / "rates.jsonl"


def known_rates() -> list[Rate]:
    """Return the rates that runs on this machine have measured. Skip lines that cannot be read."""
    found = []
    for line in read_json_lines(rates_path()):
        with contextlib.suppress(UserError):
            found.append(from_dict(line, Rate, "rate"))
    return found


class RateKeeper(Watcher):
    """A callback that saves the measured speed of a run's arms."""

    def run_ends(self, results: RunResults) -> None:
        """Add one rate per arm to the saved rates."""
        rates = [
            Rate(arm.connectivity, arm.macs * arm.batch_size, arm.train_seconds_per_lane / arm.steps)
            for arm in results.arms
            if arm.steps and arm.train_seconds_per_lane
        ]
        lines = [json.dumps(vars(rate)) + "\n" for rate in (*known_rates(), *rates)][-MOST_RATES:]
        if is_writable(rates_path().parent):
            with contextlib.suppress(OSError):  # harmless: only the next estimate is less exact
                keep_file(rates_path(), "".join(lines).encode())


def cost_of(arm: TrainedArm, rates: Sequence[Rate]) -> Cost:
    """Estimate an arm's cost from a measured rate.

    Use the rate of the same connectivity whose number of multiply-adds per step is nearest to that of the arm. If two
    rates are equally near, use the later one. Without a rate of this connectivity, use `USUAL_RATE`. The estimate
    assumes that time is proportional to multiply-adds. This assumption is right for large layers. For small layers, the
    estimate is close only if a measured step has about the same size.
    """
    macs, steps, lanes = arm.count.macs * arm.experiment.batch_size, arm.steps, len(arm.lanes)
    fitting = [rate for rate in rates if rate.connectivity == arm.model.connectivity]
    if fitting:
        nearest = min(reversed(fitting), key=lambda rate: abs(math.log(rate.macs / max(1, macs))))
        return Cost(lanes, steps, lanes * steps * nearest.seconds * macs / nearest.macs, True)
    return Cost(lanes, steps, lanes * steps * macs / USUAL_RATE, False)


def duration(seconds: float) -> str:
    """Format seconds as `45 s`, `12 min` or `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_plan(arms: Sequence[TrainedArm], programs: int, console: Console) -> None:
    """Print one row per arm, then the total. `programs` is the number of training programs to compile."""
    rates = known_rates()
    costs = [cost_of(arm, rates) for arm in arms]
    columns = ("arm", "connectivity", "parameters", "connections", "multiply-adds", "lanes", "steps", "about")
    rows = []
    for arm, cost in zip(arms, costs, strict=True):
        counts = (f"{number:,}" for number in (arm.count.parameters, arm.count.connections, arm.count.macs))
        times = (str(cost.lanes), f"{cost.steps:,}", duration(cost.seconds) if cost.steps else "-")
        rows.append((arm.name, arm.model.connectivity, *counts, *times))
    print_table(console, columns, rows, left=2)
    measured = sum(cost.is_measured for cost in costs)
    by = "runs on this machine" if measured == len(costs) else "the usual rate of 2 CPU cores"
    if 0 < measured < len(costs):
        by = f"runs on this machine ({measured} of {len(costs)} arms) and the usual rate of 2 CPU cores"
    lanes, seconds = sum(cost.lanes for cost in costs), sum(cost.seconds for cost in costs)
    what = f"{programs} programs, {lanes} lanes" if programs != 1 else f"1 program, {lanes} lanes"
    when = (
        f"about {duration(seconds)} of training by {by}" if all(cost.steps for cost in costs) else "data not prepared"
    )
    console.print(f"{what}, {when}", markup=False, highlight=False, soft_wrap=True)
