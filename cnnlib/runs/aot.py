"""Estimate the time and memory of an experiment's arms on hardware that is absent: `show NAME --on tpu:v5e:2x4`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from rich.console import Console

from cnnlib.aot.compiling import Report, compile_for, devices, on
from cnnlib.aot.hardware import Target
from cnnlib.config.resolve import TrainedArm
from cnnlib.errors import UserError
from cnnlib.runs.plan import duration
from cnnlib.spec.counts import count
from cnnlib.spec.model import Model
from cnnlib.system.tables import print_table
from cnnlib.train import programs, step
from cnnlib.train.programs import size_text
from cnnlib.train.sharding import Spread
from cnnlib.train.types import Examples

EXPENSIVE = 5
"""Number of most expensive operations to show per arm."""


@dataclass(frozen=True)
class Compiled:
    """The estimate for an arm that compiles and fits the memory."""

    report: Report
    """The compiler's report on one epoch on one device."""
    devices: int
    lanes_per_device: int
    lanes_at_a_time: int
    steps_per_epoch: int
    epochs: int
    flops_per_epoch: int
    """Number of operations per device. One multiply-add is two operations."""
    peak_flops: float
    """Published peak of one device, in operations per second."""

    def plain(self) -> dict[str, Any]:
        """Return the estimate for `--json`."""
        report, cycles = self.report, self.report.cycles
        lane_steps = self.lanes_per_device * self.steps_per_epoch
        return {
            "devices": self.devices,
            "lanes_at_a_time": self.lanes_at_a_time,
            "memory_bytes": report.memory_bytes,
            "temporary_bytes": report.temporary_bytes,
            "compile_seconds": round(report.compile_seconds, 1),
            "scheduled_cycles_per_lane_step": None if cycles is None else round(cycles / lane_steps),
            "bytes_per_lane_step": round(report.bytes / lane_steps),
            "estimated_seconds_per_epoch": report.seconds,
            "estimated_seconds": report.seconds * self.epochs,
            "multiply_adds_per_epoch": self.flops_per_epoch // 2,
            "share_of_peak": self.flops_per_epoch / report.seconds / self.peak_flops,
            "collectives": report.collectives,
            "expensive": [
                {"source": one.source or one.kind, "share": one.seconds / report.seconds, "times": one.times}
                for one in report.operations[:EXPENSIVE]
            ],
        }


@dataclass(frozen=True)
class ArmReport:
    """The estimate for one arm, or the reason why it does not compile."""

    name: str
    lanes: int
    found: Compiled | str

    def plain(self) -> dict[str, Any]:
        """Return the report for `--json`."""
        same = {"name": self.name, "lanes": self.lanes}
        if isinstance(self.found, str):
            return {**same, "compiles": False, "reason": self.found}
        return {**same, "compiles": True, **self.found.plain()}


def reports(arms: Sequence[TrainedArm], target: Target) -> Iterator[ArmReport]:
    """Compile one epoch of each arm for the target. Arms that share a program are compiled once.

    Raise UserError if the compiler for the target is missing.
    """
    known: dict[object, Compiled | str] = {}
    for arm in arms:
        if arm.program not in known:
            known[arm.program] = compiled(arm, devices(target), target)
        yield ArmReport(arm.name, len(arm.lanes), known[arm.program])


