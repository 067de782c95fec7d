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
KERNEL_INIT = nn.initializers.lecun_normal()


class Affine(nn.Module):
    """A layer with a kernel and a bias; which product joins them to the input is the layer's kind.

    Parameters are float32; the product runs in `compute_dtype`. Kernels start LeCun-normal (variance 1 / fan-in),
    biases at zero, as in Flax's own layers.
    """

    layer: Conv | Dense
    compute_dtype: DTypeLike

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
            x = ops.conv(x, kernel, strides=layer.strides, padding=layer.padding, dilation=layer.dilation)
        if layer.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (features,), jnp.float32)
            # Spelled out, since the test session raises on implicit rank promotion.
            x = x + bias.astype(self.compute_dtype).reshape((1,) * (x.ndim - 1) + (features,))
        return x


class Network(nn.Module):
    """A sequence of layers as a Flax module: `init(key, x)` gives variables, `apply(variables, x)` the output.

    `x` is `(batch, *spatial, channel)`, float; the output is of `compute_dtype`.
    """

    layers: tuple[Layer, ...]
    compute_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        x = x.astype(self.compute_dtype)
        for index, layer in enumerate(self.layers):
            x = self.apply_layer(layer, x, f"layer_{index}")
        return x

    def apply_layer(self, layer: Layer, x: Array, name: str) -> Array:
        match layer:
            case Conv() | Dense():
                return Affine(layer, self.compute_dtype, name=name)(x)
            case MaxPool():
                return ops.max_pool(x, layer.window_shape, layer.strides, layer.padding)
            case AvgPool():
                return ops.avg_pool(x, layer.window_shape, layer.strides, layer.padding)
            case Activation():
                return ACTIVATIONS[layer.function](x)
            case Residual():
                return x + Network(layer.layers, self.compute_dtype, name=name)(x)


def logits(network: Network, parameters: Parameters, x: Float[Array, "batch ..."]) -> Float[Array, "batch classes"]:
    """The network's output in float32, in which losses are computed whatever the network computes in."""
    return jnp.asarray(network.apply({"params": parameters}, x), jnp.float32)


def network(model: Model, compute_dtype: DTypeLike = jnp.float32) -> Network:
    """The Flax module of a model; its `Dense(NUM_CLASSES)` must have been given their number."""
    return Network(model.layers, compute_dtype)
