"""Map a lowering over lanes."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import lax
from jaxtyping import Array

FEW_IMAGES = 8
"""With fewer images, local layers do not use kernels.cc: its vectors hold images and would be mostly empty."""


def one_after_another(one: Callable[..., Array], *operands: Array) -> Array:
    """Run `one` on one lane after another. On CPUs, XLA runs batched convolutions and products more slowly."""
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
