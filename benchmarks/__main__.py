"""Benchmarks: `python -m benchmarks NAME`; README.md tells what each measures."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from benchmarks import (
    agreement,
    aot,
    gpu,
    kills,
    lanes,
    memory,
    mesh,
    mnist1d,
    operations,
    peers,
    scale,
    step,
    tracking,
)
from benchmarks.timing import Table
from cnnlib.aot.hardware import set_environment
from cnnlib.errors import UserError
from cnnlib.ops import kernels
from cnnlib.system.provenance import versions
from cnnlib.train.sharding import use_cores

BENCHMARKS = (
    "step",
    "lanes",
    "mesh",
    "scale",
    "ops",
    "memory",
    "tracking",
    "kills",
    "mnist1d",
    "agreement",
    "aot",
    "gpu",
)


def tables(options: argparse.Namespace) -> Iterator[Table]:
    """Run the chosen benchmark and yield its tables."""
    nets = options.net or step.NETS
    rows = options.rows or Path(f"{options.benchmark}.jsonl")
    match options.benchmark:
        case "step":
            yield from (step.measure(net, options.batch_size, options.rounds) for net in nets)
        case "lanes":
            counts = tuple(options.lanes or lanes.LANES)
            yield from (lanes.measure(net, options.batch_size, options.rounds, counts) for net in nets)
        case "mesh":
            yield from (mesh.measure(net, options.batch_size, options.rounds) for net in nets)
        case "scale":
            yield from scale.measure(options.rounds, options.only)
        case "ops":
            yield from operations.measure(options.batch_size, options.rounds, options.only)
        case "memory":
            yield from (memory.measure(net, options.batch_size) for net in nets)
        case "mnist1d":
            yield mnist1d.measure(options.rounds, epochs=options.epochs, lanes=(options.lanes or [30])[0])
        case "agreement":
            yield from agreement.measure(options.lanes or (1, 2, 0), options.steps, options.only, options.overrides)
        case "aot":
            hardware = options.hardware or ["tpu:v5e", "tpu:v6e"]
            for target in hardware:
                yield Table(f"calibration, {target}", aot.calibration(target))
            nets = options.only.split(",") if options.only else tuple(aot.NETS)
            dtypes = options.dtype or ["float32", "bfloat16"]
            yield from aot.measure(nets, options.lanes or (8, 64), dtypes, hardware, rows)
        case "gpu":
            yield from gpu.measure(options.seconds, rows, gpu.TINY if options.tiny else gpu.Sizes())
        case "kills":
            yield from kills.measure(options.rounds)
        case "tracking":
            yield tracking.measure("fc_vs_conv", options.rounds)


def main(arguments: list[str]) -> int:
    """Run a benchmark, print each table when it is ready, and write all tables to `--json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="for agreement: as of `experiments run`")
    parser.add_argument("--net", choices=step.NETS, action="append", help="default: all of them (not for ops)")
    parser.add_argument("--lanes", type=int, nargs="+", metavar="N", help=f"for lanes; default: {lanes.LANES}")
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="for ops, scale: those with this in their name; for agreement: the experiment",
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="for agreement")
    parser.add_argument("--epochs", type=int, default=150, help="for mnist1d: 40 steps each")
    parser.add_argument("--hardware", nargs="+", metavar="NAME", help="for aot, such as tpu:v5e")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), help="for aot; default: both")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="for aot, gpu; default: aot.jsonl, gpu.jsonl")
    parser.add_argument("--seconds", type=float, default=300, help="for gpu: after which no row begins")
    parser.add_argument("--tiny", action="store_true", help="for gpu: small sizes, to try it on a CPU")
    parser.add_argument("--markdown", action="store_true", help="print tables as benchmarks/README.md has them")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if min(options.batch_size, options.rounds, options.epochs, options.steps, *(options.lanes or [1])) < 1:
        parser.error("--batch-size, --rounds, --epochs and --lanes must be at least 1")
    if options.benchmark == "aot":
        set_environment()
        jax.config.update("jax_platforms", "cpu")  # JAX is imported already, so it ignores new environment variables
    if options.benchmark in ("mesh", "scale", "mnist1d"):
        use_cores()  # as `cnnlib run` does
    if options.benchmark == "gpu":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory for PyTorch and other processes
    device = jax.devices()[0]
    used = {**versions(), "kernels": kernels.chosen() if device.platform == "cpu" else "xla"}
    if (missing := peers.torch_is_missing()) is None:
        import torch

        used["torch"] = torch.__version__
    machine = f"{jax.device_count()} x {device.device_kind}"
    print(f"{machine}; {', '.join(f'{name} {value}' for name, value in used.items())}", flush=True)
    if missing:
        print(missing)
    measured = []
    for table in tables(options):
        measured.append(dataclasses.asdict(table))
        print(f"\n{table.text(options.markdown)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "versions": used, "tables": measured}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)
