"""Convolution and pooling over channels-last maps of one or two spatial axes, with derivatives that stay fast in loops.

XLA's CPU compiler runs the derivatives that JAX derives for a convolution naively inside a loop (jax issue 12868), and
that of max pooling as a select-and-scatter. So the convolution carries a derivative rule of its own, and pooling is
written as a maximum of strided slices.

Shapes: `x` is `(batch, *spatial, channel)`, a kernel `(*window, input_channel, output_channel)`.
"""

from __future__ import annotations

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cnnlib.spec import Padding, PerAxis, Window, pool_window, window_over

FEW_CHANNELS = 4
"""Below this many input channels, so for grey and colour images, a convolution is im2col (see `_conv_forward`)."""


def conv(
    x: Float[Array, "batch *spatial input_channel"],
    kernel: Float[Array, "*window input_channel output_channel"],
    *,
    strides: PerAxis = 1,
    padding: Padding = "SAME",
    dilation: PerAxis = 1,
) -> Float[Array, "batch *output_spatial output_channel"]:
    """Correlates each map with the kernel, in one or two spatial axes.

    `padding` is SAME, VALID, an int or a pair an axis; `dilation` spreads the taps of the kernel. Derivatives of first
    order are reverse-mode, by the rules below; forward mode raises TypeError, as for every `jax.custom_vjp`.
    """
    return _conv(x, kernel, window_over(x.shape[1:], "kernel", kernel.shape[:-2], strides, dilation, padding))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: Array, kernel: Array, window: Window) -> Array:
    return _conv_forward(x, kernel, window)[0]


def _conv_forward(x: Array, kernel: Array, window: Window) -> tuple[Array, tuple[Array, Array]]:
    """The output, and what the derivative needs: the input or its patches, and the kernel.

    With few input channels XLA's CPU convolution is slow, and so is its weight gradient. There the patches are built
    once and serve both as matrix products: for 28x28x1 -> 6 with a 5x5 kernel in half the time.
    """
    if x.shape[-1] >= FEW_CHANNELS:
        return _correlate(x, kernel, window.strides, window.padding, None, window.dilation), (x, kernel)
    patches = _patches(x, window)
    return patches @ kernel.reshape(-1, kernel.shape[-1]), (patches, kernel)


