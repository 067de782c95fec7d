"""Convolution, its unshared counterpart, pooling and normalisation of channels-last maps, with the field's arguments.

Every operation is differentiable as often as needed, forward and reverse, and runs under jit, vmap (over inputs, over
weights, over both), scan and remat, in float32, bfloat16 and float64. What does not fit raises UserError. Over several
CPU devices, divide the work with `jax.shard_map`: a compiled kernel is not divided by itself.
"""

from __future__ import annotations

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnlib import primitives
from cnnlib.errors import UserError
from cnnlib.geometry import Correlation, Pair, Pooling, taps_of, wide_type
from cnnlib.spec import (
    PaddingLike,
    PerAxisLike,
    Shape,
    Window,
    pool_window,
    shape_text,
    window_arguments,
    window_over,
)


def conv2d(
    x: Float[Array, "batch height width channel"],
    kernel: Float[Array, "kernel_height kernel_width channel feature"],
    *,
    strides: PerAxisLike = 1,
    padding: PaddingLike = "SAME",
    dilation: PerAxisLike = 1,
) -> Float[Array, "batch output_height output_width feature"]:
    """Correlate each image with the kernel.

    `padding` is SAME, VALID, an int for all sides, or per axis an int or a pair `(before, after)`. `dilation` spreads
    the taps of the kernel.
    """
    _check_operands("conv2d", x, kernel, axes=2)
    window = _window(x, kernel.shape[:2], strides, dilation, padding)
    correlation = Correlation(_pair(window.strides), _pads(window), (1, 1), _pair(window.dilation))
    return primitives.correlate(x[None], kernel[None], correlation)[0]


def conv1d(
    x: Float[Array, "batch length channel"],
    kernel: Float[Array, "kernel_length channel feature"],
    *,
    strides: PerAxisLike = 1,
    padding: PaddingLike = "SAME",
    dilation: PerAxisLike = 1,
) -> Float[Array, "batch output_length feature"]:
    """Correlates each signal with the kernel; arguments as for `conv2d`."""
    _check_operands("conv1d", x, kernel, axes=1)
    window = _window(x, kernel.shape[:1], strides, dilation, padding)
    correlation = Correlation(_pair(window.strides), _pads(window), (1, 1), _pair(window.dilation))
    return primitives.correlate(x[None, :, None], kernel[None, None], correlation)[0, :, 0]


def local2d(
    x: Float[Array, "batch height width channel"],
    kernel: Float[Array, "output_height output_width kernel_height kernel_width channel feature"],
    *,
    strides: PerAxisLike = 1,
    padding: PaddingLike = "SAME",
    dilation: PerAxisLike = 1,
) -> Float[Array, "batch output_height output_width feature"]:
    """Correlates each image with a kernel of its own at every position; arguments as for `conv2d`.

    No weight is copied, forward or for a gradient: outside kernels.cc each is one matrix product, batched over the
    positions.
    """
    _check_operands("local2d", x, kernel, axes=2, shared=False)
    return _local(x, kernel, _window(x, kernel.shape[2:4], strides, dilation, padding))


def local1d(
    x: Float[Array, "batch length channel"],
    kernel: Float[Array, "output_length kernel_length channel feature"],
    *,
    strides: PerAxisLike = 1,
    padding: PaddingLike = "SAME",
    dilation: PerAxisLike = 1,
) -> Float[Array, "batch output_length feature"]:
    """Correlates each signal with a kernel of its own at every position; arguments as for `conv2d`."""
    _check_operands("local1d", x, kernel, axes=1, shared=False)
    return _local(x, kernel, _window(x, kernel.shape[1:2], strides, dilation, padding))


def _local(x: Array, kernel: Array, window: Window) -> Array:
    if kernel.shape[: len(window.output_size)] != window.output_size:
        places, banks = (shape_text(shape) for shape in (window.output_size, kernel.shape[: len(window.output_size)]))
        raise UserError(f"local: the kernel has weights for {banks} positions, its window has {places}")
    correlation = Correlation(_pair(window.strides), _pads(window), (1, 1), _pair(window.dilation))
    # One spatial axis is a height of 1: a row of positions, each with a window of one row.
    weights = kernel if x.ndim == 4 else kernel[None, :, None]
    return _lowered(primitives.local(_raised(x)[None], weights[None], correlation)[0], x.ndim)


def max_pool(
    x: Float[Array, "batch *spatial channel"],
    window_shape: PerAxisLike,
    strides: PerAxisLike | None = None,
    padding: PaddingLike = "VALID",
) -> Float[Array, "batch *output_spatial channel"]:
    """The largest value under each window, over one or two spatial axes.

    `strides` defaults to the window, padding never wins, and what is not a number does. Values that tie for the largest
    share their window's gradient equally.
    """
    window = _pool_window(x, window_shape, strides, padding)
    pooling = Pooling(_pair(window.size), _pair(window.strides), _pads(window))
    return _lowered(primitives.max_pool(_raised(x), pooling), x.ndim)


def avg_pool(
    x: Float[Array, "batch *spatial channel"],
    window_shape: PerAxisLike,
    strides: PerAxisLike | None = None,
    padding: PaddingLike = "VALID",
) -> Float[Array, "batch *output_spatial channel"]:
    """The mean under each window; `strides` defaults to the window, zeros of the padding count as values."""
    window = _pool_window(x, window_shape, strides, padding)
    correlation = Correlation(_pair(window.strides), _pads(window), (1, 1), (1, 1))
    taps = taps_of(_raised(x), _pair(window.size), correlation, fill=0.0)
    return _lowered(functools.reduce(operator.add, taps) / jnp.asarray(len(taps), x.dtype), x.ndim)


