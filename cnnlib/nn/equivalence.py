"""Convert a model's parameters between the three connectivities: convolutional (conv), local and full.

A convolution is a local layer with equal weights at all positions. A local layer is a full layer whose weights are zero
outside the windows. `expand` goes from conv to local to full: it returns parameters with which the new net computes
exactly the same function. `project` goes from full to local to conv: it finds the parameters of the new net that are
nearest to the old net by least squares over the old weights. It also returns the distance, which is 0 if the new net
can represent the old net. Dense layers, norms and the statistics of norms are the same in all connectivities, so they
are not changed.

All conversions of parameters here are linear functions of arrays. They work under jit, vmap and differentiation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from cnnlib.errors import UserError
from cnnlib.nn.network import Parameters, bias_shape, kernel_shape
from cnnlib.spec import counts
from cnnlib.spec.layers import FILTERS, READINGS, Connectivity, Filter, Norm
from cnnlib.spec.model import Model
from cnnlib.spec.window import Shape, Window


class Projection(NamedTuple):
    """The nearest parameters of a connectivity that shares more weights, and the distance to them."""

    parameters: Parameters
    distance: dict[str, Array]
    """Relative distance per changed layer. The keys are paths, such as `layer_3` or `layer_3/layer_0`. The distance is
    the norm of the change of kernel and biases, divided by the norm of the old kernel and biases. 0: nothing was lost.
    1: everything was lost."""
    total: Array
    """Relative distance over all changed layers together."""


def expand(model: Model, parameters: Parameters, input_shape: Shape, to: Connectivity) -> Parameters:
    """Return parameters with which `model.with_connectivity(to)` computes the same function as `model`.

    `parameters` are the parameters of `model` for inputs of `input_shape`. A new local layer also has weights for taps
    on the padding. These weights are copied from the convolution, and they are multiplied only by zeros. Raise
    UserError if `to` shares more weights than the model.
    """

    def change(path: str, layer: Filter, shape: Shape, entry: dict[str, Array], step: str) -> dict[str, Array]:
        window, expanded = layer.window(shape), {}
        positions = window.output_size
        if step == "local":
            expanded["kernel"] = jnp.broadcast_to(entry["kernel"], (*positions, *entry["kernel"].shape))
            if "bias" in entry:
                expanded["bias"] = jnp.broadcast_to(entry["bias"], (*positions, *entry["bias"].shape))
        else:
            expanded = {**entry, "kernel": _scattered(entry["kernel"], window, layer.groups)}
        return expanded

    return _along(model, parameters, input_shape, to, READINGS, change)


def project(model: Model, parameters: Parameters, input_shape: Shape, to: Connectivity) -> Projection:
    """Find the parameters of `model.with_connectivity(to)` that are nearest to `parameters`.

    The connectivity `to` must share more weights than the model, or be the same. For each layer, the result minimises
    the sum of squared differences over all connections. A tap on the padding is not a connection. A projection to local
    drops the weights outside the windows. A projection to conv sets each shared weight to the mean of the weights at
    all positions where its tap is a connection. If there is no such position, the shared weight becomes 0. Raise
    UserError if `to` shares fewer weights than the model.
    """
    lost: dict[str, Array] = {}
    whole: dict[str, Array] = {}

    def change(path: str, layer: Filter, shape: Shape, entry: dict[str, Array], step: str) -> dict[str, Array]:
        window = layer.window(shape)
        if step == "local":
            nearest = {**entry, "kernel": _gathered(entry["kernel"], window, shape[-1], layer.groups)}
            back = {**entry, "kernel": _scattered(nearest["kernel"], window, layer.groups)}
        else:
            nearest, back, seen = {}, {}, {}
            for name, value in entry.items():
                positions = value.reshape(math.prod(window.output_size), -1, *value.shape[-2:][name == "bias" :])
                is_used = _inside(window) if name == "kernel" else np.ones(positions.shape[:2], bool)
                mask = jnp.asarray(is_used.reshape(*is_used.shape, *(1,) * (positions.ndim - 2)), value.dtype)
                # `where` drops NaN on the padding too. A product with the mask would keep NaN.
                seen[name] = jnp.where(mask > 0, positions, jnp.zeros((), value.dtype))
                mean = _mean(seen[name], mask)
                nearest[name] = mean.reshape(value.shape[len(window.output_size) :])
                back[name] = mean * mask
            entry = seen
        # A layer may take two steps, from full to local to conv. Each step projects onto a subspace of the previous
        # one, so the squared distances of the steps add up.
        lost[path] = lost.get(path, jnp.zeros(())) + sum(jnp.sum((entry[name] - back[name]) ** 2) for name in entry)
        whole.setdefault(path, sum((jnp.sum(value**2) for value in entry.values()), jnp.zeros(())))
        return nearest

    nearest = _along(model, parameters, input_shape, to, READINGS[::-1], change)
    total = _ratio(sum(lost.values(), jnp.zeros(())), sum(whole.values(), jnp.zeros(())))
    return Projection(nearest, {path: _ratio(lost[path], whole[path]) for path in lost}, total)


def tied(model: Model, gradient: Parameters, input_shape: Shape, source: Connectivity) -> Parameters:
    """Convert the gradient of expanded parameters to the gradient of the parameters of `model`.

    `source` is the connectivity of the expanded parameters, to which `gradient` belongs. The conversion is the
    transpose of `expand`: if several weights are one weight in `model`, it adds their gradients.
    """
    like = parameter_shapes(model, input_shape, jax.tree.leaves(gradient)[0].dtype)
    transpose = jax.linear_transpose(lambda parameters: expand(model, parameters, input_shape, source), like)
    (summed,) = transpose(gradient)
    result: Parameters = summed
    return result


def parameter_shapes(model: Model, input_shape: Shape, dtype: Any = jnp.float32) -> Parameters:
    """Return the shapes and types of a model's parameters, without using Flax or creating arrays."""
    tree: Parameters = {}
    for layer in counts.layers(model, input_shape):
        if layer.count.parameters:
            kind: Any = layer.layer
            if isinstance(kind, Norm):
                shapes = dict.fromkeys(("scale", "bias"), layer.input_shape[-1:])
            else:
                shapes = {"kernel": kernel_shape(kind, layer.input_shape)}
                if kind.use_bias:
                    shapes["bias"] = bias_shape(kind, layer.input_shape)
            struct: Any = jax.ShapeDtypeStruct  # its constructor has no type annotations
            entry = {name: struct(shape, dtype) for name, shape in shapes.items()}
            tree = _with_entry(tree, layer.path, entry)
    return tree


