"""Geometry of correlations and poolings: static arguments, output sizes, and the input values under each tap."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

Pair = tuple[int, int]


class Correlation(NamedTuple):
    """The static arguments of a correlation. Each pair is `(height, width)`."""

    strides: Pair
    padding: tuple[Pair, Pair]
    """Per axis `(before, after)`, in steps of the dilated input. Negative padding crops."""
    x_dilation: Pair
    """Distance between neighbouring input values. Zeros fill the gaps; 1 leaves no gaps."""
    kernel_dilation: Pair

    def output_size(self, size: tuple[int, ...], window: tuple[int, ...]) -> tuple[int, ...]:
        """Return the number of output positions per axis."""
        return tuple(
            ((n - 1) * spread + 1 + low + high - ((k - 1) * d + 1)) // s + 1
            for n, k, s, (low, high), spread, d in zip(size, window, *self, strict=True)
        )

    def transposed(self, size: tuple[int, ...], window: tuple[int, ...]) -> Correlation:
        """Return the correlation that computes the gradient for an input of `size` from the gradient of the output.

        The returned correlation needs the forward kernel, rotated by 180 degrees, with channels and features exchanged.
        """
        padding = []
        for n, outputs, k, s, (low, _), spread, d in zip(
            size, self.output_size(size, window), window, *self, strict=True
        ):
            before = (k - 1) * d - low
            # The n results are `spread` steps apart. The window of the last result ends where the padding ends.
            after = (n - 1) * spread + 1 + (k - 1) * d - ((outputs - 1) * s + 1) - before
            padding.append((before, after))
        return Correlation(self.x_dilation, (padding[0], padding[1]), self.strides, self.kernel_dilation)


class Pooling(NamedTuple):
    """The static arguments of a pooling. Each pair is `(height, width)`."""

    window: Pair
    strides: Pair
    padding: tuple[Pair, Pair]

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the number of output positions per axis."""
        return tuple((n + low + high - k) // s + 1 for n, k, s, (low, high) in zip(size, *self, strict=True))


def wide_type(dtype: Any) -> Any:
    """Return the type for sums over many values of `dtype`: float32, or `dtype` itself if it is wider."""
    return dtype if jnp.dtype(dtype).itemsize > 4 else jnp.dtype(jnp.float32)


def taps_of(x: Array, window: tuple[int, ...], correlation: Correlation, fill: float) -> list[Array]:
    """Return one array per tap. The array holds the values under the tap at all output positions.

    A tap is one element of the window. Taps are in row-major order. `x` is `(image, height, width, channel)`. Each
    returned array is `(image, row, column, channel)`. Padding has value `fill`.
    """
    rows, columns = correlation.output_size(x.shape[1:3], window)
    (low_h, high_h), (low_w, high_w) = correlation.padding
    (spread_h, spread_w), (step_h, step_w) = correlation.x_dilation, correlation.strides
    edges = [(0, 0, 0), (low_h, high_h, spread_h - 1), (low_w, high_w, spread_w - 1), (0, 0, 0)]
    padded = lax.pad(x, jnp.asarray(fill, x.dtype), edges)
    taps = []
    for i in range(window[0]):
        for j in range(window[1]):
            top, left = i * correlation.kernel_dilation[0], j * correlation.kernel_dilation[1]
            stops = (x.shape[0], top + (rows - 1) * step_h + 1, left + (columns - 1) * step_w + 1, x.shape[3])
            taps.append(lax.slice(padded, (0, top, left, 0), stops, (1, step_h, step_w, 1)))
    return taps


def im2col(x: Array, window: tuple[int, ...], correlation: Correlation) -> Array:
    """Return the values under the window at each position: `(image, row, column, taps * channels)`.

    In the last axis, the channel index changes fastest.
    """
    return jnp.concatenate(taps_of(x, window, correlation, fill=0.0), axis=-1)
