"""Lowerings of local layers and their gradients on a CPU, a GPU and a TPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from cnnlib.ops import kernels
from cnnlib.ops.geometry import Correlation, Pair, taps_of
from cnnlib.ops.lowerings.convolutions import stock
from cnnlib.ops.lowerings.lanes import FEW_IMAGES, Over, one_after_another, together


def local_shape(x: Any, kernel: Any, *, correlation: Correlation, form: str) -> tuple[int, ...]:
    """Return the shape `(lane, image, row, column, feature)`. Raise TypeError if the operands do not fit."""
    positions = correlation.output_size(x.shape[2:4], kernel.shape[3:5])
    if (x.shape[0], *positions, x.shape[-1]) != (*kernel.shape[:3], kernel.shape[-2]):
        raise TypeError(f"x {x.shape} and kernel {kernel.shape} differ in lanes, positions or channels")
    return (*x.shape[:2], *positions, kernel.shape[-1])


def local_input_shape(
    gradient: Any, kernel: Any, *, size: Pair, correlation: Correlation, form: str
) -> tuple[int, ...]:
    """Return the shape `(lane, image, height, width, channel)`."""
    return (*gradient.shape[:2], *size, kernel.shape[-2])


def local_kernel_shape(x: Any, gradient: Any, *, window: Pair, correlation: Correlation, form: str) -> tuple[int, ...]:
    """Return the shape `(lane, row, column, kernel_height, kernel_width, channel, feature)`."""
    return (x.shape[0], *gradient.shape[2:4], *window, x.shape[-1], gradient.shape[-1])


def local_lane(x: Array, kernel: Array, correlation: Correlation) -> Array:
    """Compute one lane as one matrix product, batched over positions, without copying weights."""
    rows, columns, height, width, channels, features = kernel.shape
    # Positions come first, because the product is batched over positions. Images and channels share one axis.
    images_last = x.transpose(1, 2, 0, 3).reshape(1, *x.shape[1:3], -1)
    taps = taps_of(images_last, (height, width), correlation, fill=0.0)
    patches = jnp.concatenate([tap.reshape(rows * columns, -1, channels) for tap in taps], axis=-1)
    y = lax.batch_matmul(patches, kernel.reshape(rows * columns, -1, features))
    return y.reshape(rows, columns, -1, features).transpose(2, 0, 1, 3)


def local_lane_on_tpu(x: Array, kernel: Array, correlation: Correlation) -> Array:
    """Compute the product of `local_lane`, but gather the windows with a convolution whose kernel is the identity.

    A TPU's matrix unit gathers values about six times as fast as its vector unit. The matrix unit rounds the values,
    but the product that follows would round them in the same way.
    """
    rows, columns, height, width, channels, features = kernel.shape
    taps = height * width * channels
    identity = jnp.eye(taps, dtype=x.dtype).reshape(height, width, channels, taps)
    patches = stock(x, identity, correlation).reshape(x.shape[0], rows * columns, taps)
    weights = kernel.reshape(rows * columns, taps, features)
    # The product is (position, feature, image). Images come last, as in the convolutions of a TPU.
    y = lax.dot_general(weights, patches, (((1,), (2,)), ((0,), (1,))))
    return y.reshape(rows, columns, features, -1).transpose(3, 0, 1, 2)


class Local(NamedTuple):
    """The lowerings of a local layer: its output, input gradient and kernel gradient."""

    lane: Callable[..., Array]
    """Compute the output of one lane. The function must be linear in the input and in the kernel."""
    over: Over = together
    """How to run a function of one lane on all lanes."""

    def forward(self, x: Array, kernel: Array, *, correlation: Correlation, form: str) -> Array:
        """Compute the output of all lanes."""
        return self.over(functools.partial(self.lane, correlation=correlation), x, kernel)

    def input_gradient(
        self, gradient: Array, kernel: Array, *, size: Pair, correlation: Correlation, form: str
    ) -> Array:
        """Compute the gradient of an input of `size` from the gradient of the output."""
        _, *shape = local_input_shape(gradient, kernel, size=size, correlation=correlation, form=form)
        like = jax.ShapeDtypeStruct(tuple(shape), gradient.dtype)

        def one(gradient: Array, kernel: Array) -> Array:
            (result,) = jax.linear_transpose(lambda x: self.lane(x, kernel, correlation), like)(gradient)
            return jnp.asarray(result)

        return self.over(one, gradient, kernel)

    def kernel_gradient(self, x: Array, gradient: Array, *, window: Pair, correlation: Correlation, form: str) -> Array:
        """Compute the gradient of the kernels, whose taps have the shape `window`."""
        _, *shape = local_kernel_shape(x, gradient, window=window, correlation=correlation, form=form)
        like = jax.ShapeDtypeStruct(tuple(shape), x.dtype)

        def one(x: Array, gradient: Array) -> Array:
            (result,) = jax.linear_transpose(lambda kernel: self.lane(x, kernel, correlation), like)(gradient)
            return jnp.asarray(result)

        return self.over(one, x, gradient)


LOCAL_ON_XLA_CPU = Local(local_lane, one_after_another)
LOCAL_ON_GPU = Local(local_lane)
LOCAL_ON_TPU = Local(local_lane_on_tpu)


def local_on_cpu(
    target: str, shape: Callable[..., tuple[int, ...]], otherwise: Callable[..., Array]
) -> Callable[..., Array]:
    """Return a lowering. It calls the function `target` of kernels.cc if possible, else the lowering `otherwise`.

    kernels.cc supports float32 and at least `FEW_IMAGES` images. It copies the first operand to a scratch buffer in
    which images come last. Each row of the buffer is padded to whole vectors.
    """

    def lowered(first: Array, second: Array, *, correlation: Correlation, form: str, **static: Any) -> Array:
        if form != "native" or first.dtype != jnp.float32 or first.shape[1] < FEW_IMAGES:
            return otherwise(first, second, correlation=correlation, form=form, **static)
        output = jax.ShapeDtypeStruct(shape(first, second, correlation=correlation, form=form, **static), first.dtype)
        turned = jax.ShapeDtypeStruct((math.prod(first.shape[2:]), -(-first.shape[1] // 16) * 16), first.dtype)
        attributes = {
            "strides": correlation.strides,
            "low": tuple(low for low, _ in correlation.padding),
            "dilation": correlation.kernel_dilation,
        }
        return kernels.call(target, output, first, second, scratch=turned, attributes=attributes)

    return lowered
