"""What holds on a GPU alone. Each test runs in a process of its own, since this one computes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from cnnlib.system.machine import gpus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(gpus() or []), reason="there is no GPU here"),
]

DETERMINISTIC = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"


def started(out, *arguments, flags=DETERMINISTIC):
    """Starts a run on what JAX finds, with every checkpoint written."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [sys.executable, "-u", "-m", "cnnlib", "run", "fc_vs_conv", "arms=lenet5", "lanes.seed=0,1"]
    return subprocess.Popen(
        [*command, "epochs=8", "checkpoint.share=1", *arguments, "--wandb", "off", "--out", str(out)],
        env={**environment, "XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def fingerprints(out):
    (arm,) = json.loads((out / "results.json").read_text())["arms"]
    return [lane["parameters_sha256"] for lane in arm["lanes"]]


def test_a_run_resumed_on_the_same_gpu_gives_the_same_numbers(tmp_path):
    whole = started(tmp_path / "whole")
    printed, _ = whole.communicate()
    assert whole.returncode == 0, printed
    stopped = started(tmp_path / "stopped")
    for line in stopped.stdout:
        if line.startswith("lenet5: epoch 2/8"):
            stopped.terminate()
    assert stopped.wait() == 143
    resumed = started(tmp_path / "stopped", "--resume")
    printed, _ = resumed.communicate()
    assert resumed.returncode == 0 and "lenet5 goes on after epoch" in printed, printed
    assert fingerprints(tmp_path / "stopped") == fingerprints(tmp_path / "whole")
