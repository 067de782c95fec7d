"""Lowerings of correlations and their gradients on a CPU, a GPU and a TPU.

A lowering is a function of the primitive's operands. A GPU or TPU lowering is written in JAX, so it also runs on a CPU,
where the tests check it (`CNNLIB_KERNELS=gpu`, `=tpu`). A lane is one of the models that are trained together. All
operands have a lane axis: `x` is `(lane, image, height, width, channel)`.

- A CPU runs all lanes in kernels.cc, or one lane after another in XLA's operations. In kernels.cc, a convolution and
  the max pooling that follows it are one operation.
- A GPU runs all lanes as the groups of one convolution.
- A TPU also runs several lanes as the groups of one convolution. It runs a single lane in blocks (see `Blocks`).

docs/accelerators.md has the measurements behind these choices.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from cnnlib.ops import kernels
from cnnlib.ops.geometry import Correlation, Pair, im2col
from cnnlib.ops.lowerings.blocks import in_blocks, kernel_gradient_in_blocks
from cnnlib.ops.lowerings.convolutions import (
    contract,
    convolution,
    convolution_input_gradient,
    convolution_kernel_gradient,
    stock,
)
from cnnlib.ops.lowerings.lanes import one_after_another, together

FEW_CHANNELS = 4
"""With fewer input channels, as in grey and colour images, a CPU multiplies all windows (`im2col`) by the kernel in one
matrix product. This is faster than XLA's convolutions."""


# Shapes of results. Each function takes the static arguments of its primitive.


def correlate_shape(x: Any, kernel: Any, *, correlation: Correlation, form: str) -> tuple[int, ...]:
    """Return `(lane, image, output_height, output_width, feature)`. Raise TypeError if the operands do not fit."""
    if x.shape[0] != kernel.shape[0] or x.shape[-1] != kernel.shape[-2]:
        raise TypeError(f"x {x.shape} and kernel {kernel.shape} differ in lanes or channels")
    return (*x.shape[:2], *correlation.output_size(x.shape[2:4], kernel.shape[1:3]), kernel.shape[-1])


def input_gradient_shape(
    gradient: Any, kernel: Any, *, size: Pair, correlation: Correlation, form: str
) -> tuple[int, ...]:
    """Return the shape `(lane, image, height, width, channel)`. Raise TypeError if the operands do not fit."""
    if gradient.shape[0] != kernel.shape[0] or gradient.shape[-1] != kernel.shape[-1]:
        raise TypeError(f"gradient {gradient.shape} and kernel {kernel.shape} differ in lanes or features")
    return (*gradient.shape[:2], *size, kernel.shape[-2])


def kernel_gradient_shape(
    x: Any, gradient: Any, *, window: Pair, correlation: Correlation, form: str
) -> tuple[int, ...]:
    """Return the shape `(lane, kernel_height, kernel_width, channel, feature)`."""
    return (x.shape[0], *window, x.shape[-1], gradient.shape[-1])


def correlation_attributes(correlation: Correlation) -> dict[str, tuple[int, ...]]:
    """Return the attributes that describe a correlation to kernels.cc."""
    return {
        "strides": correlation.strides,
        "low": tuple(low for low, _ in correlation.padding),
        "x_dilation": correlation.x_dilation,
        "kernel_dilation": correlation.kernel_dilation,
    }


def correlate_on_cpu(x: Array, kernel: Array, *, correlation: Correlation, form: str) -> Array:
    """Correlate all lanes in kernels.cc, or one after another with XLA."""
    if form == "native" and x.dtype == jnp.float32:
        shape = correlate_shape(x, kernel, correlation=correlation, form=form)
        output = jax.ShapeDtypeStruct(shape, x.dtype)
        return kernels.call("cnnlib_correlate", output, x, kernel, attributes=correlation_attributes(correlation))

    def one(x: Array, kernel: Array) -> Array:
        if x.shape[-1] < FEW_CHANNELS and correlation.x_dilation == (1, 1):
            return im2col(x, kernel.shape[:2], correlation) @ kernel.reshape(-1, kernel.shape[-1])
        return stock(x, kernel, correlation)

    return one_after_another(one, x, kernel)


def input_gradient_on_cpu(gradient: Array, kernel: Array, *, size: Pair, correlation: Correlation, form: str) -> Array:
    """Scatter the gradient in kernels.cc if `scatters` says so. If not, correlate it with the rotated kernel."""
    if form == "native" and gradient.dtype == jnp.float32 and scatters(gradient, kernel, size, correlation):
        shape = input_gradient_shape(gradient, kernel, size=size, correlation=correlation, form=form)
        output = jax.ShapeDtypeStruct(shape, gradient.dtype)
        return kernels.call("cnnlib_scatter", output, gradient, kernel, attributes=correlation_attributes(correlation))
    back, turned = turned_for(kernel, size, correlation)
    return correlate_on_cpu(gradient, turned, correlation=back, form=form)


VECTOR = 8
"""Number of values per vector that `scatters` assumes. A larger number would favour scattering."""


