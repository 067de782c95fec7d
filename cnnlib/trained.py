"""An experiment's models trained in memory, for whoever wants to look inside them; no folder is written."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from typing import NamedTuple

import jax
import numpy as np

from cnnlib import evaluation, kernels, mesh, train
from cnnlib.config import Experiment
from cnnlib.data import DataSet, load
from cnnlib.errors import UserError
from cnnlib.feeds import on_devices
from cnnlib.models import Parameters, Statistics
from cnnlib.programs import (
    check_parameters_fit,
    compile_cache,
    numbers_of,
    preferred_at_a_time,
    recipe_of,
    spread_of,
)
from cnnlib.resolve import TrainedArm, resolve
from cnnlib.run import most_devices
from cnnlib.spec import Model, Shape
from cnnlib.train import Examples


class Net(NamedTuple):
    """One trained model, with what it needs to look at stored examples."""

    model: Model
    parameters: Parameters
    statistics: Statistics
    input_shape: Shape
    mean: np.ndarray
    """Of each channel of the training examples, subtracted from what the model sees."""
    deviation: np.ndarray
    """By which it is divided."""
    test_accuracy: float
    """Share of the test examples that it gets right."""

    def seen(self, x: np.ndarray) -> np.ndarray:
        """Stored examples `(count, *spatial, channel)` as the model sees them: float32, normalised."""
        return np.asarray((np.asarray(x, np.float32) - self.mean) / self.deviation, np.float32)


COMPILING_KERNELS = threading.Lock()


def train_models(experiment: Experiment) -> tuple[dict[str, list[Net]], DataSet]:
    """Trains every lane of every arm; returns the models by arm, a lane each, and the data.

    The numbers are those of `run`, to rounding, which the steps of a training enlarge. Arms are compiled and trained
    beside one another. Raises UserError where arms have different data, where a lane diverges, and for whatever `run`
    refuses.
    """
    arms = resolve(experiment)
    if len({arm.data for arm in arms}) > 1:
        raise UserError("models that are looked at side by side need the same data: these arms have different ones")
    if arms[0].data.stream:
        raise UserError("data.stream=true: models that are looked at have their examples in memory")
    devices = most_devices(arms, mesh.devices(experiment.devices))
    for arm in arms:
        check_parameters_fit(arm, devices)
    data = load(arms[0].data)
    with compile_cache(experiment.compile_cache, says=warnings.warn):
        splits = on_devices(data, devices)
        with ThreadPoolExecutor(max_workers=2) as pool:
            nets = list(pool.map(lambda arm: train_arm(arm, data, splits, devices), arms))
    return {arm.name: lanes for arm, lanes in zip(arms, nets, strict=True)}, data


def train_arm(
    arm: TrainedArm, data: DataSet, splits: dict[str, Examples], devices: tuple[jax.Device, ...]
) -> list[Net]:
    """Trains every lane of one arm."""
    if devices[0].platform == "cpu" and arm.model.connectivity != "full":
        with COMPILING_KERNELS:  # once, and not by two arms at the same time
            kernels.chosen()
    spread = spread_of(arm, devices)
    recipe = recipe_of(arm, spread)
    wanted = arm.experiment.lanes.at_a_time
    most = spread.lanes_a_device
    at_a_time = min(
        wanted or preferred_at_a_time(arm.model.connectivity, arm.input_shape, most, devices[0].platform), most
    )
    numbers, examples = spread.put(numbers_of(arm)), spread.shared(splits)
    # Run once: on a CPU, making it fast takes three seconds of the compiler, and saves none.
    options = {"xla_backend_optimization_level": 0} if devices[0].platform == "cpu" else None
    initialize = spread.compiled_for(train.over_lanes(train.initialize(recipe), at_a_time=1))
    states = initialize.lower(numbers).compile(options)(numbers)
    epoch, predict = (
        spread.compiled_for(train.over_lanes(function, at_a_time, lane_arguments=2), 2, shared_arguments=1)
        for function in (train.epoch(recipe), evaluation.predict(recipe))
    )
    for _ in range(arm.experiment.epochs):
        states, _ = epoch(states, numbers, examples["train"])
    answers = spread.fetched(predict(states.parameters, states.statistics, examples["test"]))
    states = spread.fetched(states)
    if states.diverged.any():
        seed = arm.lanes[int(np.argmax(states.diverged))].seed
        raise UserError(f"arm {arm.name}: the lane of seed {seed} has diverged; a smaller learning rate may not")
    nets = []
    for lane in range(len(arm.lanes)):
        parameters, statistics = jax.tree.map(itemgetter(lane), (states.parameters, states.statistics))
        accuracy = float((answers.predicted[lane] == data.test.y).mean())
        nets.append(Net(arm.model, parameters, statistics, arm.input_shape, data.mean, data.deviation, accuracy))
    return nets
