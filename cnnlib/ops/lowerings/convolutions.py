"""The convolution of one lane and its gradients, computed by XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from cnnlib.ops.geometry import Correlation, Pair, wide_type


def cropped(x: Array, correlation: Correlation) -> tuple[Array, Correlation]:
    """Apply negative padding by cropping; return the cropped images and their correlation.

    XLA's CPU compiler reads outside images if a convolution crops one side and pads the other (openxla/xla issue 48713;
    seen with jaxlib 0.7.2 and 0.10.2, in float32 and bfloat16). A gradient has negative padding if the padding of the
    forward convolution is wider than (kernel - 1) * dilation.
    """
    edges, padding = [(0, 0, 0)], []
    for n, pair, spread in zip(x.shape[1:3], correlation.padding, correlation.x_dilation, strict=True):
        # Number of image values to crop, rounded up. Neighbouring values are `spread` steps of padding apart.
        low, high = (-(min(side, 0) // spread) for side in pair)
        low = min(low, n)
        high = min(high, n - low)
        edges.append((-low, -high, 0))
        padding.append((pair[0] + low * spread, pair[1] + high * spread))
    if not any(map(any, edges)):
        return x, correlation
    x = lax.pad(x, jnp.zeros((), x.dtype), [*edges, (0, 0, 0)])
    return x, correlation._replace(padding=(padding[0], padding[1]))


def stock(x: Array, kernel: Array, correlation: Correlation) -> Array:
    """Correlate one lane with XLA's own convolution."""
    x, correlation = cropped(x, correlation)
    return lax.conv_general_dilated(x, kernel, *correlation, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def convolution(x: Array, kernel: Array, correlation: Correlation) -> Array:
    """Correlate one lane with XLA's own convolution, over a single axis if `x` holds signals (height 1).

    Under `jax.vmap` on a TPU, a single axis takes one seventh fewer cycles than two (MNIST-1D's CNN, 5 lanes).
    """
    padding, dilation = correlation.padding, correlation.x_dilation
    if x.shape[1] != 1 or kernel.shape[0] != 1 or padding[0] != (0, 0) or dilation[0] != 1:
        return stock(x, kernel, correlation)
    x, correlation = cropped(x, correlation)
    padding = correlation.padding
    y = lax.conv_general_dilated(
        x[:, 0],
        kernel[0],
        correlation.strides[1:],
        padding[1:],
        dilation[1:],
        correlation.kernel_dilation[1:],
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    return y[:, None]


def convolution_input_gradient(gradient: Array, kernel: Array, size: Pair, correlation: Correlation) -> Array:
    """Compute the input gradient of one lane: the transpose of `convolution` with respect to its input.

    Padding beyond (kernel - 1) * dilation is added to the input before the convolution. If the convolution itself
    added this padding, its transpose would have negative padding (see `cropped`).
    """
    spans = [(k - 1) * d for k, d in zip(kernel.shape[:2], correlation.kernel_dilation, strict=True)]
    spare, kept = [], []
    for pair, span, spread in zip(correlation.padding, spans, correlation.x_dilation, strict=True):
        low, high = (max(0, side - span) // spread for side in pair)
        spare.append((low, high, 0))
        kept.append((pair[0] - low * spread, pair[1] - high * spread))
    inner = correlation._replace(padding=(kept[0], kept[1]))

    def forward(x: Array) -> Array:
        if any(map(any, spare)):
            x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *spare, (0, 0, 0)])
        return convolution(x, kernel, inner)

    like = jax.ShapeDtypeStruct((gradient.shape[0], *size, kernel.shape[-2]), gradient.dtype)
    (result,) = jax.linear_transpose(forward, like)(gradient)
    return jnp.asarray(result)


def convolution_kernel_gradient(x: Array, gradient: Array, window: Pair, correlation: Correlation) -> Array:
    """Compute the kernel gradient of one lane: the transpose of `convolution` with respect to its kernel."""
    like = jax.ShapeDtypeStruct((*window, x.shape[-1], gradient.shape[-1]), x.dtype)
    (result,) = jax.linear_transpose(lambda kernel: convolution(x, kernel, correlation), like)(gradient)
    return jnp.asarray(result)


def contract(patches: Array, gradient: Array) -> Array:
    """Sum `patches[..., i] * gradient[..., j]` over images and positions, in float32 or a wider type."""
    axes = tuple(range(gradient.ndim - 1))
    return lax.dot_general(
        patches, gradient, ((axes, axes), ((), ())), preferred_element_type=wide_type(gradient.dtype)
    )
