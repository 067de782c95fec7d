"""What keeping and following a run costs: the main job with and without, as whole processes, in turn."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.timing import Table

EXTRAS = {
    "alone": ["checkpoint.every=0", "--wandb", "off"],
    "checkpoints": ["--wandb", "off"],
    "W&B offline": ["checkpoint.every=0", "--wandb", "offline"],
    "checkpoints and W&B": ["--wandb", "offline"],
}


def measure(experiment: str, rounds: int) -> Table:
    """Seconds of each way of running an experiment, one run of each a round, and times the first of the same round.

    A warm-up before the first round compiles the programs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in EXTRAS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            for name, extra in EXTRAS.items():
                out = Path(folder, f"{number}-{name.replace(' ', '-')}")
                command = [sys.executable, "-m", "experiments", "run", experiment, "--out", str(out), *extra]
                start = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "COLUMNS": "200"})
                if number:
                    seconds[name].append(time.perf_counter() - start)
    rows = [
        {
            "whole process": name,
            "median s": float(np.median(found)),
            "times alone": f"{np.median(np.divide(found, seconds['alone'])):.3f}",
            "lowest": f"{np.min(np.divide(found, seconds['alone'])):.3f}",
            "highest": f"{np.max(np.divide(found, seconds['alone'])):.3f}",
        }
        for name, found in seconds.items()
    ]
    return Table(f"{experiment}, {rounds} runs of each in turn", rows)
