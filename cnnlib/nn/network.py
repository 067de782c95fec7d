"""Run a spec as a Flax Linen module. Only this file imports Flax."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PyTree

from cnnlib import ops
from cnnlib.spec.layers import Activation, AvgPool, Conv, Dense, Full, Layer, Local, MaxPool, Norm, Residual
from cnnlib.spec.model import Model
from cnnlib.spec.window import Shape

Parameters = dict[str, PyTree]
"""One entry per layer, named by its position: `{"layer_0": {"kernel": ..., "bias": ...}, ...}`. If layer 0 is a
residual, `layer_0` holds the entries of its layers, and `layer_0_shortcut` holds those of its shortcut. `kernel_shape`
and `bias_shape` return the shapes of the arrays. A norm has the arrays `scale` and `bias`, with one value per
channel."""

Statistics = dict[str, PyTree]
"""Running `mean` and `variance` of each norm, per channel. Layers have the names of `Parameters`. Empty if there are no
norms."""

EPSILON = 1e-5
"""Small number that a norm adds to the variance."""
DECAY = 0.9
"""Decay of a norm's running statistics per step: new = DECAY * old + (1 - DECAY) * batch."""

Stretch = Callable[[Parameters, Statistics, Array], tuple[Array, Statistics]]

ACTIVATIONS = {"relu": nn.relu, "tanh": nn.tanh}
NON_DECREASING = {"relu", "tanh"}
"""Names of non-decreasing activations. For such an activation f, max(f(a), f(b)) = f(max(a, b))."""


