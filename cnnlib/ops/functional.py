"""Convolution, local layers, pooling and batch normalisation of channels-last maps, with the usual arguments.

Every operation has derivatives of any order, forward and reverse. It runs under jit, vmap (over inputs, weights or
both), scan and remat, in float32, bfloat16 and float64. Invalid arguments, and shapes that do not match, raise
UserError. To use several CPU devices, divide the work with `jax.shard_map`: JAX cannot divide a call to kernels.cc.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnlib.errors import UserError
from cnnlib.ops import primitives
from cnnlib.ops.geometry import Correlation, Pair, Pooling, taps_of, wide_type
from cnnlib.spec.layers import MaxPool
from cnnlib.spec.window import (
    PaddingLike,
    PerAxisLike,
    Shape,
    Window,
    count_of,
    pad_pairs,
    per_axis,
    pool_window,
    shape_text,
    whole_per_axis,
    window_arguments,
    window_over,
)


def conv2d(
    x: Float[Array, "batch height width channel"],
    kernel: Float[Array, "kernel_height kernel_width group_channel feature"],
    *,
    strides: PerAxisLike = 1,
    padding: PaddingLike = "SAME",
    dilation: PerAxisLike = 1,
    feature_group_count: int = 1,
    pool: MaxPool | None = None,
) -> Float[Array, "batch output_height output_width feature"]:
    """Correlate each image with the kernel.

    Args:
        x: Images.
        kernel: Weights; `group_channel` is `channel / feature_group_count`.
        strides: One int for all axes, or one per axis.
        padding: SAME, VALID, an int for all sides, or per axis an int or a pair `(before, after)`.
        dilation: Distance between neighbouring taps of the kernel: one int for all axes, or one per axis.
        feature_group_count: Number of groups of channels and of features. Each group of features sees only its own
            group of channels. If there are as many groups as channels, the convolution is depthwise.
        pool: Max pooling to apply to the result. kernels.cc runs the convolution and unpadded pooling together, so
            that the map between them stays in the processor's cache.
    """
    groups = _check_operands("conv2d", x, kernel, 2, feature_group_count)
    window = _window(x.shape[1:], kernel.shape[:2], strides, dilation, padding)
    return _correlated(_groups(x, groups), _groups(kernel, groups), window, pool)


def conv1d(
    x: Float[Array, "batch length channel"],
    kernel: Float[Array, "kernel_length group_channel feature"],
    *,
    strides: PerAxisLike = 1,
    padding: PaddingLike = "SAME",
    dilation: PerAxisLike = 1,
    feature_group_count: int = 1,
    pool: MaxPool | None = None,
) -> Float[Array, "batch output_length feature"]:
    """Correlate each signal with the kernel. The arguments are the same as for `conv2d`."""
    groups = _check_operands("conv1d", x, kernel, 1, feature_group_count)
    window = _window(x.shape[1:], kernel.shape[:1], strides, dilation, padding)
    return _correlated(_groups(x[:, None], groups), _groups(kernel[None], groups), window, pool)[:, 0]


def _correlated(
    x: Float[Array, "group batch height width group_channel"],
    kernel: Float[Array, "group kernel_height kernel_width group_channel group_feature"],
    window: Window,
    pool: MaxPool | None,
) -> Float[Array, "batch output_height output_width feature"]:
    """Correlate, then max-pool if `pool` is given."""
    if pool is None:
        return _joined(primitives.correlate(x, kernel, _correlation(window)))
    under = pool.window((*window.output_size, kernel.shape[-1] * kernel.shape[0]))
    pooling = Pooling(_pair(under.size), _pair(under.strides), _pads(under))
    if primitives.pools_within(x.dtype, pooling):
        return _joined(primitives.correlate_max(x, kernel, _correlation(window), pooling))
    return primitives.max_pool(_joined(primitives.correlate(x, kernel, _correlation(window))), pooling)


def conv_transpose2d(
    y: Float[Array, "batch height width feature"],
    kernel: Float[Array, "kernel_height kernel_width group_channel feature"],
    *,
    strides: PerAxisLike = 1,
    padding: PaddingLike = "SAME",
    dilation: PerAxisLike = 1,
    feature_group_count: int = 1,
    output_size: Sequence[SupportsIndex] | None = None,
) -> Float[Array, "batch output_height output_width channel"]:
    """Apply a transposed convolution: the gradient of `conv2d` with respect to its input.

    The arguments describe the forward convolution, which maps images of `output_size` to maps of the size of `y`. Pass
    the kernel of `conv2d` without rotating it. PyTorch's `conv_transpose2d` stores the same weights as
    `(feature, channel, height, width)`.

    Args:
        y: Maps.
        kernel: As for `conv2d`.
        strides: As for `conv2d`. Neighbouring positions of `y` are `strides` apart in the result.
        padding: As for `conv2d`. The padding is cropped from the result.
        dilation: As for `conv2d`.
        feature_group_count: As for `conv2d`.
        output_size: Height and width of the result. For SAME, the default is size * stride, where size is the size of
            `y`. For other paddings, the default is the smallest size that fits: (size - 1) * stride + span - padding.
            Here span is (kernel size - 1) * dilation + 1, and padding is the sum of both sides.

    Raises UserError if the forward convolution does not map `output_size` to the size of `y`.
    """
    groups = _check_operands("conv_transpose2d", y, kernel, 2, feature_group_count, transposed=True)
    window = _window_back(y, kernel.shape[:2], strides, dilation, padding, output_size)
    return _joined(primitives.correlate_back(_groups(y, groups), _groups(kernel, groups), *_sized(window)))


def conv_transpose1d(
    y: Float[Array, "batch length feature"],
    kernel: Float[Array, "kernel_length group_channel feature"],
    *,
    strides: PerAxisLike = 1,
    padding: PaddingLike = "SAME",
    dilation: PerAxisLike = 1,
    feature_group_count: int = 1,
    output_size: Sequence[SupportsIndex] | None = None,
) -> Float[Array, "batch output_length channel"]:
    """Apply a transposed convolution to signals. The arguments are the same as for `conv_transpose2d`."""
    groups = _check_operands("conv_transpose1d", y, kernel, 1, feature_group_count, transposed=True)
    window = _window_back(y, kernel.shape[:1], strides, dilation, padding, output_size)
    x = primitives.correlate_back(_groups(y[:, None], groups), _groups(kernel[None], groups), *_sized(window))
    return _joined(x)[:, 0]


def local2d(
    x: Float[Array, "batch height width channel"],
    kernel: Float[Array, "output_height output_width kernel_height kernel_width group_channel feature"],
    *,
    strides: PerAxisLike = 1,
    padding: PaddingLike = "SAME",
    dilation: PerAxisLike = 1,
    feature_group_count: int = 1,
) -> Float[Array, "batch output_height output_width feature"]:
    """Correlate each image with separate weights at every position. The arguments are the same as for `conv2d`.

    Neither the forward pass nor a gradient copies weights. Without kernels.cc, the forward pass and each gradient are
    one matrix product each, batched over positions.
    """
    groups = _check_operands("local2d", x, kernel, 2, feature_group_count, shared=False)
    window = _window(x.shape[1:], kernel.shape[2:4], strides, dilation, padding)
    _check_positions(kernel, window)
    return _joined(primitives.local(_groups(x, groups), _groups(kernel, groups), _correlation(window)))


def local1d(
    x: Float[Array, "batch length channel"],
    kernel: Float[Array, "output_length kernel_length group_channel feature"],
    *,
    strides: PerAxisLike = 1,
    padding: PaddingLike = "SAME",
    dilation: PerAxisLike = 1,
    feature_group_count: int = 1,
) -> Float[Array, "batch output_length feature"]:
    """Correlate each signal with separate weights at every position. The arguments are the same as for `conv2d`."""
    groups = _check_operands("local1d", x, kernel, 1, feature_group_count, shared=False)
    window = _window(x.shape[1:], kernel.shape[1:2], strides, dilation, padding)
    _check_positions(kernel, window)
    y = primitives.local(_groups(x[:, None], groups), _groups(kernel[None, :, None], groups), _correlation(window))
    return _joined(y)[:, 0]


def _groups(array: Float[Array, "*axes member"], groups: int) -> Float[Array, "group ..."]:
    """Split the last axis (channels or features) into groups and move the groups to the front, as lanes."""
    if groups == 1:
        return array[None]
    return jnp.moveaxis(array.reshape(*array.shape[:-1], groups, array.shape[-1] // groups), -2, 0)


def _joined(y: Float[Array, "group batch height width group_feature"]) -> Float[Array, "batch height width feature"]:
    """Concatenate the features of all groups."""
    if y.shape[0] == 1:
        return y[0]
    groups, *_, features = y.shape
    y = jnp.moveaxis(y, 0, -2)
    return y.reshape(*y.shape[:-2], groups * features)


def _check_positions(kernel: Array, window: Window) -> None:
    if kernel.shape[: len(window.output_size)] != window.output_size:
        places, banks = (shape_text(shape) for shape in (window.output_size, kernel.shape[: len(window.output_size)]))
        raise UserError(f"local: the kernel has weights for {banks} positions, its window has {places}")


def max_pool(
    x: Float[Array, "batch *spatial channel"],
    window_shape: PerAxisLike,
    strides: PerAxisLike | None = None,
    padding: PaddingLike = "VALID",
) -> Float[Array, "batch *output_spatial channel"]:
    """Return the largest value in each window, over one or two spatial axes.

    `strides` defaults to `window_shape`. Padding never counts as the largest value. If a window contains NaN, its
    result is NaN. If several values of a window are the largest, they share the gradient equally.
    """
    window = _pool_window(x, window_shape, strides, padding)
    pooling = Pooling(_pair(window.size), _pair(window.strides), _pads(window))
    return _lowered(primitives.max_pool(_raised(x), pooling), x.ndim)


def avg_pool(
    x: Float[Array, "batch *spatial channel"],
    window_shape: PerAxisLike,
    strides: PerAxisLike | None = None,
    padding: PaddingLike = "VALID",
    count_include_pad: bool = True,
) -> Float[Array, "batch *output_spatial channel"]:
    """Return the mean of each window. `strides` defaults to `window_shape`.

    The mean includes the zeros of the padding, unless `count_include_pad` is False.
    """
    window = _pool_window(x, window_shape, strides, padding)
    correlation = Correlation(_pair(window.strides), _pads(window), (1, 1), (1, 1))

    def total(x: Array) -> Array:
        return functools.reduce(operator.add, taps_of(x, _pair(window.size), correlation, fill=0.0))

    count = jnp.asarray(math.prod(window.size), x.dtype)
    if not count_include_pad:
        count = total(jnp.ones((1, *_raised(x).shape[1:3], 1), x.dtype))
    return _lowered(total(_raised(x)) / count, x.ndim)


def batch_norm(
    x: Float[Array, "batch *spatial channel"],
    scale: Float[Array, " channel"],
    bias: Float[Array, " channel"],
    epsilon: float,
    over: str | None = None,
) -> tuple[Float[Array, "batch *spatial channel"], Float[Array, " channel"], Float[Array, " channel"]]:
    """Normalise each channel of `x`. Return three arrays: the result, and the mean and the variance of each channel.

    The result is (x - mean) / sqrt(variance + epsilon) * scale + bias. Mean and variance are over batch and positions.
    The variance is biased: the mean of the squared differences from the mean. The function computes in float32, or in
    the type of `x` if that is wider. The result has the type of `x`. Inside `shard_map`, `over` names the mesh axis
    that divides the batch into equal parts. With `over`, mean and variance cover the whole batch.
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
    """Compute the JVP (forward derivative). Its transpose sums over the map twice: once for bias, once for scale."""
    (x, scale, bias), (dx, dscale, dbias) = primals, tangents
    normal, mean, variance = _normal(x, epsilon, over)
    deviation = jnp.sqrt(variance + epsilon)
    gain, dmean, along = scale / deviation, _mean(dx, over), _mean(normal * dx, over)
    y = normal * _channels(scale, x) + _channels(bias, x)
    dy = dx * _channels(gain, x) + normal * _channels(dscale - gain * along, x) + _channels(dbias - gain * dmean, x)
    return (y, mean, variance), (dy, dmean, 2 * deviation * along)


