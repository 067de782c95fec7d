"""Activations and receptive fields of the layers of a trained net.

All of `cnnlib.interpret` works for full, local and convolutional nets. Functions take a layer as its position in
`net.model.layers`; a residual is one layer. They take images `(height, width, channel)` as stored, that is, not
normalised. `activations` and `linear_probes` accept signals too; functions for images raise UserError for signals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from cnnlib.errors import UserError
from cnnlib.interpret.trained import Net
from cnnlib.nn.network import Parameters, Statistics, network
from cnnlib.spec import counts
from cnnlib.spec.counts import Field, LayerCount
from cnnlib.spec.model import Model
from cnnlib.spec.window import Shape, shape_text

BATCH_SIZE = 250
"""Largest number of examples that are on the device at the same time."""


# Outputs of layers.


def activations(
    net: Net, x: Num[np.ndarray, "count ..."], layers: Sequence[int] | None = None
) -> list[Float[np.ndarray, "count ..."]]:
    """Return the outputs `(count, *shape)` of some layers for stored examples, one array per layer.

    `layers` of None means all layers. Batch norms use the running statistics. The outputs of the last layer are the
    logits. The device holds `BATCH_SIZE` examples at a time; the host's memory holds all returned outputs. Raises
    UserError if the examples do not have the shape of the net's input, or if a layer does not exist.
    """
    wanted = tuple(range(len(net.model.layers)) if layers is None else (checked_layer(net, at) for at in layers))
    parts = [
        jax.device_get(outputs(net.model, net.parameters, net.statistics, batch, wanted))
        for batch in batches(net, x, BATCH_SIZE)
    ]
    return [np.concatenate(rows)[: len(x)] for rows in zip(*parts, strict=True)]


@partial(jax.jit, static_argnames=("model", "wanted"))
def outputs(
    model: Model,
    parameters: Parameters,
    statistics: Statistics,
    x: Float[Array, "batch ..."],
    wanted: tuple[int, ...],
) -> list[Float[Array, "batch ..."]]:
    """Return the outputs of the layers in `wanted` for normalised examples."""
    found = {}
    for layer in range(max(wanted, default=-1) + 1):
        x = found[layer] = through(model, parameters, statistics, x, layer, layer + 1)
    return [found[layer] for layer in wanted]


def through(model: Model, parameters: Parameters, statistics: Statistics, x: Array, first: int, end: int) -> Array:
    """Apply layers `first` to `end` - 1 to `x`: the output of layer `first` - 1, or the examples if `first` is 0."""
    if first == end:
        return x
    own, seen = (
        {
            f"layer_{layer - first}{tail}": tree[f"layer_{layer}{tail}"]
            for layer in range(first, end)
            for tail in ("", "_shortcut")
            if f"layer_{layer}{tail}" in tree
        }
        for tree in (parameters, statistics)
    )
    output: Any = network(Model(model.layers[first:end])).apply({"params": own, "batch_stats": seen}, x)
    return jnp.asarray(output)


def batches(net: Net, x: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Normalise stored examples and yield batches of `size`; repeat the last example to fill the last batch."""
    if len(x) == 0 or x.shape[1:] != net.input_shape:
        raise UserError(f"the net sees examples of {shape_text(net.input_shape)}, one or more, not {x.shape}")
    size = min(size, len(x))
    for start in range(0, len(x), size):
        yield net.seen(x[np.minimum(np.arange(start, start + size), len(x) - 1)])


# Receptive fields.


class Rectangle(NamedTuple):
    """Rows `top` to `bottom` - 1 and columns `left` to `right` - 1 of an image.

    The rectangle may reach beyond the image, onto the zeros around it.
    """

    top: int
    bottom: int
    left: int
    right: int


def receptive_field(net: Net, layer: int, position: tuple[int, ...] = ()) -> Rectangle:
    """Return the part of the image that the units at `position` of a layer depend on.

    `position` is `(row, column)`, or `()` if the layer's output is a vector. Pixels outside the returned rectangle do
    not change these units. For a full layer, the rectangle is the whole part of the image that the earlier layers see.
    Raises UserError if the layer or the position does not exist, or if the net takes signals.
    """
    found = counted(net, layer)
    places = found.output_shape[:-1]
    if len(position) != len(places) or any(not 0 <= at < n for at, n in zip(position, places, strict=True)):
        known = f"positions within {shape_text(places)}" if places else "no positions"
        raise UserError(f"layer {layer} has {known}, not {position}")
    fields = [known_field(field, layer) for field in found.fields]
    starts = [
        at * field.stride - field.padding for at, field in zip(position or (0,) * len(fields), fields, strict=True)
    ]
    (top, left), (height, width) = starts, (field.size for field in fields)
    return Rectangle(top, top + height, left, left + width)


# Checks of arguments.


def checked_layer(net: Net, layer: int) -> int:
    """Return `layer`; raise UserError if the net has no such layer."""
    if not 0 <= layer < len(net.model.layers):
        raise UserError(f"no layer {layer}: {net.model} has layers 0 to {len(net.model.layers) - 1}")
    return layer


def check_image_net(net: Net) -> None:
    """Raise UserError if the net takes signals instead of images."""
    if len(net.input_shape) != 3:
        raise UserError(f"this net sees signals of {shape_text(net.input_shape)}; height x width x channel is needed")


def layer_counts(model: Model, input_shape: Shape, layer: int) -> list[LayerCount]:
    """Return the counts of the layers at position `layer` of the model; a residual contains several layers."""
    return [found for found in counts.layers(model, input_shape) if found.path == (f"layer_{layer}",)]


def counted(net: Net, layer: int) -> LayerCount:
    """Return the counts of a layer. They include the layer's shapes and receptive fields."""
    check_image_net(net)
    (found,) = layer_counts(net.model, net.input_shape, checked_layer(net, layer))
    return found


def known_field(field: Field | None, layer: int) -> Field:
    """Return `field`; raise UserError if it is None. None means that the receptive field differs between positions."""
    if field is None:
        raise UserError(f"layer {layer}: what it sees differs from position to position, in size too")
    return field
