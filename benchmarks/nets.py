"""Build the networks of the benchmarks `aot` and `gpu`, with cnnlib's operations or with those of stock Flax."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cnnlib import ops
from cnnlib.config.schema import EXPERIMENTS, Augment, LaneNumbers, Optim
from cnnlib.errors import UserError
from cnnlib.nn import network
from cnnlib.spec.architectures import ARCHITECTURES, neyshabur_d
from cnnlib.spec.layers import MaxPool
from cnnlib.spec.model import Model
from cnnlib.spec.window import PerAxis, Shape
from cnnlib.train import step
from cnnlib.train.step import Examples, Recipe

BATCH, EXAMPLES = 100, 3500
"""Batch size and number of training examples of `fc_vs_conv`."""
FASHION = next(arm.model for arm in EXPERIMENTS.get("fashion").arms if arm.name == "two_conv")
"""A network with batch normalisation."""
NETS: dict[str, tuple[Model, Shape]] = {
    "lenet_300_100": (ARCHITECTURES.get("lenet_300_100"), (28, 28, 1)),
    "lenet5": (ARCHITECTURES.get("lenet5"), (28, 28, 1)),
    "two_conv": (ARCHITECTURES.get("two_conv"), (28, 28, 1)),
    "mnist1d_cnn": (ARCHITECTURES.get("mnist1d_cnn"), (40, 1)),
    "local_lenet5": (ARCHITECTURES.get("lenet5").local(), (28, 28, 1)),
    "neyshabur_d": (neyshabur_d(), (28, 28, 1)),
    "fashion": (FASHION, (28, 28, 1)),
}
"""The models, each with its input shape."""
DIMENSIONS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC")}


def each_axis(value: Any, axes: int) -> tuple[Any, ...]:
    """Repeat a number per axis."""
    return (value,) * axes if isinstance(value, int) else tuple(value)


def pairs(padding: Any, axes: int) -> Any:
    """Return padding in the form that JAX takes: a name, or one pair (before, after) per axis."""
    if isinstance(padding, str):
        return padding
    return [(n, n) if isinstance(n, int) else tuple(n) for n in each_axis(padding, axes)]


def stock_convolution(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: PerAxis = 1,
    padding: Any = "SAME",
    dilation: PerAxis = 1,
    feature_group_count: int = 1,
    pool: MaxPool | None = None,
) -> jax.Array:
    """Convolve as Flax's `nn.Conv` does, then pool if `pool` is given."""
    axes = x.ndim - 2
    each, pads = [each_axis(n, axes) for n in (strides, dilation)], pairs(padding, axes)
    y = lax.conv_general_dilated(x, kernel, each[0], pads, None, each[1], DIMENSIONS[axes], feature_group_count)
    return y if pool is None else stock_max_pool(y, pool.window_shape, pool.strides, pool.padding)


def stock_local(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: PerAxis = 1,
    padding: Any = "SAME",
    dilation: PerAxis = 1,
    feature_group_count: int = 1,
) -> jax.Array:
    """Compute a local layer as Flax's `nn.ConvLocal` does. `nn.ConvLocal` has no feature groups."""
    if feature_group_count != 1:
        raise ValueError(f"ConvLocal has no groups, not {feature_group_count}")
    axes = x.ndim - 2
    each, pads = [each_axis(n, axes) for n in (strides, dilation)], pairs(padding, axes)
    flat = jnp.moveaxis(kernel, -2, axes).reshape(*kernel.shape[:axes], -1, kernel.shape[-1])
    window = kernel.shape[axes : 2 * axes]
    return lax.conv_general_dilated_local(
        x, flat, each[0], pads, window, rhs_dilation=each[1], dimension_numbers=DIMENSIONS[axes]
    )


def stock_max_pool(x: jax.Array, window: PerAxis, strides: PerAxis | None = None, padding: Any = "VALID") -> jax.Array:
    """Pool with Flax's `nn.max_pool`."""
    each = [each_axis(n, x.ndim - 2) for n in (window, strides or window)]
    return nn.max_pool(x, each[0], each[1], padding)


@contextlib.contextmanager
def stock_operations() -> Iterator[None]:
    """Trace networks with stock operations inside this context. The networks still pool before bias and activation."""
    exchanged = {
        "conv2d": stock_convolution,
        "conv1d": stock_convolution,
        "local2d": stock_local,
        "local1d": stock_local,
        "max_pool": stock_max_pool,
    }
    before = {name: getattr(ops, name) for name in exchanged}
    try:
        for name, function in exchanged.items():
            setattr(network.ops, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(network.ops, name, function)


class Epoch(NamedTuple):
    """An epoch of a network, and the shapes of the arguments of the epoch."""

    recipe: Recipe
    function: Any
    """Jitted function from (states, numbers, examples) to (next states, sums). It reuses the memory of the states."""
    states: Any
    numbers: LaneNumbers
    examples: Examples
    steps: int
    """Lane-steps per call."""


def model_of(net: str) -> Model:
    """Return the model of `NETS` with this name, for ten classes."""
    return NETS[net][0].with_num_classes(10)


def epoch_of(
    net: str, lanes: int, dtype: str, at_a_time: int, batch: int = BATCH, examples: int = EXAMPLES, optim: str = "adam"
) -> Epoch:
    """Make the epoch of `lanes` models of one network, but do not trace it. Vectorise `at_a_time` models."""
    shape, struct = NETS[net][1], jax.ShapeDtypeStruct
    recipe = Recipe(network.network(model_of(net), jnp.dtype(dtype)), shape, Optim(optim), Augment(), batch, epochs=1)
    seeds = ("seed", "order_seed")
    of_lanes: Any = (struct((lanes,), jnp.uint32 if name in seeds else jnp.float32) for name in LaneNumbers._fields)
    numbers = LaneNumbers(*of_lanes)
    kind: Any = jnp.uint8 if len(shape) == 3 else jnp.float32
    channel: Any = struct((shape[-1],), jnp.float32)
    stored: Any = struct((examples, *shape), kind), struct((examples,), jnp.int32)
    states = jax.eval_shape(step.over_lanes(step.initialize(recipe), 1), numbers)
    function = jax.jit(step.over_lanes(step.epoch(recipe), at_a_time, 2), donate_argnums=0)
    return Epoch(recipe, function, states, numbers, Examples(*stored, channel, channel), lanes * (examples // batch))


class Rows:
    """Rows in a file of JSON lines. A finished row is written at once. A row that is in the file is not made again.

    Args:
        path: The file.
        made_with: Names and values, such as versions, stored in each row. Rows with other values are ignored.
    """

    def __init__(self, path: Path, made_with: dict[str, str]) -> None:
        self.path, self.made_with = path, made_with
        self.known: dict[tuple[Any, ...], dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            one = json.loads(line)
            if all(one.get(name) == value for name, value in made_with.items()):
                self.known[tuple(one["key"])] = one

    def of(self, key: tuple[Any, ...], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the row of `key`. If it is missing, call `make`. If `make` fails, the row's `failed` is the reason.

        Raises:
            UserError: `make` raised it because no row can be made, for example without a compiler.
        """
        if key not in self.known:
            try:
                values = make()
            except UserError:
                raise
            except Exception as error:
                values = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
            self.known[key] = {"key": key, **self.made_with, **values}
            with self.path.open("a") as file:
                file.write(json.dumps(self.known[key]) + "\n")
        return self.known[key]
