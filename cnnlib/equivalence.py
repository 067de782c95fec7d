"""Exact maps between the parameters of one model's three readings, and the projections back.

A convolution is a local layer whose positions have equal weights, and a local layer is a full one whose weights are
zero outside the windows. `expand` follows these inclusions, from one tree of parameters to another, and both nets
compute the same function. `project` goes back: to the nearest point of the smaller set, in the least-squares sense
over the weights of the larger, with the distance to it, which is zero where the larger net is one of the smaller.
Dense layers and norms are the same in all readings, and so are the statistics of norms: they pass unchanged.

Everything here is made of linear functions of arrays: it runs under jit, vmap and differentiation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cnnlib import cost
from cnnlib.errors import UserError
from cnnlib.models import Parameters, bias_shape, kernel_shape
from cnnlib.spec import FILTERS, READINGS, Connectivity, Filter, Model, Norm, Shape, Window


class Projection(NamedTuple):
    """The nearest parameters of a reading that shares more."""

    parameters: Parameters
    distance: dict[str, Array]
    """For each layer that changed, by its path such as `layer_3` or `layer_3/layer_0`: the norm of what its kernel and
    biases lost, over the norm of what they were; 0 where nothing was lost, 1 where all was."""
    total: Array
    """The same over all these layers together."""


def expand(model: Model, parameters: Parameters, input_shape: Shape, to: Connectivity) -> Parameters:
    """The parameters of `model.with_connectivity(to)` that compute what `model` computes.

    `parameters` are those of `model` on inputs of `input_shape`. Weights of a local layer's taps on the padding, which
    meet zeros only, become those of the convolution too. Raises UserError where `to` shares more than the model.
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
    """The parameters of `model.with_connectivity(to)` nearest to those of `model`, a reading that shares less.

    Layer by layer the one that minimises the sum of squared differences over all connections, taps on the padding left
    out: outside a window weights are dropped, and tied weights are the mean of theirs. A weight that no connection
    uses, since its tap is on the padding at every position, is 0. Raises UserError where `to` shares less than the
    model.
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
                # Not a product with the mask: what is not a number on the padding is left out as well.
                seen[name] = jnp.where(mask > 0, positions, jnp.zeros((), value.dtype))
                mean = _mean(seen[name], mask)
                nearest[name] = mean.reshape(value.shape[len(window.output_size) :])
                back[name] = mean * mask
            entry = seen
        # The steps of a layer are projections onto nested sets, so what they lose adds up in squares.
        lost[path] = lost.get(path, jnp.zeros(())) + sum(jnp.sum((entry[name] - back[name]) ** 2) for name in entry)
        whole.setdefault(path, sum((jnp.sum(value**2) for value in entry.values()), jnp.zeros(())))
        return nearest

    nearest = _along(model, parameters, input_shape, to, READINGS[::-1], change)
    total = _ratio(sum(lost.values(), jnp.zeros(())), sum(whole.values(), jnp.zeros(())))
    return Projection(nearest, {path: _ratio(lost[path], whole[path]) for path in lost}, total)


def tied(model: Model, gradient: Parameters, input_shape: Shape, source: Connectivity) -> Parameters:
    """The gradient in the parameters of `model`, from the gradient in those that `expand` makes of them for `source`.

    It sums over the weights that the model ties together: the transpose of `expand`.
    """
    like = parameter_shapes(model, input_shape, jax.tree.leaves(gradient)[0].dtype)
    transpose = jax.linear_transpose(lambda parameters: expand(model, parameters, input_shape, source), like)
    (summed,) = transpose(gradient)
    result: Parameters = summed
    return result


def parameter_shapes(model: Model, input_shape: Shape, dtype: Any = jnp.float32) -> Parameters:
    """Shapes and types of a model's parameters, without Flax and without any array."""
    tree: Parameters = {}
    for layer in cost.layers(model, input_shape):
        if layer.count.parameters:
            kind: Any = layer.layer
            if isinstance(kind, Norm):
                shapes = dict.fromkeys(("scale", "bias"), layer.input_shape[-1:])
            else:
                shapes = {"kernel": kernel_shape(kind, layer.input_shape)}
                if kind.use_bias:
                    shapes["bias"] = bias_shape(kind, layer.input_shape)
            struct: Any = jax.ShapeDtypeStruct  # its constructor is not annotated
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
    """The parameters with each layer that has a window brought to `to`, one step of `order` after another."""
    names = {kind: name for name, kind in FILTERS.items()}
    for layer in cost.layers(model, input_shape):
        if not isinstance(layer.layer, Filter):
            continue
        start, end = order.index(names[type(layer.layer)]), order.index(to)
        if start > end:
            way = "project" if order is READINGS else "expand"
            raise UserError(f"{layer.layer} is no special case of a {to} layer in this direction; {way} goes there")
        entry: Any = parameters
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


