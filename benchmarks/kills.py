"""Kill runs at random moments, resume them, and compare their fingerprints with those of an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.timing import Table

RUN = [
    *(sys.executable, "-m", "cnnlib", "run", "fc_vs_conv", "--wandb", "off", "--no-check"),
    *("arms=mlp_75_33,lenet5", "arms.mlp_75_33.model=dense:8 relu dense:classes"),
    "arms.lenet5.model=conv:4@3 relu max:2 dense:classes",
    *("lanes.seed=0..2", "batch_size=100", "data.train=500", "epochs=8", "checkpoint.share=1"),
]
MOMENTS = {"at a moment of its whole time": False, "inside a save": True}


def start(out: Path, *more: str) -> subprocess.Popen[bytes]:
    """Start a run in its own process group."""
    nothing = subprocess.DEVNULL
    return subprocess.Popen([*RUN, "--out", str(out), *more], stdout=nothing, stderr=nothing, process_group=0)


def fingerprints(out: Path) -> list[str]:
    """Return the parameter fingerprints of all lanes of a finished run."""
    arms = json.loads((out / "results.json").read_text())["arms"]
    return [lane["parameters_sha256"] for arm in arms for lane in arm["lanes"]]


def unfinished(out: Path) -> bool:
    """Return whether the run has an unfinished checkpoint."""
    return any(out.glob("checkpoints/*/*.orbax-checkpoint-tmp*"))


def killed(out: Path, random: np.random.RandomState, seconds: float, inside: bool) -> bool:
    """Kill a run at a random moment, or, if `inside`, at the next save after it. Return whether the kill counts."""
    process = start(out)
    until = time.monotonic() + random.uniform(0, seconds)
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    while inside and process.poll() is None and not unfinished(out):
        time.sleep(0.0005)
    is_running = process.poll() is None
    if is_running:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return is_running and (not inside or unfinished(out))


def measure(rounds: int) -> Iterator[Table]:
    """Kill `rounds` runs at any moment, and `rounds // 4` runs during a save. Resume each and compare fingerprints."""
    with tempfile.TemporaryDirectory() as folder:
        start(Path(folder, "warm")).wait()
        began = time.monotonic()
        start(Path(folder, "alone")).wait()
        seconds, right = time.monotonic() - began, fingerprints(Path(folder, "alone"))
        random, rows = np.random.RandomState(0), []
        for what, inside in MOMENTS.items():
            kept = equal = again = 0
            while kept < (rounds // 4 if inside else rounds):
                out = Path(folder, f"{inside}-{kept}-{again}")
                if not killed(out, random, seconds, inside):
                    again += 1
                    continue
                kept += 1
                equal += start(out, "--resume").wait() == 0 and fingerprints(out) == right
            rows.append(
                {"killed": what, "runs": kept, "resumed to equal fingerprints": equal, "missed, not counted": again}
            )
    yield Table("kills", [{key: str(value) for key, value in row.items()} for row in rows])
