"""One training step of one model: ours inside the epoch program, against stock Flax and PyTorch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.timing import Contestant, blocked, interleaved, matrix_product, summary
from cnnlib import train
from cnnlib.architectures import ARCHITECTURES
from cnnlib.config import Augment, LaneNumbers, Optim
from cnnlib.cost import count
from cnnlib.models import network
from cnnlib.spec import Model
from cnnlib.train import Examples, Recipe

NETS = ("lenet_300_100", "lenet5", "two_conv")
LANES, STEPS, LOOP_STEPS = 8, 16, 4


def ours(model: Model, x: np.ndarray, y: np.ndarray, lanes: int, at_a_time: int) -> Any:
    """The compiled epoch of `STEPS` steps for a population, with its arguments: a call trains `lanes * STEPS` steps."""
    optim = Optim("sgd", learning_rate=(peers.LEARNING_RATE,), momentum=(peers.MOMENTUM,))
    recipe = Recipe(network(model), x.shape[1:], optim, Augment(), batch_size=len(x), epochs=1)
    data = Examples(
        jnp.tile(jnp.asarray(x), (STEPS, 1, 1, 1)), jnp.tile(jnp.asarray(y), STEPS), jnp.zeros(1), jnp.ones(1)
    )
    ones = np.ones(lanes, np.float32)
    numbers = LaneNumbers(
        np.arange(lanes, dtype=np.uint32), peers.LEARNING_RATE * ones, peers.MOMENTUM * ones, 0 * ones, 0 * ones
    )
    states = jax.jit(train.over_lanes(train.initialize(recipe), 1))(numbers)
    epoch = jax.jit(train.over_lanes(train.epoch(recipe), at_a_time, lane_arguments=2))
    return blocked(epoch.lower(states, numbers, data).compile(), states, numbers, data)


def contestants(model: Model, x: np.ndarray, y: np.ndarray, at_a_time: int) -> list[Contestant]:
    """Everybody who trains `model` on the batch `x`, `y`."""
    images, labels = jnp.asarray(x), jnp.asarray(y)
    init, step = peers.stock_step(model)
    state = jax.jit(init)(jax.random.key(0), images)
    states = peers.stacked_init(init, images, LANES)

    @jax.jit
    def scanned(state: Any) -> Any:
        return jax.lax.scan(lambda s, _: (step(s, images, labels), None), state, length=LOOP_STEPS)[0]

    entries = [
        Contestant(f"cnnlib, {LANES} lanes", ours(model, x, y, LANES, at_a_time), LANES * STEPS),
        Contestant("cnnlib, 1 lane", ours(model, x, y, 1, 1), STEPS),
        Contestant("stock Flax, a step a call", blocked(jax.jit(step), state, images, labels)),
        Contestant("stock Flax, steps in lax.scan", blocked(scanned, state), LOOP_STEPS),
        Contestant(
            f"stock Flax, vmap of {LANES}",
            blocked(jax.jit(jax.vmap(step, (0, None, None))), states, images, labels),
            LANES,
        ),
    ]
    if peers.has_torch():
        entries.append(Contestant("PyTorch eager, NCHW", peers.torch_step(model, x, y, channels_last=False)))
        entries.append(Contestant("PyTorch eager, channels_last", peers.torch_step(model, x, y, channels_last=True)))
    return entries


def measure(net: str, batch_size: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a lane-step of every contestant on one net, and its share of the matrix-product rate."""
    model = ARCHITECTURES.get(net).with_num_classes(10)
    random = np.random.RandomState(0)
    x = random.normal(size=(batch_size, 28, 28, 1)).astype(np.float32)
    y = random.randint(0, 10, batch_size).astype(np.int32)
    convolves_on_cpu = model.connectivity == "conv" and jax.devices()[0].platform == "cpu"
    yardstick, operations = matrix_product()
    entries = contestants(model, x, y, at_a_time=1 if convolves_on_cpu else LANES)
    seconds = interleaved([yardstick, *entries], rounds)
    rate = operations / float(np.median(seconds[yardstick.name]))
    # Forward, and backward to weights and inputs: three times the multiply-adds; the first layer has no input gradient.
    first = count(Model(model.layers[:1]), x.shape[1:]).macs
    step_operations = 2.0 * batch_size * (3 * count(model, x.shape[1:]).macs - first)
    rows = []
    for entry in entries:
        median = float(np.median(seconds[entry.name]))
        rows.append(
            {
                "name": entry.name,
                **summary(seconds[entry.name]),
                "share_of_matrix_product_rate": step_operations / median / rate,
                # Round by round, so that a machine that slows down slows both.
                "times_ours": float(np.median(np.divide(seconds[entry.name], seconds[f"cnnlib, {LANES} lanes"]))),
            }
        )
    return {"net": net, "batch_size": batch_size, "rounds": rounds, "matrix_product_gflops": rate / 1e9, "rows": rows}
