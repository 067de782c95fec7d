"""One Flax Linen module that reads a spec; the only file that knows Flax."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from cnnlib import ops
from cnnlib.spec import Activation, AvgPool, Conv, Dense, Full, Layer, Local, MaxPool, Model, Norm, Residual, Shape

Parameters = dict[str, Any]
"""Layer by layer, by position: `{"layer_0": {"kernel": ..., "bias": ...}, ...}`; a residual's layers nest, those of its
shortcut in `layer_0_shortcut`. `kernel_shape` and `bias_shape` say what is in an entry; a norm's is a `scale` and a
`bias`, one each a channel."""

Statistics = dict[str, Any]
"""What norms have seen, by the same paths: the running `mean` and `variance` of each channel. Empty without norms."""

EPSILON = 1e-5
"""Added to a norm's variance."""
DECAY = 0.9
"""Of a norm's running statistics at each step: they become DECAY of what they were and 1 - DECAY of the batch's."""

Stretch = Callable[[Parameters, Statistics, Array], tuple[Array, Statistics]]

ACTIVATIONS = {"relu": nn.relu, "tanh": nn.tanh}
NON_DECREASING = {"relu", "tanh"}
"""Activations that commute with a maximum."""


def kernel_shape(layer: Conv | Local | Full | Dense, input_shape: Shape) -> Shape:
    """The kernel of a layer on an input `(*spatial, channel)`.

    `(*window, channel, feature)` for a convolution, `(*positions, *window, channel, feature)` for a local layer, both
    with the channels of one group, and `(node, node)` for a full one, the nodes of a map row by row, channels fastest.
    """
    if isinstance(layer, Full | Dense):
        return (math.prod(input_shape), math.prod(layer.output_shape(input_shape)))
    window = layer.window(input_shape)
    positions = window.output_size if isinstance(layer, Local) else ()
    return (*positions, *window.size, input_shape[-1] // layer.groups, layer.features)


def bias_shape(layer: Conv | Local | Full | Dense, input_shape: Shape) -> Shape:
    """The biases of a layer: one a feature where weights are shared, else one a node of its output."""
    return (layer.features,) if isinstance(layer, Conv) else layer.output_shape(input_shape)


def kernel_init(positions: int) -> nn.initializers.Initializer:
    """LeCun-normal, as in Flax's own layers: variance 1 / fan-in, where the leading `positions` axes are no inputs."""
    initializer: nn.initializers.Initializer = nn.initializers.variance_scaling(
        1.0, "fan_in", "truncated_normal", batch_axis=tuple(range(positions))
    )
    return initializer


class Affine(nn.Module):
    """A layer with a kernel and a bias; which product joins them to the input is the layer's kind.

    Parameters are float32; the product runs in `compute_dtype`. Kernels start LeCun-normal (variance 1 / fan-in, which
    for a full layer are all nodes of its input), biases at zero.
    """

    layer: Conv | Local | Full | Dense
    compute_dtype: DTypeLike
    pool: Layer | None = None
    """Max pooling between the product and the bias (see `Network`)."""

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
            # Spelled out, since the test session raises on implicit rank promotion.
            x = x + bias.reshape((1,) * (x.ndim - len(shape)) + shape)
        return x


class Normalised(nn.Module):
    """Batch normalisation with its running statistics (`spec.Norm`).

    As Flax's `nn.BatchNorm` with momentum 0.9: training uses the batch's mean and biased variance, and moves towards
    these the running ones, which start at 0 and 1; otherwise the running ones are used. (PyTorch moves its running
    variance towards the unbiased one.) Computed in float32 whatever the type of its input (float64 in float64).
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
    """The layer's input `(batch, *spatial, channel)` joined to its kernel, without biases; of a convolution, pooled."""
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

    `x` is `(batch, *spatial, channel)`, float; the output is of `compute_dtype`. With `training` norms use the
    statistics of the batch, and move their running ones, the collection `batch_stats`, which must be mutable then.

    A bias, a rounding and a non-decreasing activation commute with a maximum: max pooling after them gives the same
    values as before them. So it comes first, and they run on what is left, a quarter for a window of 2x2. Gradients are
    the same too, except where rounding makes values tie that did not before: there only the true largest has it.
    """

    layers: tuple[Layer, ...]
    compute_dtype: DTypeLike = jnp.float32
    data_axis: str | None = None
    """The axis of a mesh along which devices share each batch of training (`ops.batch_norm`)."""

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
        """One layer, and with a convolution the pooling that comes before its bias."""
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
    """The layer applied to `(batch, *spatial, channel)`."""
    return ops.max_pool(x, layer.window_shape, layer.strides, layer.padding)


def pools_before_bias(layers: tuple[Layer, ...]) -> dict[int, int]:
    """Positions of convolutions, each with that of the max pooling that may move to before its bias.

    Only of convolutions, whose bias is the same all over a window, and not past a norm, whose scale may be negative.
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
    """A network's parameters, drawn from the key, and the statistics that its norms begin with."""
    variables = network.init(key, jnp.zeros((1, *input_shape), jnp.float32))
    return variables["params"], variables.get("batch_stats", {})


def logits(
    network: Network, parameters: Parameters, statistics: Statistics, x: Float[Array, "batch ..."]
) -> Float[Array, "batch classes"]:
    """The network's output in float32, in which losses are computed whatever the network computes in."""
    return jnp.asarray(network.apply({"params": parameters, "batch_stats": statistics}, x), jnp.float32)


def training_logits(
    network: Network, parameters: Parameters, statistics: Statistics, x: Float[Array, "batch ..."], remat: bool = False
) -> tuple[Float[Array, "batch classes"], Statistics]:
    """The same where norms use the statistics of the batch, and the running ones after it.

    With `remat` the derivative keeps only what enters each of the `stretches`, and computes the rest again.
    """
    changed: Statistics = {}
    for first, end in stretches(network.layers) if remat else [(0, len(network.layers))]:
        part = network.clone(layers=network.layers[first:end])
        own, seen = (renamed(known, first, end, -first) for known in (parameters, statistics))
        x, after = (computed_again(applied(part)) if remat else applied(part))(own, seen, x)
        changed |= renamed(after, 0, end - first, first)
    return jnp.asarray(x, jnp.float32), changed


def applied(network: Network) -> Stretch:
    """The function that trains with a network: `apply(parameters, statistics, x) -> (output, statistics)`."""

    def apply(parameters: Parameters, statistics: Statistics, x: Array) -> tuple[Array, Statistics]:
        variables = {"params": parameters, "batch_stats": statistics}
        output, changed = network.apply(variables, x, training=True, mutable=["batch_stats"])
        return jnp.asarray(output), changed.get("batch_stats", {})

    return apply


def renamed(known: dict[str, Any], first: int, end: int, by: int) -> dict[str, Any]:
    """The entries of layers `first` to before `end`, their positions moved by so many."""
    found = {}
    for name, value in known.items():
        _, number, *rest = name.split("_")
        if first <= int(number) < end:
            found["_".join(["layer", str(int(number) + by), *rest])] = value
    return found


def stretches(layers: tuple[Layer, ...]) -> list[tuple[int, int]]:
    """Where maps are cheapest to keep: layers up to each pooling, and residuals alone; first and end of each."""
    ends = {0, len(layers)}
    for index, layer in enumerate(layers):
        if isinstance(layer, MaxPool | AvgPool | Residual):
            ends.add(index + 1)
        if isinstance(layer, Residual):
            ends.add(index)
    return list(itertools.pairwise(sorted(ends)))


def computed_again(stretch: Stretch) -> Stretch:
    """A function of which the derivative keeps the arguments alone.

    `jax.checkpoint` does that with a barrier that XLA takes away on a CPU (jaxlib 0.10.2) before it finds the same
    computation twice, and keeps the first. Here the second one's input is chosen by what comes back from the layers
    behind, which no compiler can know: it is the input, unless the first number that comes back is not a number, as
    then the gradient is not one either.
    """

    def keep(*arguments: Any) -> tuple[Any, Any]:
        return stretch(*arguments), arguments

    def again(arguments: Any, cotangents: Any) -> Any:
        parameters, statistics, x = arguments
        back = cotangents[0].reshape(-1)[0]
        x = jnp.where(back == back, x, -x)
        return jax.vjp(stretch, parameters, statistics, x)[1](cotangents)

    function = jax.custom_vjp(stretch)
    function.defvjp(keep, again)
    return function


def network(model: Model, compute_dtype: DTypeLike = jnp.float32, data_axis: str | None = None) -> Network:
    """The Flax module of a model; its `Dense(NUM_CLASSES)` must have been given their number."""
    return Network(model.layers, compute_dtype, data_axis)
