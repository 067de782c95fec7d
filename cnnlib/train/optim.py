"""Build optax chains with traced hyperparameters, so that lanes (models) of one program may have different values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from cnnlib.config.schema import LaneNumbers, Optim


def schedule(name: str, total_steps: int) -> optax.Schedule:
    """Return the schedule `name`: for each step, the learning rate divided by its peak.

    The names are `constant`, `cosine` (from 1 to 0) and `one_cycle` (Smith 2018). `one_cycle` is optax's
    `cosine_onecycle_schedule` with its defaults. The learning rate rises from 1/25 to 1 over the first 30 % of the
    steps, then falls to 1/250,000. Both parts follow a cosine.
    """
    if name == "constant":
        return optax.constant_schedule(1.0)
    if name == "cosine":
        return optax.cosine_decay_schedule(1.0, total_steps)
    return optax.cosine_onecycle_schedule(total_steps, peak_value=1.0)


def optimizer(optim: Optim, numbers: LaneNumbers, total_steps: int) -> optax.GradientTransformation:
    """Return the update rule of one lane. `optim` has the static settings, `numbers` the traced scalar hyperparameters.

    If any lane of the arm needs an L1 term, all lanes have an L1 term. Its strength is zero in lanes that do not need
    it. If no lane needs an L1 term, the program contains none.
    """
    relative = schedule(optim.schedule, total_steps)

    def learning_rate(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        return jnp.multiply(numbers.learning_rate, relative(step))

    decay = optax.add_decayed_weights(numbers.weight_decay)
    if optim.name == "sgd":
        rule = optax.chain(decay, optax.trace(numbers.momentum))
    elif optim.name == "adam":
        rule = optax.chain(decay, optax.scale_by_adam(b1=numbers.momentum))
    else:
        rule = optax.chain(optax.scale_by_adam(b1=numbers.momentum), decay)
    rule = optax.chain(rule, optax.scale_by_learning_rate(learning_rate))
    if any(optim.l1):
        smallest = jnp.multiply(numbers.l1_threshold, numbers.l1)
        rule = optax.chain(add_l1_subgradient(numbers.l1), rule, drop_small_weights(smallest))
    return rule


# beta-LASSO (Neyshabur 2020, arXiv 2007.13657, algorithm 1): SGD on the loss plus lambda |theta|, where theta is a
# weight and lambda is `l1`. After each step, every weight of magnitude below beta * lambda becomes zero, where beta is
# `l1_threshold`. Only kernels change: a zero bias or scale saves no connection.


def add_l1_subgradient(strength: jax.typing.ArrayLike) -> optax.GradientTransformation:
    """Add `strength` times the sign of each weight (0 at 0) to the gradient of every kernel.

    Put this transformation first in a chain. Momentum and Adam's moments then include the penalty.
    """

    def update(gradient: jax.Array, weights: jax.Array) -> jax.Array:
        return gradient + jnp.asarray(strength, gradient.dtype) * jnp.sign(weights)

    return _of_kernels(update)


def drop_small_weights(smallest: jax.typing.ArrayLike) -> optax.GradientTransformation:
    """Set each kernel weight to zero if its magnitude after the update would be below `smallest`.

    Put this transformation last in a chain, after the learning rate.
    """

    def update(step: jax.Array, weights: jax.Array) -> jax.Array:
        # Use `<`, not `<=`, so that `smallest` = 0 changes nothing.
        return jnp.where(jnp.abs(weights + step) < jnp.asarray(smallest, weights.dtype), -weights, step)

    return _of_kernels(update)


def sparsity(parameters: PyTree) -> float:
    """Compute on the host which share (0 to 1) of a model's kernel weights is exactly zero.

    In a local layer, some weights only see padding. These weights are counted too. Only an L1 term makes them zero.
    """
    kernels = [np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(parameters) if _is_kernel(path)]
    return sum(int((kernel == 0).sum()) for kernel in kernels) / sum(kernel.size for kernel in kernels)


def _of_kernels(change: Callable[[jax.Array, jax.Array], jax.Array]) -> optax.GradientTransformation:
    """Return a stateless transformation that applies `change(update, weights)` to kernels only."""

    def update(updates: PyTree, parameters: PyTree) -> PyTree:
        return jax.tree.map_with_path(
            lambda path, value, weights: change(value, weights) if _is_kernel(path) else value, updates, parameters
        )

    return optax.stateless(update)


def _is_kernel(path: tuple[Any, ...]) -> bool:
    return getattr(path[-1], "key", None) == "kernel"