def _normal(x: Array, epsilon: float, over: str | None) -> tuple[Array, Array, Array]:
    """Return three arrays: `x` with mean 0 and standard deviation 1 per channel, the means, and the variances.

    The mean is subtracted before squaring. The formula mean(x^2) - mean(x)^2 subtracts two large numbers, and most of
    the difference may be rounding error.
    """
    mean = _mean(x, over)
    centred = x - _channels(mean, x)
    variance = _mean(jnp.square(centred), over)
    return centred * _channels(1 / jnp.sqrt(variance + epsilon), x), mean, variance


def _mean(x: Array, over: str | None) -> Array:
    total = x.sum(axis=tuple(range(x.ndim - 1))) / math.prod(x.shape[:-1])
    return total if over is None else jax.lax.pmean(total, over)  # type: ignore[no-untyped-call]


def _channels(values: Array, x: Array) -> Array:
    """Reshape one value per channel so that it broadcasts against `x`."""
    return values.reshape((1,) * (x.ndim - 1) + values.shape)


def _check_operands(
    name: str, x: Array, kernel: Array, axes: int, groups: Any, *, shared: bool = True, transposed: bool = False
) -> int:
    """Check shapes, types and groups, and return the number of groups.

    Raises UserError if `x`, `kernel` and `groups` do not match. Without this check, kernels.cc would read memory
    outside the arrays.
    """
    spatial = ("height", "width") if axes == 2 else ("length",)
    positions = () if shared else tuple(f"output_{axis}" for axis in spatial)
    what = "y" if transposed else "x"
    count = count_of(groups, f"{name}: feature_group_count")
    channel = "channel" if count == 1 else "group_channel"
    for which, operand, expected in (
        (what, x, ("batch", *spatial, "feature" if transposed else "channel")),
        ("kernel", kernel, (*positions, *(f"kernel_{axis}" for axis in spatial), channel, "feature")),
    ):
        if operand.ndim != len(expected):
            raise UserError(f"{name}: {which} must be ({', '.join(expected)}), its shape is {operand.shape}")
    channels, taken, features = x.shape[-1], kernel.shape[-2] * count, kernel.shape[-1]
    if transposed and channels != features:
        raise UserError(f"{name}: y has {channels} features, its kernel {features}")
    if not transposed and channels != taken:
        each = "" if count == 1 else f" ({count} groups of {kernel.shape[-2]})"
        raise UserError(f"{name}: x has {channels} channels, its kernel takes {taken}{each}")
    if features % count:
        raise UserError(f"{name}: {features} features do not divide into {count} groups")
    if x.dtype != kernel.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"{name}: {what} is {x.dtype}, its kernel {kernel.dtype}; expected one floating-point type")
    return count


