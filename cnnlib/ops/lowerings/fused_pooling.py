"""Lowerings of a convolution followed by max pooling, as one operation, and of its derivatives."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cnnlib.ops import kernels
from cnnlib.ops.geometry import Correlation, Pair, Pooling
from cnnlib.ops.lowerings.correlations import (
    correlate_on_gpu,
    correlate_shape,
    correlation_attributes,
    input_gradient_on_gpu,
    input_gradient_shape,
    kernel_gradient_on_gpu,
    kernel_gradient_shape,
    scatters,
    turned_for,
)
from cnnlib.ops.lowerings.poolings import max_pool, pooling_attributes, taps_under, winning_taps

# The winners of a pooling window are the taps that hold its largest value. They are stored as one integer per window,
# with one bit per tap. The gradient needs only the winners, so the map between correlation and pooling is not kept: in
# kernels.cc it never leaves the cache, forward or backward. Accelerators run the two operations separately. A function
# named `..._elsewhere` serves programs that are traced for a CPU and lowered for another platform.

MOST_TAPS = 31
"""Largest number of taps of a pooling window: each tap takes one bit, and an int32 has 31 bits besides its sign."""


def pools_within(form: str, dtype: Any, pooling: Pooling) -> bool:
    """Return whether correlation and pooling run as one operation.

    This needs the form `native`, float32, a pooling without padding, and at most `MOST_TAPS` taps.
    """
    padded = any(map(any, pooling.padding))
    return form == "native" and dtype == jnp.float32 and not padded and math.prod(pooling.window) <= MOST_TAPS


def pooled_correlate_shape(x: Any, kernel: Any, *_: Any, correlation: Correlation, pooling: Pooling, form: str) -> Any:
    """Return the shape of the pooled map: `(lane, image, row, column, feature)`."""
    lanes, images, *size, features = correlate_shape(x, kernel, correlation=correlation, form=form)
    return (lanes, images, *pooling.output_size(tuple(size)), features)


def pooled_input_gradient_shape(gradient: Any, kernel: Any, *_: Any, pooling: Pooling, **static: Any) -> Any:
    """Return the shape `(lane, image, height, width, channel)`."""
    return input_gradient_shape(gradient, kernel, **static)


def pooled_kernel_gradient_shape(x: Any, gradient: Any, *_: Any, pooling: Pooling, **static: Any) -> Any:
    """Return the shape `(lane, kernel_height, kernel_width, channel, feature)`."""
    return kernel_gradient_shape(x, gradient, **static)


def _pooled_attributes(correlation: Correlation, pooling: Pooling, size: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    own = pooling_attributes(pooling)
    renamed = {"window": own["window"], "pool_strides": own["strides"], "pool_low": own["low"]}
    return {**correlation_attributes(correlation), "size": size, **renamed}


def correlate_max_on_cpu(
    x: Array, kernel: Array, *, correlation: Correlation, pooling: Pooling, form: str
) -> tuple[Array, Array]:
    """For each window, return its largest value and its winners. kernels.cc computes both."""
    shape = pooled_correlate_shape(x, kernel, correlation=correlation, pooling=pooling, form=form)
    size = correlation.output_size(x.shape[2:4], kernel.shape[1:3])
    largest, winners = jax.ShapeDtypeStruct(shape, x.dtype), jax.ShapeDtypeStruct(shape, jnp.int32)
    attributes = _pooled_attributes(correlation, pooling, size)
    return kernels.call("cnnlib_correlate_pooled", (largest, winners), x, kernel, attributes=attributes)


def correlate_max_elsewhere(
    x: Array, kernel: Array, *, correlation: Correlation, pooling: Pooling, form: str
) -> tuple[Array, Array]:
    """For each window, return its largest value and its winners."""
    y = correlate_on_gpu(x, kernel, correlation=correlation, form=form)
    maps = y.reshape(-1, *y.shape[2:])
    largest = max_pool(maps, pooling=pooling, form=form)
    bits = [won.astype(jnp.int32) << tap for tap, won in enumerate(winning_taps(maps, largest, pooling))]
    lanes = lambda array: array.reshape(*y.shape[:2], *array.shape[1:])  # noqa: E731
    return lanes(largest), lanes(functools.reduce(operator.or_, bits))


def correlate_at_winners(
    x: Array,
    kernel: Array,
    winners: Array,
    *,
    correlation: Correlation,
    pooling: Pooling,
    form: str,
    on: Callable[..., Array],
) -> Array:
    """Correlate, then average the winners of each window: the forward derivative of `correlate_max`.

    `on` is the function that correlates on this platform, such as `correlate_on_gpu`.
    """
    y = on(x, kernel, correlation=correlation, form=form)
    wins = _bits(winners.reshape(-1, *winners.shape[2:]), pooling)
    taps = zip(wins, taps_under(y.reshape(-1, *y.shape[2:]), pooling, fill=0.0), strict=True)
    total = functools.reduce(operator.add, [jnp.where(won, tap, jnp.zeros((), y.dtype)) for won, tap in taps])
    return _share(total, wins).reshape(winners.shape)


def pooled_input_gradient_on_cpu(
    gradient: Array, kernel: Array, winners: Array, *, size: Pair, pooling: Pooling, correlation: Correlation, form: str
) -> Array:
    """Compute the input gradient from the gradient of the pooled values, in kernels.cc.

    The function scatters or correlates, whichever is faster, as in `input_gradient_on_cpu`.
    """
    between = correlation.output_size(size, kernel.shape[1:3])
    output = jax.ShapeDtypeStruct(
        input_gradient_shape(gradient, kernel, size=size, correlation=correlation, form=form), gradient.dtype
    )
    maps = jax.ShapeDtypeStruct((*gradient.shape[:2], *between, gradient.shape[-1]), gradient.dtype)
    target, own = "cnnlib_scatter_unpooled", correlation
    if not scatters(maps, kernel, size, correlation):
        target, (own, kernel) = "cnnlib_correlate_unpooled", turned_for(kernel, size, correlation)
    return kernels.call(target, output, gradient, kernel, winners, attributes=_pooled_attributes(own, pooling, between))


def pooled_input_gradient_elsewhere(
    gradient: Array, kernel: Array, winners: Array, *, size: Pair, pooling: Pooling, correlation: Correlation, form: str
) -> Array:
    """Compute the input gradient from the gradient of the pooled values."""
    maps = _unpool(gradient, winners, pooling, correlation.output_size(size, kernel.shape[1:3]))
    return input_gradient_on_gpu(maps, kernel, size=size, correlation=correlation, form=form)


def pooled_kernel_gradient_on_cpu(
    x: Array, gradient: Array, winners: Array, *, window: Pair, pooling: Pooling, correlation: Correlation, form: str
) -> Array:
    """Compute the kernel gradient from the gradient of the pooled values, in kernels.cc."""
    shape = kernel_gradient_shape(x, gradient, window=window, correlation=correlation, form=form)
    attributes = _pooled_attributes(correlation, pooling, correlation.output_size(x.shape[2:4], window))
    output = jax.ShapeDtypeStruct(shape, x.dtype)
    return kernels.call("cnnlib_kernel_gradient_unpooled", output, x, gradient, winners, attributes=attributes)


def pooled_kernel_gradient_elsewhere(
    x: Array, gradient: Array, winners: Array, *, window: Pair, pooling: Pooling, correlation: Correlation, form: str
) -> Array:
    """Compute the kernel gradient from the gradient of the pooled values."""
    maps = _unpool(gradient, winners, pooling, correlation.output_size(x.shape[2:4], window))
    return kernel_gradient_on_gpu(x, maps, window=window, correlation=correlation, form=form)


def _bits(winners: Array, pooling: Pooling) -> list[Array]:
    """Return one boolean array per tap. It is True for the windows in which this tap is a winner."""
    return [winners >> tap & 1 == 1 for tap in range(math.prod(pooling.window))]


def _share(array: Array, wins: list[Array]) -> Array:
    """Divide `array` by the number of winners of each window, or by 1 if a window has none."""
    count = functools.reduce(operator.add, [won.astype(array.dtype) for won in wins])
    return array / jnp.maximum(count, jnp.ones((), array.dtype))


def _unpool(gradient: Array, winners: Array, pooling: Pooling, size: tuple[int, ...]) -> Array:
    """Return maps of `size` in which the winners of each window share its gradient equally. All arrays have lanes."""
    flat, kept = (array.reshape(-1, *array.shape[2:]) for array in (gradient, winners))
    wins = _bits(kept, pooling)
    share, zero = _share(flat, wins), jnp.zeros((), gradient.dtype)
    like = jax.ShapeDtypeStruct((flat.shape[0], *size, flat.shape[-1]), gradient.dtype)
    each = [jnp.where(won, share, zero) for won in wins]
    (maps,) = jax.linear_transpose(lambda maps: taps_under(maps, pooling, fill=0.0), like)(each)
    return jnp.asarray(maps).reshape(*gradient.shape[:2], *size, gradient.shape[-1])
