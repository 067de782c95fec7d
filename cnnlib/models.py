"""One Flax Linen module that reads a spec; the only file that knows Flax."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cnnlib import ops
from cnnlib.spec import Activation, AvgPool, Conv, Dense, Layer, MaxPool, Model, Residual, per_axis

Parameters = dict[str, Any]
"""Layer by layer, by position: `{"layer_0": {"kernel": ..., "bias": ...}, ...}`; a residual's layers nest."""

ACTIVATIONS = {"relu": nn.relu, "tanh": nn.tanh}
NON_DECREASING = {"relu", "tanh"}
"""Activations that commute with a maximum."""
KERNEL_INIT = nn.initializers.lecun_normal()


class Affine(nn.Module):
    """A layer with a kernel and a bias; which product joins them to the input is the layer's kind.

    Parameters are float32; the product runs in `compute_dtype`. Kernels start LeCun-normal (variance 1 / fan-in),
    biases at zero, as in Flax's own layers.
    """

    layer: Conv | Dense
    compute_dtype: DTypeLike
    pool: Layer | None = None
    """Pooling between the product and the bias (see `Network`)."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        layer = self.layer
        x = x.astype(self.compute_dtype)
        kernel_shape: tuple[int, ...]
        if isinstance(layer, Dense):
            x = x.reshape(x.shape[0], -1)
            features, kernel_shape = layer.num_units, (x.shape[-1], layer.num_units)
        else:
            window = per_axis(layer.kernel_size, x.ndim - 2, "kernel")
            features, kernel_shape = layer.features, (*window, x.shape[-1], layer.features)
        kernel = self.param("kernel", KERNEL_INIT, kernel_shape, jnp.float32).astype(self.compute_dtype)
        if isinstance(layer, Dense):
            x = x @ kernel
        else:
            conv = ops.conv2d if x.ndim == 4 else ops.conv1d
            x = conv(x, kernel, strides=layer.strides, padding=layer.padding, dilation=layer.dilation)
        if isinstance(self.pool, MaxPool):
            x = max_pool(x, self.pool)
        if layer.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (features,), jnp.float32)
            # Spelled out, since the test session raises on implicit rank promotion.
            x = x + bias.astype(self.compute_dtype).reshape((1,) * (x.ndim - 1) + (features,))
        return x


class Network(nn.Module):
    """A sequence of layers as a Flax module: `init(key, x)` gives variables, `apply(variables, x)` the output.

    `x` is `(batch, *spatial, channel)`, float; the output is of `compute_dtype`.

    A bias, a rounding and a non-decreasing activation commute with a maximum: max pooling after them gives the same
    values as before them. So it comes first, and they run on what is left, a quarter for a window of 2x2. Gradients are
    the same too, except where rounding makes values tie that did not before: there only the true largest has it.
    """

    layers: tuple[Layer, ...]
    compute_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        x = x.astype(self.compute_dtype)
        early = pools_before_bias(self.layers)
        for index, layer in enumerate(self.layers):
            if index not in early.values():
                pool = early.get(index)
                x = self.apply_layer(layer, x, f"layer_{index}", None if pool is None else self.layers[pool])
        return x

    def apply_layer(self, layer: Layer, x: Array, name: str, pool: Layer | None) -> Array:
        match layer:
            case Conv() | Dense():
                return Affine(layer, self.compute_dtype, pool, name=name)(x)
            case MaxPool():
                return max_pool(x, layer)
            case AvgPool():
                return ops.avg_pool(x, layer.window_shape, layer.strides, layer.padding)
            case Activation():
                return ACTIVATIONS[layer.function](x)
            case Residual():
                return x + Network(layer.layers, self.compute_dtype, name=name)(x)


def max_pool(x: Array, layer: MaxPool) -> Array:
    """The layer applied to `(batch, *spatial, channel)`."""
    return ops.max_pool(x, layer.window_shape, layer.strides, layer.padding)


def pools_before_bias(layers: tuple[Layer, ...]) -> dict[int, int]:
    """Positions of convolutions, each with that of the max pooling that may move to before its bias."""
    pools = {}
    for index, layer in enumerate(layers):
        after = index + 1
        while after < len(layers) and isinstance(between := layers[after], Activation):
            if between.function not in NON_DECREASING:
                break
            after += 1
        if isinstance(layer, Conv) and after < len(layers) and isinstance(layers[after], MaxPool):
            pools[index] = after
    return pools


def logits(network: Network, parameters: Parameters, x: Float[Array, "batch ..."]) -> Float[Array, "batch classes"]:
    """The network's output in float32, in which losses are computed whatever the network computes in."""
    return jnp.asarray(network.apply({"params": parameters}, x), jnp.float32)


def network(model: Model, compute_dtype: DTypeLike = jnp.float32) -> Network:
    """The Flax module of a model; its `Dense(NUM_CLASSES)` must have been given their number."""
    return Network(model.layers, compute_dtype)
