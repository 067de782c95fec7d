"""The filters of a net's first layer, and the image patches that excite its units most."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Num

from cnnlib.errors import UserError
from cnnlib.interpret.activations import BATCH_SIZE, Rectangle, batches, counted, receptive_field, through
from cnnlib.interpret.trained import Net
from cnnlib.nn.network import Parameters, Statistics
from cnnlib.spec import counts
from cnnlib.spec.model import Model
from cnnlib.spec.window import shape_text


class Patches(NamedTuple):
    """The patches that excite each unit of a layer most, strongest first. If a layer has maps, each map is one unit."""

    examples: Int[np.ndarray, "unit count"]
    """Index of the image of each patch. A unit has each image at most once."""
    positions: Int[np.ndarray, "unit count axis"]
    """Row and column of the patch in the layer's map. If the layer's output is a vector, the last axis has length 0."""
    values: Float[np.ndarray, "unit count"]
    """Output of the unit for the patch. After a ReLU, 0 means that the unit does not respond."""
    pixels: Float[np.ndarray, "unit count height width channel"]
    """Pixels of the patch. Outside the image, they are the mean of the training examples, which the net sees as 0."""


def strongest_patches(net: Net, x: Num[np.ndarray, "count height width channel"], layer: int, count: int) -> Patches:
    """Return the `count` patches that excite each unit of a layer most. Each image gives at most one patch per unit.

    A patch is the receptive field of the unit, as in Zeiler and Fergus, "Visualizing and understanding convolutional
    networks", 2014. (Zeiler and Fergus also use a deconvolution.) If positions or images tie, take the first one.
    Raises UserError if `count` exceeds the number of images, if the layer does not exist, or if the net takes signals.
    """
    places = counted(net, layer).output_shape[:-1]
    if not 1 <= count <= len(x):
        raise UserError(f"count={count}: there are {len(x)} images, each with one patch a unit at most")
    values, at = (
        np.concatenate(rows)[: len(x)]
        for rows in zip(
            *(
                jax.device_get(_peaks(net.model, net.parameters, net.statistics, batch, layer))
                for batch in batches(net, x, BATCH_SIZE)
            ),
            strict=True,
        )
    )
    examples = np.argsort(-values, axis=0, kind="stable")[:count].T
    units = np.arange(values.shape[1])[:, None]
    positions = np.stack(np.unravel_index(at[examples, units], places), axis=-1) if places else at[:0].T
    positions = positions.reshape(*examples.shape, len(places))
    pixels = np.stack(
        [
            np.stack(
                [
                    patch(net, x[example], receptive_field(net, layer, tuple(map(int, position))))
                    for example, position in zip(*row, strict=True)
                ]
            )
            for row in zip(examples, positions, strict=True)
        ]
    )
    return Patches(examples, positions, values[examples, units], pixels)


@partial(jax.jit, static_argnames=("model", "layer"))
def _peaks(
    model: Model, parameters: Parameters, statistics: Statistics, x: Float[Array, "batch ..."], layer: int
) -> tuple[Float[Array, "batch unit"], Int[Array, "batch unit"]]:
    """Return the largest value in each unit's map, and the index of this value in the flattened map."""
    y = through(model, parameters, statistics, x, 0, layer + 1)
    y = y.reshape(y.shape[0], -1, y.shape[-1])
    return y.max(axis=1), y.argmax(axis=1)


def patch(
    net: Net, image: Num[np.ndarray, "height width channel"], seen: Rectangle
) -> Float[np.ndarray, "patch_height patch_width channel"]:
    """Return a rectangle of a stored image; pixels outside the image are the mean of the training examples."""
    height, width, _ = image.shape
    patch = np.broadcast_to(net.mean, (seen.bottom - seen.top, seen.right - seen.left, image.shape[-1])).copy()
    top, bottom = max(seen.top, 0), min(seen.bottom, height)
    left, right = max(seen.left, 0), min(seen.right, width)
    if top < bottom and left < right:
        inside = image[top:bottom, left:right]
        patch[top - seen.top : bottom - seen.top, left - seen.left : right - seen.left] = inside
    return patch


# Filters of the first layer.


def first_filters(net: Net) -> Float[np.ndarray, "filter height width channel"]:
    """Return the kernels of the first layer with weights, as images.

    A convolution has one kernel per feature. In other layers, each node has its own kernel. These kernels are ordered
    by position (row by row), then by feature. Kernels of a local layer have the size of the window. Kernels of a full
    or dense layer have the size of the whole input. Raises UserError if the input is not an image.
    """
    first = next((layer for layer in counts.layers(net.model, net.input_shape) if layer.count.weights), None)
    if first is None or len(first.input_shape) != 3:
        of = "a net without weights" if first is None else f"an input of {shape_text(first.input_shape)}"
        raise UserError(f"filters are shown as images of height x width x channel; {of} has none")
    entry: Any = net.parameters
    for name in first.path:
        entry = entry[name]
    kernel = np.asarray(entry["kernel"], np.float32)
    seen = first.layer.window(first.input_shape).size if kernel.ndim > 2 else first.input_shape[:-1]  # type: ignore[union-attr]
    by_position = kernel.reshape(-1, *seen, first.input_shape[-1], kernel.shape[-1])
    return np.moveaxis(by_position, -1, 1).reshape(-1, *by_position.shape[1:-1])