def _window(
    input_shape: Shape, size: Shape, strides: PerAxisLike, dilation: PerAxisLike, padding: PaddingLike
) -> Window:
    kept, pads = window_arguments("conv", {"kernel": size, "strides": strides, "dilation": dilation}, padding)
    return window_over(input_shape, "kernel", size, kept["strides"], kept["dilation"], pads)


def _window_back(
    y: Array,
    size: Shape,
    strides: PerAxisLike,
    dilation: PerAxisLike,
    padding: PaddingLike,
    output_size: Sequence[SupportsIndex] | None,
) -> Window:
    """Return the window of the forward convolution, from `output_size` to the size of `y`."""
    kept, pads = window_arguments("conv", {"kernel": size, "strides": strides, "dilation": dilation}, padding)
    places, axes = y.shape[1:-1], y.ndim - 2
    steps, spread = per_axis(kept["strides"], axes, "stride"), per_axis(kept["dilation"], axes, "dilation")
    if output_size is not None:
        wanted = per_axis(whole_per_axis(output_size, "output_size"), axes, "output_size")
    elif pads == "SAME":
        wanted = tuple(n * s for n, s in zip(places, steps, strict=True))
    else:
        sides = pad_pairs(pads, places, size, steps, spread)
        wanted = tuple(
            (n - 1) * s + (k - 1) * d + 1 - low - high
            for n, s, k, d, (low, high) in zip(places, steps, size, spread, sides, strict=True)
        )
    if min(wanted) < 1:
        raise UserError(f"conv_transpose: nothing is left of a result of {shape_text(wanted)}")
    window = window_over((*wanted, y.shape[-1]), "kernel", size, steps, spread, pads)
    if window.output_size != places:
        sizes = f"to {shape_text(window.output_size)}, and y has {shape_text(places)}"
        raise UserError(f"conv_transpose: this convolution takes {shape_text(wanted)} {sizes}")
    return window


