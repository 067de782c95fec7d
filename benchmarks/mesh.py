"""Time training on two CPU devices that divide lanes or batches, and on one device that uses all cores."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from benchmarks import peers
from benchmarks.step import INPUT_SHAPE, batch_of, default_at_a_time, model_of
from benchmarks.timing import Contestant, Table, interleaved, summary
from cnnlib.config.schema import Augment, LaneNumbers, Optim
from cnnlib.nn.network import network
from cnnlib.spec.model import Model
from cnnlib.train import sharding, step
from cnnlib.train.step import Examples, Recipe

STEPS = 16
WAYS = {"one device of all cores": (1, 1), "lanes over devices": (2, 1), "batches over devices": (1, 2)}


def epoch_of(model: Model, batch_size: int, lanes: int, shape: tuple[int, int]) -> Any:
    """Return a function that trains `lanes` lanes for `STEPS` steps each, on a mesh of this shape."""
    devices = jax.devices()[: shape[0] * shape[1]]
    spread = sharding.spread(lanes, devices, batch_size, shape)
    x, y = batch_of(batch_size)
    optim = Optim("sgd", learning_rate=(peers.LEARNING_RATE,), momentum=(peers.MOMENTUM,))
    net = network(model, data_axis=spread.data_axis)
    shared = {"shards": spread.shards, "data_axis": spread.data_axis}
    recipe = Recipe(net, INPUT_SHAPE, optim, Augment(), batch_size, epochs=1, **shared)
    images, labels = np.tile(x, (STEPS, 1, 1, 1)), np.tile(y.astype(np.int32), STEPS)
    known = (np.zeros(1, np.float32), np.ones(1, np.float32))
    examples = spread.shared(sharding.replicated(Examples(images, labels, *known), devices))  # type: ignore[arg-type]
    ones, seeds = np.ones(lanes, np.float32), np.arange(lanes, dtype=np.uint32)
    numbers = LaneNumbers(seeds, seeds, peers.LEARNING_RATE * ones, peers.MOMENTUM * ones, *[0 * ones] * 4)  # type: ignore[arg-type]
    numbers = spread.put(numbers)
    states = spread.compiled_for(step.over_lanes(step.initialize(recipe), 1))(numbers)
    at_a_time = min(default_at_a_time(model, lanes), spread.lanes_a_device)
    epoch = spread.compiled_for(step.over_lanes(step.epoch(recipe), at_a_time, 2), 2, 1)
    program = epoch.lower(states, numbers, examples).compile()
    return lambda: jax.block_until_ready(program(states, numbers, examples)[1].loss)


def measure(net: str, batch_size: int, rounds: int) -> Table:
    """Return milliseconds per lane-step for one and two lanes, and the ratio to one device of all cores."""
    model = model_of(net)
    entries = {
        (lanes, way): Contestant(f"{lanes} {way}", epoch_of(model, batch_size, lanes, shape), lanes * STEPS)
        for lanes in (1, 2)
        for way, shape in WAYS.items()
        if shape[0] <= lanes
    }
    seconds = interleaved(list(entries.values()), rounds)
    rows = []
    for (lanes, way), entry in entries.items():
        one = seconds[entries[lanes, "one device of all cores"].name]
        rows.append(
            {"ms per lane-step": f"{way}, {lanes} lane{'s' * (lanes > 1)}", **summary(seconds[entry.name], one)}
        )
    return Table(f"{net}, batch {batch_size}, 2 cores, median of {rounds} rounds", named(rows))


def named(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rename the column `times_ours` to "times one device"."""
    return [{("times one device" if key == "times_ours" else key): value for key, value in row.items()} for row in rows]