def kernel_shape(layer: Conv | Local | Full | Dense, input_shape: Shape) -> Shape:
    """Return the shape of a layer's kernel on an input `(*spatial, channel)`.

    Convolution: `(*window, channel, feature)`. Local layer: `(*positions, *window, channel, feature)`. For convolutions
    and local layers, `channel` counts only the input channels of one group. Full layer: `(input node, output node)`.
    Nodes are numbered in row-major order, with the channel index changing fastest.
    """
    if isinstance(layer, Full | Dense):
        return (math.prod(input_shape), math.prod(layer.output_shape(input_shape)))
    window = layer.window(input_shape)
    positions = window.output_size if isinstance(layer, Local) else ()
    return (*positions, *window.size, input_shape[-1] // layer.groups, layer.features)


def bias_shape(layer: Conv | Local | Full | Dense, input_shape: Shape) -> Shape:
    """Return the shape of a layer's biases. A convolution has one per feature; others have one per output node."""
    return (layer.features,) if isinstance(layer, Conv) else layer.output_shape(input_shape)


def kernel_init(positions: int) -> nn.initializers.Initializer:
    """Return Flax's LeCun-normal initialiser (variance 1 / fan-in). The fan-in excludes the first `positions` axes."""
    initializer: nn.initializers.Initializer = nn.initializers.variance_scaling(
        1.0, "fan_in", "truncated_normal", batch_axis=tuple(range(positions))
    )
    return initializer


class Affine(nn.Module):
    """A layer with a kernel and a bias. The type of the layer decides how the kernel is applied (see `product`).

    Parameters are float32. The product runs in `compute_dtype`. Kernels start LeCun-normal (variance 1 / fan-in; for a
    full layer, the fan-in is the number of input nodes). Biases start at zero.
    """

    layer: Conv | Local | Full | Dense
    compute_dtype: DTypeLike
    pool: Layer | None = None
    """Max pooling to apply after the product and before the bias is added (see `Network`)."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        layer, input_shape = self.layer, x.shape[1:]
        x = x.astype(self.compute_dtype)
        initializer = kernel_init(len(input_shape) - 1 if isinstance(layer, Local) else 0)
        kernel = self.param("kernel", initializer, kernel_shape(layer, input_shape), jnp.float32)
        pool = self.pool if isinstance(self.pool, MaxPool) else None
        x = product(layer, x, kernel.astype(self.compute_dtype), pool)
        if layer.use_bias:
            shape = bias_shape(layer, input_shape)
            bias = self.param("bias", nn.initializers.zeros_init(), shape, jnp.float32).astype(self.compute_dtype)
            # Reshape explicitly, because the tests raise an error on implicit rank promotion.
            x = x + bias.reshape((1,) * (x.ndim - len(shape)) + shape)
        return x


class Normalised(nn.Module):
    """Batch normalisation (`spec.Norm`) and its running statistics.

    The module behaves like Flax's `nn.BatchNorm` with momentum 0.9. The running mean starts at 0 and the running
    variance at 1. Training uses the mean and the biased variance of the batch, and moves the running statistics towards
    them. (PyTorch moves the running variance towards the unbiased variance.) Evaluation uses the running statistics.
    The module computes in float64 for float64 inputs, and in float32 for all other inputs.
    """

    data_axis: str | None

    @nn.compact
    def __call__(self, x: Float[Array, "batch ..."], training: bool) -> Float[Array, "batch ..."]:
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones_init(), channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), channels, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        variance = self.variable("batch_stats", "variance", jnp.ones, channels, jnp.float32)
        if training:
            y, *batch = ops.batch_norm(x, scale, bias, EPSILON, self.data_axis)
            for running, seen in zip((mean, variance), batch, strict=True):
                running.value = (DECAY * running.value + (1 - DECAY) * seen).astype(running.value.dtype)
            return y
        row = (1,) * (x.ndim - 1) + channels
        gain = scale / jnp.sqrt(variance.value + EPSILON)
        y = (x - mean.value.reshape(row)) * gain.reshape(row) + bias.reshape(row)
        return y.astype(x.dtype)


def product(layer: Conv | Local | Full | Dense, x: Array, kernel: Array, pool: MaxPool | None = None) -> Array:
    """Apply `kernel` to `x`, an array `(batch, *spatial, channel)`, without biases.

    If `pool` is given, `layer` is a convolution, and `pool` is applied to its result.
    """
    if isinstance(layer, Full | Dense):
        return (x.reshape(x.shape[0], -1) @ kernel).reshape(x.shape[0], *layer.output_shape(x.shape[1:]))
    arguments: dict[str, Any] = {
        "strides": layer.strides,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "feature_group_count": layer.groups,
    }
    if isinstance(layer, Local):
        return (ops.local2d if x.ndim == 4 else ops.local1d)(x, kernel, **arguments)
    return (ops.conv2d if x.ndim == 4 else ops.conv1d)(x, kernel, **arguments, pool=pool)


class Network(nn.Module):
    """A sequence of layers as a Flax module: `init(key, x)` gives variables, `apply(variables, x)` the output.

    `x` is a float array `(batch, *spatial, channel)`. The output has type `compute_dtype`. If `training` is true, norms
    use the batch's statistics and update the running statistics. The running statistics are in the collection
    `batch_stats`, so `apply` must be called with `mutable=["batch_stats"]`.

    Adding a bias, rounding and non-decreasing activations do not change the order of values. Therefore max pooling
    gives the same result before these operations as after them. We pool first, because the operations then run on fewer
    values: on a quarter of them for a 2x2 window. Gradients are also the same, unless rounding makes different values
    equal. In this case, only the value that was largest before rounding gets the gradient.
    """

    layers: tuple[Layer, ...]
    compute_dtype: DTypeLike = jnp.float32
    data_axis: str | None = None
    """Mesh axis along which devices divide each training batch (`ops.batch_norm`)."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch ..."], training: bool = False) -> Float[Array, "batch ..."]:
        x = x.astype(self.compute_dtype)
        early = pools_before_bias(self.layers)
        for index, layer in enumerate(self.layers):
            if index not in early.values():
                pool = early.get(index)
                x = self.apply_layer(layer, x, training, f"layer_{index}", None if pool is None else self.layers[pool])
        return x

    def apply_layer(self, layer: Layer, x: Array, training: bool, name: str, pool: Layer | None) -> Array:
        """Apply one layer. If `pool` is given, `layer` is a convolution, and the pooling runs before its bias."""
        match layer:
            case Conv() | Local() | Full() | Dense():
                return Affine(layer, self.compute_dtype, pool, name=name)(x)
            case MaxPool():
                return max_pool(x, layer)
            case AvgPool():
                return ops.avg_pool(x, layer.window_shape, layer.strides, layer.padding)
            case Activation():
                return ACTIVATIONS[layer.function](x)
            case Norm():
                return Normalised(self.data_axis, name=name)(x, training)
            case Residual():
                own = (self.compute_dtype, self.data_axis)
                branch = Network(layer.layers, *own, name=name)(x, training)
                shortcut = Network(layer.shortcut, *own, name=f"{name}_shortcut")(x, training)
                return shortcut + branch


def max_pool(x: Array, layer: MaxPool) -> Array:
    """Apply max pooling to `(batch, *spatial, channel)`."""
    return ops.max_pool(x, layer.window_shape, layer.strides, layer.padding)


