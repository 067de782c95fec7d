"""optax chains whose numbers are traced, so that lanes of one program may differ in them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
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
    """The update rule of one lane. What is static comes from `optim`, the numbers (scalars, traced) from the lane."""
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
    return optax.chain(rule, optax.scale_by_learning_rate(learning_rate))
