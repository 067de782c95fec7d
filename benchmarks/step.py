"""Time one training step of one model, in the epoch program of cnnlib, in stock Flax and in PyTorch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.nets import model_of as model_of
from benchmarks.timing import Contestant, Table, blocked, interleaved, matrix_product, summary
from cnnlib.config.schema import Augment, LaneNumbers, Optim
from cnnlib.nn.network import network
from cnnlib.ops import kernels
from cnnlib.spec.counts import count
from cnnlib.spec.model import Model
from cnnlib.train import step as train
from cnnlib.train.programs import preferred_at_a_time
from cnnlib.train.step import Examples, Recipe

NETS = ("lenet_300_100", "lenet5", "two_conv")
INPUT_SHAPE = (28, 28, 1)
LANES, STEPS, LOOP_STEPS = 8, 16, 4


def batch_of(batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random images and labels for timing. The measured time does not depend on their values."""
    random = np.random.RandomState(0)
    return random.normal(size=(batch_size, *INPUT_SHAPE)).astype(np.float32), random.randint(0, 10, batch_size)


def default_at_a_time(model: Model, lanes: int) -> int:
    """Return how many lanes cnnlib vectorises by default."""
    return preferred_at_a_time(model.connectivity, INPUT_SHAPE, lanes, jax.devices()[0].platform)


def our_epoch(model: Model, batch_size: int, lanes: int, at_a_time: int, steps: int) -> tuple[Any, tuple[Any, ...]]:
    """Return a compiled epoch and the arguments of its call. The epoch trains `lanes` lanes for `steps` steps."""
    x, y = batch_of(batch_size)
    optim = Optim("sgd", learning_rate=(peers.LEARNING_RATE,), momentum=(peers.MOMENTUM,))
    recipe = Recipe(network(model), INPUT_SHAPE, optim, Augment(), batch_size, epochs=1)
    images, labels = jnp.asarray(x), jnp.asarray(y, jnp.int32)
    data = Examples(jnp.tile(images, (steps, 1, 1, 1)), jnp.tile(labels, steps), jnp.zeros(1), jnp.ones(1))
    ones = np.ones(lanes, np.float32)
    seeds = np.arange(lanes, dtype=np.uint32)
    numbers = LaneNumbers(seeds, seeds, peers.LEARNING_RATE * ones, peers.MOMENTUM * ones, *[0 * ones] * 4)
    states = jax.jit(train.over_lanes(train.initialize(recipe), 1))(numbers)
    epoch = jax.jit(train.over_lanes(train.epoch(recipe), at_a_time, lane_arguments=2))
    return epoch.lower(states, numbers, data).compile(), (states, numbers, data)


def ours(model: Model, batch_size: int, lanes: int, steps: int = STEPS, at_a_time: int | None = None) -> Any:
    """Return a function that trains `lanes` models for `steps` steps each."""
    program, arguments = our_epoch(model, batch_size, lanes, at_a_time or default_at_a_time(model, lanes), steps)
    return blocked(program, *arguments)


def step_operations(model: Model, batch_size: int) -> float:
    """Return the number of floating-point operations of a step. A multiply-add counts as two operations.

    The forward pass, the weight gradients and the input gradients count equally. The first layer has no input gradient.
    """
    first = count(Model(model.layers[:1]), INPUT_SHAPE).macs
    return 2.0 * batch_size * (3 * count(model, INPUT_SHAPE).macs - first)


def contestants(model: Model, batch_size: int) -> list[Contestant]:
    """Return all contestants that train `model`."""
    x, y = batch_of(batch_size)
    images, labels = jnp.asarray(x), jnp.asarray(y, jnp.int32)
    init, step = peers.stock_step(model)
    state = jax.jit(init)(jax.random.key(0), images)
    states = peers.stacked_init(init, images, LANES)

    @jax.jit
    def scanned(state: Any) -> Any:
        return jax.lax.scan(lambda s, _: (step(s, images, labels), None), state, length=LOOP_STEPS)[0]

    entries = [
        Contestant(f"cnnlib, {LANES} lanes", ours(model, batch_size, LANES), LANES * STEPS),
        Contestant("cnnlib, 1 lane", ours(model, batch_size, 1), STEPS),
        Contestant("stock Flax, one step per call", blocked(jax.jit(step), state, images, labels)),
        Contestant("stock Flax, steps in lax.scan", blocked(scanned, state), LOOP_STEPS),
        Contestant(
            f"stock Flax, vmap of {LANES}",
            blocked(jax.jit(jax.vmap(step, (0, None, None))), states, images, labels),
            LANES,
        ),
    ]
    if peers.torch_is_missing():
        return entries
    entries += [
        Contestant("PyTorch eager, NCHW", peers.torch_step(model, x, y, channels_last=False)),
        Contestant("PyTorch eager, channels_last", peers.torch_step(model, x, y, channels_last=True)),
    ]
    try:
        kernels.compiler()
    except kernels.Unavailable as problem:
        print(f"{problem}: torch.compile takes no part")
    else:
        compiled = peers.torch_step(model, x, y, channels_last=True, compiled=True)
        entries.append(Contestant("PyTorch torch.compile, channels_last", compiled))
    return entries


def measure(net: str, batch_size: int, rounds: int) -> Table:
    """Return the milliseconds per lane-step of each contestant on one net, and its share of the matrix-product rate."""
    model = model_of(net)
    yardstick, operations = matrix_product()
    entries = contestants(model, batch_size)
    seconds = interleaved([yardstick, *entries], rounds)
    rate = operations / float(np.median(seconds[yardstick.name]))
    rows = [
        {
            "ms per lane-step": entry.name,
            **summary(seconds[entry.name], seconds[f"cnnlib, {LANES} lanes"]),
            "share": step_operations(model, batch_size) / float(np.median(seconds[entry.name])) / rate,
        }
        for entry in entries
    ]
    return Table(f"{net}, batch {batch_size}, {rounds} rounds; matrix product {rate / 1e9:.0f} GFLOP/s", rows)
