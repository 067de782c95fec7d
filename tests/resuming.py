"""A small run that is interrupted, and what of it must be equal to one that is not."""

from __future__ import annotations

import json

import pytest

from cnnlib.config.schema import Arm, Checkpoint, Experiment, Lanes, Optim
from cnnlib.data.declaration import Data
from cnnlib.errors import Stopped
from cnnlib.runs.callbacks import Watcher
from cnnlib.runs.runner import run
from cnnlib.spec.notation import parse_model

EXPERIMENT = Experiment(
    arms=(
        Arm("full", parse_model("avg:4 dense:8 relu dense:classes")),
        Arm("conv", parse_model("avg:4 conv:4@3 relu dense:classes")),
    ),
    data=Data("lines", validation=200),
    optim=Optim("adam", learning_rate=(0.01, 0.03)),
    lanes=Lanes(seed=(3, 4)),
    epochs=3,
    batch_size=200,
    checkpoint=Checkpoint(share=1.0),
)


class Listener(Watcher):
    def __init__(self):
        self.said, self.epochs = [], []

    def says(self, text):
        self.said.append(text)

    def epoch_ends(self, report):
        self.epochs.append((report.arm, report.epoch))


def comparable(out):
    """All that a run has left behind, but for times and for how often it was resumed."""
    results = json.loads((out / "results.json").read_text())
    for name in ("wall_seconds", "resumed", "commit", "finished"):  # whoever develops may edit while tests run
        results.pop(name)
    for arm in results["arms"]:
        for name in ("compile_seconds", "train_seconds_per_lane", "memory_bytes"):
            arm.pop(name)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return results, [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def stop_after(epochs):
    """A wish to stop that is made once so many epochs have been told."""
    told = Listener()
    return told, lambda: len(told.epochs) >= epochs


def interrupted(out, epochs, experiment=EXPERIMENT):
    watcher, stop = stop_after(epochs)
    with pytest.raises(Stopped) as stopped:
        run(experiment, "tiny", out, watcher, stop=stop)
    return watcher, str(stopped.value)
