"""Small populations of models that are trained for a few steps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cnnlib.config.schema import Augment, LaneNumbers, Optim
from cnnlib.data.sets import make_lines
from cnnlib.nn.network import network
from cnnlib.spec.notation import parse_model
from cnnlib.train import step as train
from cnnlib.train.types import Examples, Recipe

CONV = "conv:4@3 relu max:2 conv:6@3:valid relu max:2 dense:3"
FULL = "dense:16 relu dense:3"
# A lane of a population and the model alone are different programs: they may round differently, 32 steps long.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


def recipe(text=CONV, **changes):
    base = Recipe(network(parse_model(text)), (12, 12, 1), Optim("adam"), Augment(), batch_size=20, epochs=4)
    return base._replace(**changes)


def examples(count=160, seed=0):
    x, y = make_lines(np.random.RandomState(seed), count, side=28)
    x = x[:, 8:20, 8:20]
    return Examples(jnp.asarray(x), jnp.asarray(y), jnp.asarray([20.0]), jnp.asarray([30.0]))


def lanes(*seeds, orders=None, **numbers):
    """Lanes of the given seeds; a number may be one for all or a list."""
    values = {"learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.0, "label_smoothing": 0.0}
    values |= {"l1": 0.0, "l1_threshold": 0.0, **numbers}
    columns = {name: jnp.broadcast_to(jnp.asarray(v, jnp.float32), (len(seeds),)) for name, v in values.items()}
    seeds = jnp.asarray(seeds, jnp.uint32)
    return LaneNumbers(seeds, seeds if orders is None else jnp.asarray(orders, jnp.uint32), **columns)


@functools.cache
def programs(recipe, at_a_time):
    return (
        jax.jit(train.over_lanes(train.initialize(recipe), 1)),
        jax.jit(train.over_lanes(train.epoch(recipe), at_a_time, lane_arguments=2)),
    )


def trained(recipe, numbers, epochs=2, at_a_time=1):
    data = examples()
    initialize, epoch = programs(recipe, at_a_time)
    states = initialize(numbers)
    for _ in range(epochs):
        states, sums = epoch(states, numbers, data)
    return states, sums


def lane(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **TOLERANCE), a, b)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b):
    return any(not np.allclose(x, y, **TOLERANCE) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