def compiled(arm: TrainedArm, available: Sequence[jax.Device], target: Target) -> Compiled | str:
    """Compile one epoch of an arm. As many lanes (models) run at a time as fit in memory.

    Return the estimate. If the arm does not compile or does not fit, return the reason as text.
    """
    examples = examples_of(arm).y.shape[0]
    if not examples:
        return f"data set {arm.description.name} is not prepared, so its size is unknown: say data.train=N"
    try:
        spread = programs.spread_of(arm, available[: arm.experiment.devices])
    except UserError as error:
        return str(error)
    platform = "tpu" if target.platform == "tpu" else "gpu"
    most = spread.lanes_a_device
    wanted = arm.experiment.lanes.at_a_time
    preferred = programs.preferred_at_a_time(arm.model.connectivity, arm.input_shape, most, platform)
    at_a_time = min(wanted or preferred, most)
    while True:
        try:
            with jax.default_matmul_precision(arm.experiment.precision):
                report = compile_for(*epoch_of(arm, spread, at_a_time), target)
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            if "RESOURCE_EXHAUSTED" not in reason:
                return reason
        else:
            if report.memory_bytes <= target.chip.memory_bytes:
                break
            reason = f"needs {size_text(report.memory_bytes)} of {size_text(target.chip.memory_bytes)}"
        if at_a_time == 1:
            return f"one lane at a time: {reason}"
        at_a_time = max(1, at_a_time // 2)
    steps = examples // arm.experiment.batch_size * arm.experiment.passes
    flops = flops_per_step(arm) * steps * most // spread.shards
    devices_used = len(spread.devices)
    return Compiled(report, devices_used, most, at_a_time, steps, arm.experiment.epochs, flops, target.chip.peak_flops)


def flops_per_step(arm: TrainedArm) -> int:
    """Return the operations per lane and step. One multiply-add is two operations.

    A step computes the forward pass, the weight gradients and the input gradients. The first layer computes no input
    gradient.
    """
    first = count(Model(arm.model.layers[:1]), arm.input_shape).macs
    return 2 * arm.experiment.batch_size * (3 * arm.count.macs - first)


def epoch_of(arm: TrainedArm, spread: Spread, at_a_time: int) -> tuple[Any, tuple[Any, ...]]:
    """Return an arm's jitted epoch for the devices of `spread`, and the shapes of its arguments."""
    recipe = programs.recipe_of(arm, spread)
    numbers = programs.shapes(spread.filled(programs.numbers_of(arm)))
    states, _ = jax.eval_shape(step.over_lanes(programs.begin(recipe), 1), numbers)
    own = step.over_lanes(step.epoch(recipe), at_a_time, lane_arguments=2)
    epoch = spread.compiled_for(own, 2, 1, donate_argnums=0)
    arguments = (states, numbers, examples_of(arm))
    return epoch, on(spread.devices[0], arguments) if len(spread.devices) == 1 else arguments


def examples_of(arm: TrainedArm) -> Examples:
    """Return the shapes of the training examples on one device. Images are uint8, signals are float32."""
    size = arm.description.counts.get("train") or arm.experiment.data.train or 0
    stored = arm.description.input_shape
    shape: Any = jax.ShapeDtypeStruct
    kind = np.uint8 if len(stored) == 3 else np.float32
    channel = shape((stored[-1],), np.float32)
    return Examples(shape((size, *stored), kind), shape((size,), np.int32), channel, channel)


def seconds_text(seconds: float) -> str:
    """Format a time: with two digits if it is below 10 s, else as `duration` does."""
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)


def print_reports(found: Sequence[ArmReport], target: Target, console: Console) -> None:
    """Print one row per arm, then each arm's most expensive operations."""
    columns = ("arm", "devices", "lanes at a time", "memory", "compile", "cycles", "of peak", "epoch", "run")
    rows = []
    for arm in found:
        values = arm.plain()
        if not values["compiles"]:
            console.print(f"{arm.name}: {arm.found}", markup=False, soft_wrap=True)
            continue
        cycles = values["scheduled_cycles_per_lane_step"]
        rows.append(
            (
                arm.name,
                str(values["devices"]),
                str(values["lanes_at_a_time"]),
                size_text(values["memory_bytes"]),
                f"{values['compile_seconds']:.0f} s",
                "-" if cycles is None else f"{cycles:,}",
                f"{values['share_of_peak']:.1%}",
                seconds_text(values["estimated_seconds_per_epoch"]),
                seconds_text(values["estimated_seconds"]),
            )
        )
    if rows:
        print_table(console, columns, rows)
    for arm in found:
        values = arm.plain()
        if values["compiles"]:
            exchanged = ", ".join(f"{kind} {times}" for kind, times in values["collectives"].items()) or "none"
            console.print(f"{arm.name}: collectives: {exchanged}; most expensive:", markup=False, soft_wrap=True)
            for one in values["expensive"]:
                console.print(f"  {one['share']:5.1%}  {one['source'][-90:]}", markup=False, soft_wrap=True)
    memory = size_text(target.chip.memory_bytes)
    console.print(
        f"\n{target}: {target.chip.name}, {memory} per device. Seconds are estimates by the compiler's account, and "
        "nothing was run: docs/accelerators.md has their calibration.",
        markup=False,
        soft_wrap=True,
    )
