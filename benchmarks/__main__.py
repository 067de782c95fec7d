"""`python -m benchmarks step [--net NET] [--batch-size N] [--rounds N] [--json FILE]`: speed beside peers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import jax

from benchmarks import peers, step
from cnnlib.tracking import versions


def main(arguments: list[str]) -> int:
    """Runs a benchmark, prints its table, and writes it to `--json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("benchmark", choices=["step"])
    parser.add_argument("--net", choices=step.NETS, action="append", help="default: all of them")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    device = jax.devices()[0]
    print(f"{jax.device_count()} x {device.device_kind}; " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    if not peers.has_torch():
        print("PyTorch is not installed: its rows are missing (extra `bench`)")
    measured = []
    for net in options.net or step.NETS:
        result = step.measure(net, options.batch_size, options.rounds)
        measured.append(result)
        print(
            f"\n{net}, batch {result['batch_size']}, {result['rounds']} rounds; "
            f"matrix product {result['matrix_product_gflops']:.0f} GFLOP/s\n"
        )
        print(f"{'ms a lane-step':32} {'median':>8} {'low':>8} {'high':>8} {'x ours':>8} {'share':>7}")
        for row in result["rows"]:
            print(
                f"{row['name']:32} {row['median_ms']:8.2f} {row['low_ms']:8.2f} {row['high_ms']:8.2f} "
                f"{row['times_ours']:8.2f} {row['share_of_matrix_product_rate']:7.1%}"
            )
    if options.json:
        options.json.write_text(json.dumps({"versions": versions(), "results": measured}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