def _along(
    model: Model,
    parameters: Parameters,
    input_shape: Shape,
    to: Connectivity,
    order: tuple[Connectivity, ...],
    change: Callable[[str, Filter, Shape, dict[str, Array], str], dict[str, Array]],
) -> Parameters:
    """Apply `change` to each layer that has a window, once per step, until the layer's connectivity is `to`.

    `order` lists the connectivities in the order in which the parameters are converted.
    """
    names = {kind: name for name, kind in FILTERS.items()}
    for layer in counts.layers(model, input_shape):
        if not isinstance(layer.layer, Filter):
            continue
        start, end = order.index(names[type(layer.layer)]), order.index(to)
        if start > end:
            way = "project" if order is READINGS else "expand"
            raise UserError(f"{layer.layer} is no special case of a {to} layer in this direction; {way} goes there")
        entry: PyTree = parameters
        for name in layer.path:
            entry = entry.get(name, {})
        shapes = {"kernel": kernel_shape(layer.layer, layer.input_shape)}
        if layer.layer.use_bias:
            shapes["bias"] = bias_shape(layer.layer, layer.input_shape)
        for name, expected in shapes.items():
            found = entry[name].shape if name in entry else None
            if found != expected:
                path = "/".join(layer.path)
                raise UserError(f"{path}: {layer.layer} has a {name} of shape {expected}, not {found}")
        for step in order[start + 1 : end + 1]:
            entry = change("/".join(layer.path), layer.layer, layer.input_shape, entry, step)
        parameters = _with_entry(parameters, layer.path, entry)
    return parameters


def _with_entry(tree: Parameters, path: tuple[str, ...], entry: Parameters) -> Parameters:
    """Return `tree`, but with `entry` at `path`."""
    name, *rest = path
    return {**tree, name: _with_entry(tree.get(name, {}), tuple(rest), entry) if rest else entry}


