"""Build results of runs without training, for tests of code that reads results."""

from __future__ import annotations

from dataclasses import replace

from cnnlib.config.schema import SETTING_FIELDS
from cnnlib.runs.arm_results import chosen_setting, settings_of
from cnnlib.runs.metrics import MetricsLine
from cnnlib.runs.record import Identity, RunRecord, Session
from cnnlib.runs.results import (
    FORMAT,
    NO_ACCURACY,
    ArmResult,
    DataResult,
    DeviceResult,
    LaneResult,
    Machine,
    RunResults,
)

LANE = LaneResult(
    seed=0,
    order_seed=0,
    learning_rate=0.1,
    momentum=0.9,
    weight_decay=0.0,
    label_smoothing=0.0,
    l1=0.0,
    l1_threshold=0.0,
    status="ok",
    epochs=12,
    parameters_sha256="0" * 64,
    test_accuracy=0.5,
)
DATA = DataResult("mnist5k", 3500, 500, 1000)


def lane(seed, accuracy, **change):
    """A lane of one seed for weights and order; an accuracy of None means that it has diverged."""
    accuracies = {f"{part}_accuracy": accuracy for part in ("test", "train", "validation")}
    known = {"status": "ok" if accuracy is not None else "diverged", "order_seed": seed, **accuracies}
    return replace(LANE, seed=seed, **{**known, **change})


def arm(name, lanes, **change):
    """An arm with these lanes. Settings and the choice among them are those of a run."""
    settings = settings_of(lanes)
    chosen = change.get("chosen_setting", chosen_setting(settings))
    known = {
        "name": name,
        "connectivity": "conv",
        "model": "dense:3",
        "parameters": 61_706,
        "connections": 416_520,
        "macs": 416_520,
        "data": DATA,
        "batch_size": 128,
        "steps": 324,
        "compile_seconds": 1.0,
        "lanes_at_a_time": 1,
        "memory_bytes": 1000,
        "epochs": 12,
        "train_seconds_per_lane": 1.234,
        "chosen_setting": chosen,
        "test_accuracy": NO_ACCURACY if chosen is None else settings[chosen].test_accuracy,
        "settings": settings,
        "lanes": tuple(lanes),
    }
    return ArmResult(**{**known, **change})


def results(*arms, **change):
    """Results of a run with these arms."""
    known = {
        "format": FORMAT,
        "experiment": "fc_vs_conv",
        "config": {"epochs": 12, "compute_dtype": "float32"},
        "data": DATA,
        "device": DeviceResult(platform="cpu", kind="cpu", count=1, kernels="native"),
        "versions": {"jax": "0.10.2"},
        "commit": None,
        "wall_seconds": 37.4,
        "arms": arms,
    }
    return RunResults(**{**known, **change})


IDENTITY = Identity(
    experiment="tiny",
    config={"epochs": 3, "lanes.at_a_time": None, "checkpoint.every": 1, "data.data_dir": None},
    code_sha256="a" * 64,
    data_sha256="b" * 64,
    streamed=(),
    versions={"jax": "0.10.2", "python": "3.11.7"},
    device={"platform": "cpu", "kind": "cpu", "kernels": "native"},
    settings={"XLA_FLAGS": None},
    machine=Machine("one", 2),
    devices=1,
)


def record(sessions=(), **change):
    """The record of a run that this process trains, after other sessions."""
    known = {
        "format": FORMAT,
        "id": "0123abcd",
        "experiment": "tiny",
        "identity": IDENTITY,
        "command": None,
        "checked": True,
        "arms": {},
        "tags": (),
        "sessions": (*sessions, Session.of_this_process()),
    }
    return RunRecord(**{**known, **change})


def line(lane, epoch, **change):
    """A line of metrics of a lane, whose seed is its number."""
    known = {**{name: getattr(LANE, name) for name in SETTING_FIELDS}, "seed": lane, "order_seed": lane}
    known |= {"arm": "a", "lane": lane, "epoch": epoch, "status": "ok", "seconds": 1.0}
    return MetricsLine(**{**known, **change})
