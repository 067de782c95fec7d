"""optax chains whose numbers are traced, so that lanes of one program may differ in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cnnlib.config import LaneNumbers, Optim


def schedule(name: str, total_steps: int) -> optax.Schedule:
    """The learning rate relative to its peak: `constant`, `cosine` (1 to 0), or `one_cycle` (Smith 2018).

    One cycle climbs from 1/25 to 1 over the first 30 % of the steps and falls to 1/250,000, both along a cosine:
    optax's `cosine_onecycle_schedule` with its defaults.
    """
    if name == "constant":
        return optax.constant_schedule(1.0)
    if name == "cosine":
        return optax.cosine_decay_schedule(1.0, total_steps)
    return optax.cosine_onecycle_schedule(total_steps, peak_value=1.0)


def optimizer(optim: Optim, numbers: LaneNumbers, total_steps: int) -> optax.GradientTransformation:
    """The update rule of one lane. What is static comes from `optim`, the numbers (scalars, traced) from the lane.

    Where one lane has an L1 term all have, of a lambda that may be zero; where none has, the program knows nothing of
    it.
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


# beta-LASSO (Neyshabur 2020, arXiv 2007.13657, algorithm 1): SGD on the loss plus lambda |theta|, and after each step
# every weight of less than beta lambda becomes zero. Only kernels: a bias or a scale near zero spares no connection.


def add_l1_subgradient(strength: jax.typing.ArrayLike) -> optax.GradientTransformation:
    """Adds to a kernel's gradient `strength` times the sign of each weight, which is 0 at 0.

    First in a chain, so that momentum and Adam's moments are those of the penalised loss.
    """

    def update(gradient: jax.Array, weights: jax.Array) -> jax.Array:
        return gradient + jnp.asarray(strength, gradient.dtype) * jnp.sign(weights)

    return _of_kernels(update)


def drop_small_weights(smallest: jax.typing.ArrayLike) -> optax.GradientTransformation:
    """Makes an update bring to zero each weight of a kernel that it would leave below `smallest` in magnitude.

    Last in a chain, after the learning rate.
    """

    def update(step: jax.Array, weights: jax.Array) -> jax.Array:
        # Less than, so that with 0 nothing changes.
        return jnp.where(jnp.abs(weights + step) < jnp.asarray(smallest, weights.dtype), -weights, step)

    return _of_kernels(update)


def sparsity(parameters: Any) -> float:
    """The share of a model's kernel weights that are exactly zero, on the host.

    Those of a local layer's taps on the padding count as well: nothing but an L1 term moves them.
    """
    kernels = [np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(parameters) if _is_kernel(path)]
    return sum(int((kernel == 0).sum()) for kernel in kernels) / sum(kernel.size for kernel in kernels)


def _of_kernels(change: Callable[[jax.Array, jax.Array], jax.Array]) -> optax.GradientTransformation:
    """A transformation without state that changes the updates of kernels, given their weights."""

    def update(updates: Any, parameters: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, value, weights: change(value, weights) if _is_kernel(path) else value, updates, parameters
        )

    return optax.stateless(update)


def _is_kernel(path: tuple[Any, ...]) -> bool:
    return getattr(path[-1], "key", None) == "kernel"