def _conv_backward(window: Window, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x_or_patches, kernel = saved
    if kernel.shape[-2] < FEW_CHANNELS:
        kernel_gradient = _contract(x_or_patches, gradient)
    else:
        kernel_gradient = _blocked_kernel_gradient(x_or_patches, gradient, window)
    return (
        _input_gradient(kernel, gradient, window),
        kernel_gradient.astype(kernel.dtype).reshape(kernel.shape),
    )


_conv.defvjp(_conv_forward, _conv_backward)


def _correlate(
    x: Array,
    kernel: Array,
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    x_dilation: tuple[int, ...] | None,
    kernel_dilation: tuple[int, ...],
) -> Array:
    dimensions = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC")}[x.ndim - 2]
    return lax.conv_general_dilated(x, kernel, strides, padding, x_dilation, kernel_dilation, dimensions)


def _input_gradient(kernel: Array, gradient: Array, window: Window) -> Array:
    """The transposed convolution, spelled as a plain one: the gradient, spread by the strides, meets the kernel flipped
    and with its channels exchanged. JAX's own rule exchanges them by dimension numbers, which is slow in a loop."""
    flipped = jnp.flip(kernel, range(len(window.size))).swapaxes(-1, -2)
    padding = []
    for n, outputs, k, s, d, (low, _) in zip(
        window.input_size, window.output_size, window.size, window.strides, window.dilation, window.padding, strict=True
    ):
        before = (k - 1) * d - low
        padding.append((before, n + (k - 1) * d - ((outputs - 1) * s + 1) - before))
    ones = (1,) * len(padding)
    return _correlate(gradient, flipped, ones, tuple(padding), window.strides, window.dilation)


def _contract(patches: Array, gradient: Array) -> Array:
    """Sums `patches[..., i] * gradient[..., j]` over batch and positions, accumulating in float32 at least."""
    axes = tuple(range(gradient.ndim - 1))
    wide = jnp.promote_types(gradient.dtype, jnp.float32)
    return lax.dot_general(patches, gradient, ((axes, axes), ((), ())), preferred_element_type=wide)


def _blocked_kernel_gradient(x: Array, gradient: Array, window: Window) -> Array:
    """The weight gradient from patches of up to 8 blocks of the batch, one after another, whose products add up.

    The patches of a whole batch outgrow the cache: for 14x14x32 -> 64 with a 3x3 kernel and a batch of 128, blocks take
    half the time of a single product. And a loop's operands are stored, so what made x is not computed once a tap.
    """
    batch = x.shape[0]
    blocks = max(n for n in range(1, 9) if batch % n == 0)
    parts = (x.reshape(blocks, -1, *x.shape[1:]), gradient.reshape(blocks, -1, *gradient.shape[1:]))
    products: Array = lax.map(lambda part: _contract(_patches(part[0], window), part[1]), parts)
    return products.sum(axis=0)


def _patches(x: Array, window: Window) -> Array:
    """im2col: the values under the window at each position, `(batch, *output, taps * channels)`, taps slowest."""
    return jnp.concatenate(_taps(x, window, fill=0.0), axis=-1)


def _taps(x: Array, window: Window, fill: float) -> list[Array]:
    """For each tap of the window, row by row: the value under it at every position, `(batch, *output, channel)`."""
    edges = [(0, 0, 0), *((low, high, 0) for low, high in window.padding), (0, 0, 0)]
    padded = lax.pad(x, jnp.asarray(fill, x.dtype), edges)
    taps = []
    for index in range(math.prod(window.size)):
        starts: list[int] = []
        for k, d in zip(reversed(window.size), reversed(window.dilation), strict=True):
            index, position = divmod(index, k)
            starts.insert(0, position * d)
        stops = [
            start + (outputs - 1) * s + 1
            for start, outputs, s in zip(starts, window.output_size, window.strides, strict=True)
        ]
        taps.append(lax.slice(padded, (0, *starts, 0), (x.shape[0], *stops, x.shape[-1]), (1, *window.strides, 1)))
    return taps


def max_pool(
    x: Float[Array, "batch *spatial channel"],
    window_shape: PerAxis,
    strides: PerAxis | None = None,
    padding: Padding = "VALID",
) -> Float[Array, "batch *output_spatial channel"]:
    """The largest value under each window; `strides` defaults to the window, padding never wins.

    Where values tie in windows that do not overlap, they share the gradient equally. Overlapping or padded windows take
    the derivative of `jnp.maximum`, tap by tap, which shares it as well, not equally where more than two tie.
    """
    window = pool_window(x.shape[1:], "window", window_shape, strides, padding)
    if window.strides == window.size and not any(map(any, window.padding)):
        return _tiled_max_pool(x, window)
    return _largest_tap(x, window)


def _largest_tap(x: Array, window: Window) -> Array:
    return functools.reduce(jnp.maximum, _taps(x, window, fill=-jnp.inf))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _tiled_max_pool(x: Array, window: Window) -> Array:
    return _largest_tap(x, window)


def _tiled_max_pool_forward(x: Array, window: Window) -> tuple[Array, tuple[Array, Array]]:
    y = _largest_tap(x, window)
    return y, (x, y)


def _tiled_max_pool_backward(window: Window, saved: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    """One pass over the input, in place of one a tap: each value that equals its window's largest gets its share."""
    x, y = saved
    winners = functools.reduce(operator.add, [(tap == y).astype(x.dtype) for tap in _taps(x, window, fill=-jnp.inf)])
    tiled = [outputs * k for outputs, k in zip(window.output_size, window.size, strict=True)]
    tiles = x[(slice(None), *map(slice, tiled))]
    # (batch, height, width, channel) to (batch, rows, window rows, columns, window columns, channel)
    paired = [n for pair in zip(window.output_size, window.size, strict=True) for n in pair]
    over_window = tuple(range(2, 2 + 2 * len(tiled), 2))
    largest, share = jnp.expand_dims(y, over_window), jnp.expand_dims(gradient / winners, over_window)
    hit = tiles.reshape(x.shape[0], *paired, x.shape[-1]) == largest
    shares = jnp.where(hit, share, jnp.zeros((), x.dtype)).reshape(tiles.shape)
    outside = [(0, n - kept, 0) for n, kept in zip(x.shape[1:-1], tiled, strict=True)]
    return (lax.pad(shares, jnp.zeros((), x.dtype), [(0, 0, 0), *outside, (0, 0, 0)]),)


_tiled_max_pool.defvjp(_tiled_max_pool_forward, _tiled_max_pool_backward)


def avg_pool(
    x: Float[Array, "batch *spatial channel"],
    window_shape: PerAxis,
    strides: PerAxis | None = None,
    padding: Padding = "VALID",
) -> Float[Array, "batch *output_spatial channel"]:
    """The mean under each window; `strides` defaults to the window, zeros of the padding count as values."""
    window = pool_window(x.shape[1:], "window", window_shape, strides, padding)
    taps = _taps(x, window, fill=0.0)
    return functools.reduce(operator.add, taps) / jnp.asarray(len(taps), x.dtype)