def batch_norm(
    x: Float[Array, "batch *spatial channel"],
    scale: Float[Array, " channel"],
    bias: Float[Array, " channel"],
    epsilon: float,
    over: str | None = None,
) -> tuple[Float[Array, "batch *spatial channel"], Float[Array, " channel"], Float[Array, " channel"]]:
    """Each channel less its mean, over its deviation, times scale, plus bias; and the mean and variance that it had.

    Both are over batch and positions. The variance is biased (a mean of squares), and the deviation the root of it and
    `epsilon`. All is computed in float32, or in the type of `x` where that is wider; the result has the type of `x`.
    Inside `shard_map`, `over` is the axis of the mesh along which devices have equal parts of the batch: mean and
    variance are those of all of it.
    """
    x, scale, bias, own = *(array.astype(wide_type(x.dtype)) for array in (x, scale, bias)), x.dtype
    y, mean, variance = _batch_norm(x, scale, bias, epsilon, over)
    return y.astype(own), mean, variance


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _batch_norm(x: Array, scale: Array, bias: Array, epsilon: float, over: str | None) -> tuple[Array, Array, Array]:
    normal, mean, variance = _normal(x, epsilon, over)
    return normal * _channels(scale, x) + _channels(bias, x), mean, variance


@_batch_norm.defjvp
def _batch_norm_derivative(
    epsilon: float, over: str | None, primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    """In a form whose transpose takes two sums over the map, those that are the gradients of bias and scale."""
    (x, scale, bias), (dx, dscale, dbias) = primals, tangents
    normal, mean, variance = _normal(x, epsilon, over)
    deviation = jnp.sqrt(variance + epsilon)
    gain, dmean, along = scale / deviation, _mean(dx, over), _mean(normal * dx, over)
    y = normal * _channels(scale, x) + _channels(bias, x)
    dy = dx * _channels(gain, x) + normal * _channels(dscale - gain * along, x) + _channels(dbias - gain * dmean, x)
    return (y, mean, variance), (dy, dmean, 2 * deviation * along)


def _normal(x: Array, epsilon: float, over: str | None) -> tuple[Array, Array, Array]:
    """Channels of mean 0 and deviation 1, with the mean and variance that they had.

    The mean comes off before squares are taken: a difference of two large sums would be of rounding errors only.
    """
    mean = _mean(x, over)
    centred = x - _channels(mean, x)
    variance = _mean(jnp.square(centred), over)
    return centred * _channels(1 / jnp.sqrt(variance + epsilon), x), mean, variance


def _mean(x: Array, over: str | None) -> Array:
    total = x.sum(axis=tuple(range(x.ndim - 1))) / math.prod(x.shape[:-1])
    return total if over is None else jax.lax.pmean(total, over)  # type: ignore[no-untyped-call]


def _channels(values: Array, x: Array) -> Array:
    """A value a channel, with the axes of x."""
    return values.reshape((1,) * (x.ndim - 1) + values.shape)


def _check_operands(name: str, x: Array, kernel: Array, axes: int, shared: bool = True) -> None:
    """Raises UserError for what no kernel could be told to do; the compiled ones would read what is not theirs."""
    spatial = ("height", "width") if axes == 2 else ("length",)
    positions = () if shared else tuple(f"output_{axis}" for axis in spatial)
    for what, operand, expected in (
        ("x", x, ("batch", *spatial, "channel")),
        ("kernel", kernel, (*positions, *(f"kernel_{axis}" for axis in spatial), "channel", "feature")),
    ):
        if operand.ndim != len(expected):
            raise UserError(f"{name}: {what} must be ({', '.join(expected)}), its shape is {operand.shape}")
    if x.shape[-1] != kernel.shape[-2]:
        raise UserError(f"{name}: x has {x.shape[-1]} channels, its kernel takes {kernel.shape[-2]}")
    if x.dtype != kernel.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"{name}: x is {x.dtype}, its kernel {kernel.dtype}; expected one floating-point type")


def _window(x: Array, size: Shape, strides: PerAxisLike, dilation: PerAxisLike, padding: PaddingLike) -> Window:
    kept, pads = window_arguments("conv", {"kernel": size, "strides": strides, "dilation": dilation}, padding)
    return window_over(x.shape[1:], "kernel", size, kept["strides"], kept["dilation"], pads)


def _pool_window(x: Array, size: PerAxisLike, strides: PerAxisLike | None, padding: PaddingLike) -> Window:
    if x.ndim not in (3, 4) or not jnp.issubdtype(x.dtype, jnp.floating):
        expected = "(batch, length, channel) or (batch, height, width, channel) of a floating-point type"
        raise UserError(f"pool: x must be {expected}, it is {x.dtype} of shape {x.shape}")
    numbers = {"window": size, "strides": size if strides is None else strides}
    kept, pads = window_arguments("pool", numbers, padding)
    return pool_window(x.shape[1:], "window", kept["window"], kept["strides"], pads)


# One spatial axis is a height of 1 and that axis as the width.


def _pair(numbers: tuple[int, ...]) -> Pair:
    return (1, *numbers) if len(numbers) == 1 else (numbers[0], numbers[1])


def _pads(window: Window) -> tuple[Pair, Pair]:
    pads = window.padding
    return ((0, 0), pads[0]) if len(pads) == 1 else (pads[0], pads[1])


def _raised(x: Array) -> Array:
    return x[:, None] if x.ndim == 3 else x


def _lowered(y: Array, ndim: int) -> Array:
    return y[:, 0] if ndim == 3 else y
