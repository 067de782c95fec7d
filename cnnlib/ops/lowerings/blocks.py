"""Convolutions that compute blocks of outputs at once, to use all columns of a TPU's matrix unit."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from cnnlib.ops.geometry import Correlation, Pair
from cnnlib.ops.lowerings.convolutions import convolution, convolution_kernel_gradient, stock

COLUMNS = 128
"""Number of columns of a TPU's matrix unit."""
ROWS = 8
"""Number of rows of a tile of a TPU's vector memory. Features are padded to a multiple of this number."""
NARROW = 16
"""Largest number of features for which `in_blocks` takes fewer cycles than a plain convolution (libtpu 0.0.42.1, v5e).
With more features, rearranging the blocks into an output map costs more than the blocks save."""
NARROW_GRADIENT = 64
"""Largest number of features for which `kernel_gradient_in_blocks` is faster than a plain convolution."""
FEW_TAPS = 16
"""A window with fewer taps uses no blocks, because blocks would multiply by too many zeros: for 3x3 taps, 4x4 blocks
need four times the multiply-adds. Kernel gradients with more than `NARROW` features are an exception: smaller blocks
are faster for them (docs/accelerators.md)."""


class Blocks(NamedTuple):
    """A correlation that computes a block of neighbouring outputs at each position.

    A TPU's matrix unit has 128 columns. A convolution with 6 features leaves 122 of them idle. With blocks, the outputs
    of a block become additional features of one position. The larger window covers the windows of all these outputs,
    and the strides are multiplied by the size of the block. The larger kernel holds one copy of the small kernel per
    output of the block, surrounded by zeros. The matrix unit multiplies these zeros too: 5x5 taps in 4x4 blocks need
    2.6 times the multiply-adds, on 16 times as many columns.
    """

    size: Pair
    """Outputs per block, per axis."""
    counts: Pair
    """Blocks per axis."""
    window: Pair
    """Height and width of the larger kernel."""
    correlation: Correlation
    """Static arguments of the correlation with the larger kernel."""


def blocks_of(
    size: tuple[int, ...], window: tuple[int, ...], features: int, most: int, correlation: Correlation
) -> Blocks | None:
    """Return the largest blocks, of up to 4 outputs per axis, that use at most `COLUMNS` columns.

    The size of the blocks must divide the number of outputs on each axis. Return None for signals, for more than `most`
    features (rounded up to a multiple of `ROWS`), or if no block fits.
    """
    outputs = correlation.output_size(size, window)
    wide = features + -features % ROWS
    if wide > most or outputs[0] == 1:
        return None
    chosen = None
    for block in ((1, 2), (2, 2), (2, 4), (4, 4)):
        if math.prod(block) * wide <= COLUMNS and not any(n % b for n, b in zip(outputs, block, strict=True)):
            chosen = block
    if chosen is None:
        return None
    grown, padding = [], []
    for n, k, b, o, s, (low, _), spread, d in zip(size, window, chosen, outputs, *correlation, strict=True):
        grown.append((b - 1) * s + (k - 1) * d + 1)
        high = (o // b - 1) * b * s + grown[-1] - low - ((n - 1) * spread + 1)
        padding.append((low, high))
    strides = (chosen[0] * correlation.strides[0], chosen[1] * correlation.strides[1])
    larger = Correlation(strides, (padding[0], padding[1]), correlation.x_dilation, (1, 1))
    counts = (outputs[0] // chosen[0], outputs[1] // chosen[1])
    return Blocks(chosen, counts, (grown[0], grown[1]), larger)


def in_blocks(x: Array, kernel: Array, correlation: Correlation) -> Array:
    """Correlate one lane with XLA's own convolution. Use blocks of outputs if blocks are faster on a TPU."""
    window, features = kernel.shape[:2], kernel.shape[-1]
    blocks = blocks_of(x.shape[1:3], window, features, NARROW, correlation)
    if blocks is None or math.prod(window) < FEW_TAPS:
        return convolution(x, kernel, correlation)
    (rows, columns), (height, width) = blocks.counts, blocks.size
    y = stock(x, repeated(filled(kernel), correlation, blocks), blocks.correlation)
    y = y.reshape(x.shape[0], rows, columns, height, width, -1).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(x.shape[0], rows * height, columns * width, -1)[..., : kernel.shape[-1]]


def kernel_gradient_in_blocks(x: Array, gradient: Array, window: Pair, correlation: Correlation) -> Array:
    """Compute the gradient of one lane's kernel. Use blocks of outputs if blocks are faster on a TPU."""
    features = gradient.shape[-1]
    blocks = blocks_of(x.shape[1:3], window, features, NARROW_GRADIENT, correlation)
    if blocks is None or (math.prod(window) < FEW_TAPS and features <= NARROW):
        return convolution_kernel_gradient(x, gradient, window, correlation)
    (rows, columns), (height, width) = blocks.counts, blocks.size
    wide = filled(gradient).reshape(x.shape[0], rows, height, columns, width, -1).transpose(0, 1, 3, 2, 4, 5)
    wide = wide.reshape(x.shape[0], rows, columns, -1)
    larger = convolution_kernel_gradient(x, wide, blocks.window, blocks.correlation)
    like = jax.ShapeDtypeStruct((*window, x.shape[-1], features), x.dtype)
    (result,) = jax.linear_transpose(lambda kernel: repeated(filled(kernel), correlation, blocks), like)(larger)
    return jnp.asarray(result)


def filled(array: Array) -> Array:
    """Pad the last axis, the features, with zeros to a multiple of `ROWS`."""
    return lax.pad(
        array, jnp.zeros((), array.dtype), [(0, 0, 0)] * (array.ndim - 1) + [(0, -array.shape[-1] % ROWS, 0)]
    )


def repeated(kernel: Array, correlation: Correlation, blocks: Blocks) -> Array:
    """Return the larger kernel of `blocks`: `(*blocks.window, channel, output * feature)`."""
    (height, width), (step_h, step_w), (d_h, d_w) = blocks.size, correlation.strides, correlation.kernel_dilation
    zero = jnp.zeros((), kernel.dtype)
    copies = []
    for i in range(height):
        for j in range(width):
            rows = (i * step_h, (height - 1 - i) * step_h, d_h - 1)
            columns = (j * step_w, (width - 1 - j) * step_w, d_w - 1)
            copies.append(lax.pad(kernel, zero, [rows, columns, (0, 0, 0), (0, 0, 0)]))
    return jnp.stack(copies, axis=-2).reshape(*blocks.window, kernel.shape[-2], -1)
