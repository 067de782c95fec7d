"""Run a function of one lane (one of the models that are trained together) on all lanes."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import lax
from jaxtyping import Array

FEW_IMAGES = 8
"""Local layers with fewer images do not use kernels.cc. A vector in kernels.cc holds one value per image, so that most
of the vector would be empty."""


def one_after_another(one: Callable[..., Array], *operands: Array) -> Array:
    """Run `one` on one lane after another. With XLA on a CPU, this is faster than running all lanes at once."""
    if operands[0].shape[0] == 1:
        return one(*(operand[0] for operand in operands))[None]
    result: Array = lax.map(lambda lane: one(*lane), operands)
    return result


def together(one: Callable[..., Array], *operands: Array) -> Array:
    """Run `one` on all lanes at once, with `jax.vmap`."""
    if operands[0].shape[0] == 1:
        return one(*(operand[0] for operand in operands))[None]
    return jax.vmap(one)(*operands)


Over = Callable[..., Array]
"""Type of `together` and `one_after_another`."""
