"""What the arms of an experiment would take on hardware that is not there: `show NAME --on tpu:v5e:2x4`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from rich.console import Console

from cnnlib import programs, train
from cnnlib.aot.compiling import Report, compile_for, devices, on
from cnnlib.aot.hardware import Target
from cnnlib.cost import count
from cnnlib.errors import UserError
from cnnlib.mesh import Spread
from cnnlib.plan import duration
from cnnlib.programs import size_text
from cnnlib.resolve import TrainedArm
from cnnlib.spec import Model
from cnnlib.tables import print_table
from cnnlib.train import Examples

EXPENSIVE = 5
"""Operations that are shown."""


@dataclass(frozen=True)
class ArmReport:
    """What one arm would take. The figures are None where it does not compile."""

    name: str
    lanes: int
    reason: str | None = None
    """Why it does not compile."""
    devices: int | None = None
    lanes_at_a_time: int | None = None
    steps_per_epoch: int | None = None
    epochs: int | None = None
    flops_per_epoch: int | None = None
    """Of one device: two per multiply-add."""
    peak_flops: float | None = None
    """Of one device, per second, published."""
    report: Report | None = None
    """Of one epoch on one device."""

    def plain(self) -> dict[str, Any]:
        """Return the figures for `--json`."""
        report = self.report
        if report is None:
            return {"name": self.name, "compiles": False, "reason": self.reason, "lanes": self.lanes}
        assert self.devices and self.steps_per_epoch and self.epochs and self.flops_per_epoch and self.peak_flops
        lane_steps = -(-self.lanes // self.devices) * self.steps_per_epoch
        cycles = report.cycles
        return {
            "name": self.name,
            "compiles": True,
            "lanes": self.lanes,
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


def reports(arms: Sequence[TrainedArm], target: Target) -> Iterator[ArmReport]:
    """Compile an epoch of each arm for the target. Arms of one program are compiled once."""
    known: dict[Any, ArmReport] = {}
    for arm in arms:
        if arm.program not in known:
            known[arm.program] = report_of(arm, target)
        yield ArmReport(**{**vars(known[arm.program]), "name": arm.name})


def report_of(arm: TrainedArm, target: Target) -> ArmReport:
    """Compile an epoch of one arm, with as many lanes at a time as fit the memory."""
    lanes = len(arm.lanes)
    count_of_training = arm.description.counts.get("train")
    if not count_of_training:
        return ArmReport(arm.name, lanes, f"data set {arm.description.name} is not prepared: its size is unknown")
    try:
        spread = programs.spread_of(arm, devices(target)[: arm.experiment.devices])
    except UserError as error:
        if "compiler" in str(error) or "installed" in str(error):
            raise
        return ArmReport(arm.name, lanes, str(error))
    platform = "tpu" if target.platform == "tpu" else "gpu"
    most = spread.lanes_a_device
    at_a_time = min(
        arm.experiment.lanes.at_a_time
        or programs.preferred_at_a_time(arm.model.connectivity, arm.input_shape, most, platform),
        most,
    )
    while True:
        try:
            with jax.default_matmul_precision(arm.experiment.precision):
                report = compile_for(*epoch_of(arm, spread, at_a_time), target)
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            if "RESOURCE_EXHAUSTED" not in reason or at_a_time == 1:
                return ArmReport(arm.name, lanes, reason)
        else:
            if report.memory_bytes <= target.chip.memory_bytes or at_a_time == 1:
                break
        at_a_time = max(1, at_a_time // 2)
    if report.memory_bytes > target.chip.memory_bytes:
        sizes = f"{size_text(report.memory_bytes)} of {size_text(target.chip.memory_bytes)}"
        return ArmReport(arm.name, lanes, f"one lane at a time needs {sizes}")
    steps = count_of_training // arm.experiment.batch_size * arm.experiment.passes
    return ArmReport(
        arm.name,
        lanes,
        None,
        len(spread.devices),
        at_a_time,
        steps,
        arm.experiment.epochs,
        flops_per_step(arm) * steps * most // spread.shards,
        target.chip.peak_flops,
        report,
    )


def flops_per_step(arm: TrainedArm) -> int:
    """Count a lane-step's operations: two per multiply-add, forward, backward to weights, backward to inputs.

    The first layer has no gradient for its input.
    """
    first = count(Model(arm.model.layers[:1]), arm.input_shape).macs
    return 2 * arm.experiment.batch_size * (3 * arm.count.macs - first)


def epoch_of(arm: TrainedArm, spread: Spread, at_a_time: int) -> tuple[Any, tuple[Any, ...]]:
    """Return an arm's epoch, jitted for the devices of `spread`, with the shapes of its arguments."""
    recipe = programs.recipe_of(arm, spread)
    numbers = programs.shapes(spread.filled(programs.numbers_of(arm)))
    states, _ = jax.eval_shape(train.over_lanes(programs.begin(recipe), 1), numbers)
    own = train.over_lanes(train.epoch(recipe), at_a_time, lane_arguments=2)
    epoch = spread.compiled_for(own, 2, 1, donate_argnums=0)
    arguments = (states, numbers, examples_of(arm))
    return epoch, on(spread.devices[0], arguments) if len(spread.devices) == 1 else arguments


def examples_of(arm: TrainedArm) -> Examples:
    """Return the shapes of the training examples on a device: images as uint8, signals as float32."""
    size = arm.description.counts["train"]
    size = max(size, arm.experiment.data.train or 0)
    stored = arm.description.input_shape
    shape: Any = jax.ShapeDtypeStruct
    kind = np.uint8 if len(stored) == 3 else np.float32
    channel = shape((stored[-1],), np.float32)
    return Examples(shape((size, *stored), kind), shape((size,), np.int32), channel, channel)


def seconds_text(seconds: float) -> str:
    """Return a time with two digits where it is short."""
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)


def print_reports(found: Sequence[ArmReport], target: Target, console: Console) -> None:
    """Print a row per arm, then each arm's most expensive operations."""
    columns = ("arm", "devices", "lanes at a time", "memory", "compile", "cycles", "of peak", "epoch", "run")
    rows = []
    for arm in found:
        values = arm.plain()
        if not values["compiles"]:
            console.print(f"{arm.name}: {arm.reason}", markup=False, soft_wrap=True)
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
        print_table(
            console, columns, rows, headers={"lanes at a time": "lanes at\na time", "cycles": "cycles per\nlane-step"}
        )
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