def pools_before_bias(layers: tuple[Layer, ...]) -> dict[int, int]:
    """Find the convolutions whose max pooling can run before the bias is added.

    The result maps the index of the convolution in `layers` to the index of its pooling. Only a convolution has the
    same bias at all positions of a window. Pooling cannot move before a norm, because the scale of the norm may be
    negative.
    """
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


def initial(network: Network, key: Key[Array, ""], input_shape: Shape) -> tuple[Parameters, Statistics]:
    """Draw a network's initial parameters from `key`. Return them and the initial statistics of the network's norms."""
    variables = network.init(key, jnp.zeros((1, *input_shape), jnp.float32))
    return variables["params"], variables.get("batch_stats", {})


def logits(
    network: Network, parameters: Parameters, statistics: Statistics, x: Float[Array, "batch ..."]
) -> Float[Array, "batch classes"]:
    """Return the network's output in float32. Losses are always computed in float32."""
    return jnp.asarray(network.apply({"params": parameters, "batch_stats": statistics}, x), jnp.float32)


def training_logits(
    network: Network, parameters: Parameters, statistics: Statistics, x: Float[Array, "batch ..."], remat: bool = False
) -> tuple[Float[Array, "batch classes"], Statistics]:
    """Return the logits in training and the updated running statistics. Norms use the batch's statistics.

    If `remat` is true, the layers are cut into `stretches`. For the backward pass, only the input of each stretch is
    kept. The backward pass computes the other maps again.
    """
    changed: Statistics = {}
    for first, end in stretches(network.layers) if remat else [(0, len(network.layers))]:
        part = network.clone(layers=network.layers[first:end])
        own, seen = (renamed(known, first, end, -first) for known in (parameters, statistics))
        x, after = (computed_again(applied(part)) if remat else applied(part))(own, seen, x)
        changed |= renamed(after, 0, end - first, first)
    return jnp.asarray(x, jnp.float32), changed


def applied(network: Network) -> Stretch:
    """Return the network's training function: `apply(parameters, statistics, x) -> (output, statistics)`."""

    def apply(parameters: Parameters, statistics: Statistics, x: Array) -> tuple[Array, Statistics]:
        variables = {"params": parameters, "batch_stats": statistics}
        output, changed = network.apply(variables, x, training=True, mutable=["batch_stats"])
        return jnp.asarray(output), changed.get("batch_stats", {})

    return apply


def renamed(known: Parameters, first: int, end: int, by: int) -> Parameters:
    """Return the entries of the layers `first` to `end - 1`. In their names, add `by` to the layer's number."""
    found = {}
    for name, value in known.items():
        _, number, *rest = name.split("_")
        if first <= int(number) < end:
            found["_".join(["layer", str(int(number) + by), *rest])] = value
    return found


def stretches(layers: tuple[Layer, ...]) -> list[tuple[int, int]]:
    """Cut `layers` into stretches: after each pooling, and before and after each residual.

    Return one pair `(first, end)` per stretch. The layers of a stretch are `first` to `end - 1`.
    """
    ends = {0, len(layers)}
    for index, layer in enumerate(layers):
        if isinstance(layer, MaxPool | AvgPool | Residual):
            ends.add(index + 1)
        if isinstance(layer, Residual):
            ends.add(index)
    return list(itertools.pairwise(sorted(ends)))


def computed_again(stretch: Stretch) -> Stretch:
    """Return `stretch` with another derivative, which keeps only the arguments and computes the rest again.

    `jax.checkpoint` separates the forward computation from its repetition with a barrier. On a CPU, XLA (jaxlib 0.10.2)
    removes the barrier, merges the two equal computations, and so keeps the maps. Here the repetition uses `-x` if the
    first value of the incoming gradient is NaN, and `x` if not. The compiler cannot predict this gradient, so it cannot
    merge the computations. If the gradient is NaN, the result is NaN for `x` and `-x` alike.
    """

    def keep(*arguments: PyTree) -> tuple[PyTree, PyTree]:
        return stretch(*arguments), arguments

    def again(arguments: PyTree, cotangents: PyTree) -> PyTree:
        parameters, statistics, x = arguments
        back = cotangents[0].reshape(-1)[0]
        x = jnp.where(back == back, x, -x)
        return jax.vjp(stretch, parameters, statistics, x)[1](cotangents)

    function = jax.custom_vjp(stretch)
    function.defvjp(keep, again)
    return function


def network(model: Model, compute_dtype: DTypeLike = jnp.float32, data_axis: str | None = None) -> Network:
    """Return the Flax module of a model. The model's number of classes must be set (`model.with_num_classes`)."""
    return Network(model.layers, compute_dtype, data_axis)