def _with_entry(tree: Parameters, path: tuple[str, ...], entry: dict[str, Any]) -> Parameters:
    """The tree with what is at a path replaced."""
    name, *rest = path
    return {**tree, name: _with_entry(tree.get(name, {}), tuple(rest), entry) if rest else entry}


def under(window: Window) -> np.ndarray:
    """Which place of the map is under each tap at each position: `(positions, taps)`, row by row, -1 on padding."""
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
    """A kernel of groups as one of all channels, zero where channel and feature are of different groups."""
    if groups == 1:
        return kernel
    *axes, channels, features = kernel.shape
    blocks = kernel.reshape(*axes, 1, channels, groups, features // groups)
    is_own = jnp.eye(groups, dtype=bool).reshape(*(1,) * len(axes), groups, 1, groups, 1)
    return jnp.where(is_own, blocks, jnp.zeros((), kernel.dtype)).reshape(*axes, groups * channels, features)


def _grouped(kernel: Array, groups: int) -> Array:
    """The part of a kernel of all channels where channel and feature are of one group."""
    if groups == 1:
        return kernel
    *axes, channels, features = kernel.shape
    blocks = kernel.reshape(*axes, groups, channels // groups, groups, features // groups)
    own = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -2)
    return own.reshape(*axes, channels // groups, features)


def _scattered(kernel: Array, window: Window, groups: int) -> Float[Array, "input_node output_node"]:
    """A local kernel as the matrix of the full layer that computes the same."""
    places, kernel = under(window), _ungrouped(kernel, groups)
    position, tap = np.nonzero(places >= 0)
    *_, channels, features = kernel.shape
    inputs, outputs = math.prod(window.input_size), math.prod(window.output_size)
    flat = kernel.reshape(outputs, -1, channels, features)
    matrix = jnp.zeros((inputs, outputs, channels, features), kernel.dtype)
    matrix = matrix.at[places[position, tap], position].set(flat[position, tap], unique_indices=True)
    return matrix.transpose(0, 2, 1, 3).reshape(inputs * channels, outputs * features)


def _gathered(matrix: Float[Array, "input_node output_node"], window: Window, channels: int, groups: int) -> Array:
    """The windows' and groups' part of a full layer's matrix as a local kernel; taps on the padding are 0."""
    places = under(window)
    position, tap = np.nonzero(places >= 0)
    inputs, outputs = math.prod(window.input_size), math.prod(window.output_size)
    features = matrix.shape[1] // outputs
    blocks = matrix.reshape(inputs, channels, outputs, features).transpose(0, 2, 1, 3)
    kernel = jnp.zeros((outputs, places.shape[1], channels, features), matrix.dtype)
    kernel = kernel.at[position, tap].set(blocks[places[position, tap], position], unique_indices=True)
    return _grouped(kernel.reshape(*window.output_size, *window.size, channels, features), groups)


def _mean(values: Array, mask: Array) -> Array:
    """The mean over the first axis of what the mask, of zeros and ones, lets through, `(1, ...)`; 0 where it lets none.

    Measured from one of the values: the mean of equal ones is that value to the last bit.
    """
    first = jnp.argmax(mask, axis=0, keepdims=True)
    base = jnp.take_along_axis(values, jnp.broadcast_to(first, (1, *values.shape[1:])), axis=0)
    count = mask.sum(axis=0, keepdims=True)
    mean = base + ((values - base) * mask).sum(axis=0, keepdims=True) / jnp.maximum(count, 1)
    return jnp.where(count > 0, mean, jnp.zeros((), mean.dtype))


def _ratio(lost: Array, whole: Array) -> Array:
    return jnp.sqrt(lost / jnp.where(whole > 0, whole, 1))
