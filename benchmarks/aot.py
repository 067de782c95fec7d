"""Compile lanes for absent accelerators, in cnnlib and in stock Flax, and report the estimates of the compilers.

Stock Flax runs lanes vectorised or one at a time. Each finished row is written to the file that `--rows` names. A whole
table takes hours, so existing rows are not made again.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.nets import BATCH, NETS, Rows, epoch_of, model_of, stock_operations
from benchmarks.timing import Table
from cnnlib.aot.compiling import compile_for, devices, on
from cnnlib.aot.hardware import parse_target
from cnnlib.train import programs

FORMS = ("ours", "stock, all lanes at once", "stock, one lane at a time")


def row(net: str, lanes: int, dtype: str, hardware: str, form: str) -> dict[str, Any]:
    """Compile one epoch, and return the compiler's estimates per lane-step (one training step of one lane)."""
    target = parse_target(hardware)
    shape, platform = NETS[net][1], "tpu" if target.platform == "tpu" else "gpu"
    at_a_time = {
        "ours": programs.preferred_at_a_time(model_of(net).connectivity, shape, lanes, platform),
        "stock, all lanes at once": lanes,
        "stock, one lane at a time": 1,
    }[form]
    epoch = epoch_of(net, lanes, dtype, at_a_time)
    arguments = on(devices(target)[0], (epoch.states, epoch.numbers, epoch.examples))
    with contextlib.nullcontext() if form == "ours" else stock_operations():
        report = compile_for(epoch.function, arguments, target, None if form == "ours" else "xla")
    steps = epoch.steps
    return {
        "cycles_per_lane_step": None if report.cycles is None else round(report.cycles / steps),
        "microseconds_per_lane_step": 1e6 * report.seconds / steps,
        "bytes_per_lane_step": round(report.bytes / steps),
        "temporary_bytes": report.temporary_bytes,
        "compile_seconds": round(report.compile_seconds, 1),
        "lanes_at_a_time": at_a_time,
    }


def calibration(hardware: str) -> list[dict[str, Any]]:
    """Estimate the time of simple work. Compare it with the time that follows from the published peak and bandwidth."""
    target = parse_target(hardware)
    found = []
    for size in (4096, 8192, 16384):
        a = on(devices(target)[0], jax.ShapeDtypeStruct((size, size), jnp.bfloat16))
        report = compile_for(jax.jit(jnp.matmul), (a, a), target)
        found.append(("product", f"{size} x {size}", report.seconds, 2 * size**3 / target.chip.peak_flops))
    for gib in (0.25, 1, 4):
        a = on(devices(target)[0], jax.ShapeDtypeStruct((int(gib * 2**28) // 1024, 1024), jnp.float32))
        report = compile_for(jax.jit(lambda a: a + 1), (a,), target)
        found.append(("copy", f"{gib} GiB", report.seconds, 2 * gib * 2**30 / target.chip.bandwidth))
    return [
        {
            "calibration": f"{hardware}, {what} {size}",
            "estimated_ms": 1e3 * own,
            "published_ms": 1e3 * known,
            "share_of_published": known / own,
        }
        for what, size, own, known in found
    ]


def measure(
    nets: Sequence[str], lanes: Sequence[int], dtypes: Sequence[str], hardware: Sequence[str], path: Path
) -> Iterator[Table]:
    """Make the missing rows and write each to the file when it is finished. Yield one table per hardware and dtype."""
    made = Rows(path, {"jax": jax.__version__})
    for target, dtype in itertools.product(hardware, dtypes):
        rows = []
        for net, count in itertools.product(nets, lanes):
            found = {}
            for form in FORMS:
                key = (net, count, dtype, target, form)
                one = made.of(key, functools.partial(row, *key))
                found[form] = one.get("cycles_per_lane_step") or one.get("microseconds_per_lane_step")
            stock = [found[form] for form in FORMS[1:] if found[form] is not None]
            times = found["ours"] / min(stock) if stock and found["ours"] is not None else None
            rows.append({"net": net, "lanes": str(count), **found, "ours to the better stock form": times})
        yield Table(f"cycles (TPU) or microseconds (GPU) per lane-step, {target}, {dtype}, batch {BATCH}", rows)