def scatters(gradient: Any, kernel: Any, size: Pair, correlation: Correlation) -> bool:
    """Return whether kernels.cc should compute the input gradient by scattering instead of correlating.

    A correlation computes the gradient of each input value separately, in vectors of channels. It also multiplies
    padding. Scattering multiplies the gradient of each output position by the kernel and adds the products to the input
    values in the window, in vectors that hold a row of the window. Few channels and little forward padding therefore
    favour scattering. Costs are in products of two vectors. In a correlation, a single vector of channels is a third
    slower than several. In scattering, an addition takes as long as two products.
    """
    if correlation.x_dilation != (1, 1):
        return False
    _, _, rows, columns, features = gradient.shape
    *_, height, width, channels, _ = kernel.shape
    vectors = -(-channels // VECTOR)
    positions = size[0] * size[1] / math.prod(correlation.strides)
    correlated = positions * height * width * features * (4 / 3 if vectors == 1 else vectors)
    joined = width if correlation.kernel_dilation[1] == 1 else 1
    vectors = -(-joined * channels // VECTOR)
    scattered = rows * columns * height * (width // joined) * (features + 2) * vectors
    return bool(scattered < correlated)


def turned_for(kernel: Array, size: Pair, correlation: Correlation) -> tuple[Correlation, Array]:
    """Return the correlation that computes gradients for inputs of `size`, and the kernel of this correlation.

    The returned kernel is `kernel` rotated by 180 degrees, with channels and features exchanged. It may have lanes.
    """
    return correlation.transposed(size, kernel.shape[-4:-2]), jnp.flip(kernel, (-4, -3)).swapaxes(-1, -2)


def kernel_gradient_on_cpu(x: Array, gradient: Array, *, window: Pair, correlation: Correlation, form: str) -> Array:
    """Compute the kernel gradients of all lanes in kernels.cc, or one after another with XLA."""
    if form == "native" and x.dtype == jnp.float32:
        shape = kernel_gradient_shape(x, gradient, window=window, correlation=correlation, form=form)
        output = jax.ShapeDtypeStruct(shape, x.dtype)
        return kernels.call(
            "cnnlib_kernel_gradient", output, x, gradient, attributes=correlation_attributes(correlation)
        )

    def one(x: Array, gradient: Array) -> Array:
        # The batch runs in up to 8 blocks, one after another, because the windows of a whole batch do not fit in the
        # cache. The loop also makes XLA store `x`. Without a loop, XLA would compute `x` again for every tap.
        blocks = max(n for n in range(1, 9) if x.shape[0] % n == 0)
        parts = (x.reshape(blocks, -1, *x.shape[1:]), gradient.reshape(blocks, -1, *gradient.shape[1:]))
        products: Array = lax.map(lambda part: contract(im2col(part[0], window, correlation), part[1]), parts)
        return products.sum(axis=0).astype(x.dtype).reshape(*window, x.shape[-1], gradient.shape[-1])

    return one_after_another(one, x, gradient)


def correlate_on_gpu(x: Array, kernel: Array, *, correlation: Correlation, form: str) -> Array:
    """Correlate all lanes as the groups of one convolution."""
    return together(functools.partial(convolution, correlation=correlation), x, kernel)


def input_gradient_on_gpu(gradient: Array, kernel: Array, *, size: Pair, correlation: Correlation, form: str) -> Array:
    """Compute all lanes as the groups of one convolution. XLA rotates the kernels as part of this convolution."""
    one = functools.partial(convolution_input_gradient, size=size, correlation=correlation)
    return together(one, gradient, kernel)


def kernel_gradient_on_gpu(x: Array, gradient: Array, *, window: Pair, correlation: Correlation, form: str) -> Array:
    """Compute all lanes as the groups of one convolution."""
    one = functools.partial(convolution_kernel_gradient, window=window, correlation=correlation)
    return together(one, x, gradient)


def correlate_on_tpu(x: Array, kernel: Array, *, correlation: Correlation, form: str) -> Array:
    """Compute several lanes as the groups of one convolution, and a single lane in blocks."""
    if x.shape[0] > 1:
        return correlate_on_gpu(x, kernel, correlation=correlation, form=form)
    return in_blocks(x[0], kernel[0], correlation)[None]


def input_gradient_on_tpu(gradient: Array, kernel: Array, *, size: Pair, correlation: Correlation, form: str) -> Array:
    """Compute several lanes as the groups of one convolution, and a single lane in blocks."""
    if gradient.shape[0] > 1:
        return input_gradient_on_gpu(gradient, kernel, size=size, correlation=correlation, form=form)
    back, turned = turned_for(kernel[0], size, correlation)
    return in_blocks(gradient[0], turned, back)[None]


def kernel_gradient_on_tpu(x: Array, gradient: Array, *, window: Pair, correlation: Correlation, form: str) -> Array:
    """Compute several lanes as the groups of one convolution, and a single lane in blocks."""
    if x.shape[0] > 1:
        return kernel_gradient_on_gpu(x, gradient, window=window, correlation=correlation, form=form)
    return kernel_gradient_in_blocks(x[0], gradient[0], window, correlation)[None]
