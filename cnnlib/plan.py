"""What a run will be before anything runs: programs, lanes, steps, and about how many seconds; without JAX."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from cnnlib.cache import cache_folder, is_writable, keep_file
from cnnlib.resolve import TrainedArm
from cnnlib.tables import print_table
from cnnlib.tracking import is_number, read_json_lines
from cnnlib.watcher import Watcher

USUAL_RATE = 3e9
"""Multiply-adds of forward passes a second, the backward passes of the same step included, where no run on this machine
has measured any: the middle of what the arms of fc_vs_conv reach on 2 cores of an AVX-512 server processor."""
MOST_RATES = 500
"""Measured rates that are kept, the latest."""


class Rate(NamedTuple):
    """How long a lane's step took in some run on this machine."""

    connectivity: str
    macs: int
    """Of one step: multiply-adds of a forward pass over a batch."""
    seconds: float


class Cost(NamedTuple):
    """What an arm is expected to take."""

    lanes: int
    steps: int
    """Of each lane."""
    seconds: float
    """Of all lanes; compilation aside."""
    is_measured: bool
    """By earlier runs on this machine, not the usual rate."""


def rates_path() -> Path:
    """Where rates are kept, in the user's cache folder."""
    return cache_folder("rates") / "rates.jsonl"


def known_rates() -> list[Rate]:
    """The rates that runs on this machine have measured; what cannot be read is not known."""
    found = []
    for line in read_json_lines(rates_path()):
        connectivity, macs, seconds = (line.get(name) for name in Rate._fields)
        if isinstance(connectivity, str) and is_number(macs) and is_number(seconds) and macs >= 1 and seconds > 0:  # type: ignore[operator]
            found.append(Rate(connectivity, int(macs), float(seconds)))  # type: ignore[arg-type]
    return found


class RateKeeper(Watcher):
    """Keeps what the arms of a run have shown of this machine's speed."""

    def run_ends(self, results: dict[str, Any]) -> None:
        """Adds a rate an arm to those that are known."""
        rates = [
            Rate(arm["connectivity"], arm["macs"] * arm["batch_size"], arm["train_seconds_per_lane"] / arm["steps"])
            for arm in results["arms"]
            if arm["steps"] and arm["train_seconds_per_lane"]
        ]
        lines = [json.dumps(rate._asdict()) + "\n" for rate in (*known_rates(), *rates)][-MOST_RATES:]
        if is_writable(rates_path().parent):
            with contextlib.suppress(OSError):  # the next estimate is no better than this one
                keep_file(rates_path(), "".join(lines).encode())


def cost_of(arm: TrainedArm, rates: Sequence[Rate]) -> Cost:
    """What an arm will take, by the known step of its connectivity that is nearest in size, else by the usual rate.

    Of equally near ones the latest counts. Time is taken to grow with the multiply-adds: right for large layers, and
    for small ones as near as there is a known step of about their size.
    """
    macs, steps, lanes = arm.count.macs * arm.experiment.batch_size, arm.steps, len(arm.lanes)
    fitting = [rate for rate in rates if rate.connectivity == arm.model.connectivity]
    if fitting:
        nearest = min(reversed(fitting), key=lambda rate: abs(math.log(rate.macs / max(1, macs))))
        return Cost(lanes, steps, lanes * steps * nearest.seconds * macs / nearest.macs, True)
    return Cost(lanes, steps, lanes * steps * macs / USUAL_RATE, False)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_plan(arms: Sequence[TrainedArm], programs: int, console: Console) -> None:
    """A row an arm, and the sum below; `programs` is how many are compiled to train."""
    rates = known_rates()
    costs = [cost_of(arm, rates) for arm in arms]
    columns = ("arm", "connectivity", "parameters", "connections", "multiply-adds", "lanes", "steps", "about")
    rows = []
    for arm, cost in zip(arms, costs, strict=True):
        counts = (f"{number:,}" for number in (arm.count.parameters, arm.count.connections, arm.count.macs))
        times = (str(cost.lanes), f"{cost.steps:,}", duration(cost.seconds) if cost.steps else "-")
        rows.append((arm.name, arm.model.connectivity, *counts, *times))
    headers = {
        "connectivity": "connec-\ntivity",
        "parameters": "para-\nmeters",
        "connections": "connec-\ntions",
        "multiply-adds": "multiply-\nadds",
    }
    print_table(console, columns, rows, left=2, headers=headers)
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
