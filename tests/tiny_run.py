"""A small experiment of two arms, and a watcher that remembers what it was told."""

from __future__ import annotations

from cnnlib.config.schema import Arm, Checkpoint, Experiment, Lanes, Optim
from cnnlib.data.declaration import Data
from cnnlib.runs.callbacks import Watcher
from cnnlib.spec.notation import parse_model

EXPERIMENT = Experiment(
    arms=(
        Arm("full", parse_model("avg:4 dense:8 relu dense:classes")),
        Arm("conv", parse_model("avg:4 conv:4@3 relu dense:classes")),
    ),
    data=Data("lines", validation=200),
    optim=Optim("adam", learning_rate=(0.01, 0.03)),
    lanes=Lanes(seed=(3, 4)),
    epochs=2,
    batch_size=200,
    compile_cache=False,
    checkpoint=Checkpoint(every=0),  # tests/runs/test_resume.py has them
    devices=1,  # whether a test before has asked for more of them or not
)


class Silent(Watcher):
    """A watcher that remembers what it was told."""

    def __init__(self):
        self.told = []

    def says(self, *what):
        self.told.append(("says", *what))

    def arm_begins(self, *what):
        self.told.append(("begins", *what))

    def training_begins(self, *what):
        self.told.append(("trains", *what))

    def epoch_ends(self, report):
        self.told.append(("epoch", report.arm, report.epoch))

    def arm_ends(self, name, result, epoch):
        self.told.append(("ends", name, epoch))
