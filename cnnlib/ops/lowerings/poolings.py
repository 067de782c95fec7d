"""Lowerings of max pooling and its derivatives on a CPU, a GPU and a TPU."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from cnnlib.ops import kernels
from cnnlib.ops.geometry import Correlation, Pair, Pooling, taps_of


def pooled_shape(x: Any, *_: Any, pooling: Pooling, form: str) -> tuple[int, ...]:
    """Return the shape `(image, row, column, channel)`."""
    return (x.shape[0], *pooling.output_size(x.shape[1:3]), x.shape[3])


# In this module, `x` is `(image, height, width, channel)`, and lanes are merged into the images. `y` holds the largest
# value of each window. The winners of a window are the taps whose value equals this largest value.


def taps_under(x: Array, pooling: Pooling, fill: float) -> list[Array]:
    """Return one map per tap of the window. The map holds the values under the tap. Padding has value `fill`."""
    correlation = Correlation(pooling.strides, pooling.padding, (1, 1), (1, 1))
    return taps_of(x, pooling.window, correlation, fill)


def pooling_attributes(pooling: Pooling) -> dict[str, tuple[int, ...]]:
    """Return the attributes that describe a pooling to kernels.cc."""
    low = tuple(low for low, _ in pooling.padding)
    return {"window": pooling.window, "strides": pooling.strides, "low": low}


def max_pool(x: Array, *, pooling: Pooling, form: str) -> Array:
    """Return the maximum over the taps of each window."""
    return functools.reduce(jnp.maximum, taps_under(x, pooling, fill=-jnp.inf))


def max_pool_on_cpu(x: Array, *, pooling: Pooling, form: str) -> Array:
    """Max-pool in kernels.cc if the form is `native` and `x` is float32, and with XLA if not."""
    if form != "native" or x.dtype != jnp.float32:
        return max_pool(x, pooling=pooling, form=form)
    output = jax.ShapeDtypeStruct(pooled_shape(x, pooling=pooling, form=form), x.dtype)
    return kernels.call("cnnlib_max_pool", output, x, attributes=pooling_attributes(pooling))


MOST_CHOICES = 9
"""Largest number of taps for which `winner_shares` selects constants (1, 1/2, 1/3, ...) instead of dividing."""


def keeps_shares(form: str) -> bool:
    """Return whether max pooling computes the winners' shares in the forward pass and keeps them for the gradient.

    On a TPU, this saves the gradient one pass over the input and a division. On other platforms, the gradient computes
    the shares itself.
    """
    return form == "tpu"


def winning_taps(x: Array, y: Array, pooling: Pooling) -> list[Array]:
    """Return one boolean map per tap. It is True for the windows in which the tap is a winner.

    A tap on padding is never a winner, even if all values of its window are minus infinity.
    """
    return [tap == y for tap in taps_under(x, pooling, fill=jnp.nan)]


def winner_counts(x: Array, y: Array, pooling: Pooling) -> Array:
    """Return the number of winners per window, or 1 if the largest value is NaN, which no value equals."""
    count = functools.reduce(operator.add, [won.astype(x.dtype) for won in winning_taps(x, y, pooling)])
    return jnp.maximum(count, jnp.ones((), x.dtype))


def winner_shares(x: Array, y: Array, pooling: Pooling) -> Array:
    """For each window, return 1 / number of winners: the share of the window's gradient that each winner gets.

    For small windows, the function selects among constants. On a TPU, this is faster than a division.
    """
    counts, size = winner_counts(x, y, pooling), math.prod(pooling.window)
    if size > MOST_CHOICES:
        return 1 / counts
    shares = jnp.full_like(counts, 1 / size)
    for count in range(size - 1, 0, -1):
        shares = jnp.where(counts == count, jnp.asarray(1 / count, x.dtype), shares)
    return shares


def select(x: Array, y: Array, shares: Array, direction: Array, *, pooling: Pooling, form: str) -> Array:
    """Average `direction` over the winners of each window: the forward derivative of `max_pool`.

    If `keeps_shares(form)` is True, `shares` is the result of `winner_shares`. If not, `shares` is ignored.
    """
    zero = jnp.zeros((), x.dtype)
    taps = zip(winning_taps(x, y, pooling), taps_under(direction, pooling, fill=0.0), strict=True)
    total = functools.reduce(operator.add, [jnp.where(won, tap, zero) for won, tap in taps])
    return total * shares if keeps_shares(form) else total / winner_counts(x, y, pooling)


def spread(x: Array, y: Array, shares: Array, gradient: Array, *, pooling: Pooling, form: str) -> Array:
    """Divide the gradient of each window equally among the window's winners. This is the transpose of `select`."""
    share = gradient * shares if keeps_shares(form) else gradient / winner_counts(x, y, pooling)
    zero = jnp.zeros((), x.dtype)
    if pooling.strides == pooling.window and not any(map(any, pooling.padding)):
        return _spread_over_tiles(x, y, share, pooling.window)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    each = [jnp.where(won, share, zero) for won in winning_taps(x, y, pooling)]
    (result,) = jax.linear_transpose(lambda x: taps_under(x, pooling, fill=0.0), like)(each)
    return jnp.asarray(result)


def _spread_over_tiles(x: Array, y: Array, share: Array, window: Pair) -> Array:
    """Compute `spread` for windows that do not overlap, in one pass over the input instead of one per tap."""
    size, (rows, columns), (height, width) = x.shape[1:3], y.shape[1:3], window
    tiles = x[:, : rows * height, : columns * width].reshape(x.shape[0], rows, height, columns, width, -1)
    won = tiles == jnp.expand_dims(y, (2, 4))
    shares = jnp.where(won, jnp.expand_dims(share, (2, 4)), jnp.zeros((), x.dtype))
    inside = shares.reshape(x.shape[0], rows * height, columns * width, -1)
    outside = [(0, 0, 0), (0, size[0] - rows * height, 0), (0, size[1] - columns * width, 0), (0, 0, 0)]
    return lax.pad(inside, jnp.zeros((), x.dtype), outside)


def spread_on_cpu(x: Array, y: Array, shares: Array, gradient: Array, *, pooling: Pooling, form: str) -> Array:
    """Compute `spread` in kernels.cc if the form is `native` and `x` is float32, and with XLA if not."""
    if form != "native" or x.dtype != jnp.float32:
        return spread(x, y, shares, gradient, pooling=pooling, form=form)
    output = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return kernels.call("cnnlib_max_pool_gradient", output, x, y, gradient, attributes=pooling_attributes(pooling))