def _correlation(window: Window) -> Correlation:
    return Correlation(_pair(window.strides), _pads(window), (1, 1), _pair(window.dilation))


def _sized(window: Window) -> tuple[Pair, Correlation]:
    return _pair(window.input_size), _correlation(window)


def _pool_window(x: Array, size: PerAxisLike, strides: PerAxisLike | None, padding: PaddingLike) -> Window:
    if x.ndim not in (3, 4) or not jnp.issubdtype(x.dtype, jnp.floating):
        expected = "(batch, length, channel) or (batch, height, width, channel) of a floating-point type"
        raise UserError(f"pool: x must be {expected}, it is {x.dtype} of shape {x.shape}")
    numbers = {"window": size, "strides": size if strides is None else strides}
    kept, pads = window_arguments("pool", numbers, padding)
    return pool_window(x.shape[1:], "window", kept["window"], kept["strides"], pads)


# The primitives have two spatial axes. For signals, the single axis becomes the width, and the height is 1.


def _pair(numbers: tuple[int, ...]) -> Pair:
    return (1, *numbers) if len(numbers) == 1 else (numbers[0], numbers[1])


def _pads(window: Window) -> tuple[Pair, Pair]:
    pads = window.padding
    return ((0, 0), pads[0]) if len(pads) == 1 else (pads[0], pads[1])


def _raised(x: Array) -> Array:
    return x[:, None] if x.ndim == 3 else x


def _lowered(y: Array, ndim: int) -> Array:
    return y[:, 0] if ndim == 3 else y
