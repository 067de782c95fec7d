"""Train an experiment's models in memory, to look inside them; no run folder is written."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from typing import NamedTuple

import jax
import numpy as np

from cnnlib.config.resolve import TrainedArm, resolve
from cnnlib.config.schema import Experiment
from cnnlib.data.sets import DataSet, load
from cnnlib.errors import UserError
from cnnlib.nn.network import Parameters, Statistics
from cnnlib.ops import kernels
from cnnlib.runs.runner import most_devices
from cnnlib.spec.model import Model
from cnnlib.spec.window import Shape
from cnnlib.train import evaluate, sharding, step
from cnnlib.train.feeds import on_devices
from cnnlib.train.programs import (
    check_parameters_fit,
    compile_cache,
    numbers_of,
    preferred_at_a_time,
    recipe_of,
    spread_of,
)
from cnnlib.train.types import Examples


class Net(NamedTuple):
    """One trained model, and the values that are needed to apply the model to stored examples."""

    model: Model
    parameters: Parameters
    statistics: Statistics
    input_shape: Shape
    mean: np.ndarray
    """Mean of each channel over the training examples. It is subtracted from the inputs."""
    deviation: np.ndarray
    """Standard deviation of each channel. After subtraction of the mean, the inputs are divided by it."""
    test_accuracy: float
    """Share of the test examples that the model classifies correctly."""

    def seen(self, x: np.ndarray) -> np.ndarray:
        """Return stored examples `(count, *spatial, channel)` in the form that the model takes: normalised float32."""
        return np.asarray((np.asarray(x, np.float32) - self.mean) / self.deviation, np.float32)


COMPILING_KERNELS = threading.Lock()


def train_models(experiment: Experiment) -> tuple[dict[str, list[Net]], DataSet]:
    """Train every lane of every arm. Return a dictionary from arm names to models (one per lane), and the data.

    The models equal those of the command `run` up to rounding differences, which grow during training. Two arms are
    compiled and trained at the same time. Raises UserError if arms have different data, if data is streamed, if a lane
    diverges, or if `run` would refuse the experiment.
    """
    arms = resolve(experiment)
    if len({arm.data for arm in arms}) > 1:
        raise UserError("models that are looked at side by side need the same data: these arms have different ones")
    if arms[0].data.stream:
        raise UserError("data.stream=true: models that are looked at have their examples in memory")
    devices = most_devices(arms, sharding.devices(experiment.devices))
    for arm in arms:
        check_parameters_fit(arm, devices)
    data = load(arms[0].data)
    with compile_cache(experiment.compile_cache, says=warnings.warn):
        splits = on_devices(data, devices)
        with ThreadPoolExecutor(max_workers=2) as pool:
            nets = list(pool.map(lambda arm: train_lanes(arm, data, splits, devices), arms))
    return {arm.name: lanes for arm, lanes in zip(arms, nets, strict=True)}, data


def train_lanes(
    arm: TrainedArm, data: DataSet, splits: dict[str, Examples], devices: tuple[jax.Device, ...]
) -> list[Net]:
    """Train every lane of one arm; return one model per lane."""
    if devices[0].platform == "cpu" and arm.model.connectivity != "full":
        with COMPILING_KERNELS:  # two arms must not compile kernels.cc at the same time
            kernels.chosen()
    spread = spread_of(arm, devices)
    recipe = recipe_of(arm, spread)
    wanted = arm.experiment.lanes.at_a_time
    most = spread.lanes_a_device
    at_a_time = min(
        wanted or preferred_at_a_time(arm.model.connectivity, arm.input_shape, most, devices[0].platform), most
    )
    numbers, examples = spread.put(numbers_of(arm)), spread.shared(splits)
    # `initialize` runs once: on a CPU, optimising it takes three seconds of compilation and saves no time.
    options = {"xla_backend_optimization_level": 0} if devices[0].platform == "cpu" else None
    initialize = spread.compiled_for(step.over_lanes(step.initialize(recipe), at_a_time=1))
    states = initialize.lower(numbers).compile(options)(numbers)
    epoch, predict = (
        spread.compiled_for(step.over_lanes(function, at_a_time, lane_arguments=2), 2, shared_arguments=1)
        for function in (step.epoch(recipe), evaluate.predict(recipe))
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