def under(window: Window) -> np.ndarray:
    """Return which input position each tap meets at each output position, as an array `(positions, taps)`.

    The value is -1 if the tap meets padding. All positions and taps are numbered in row-major order.
    """
    places, inside = np.zeros((1, 1), np.int64), np.ones((1, 1), bool)
    for n, k, s, d, (low, _), outputs in zip(
        window.input_size, window.size, window.strides, window.dilation, window.padding, window.output_size, strict=True
    ):
        axis = np.arange(outputs)[:, None] * s - low + np.arange(k)[None, :] * d
        shape = (len(places) * outputs, places.shape[1] * k)
        places = (places[:, None, :, None] * n + axis[None, :, None, :]).reshape(shape)
        inside = (inside[:, None, :, None] & ((axis >= 0) & (axis < n))[None, :, None, :]).reshape(shape)
    return np.where(inside, places, -1)


def _inside(window: Window) -> np.ndarray:
    return under(window) >= 0


def _ungrouped(kernel: Array, groups: int) -> Array:
    """Convert a grouped kernel to a kernel over all channels. Weights between different groups are zero."""
    if groups == 1:
        return kernel
    *axes, channels, features = kernel.shape
    blocks = kernel.reshape(*axes, 1, channels, groups, features // groups)
    is_own = jnp.eye(groups, dtype=bool).reshape(*(1,) * len(axes), groups, 1, groups, 1)
    return jnp.where(is_own, blocks, jnp.zeros((), kernel.dtype)).reshape(*axes, groups * channels, features)


def _grouped(kernel: Array, groups: int) -> Array:
    """Undo `_ungrouped`: keep only the weights between channels and features of the same group."""
    if groups == 1:
        return kernel
    *axes, channels, features = kernel.shape
    blocks = kernel.reshape(*axes, groups, channels // groups, groups, features // groups)
    own = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -2)
    return own.reshape(*axes, channels // groups, features)


def _scattered(kernel: Array, window: Window, groups: int) -> Float[Array, "input_node output_node"]:
    """Convert a local kernel to the matrix of the full layer that computes the same function."""
    places, kernel = under(window), _ungrouped(kernel, groups)
    position, tap = np.nonzero(places >= 0)
    *_, channels, features = kernel.shape
    inputs, outputs = math.prod(window.input_size), math.prod(window.output_size)
    flat = kernel.reshape(outputs, -1, channels, features)
    matrix = jnp.zeros((inputs, outputs, channels, features), kernel.dtype)
    matrix = matrix.at[places[position, tap], position].set(flat[position, tap], unique_indices=True)
    return matrix.transpose(0, 2, 1, 3).reshape(inputs * channels, outputs * features)


def _gathered(matrix: Float[Array, "input_node output_node"], window: Window, channels: int, groups: int) -> Array:
    """Convert a full layer's matrix to a local kernel. Keep weights inside windows and groups; padded taps become 0."""
    places = under(window)
    position, tap = np.nonzero(places >= 0)
    inputs, outputs = math.prod(window.input_size), math.prod(window.output_size)
    features = matrix.shape[1] // outputs
    blocks = matrix.reshape(inputs, channels, outputs, features).transpose(0, 2, 1, 3)
    kernel = jnp.zeros((outputs, places.shape[1], channels, features), matrix.dtype)
    kernel = kernel.at[position, tap].set(blocks[places[position, tap], position], unique_indices=True)
    return _grouped(kernel.reshape(*window.output_size, *window.size, channels, features), groups)


def _mean(values: Array, mask: Array) -> Array:
    """Return the mean, over the first axis, of the values whose mask is 1. If no mask is 1, return 0.

    The result has shape `(1, ...)`. The function chooses one value, averages the differences of all values from it, and
    adds this average to it. Therefore the mean of equal values is exact to the last bit.
    """
    first = jnp.argmax(mask, axis=0, keepdims=True)
    base = jnp.take_along_axis(values, jnp.broadcast_to(first, (1, *values.shape[1:])), axis=0)
    count = mask.sum(axis=0, keepdims=True)
    mean = base + ((values - base) * mask).sum(axis=0, keepdims=True) / jnp.maximum(count, 1)
    return jnp.where(count > 0, mean, jnp.zeros((), mean.dtype))


def _ratio(lost: Array, whole: Array) -> Array:
    return jnp.sqrt(lost / jnp.where(whole > 0, whole, 1))
