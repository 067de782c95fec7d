"""Measure the cost of checkpoints and tracking. Whole processes with and without them run in turn.

The row "W&B hangs" uses a local server that accepts connections and never answers. A process may wait for this server
before it ends. So the table has two times: the time of the training, and the time of the whole process.
"""

from __future__ import annotations

import json
import os
import socket
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
    "W&B hangs": ["checkpoint.every=0", "--wandb", "online"],
}


def measure(experiment: str, rounds: int) -> Table:
    """In each round, time every way to run `experiment` once, and divide each time by the time of the first way.

    A warm-up before the first round compiles the programs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in EXTRAS}
    training: dict[str, list[float]] = {name: [] for name in EXTRAS}
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {**os.environ, "COLUMNS": "200", "WANDB_BASE_URL": address, "WANDB_API_KEY": "0123456789" * 4}
        for number in range(rounds + 1):
            for name, extra in EXTRAS.items():
                out = Path(folder, f"{number}-{name.replace(' ', '-')}")
                command = [sys.executable, "-m", "cnnlib", "run", experiment, "--out", str(out), *extra]
                start = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
                if number:
                    seconds[name].append(time.perf_counter() - start)
                    arms = json.loads((out / "results.json").read_text())["arms"]
                    training[name].append(sum(arm["train_seconds_per_lane"] * len(arm["lanes"]) for arm in arms))
    rows = [
        {
            "whole process": name,
            "median s": float(np.median(found)),
            "times alone": f"{np.median(np.divide(found, seconds['alone'])):.3f}",
            "lowest": f"{np.min(np.divide(found, seconds['alone'])):.3f}",
            "highest": f"{np.max(np.divide(found, seconds['alone'])):.3f}",
            "training s": float(np.median(training[name])),
            "times training alone": f"{np.median(np.divide(training[name], training['alone'])):.3f}",
        }
        for name, found in seconds.items()
    ]
    return Table(f"{experiment}, {rounds} runs of each in turn", rows)
