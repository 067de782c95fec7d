"""Where in an image a net finds evidence for a class: Grad-CAM, or gradient times input."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Num

from cnnlib.errors import UserError
from cnnlib.interpret.activations import batches, check_image_net, known_field, layer_counts, through
from cnnlib.interpret.trained import Net
from cnnlib.nn.network import Parameters, Statistics
from cnnlib.spec.layers import Activation, Filter, Norm, Residual
from cnnlib.spec.model import Model, walk


def class_evidence(
    net: Net, image: Num[np.ndarray, "height width channel"], label: int
) -> Float[np.ndarray, "height width"]:
    """Return the evidence for a class at each pixel of a stored image, `(height, width)`.

    If the net has layers with windows, the method is Grad-CAM (Selvaraju et al. 2017), for any connectivity. Grad-CAM
    uses the maps of the last layer with a window, after the norm and activation that follow this layer. The weight of a
    map is the gradient of the class's logit, averaged over the positions of the map. The evidence is the ReLU of the
    weighted sum of the maps, so it is 0 or more. The evidence is then interpolated to the size of the image. Each value
    of a map is placed at the center of the value's receptive field. This field is computed for `conv` connectivity. One
    step beyond the outermost centers, the evidence is 0.

    If the net has no layer with a window, the method is gradient times input (Shrikumar et al. 2016). The products are
    summed over channels, so this evidence is positive or negative. It is relative to an image that equals the mean of
    the training examples everywhere.

    Raises UserError if the class does not exist, the image has another shape, or the net takes signals.
    """
    check_image_net(net)
    num_classes = net.model.shapes(net.input_shape)[-1][-1]
    if not 0 <= label < num_classes:
        raise UserError(f"no class {label}; there are 0 to {num_classes - 1}")
    layer = last_map(net.model)
    (x,) = batches(net, image[None], 1)
    evidence = np.asarray(_evidence(net.model, net.parameters, net.statistics, x, np.int32(label), layer))
    if layer is None:
        return evidence
    (geometry,) = layer_counts(net.model.conv(), net.input_shape, layer)
    for axis, field in enumerate(geometry.fields):
        known = known_field(field, layer)
        middles = np.arange(-1, evidence.shape[axis] + 1) * known.stride - known.padding + (known.size - 1) / 2
        places = np.arange(net.input_shape[axis])
        evidence = np.apply_along_axis(partial(_interpolated, places, middles), axis, evidence)
    return np.asarray(evidence, np.float32)


def _interpolated(places: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.asarray(np.interp(places, known, np.pad(values, 1)))


def last_map(model: Model) -> int | None:
    """Return the layer whose maps Grad-CAM uses: the last layer with a window, or the norm or activation after it."""
    last = None
    for index, layer in enumerate(model.layers):
        inside = layer.layers if isinstance(layer, Residual) else (layer,)
        follows = last == index - 1 and isinstance(layer, Activation | Norm)
        if follows or any(isinstance(part, Filter) for part in walk(inside)):
            last = index
    return last


@partial(jax.jit, static_argnames=("model", "layer"))
def _evidence(
    model: Model,
    parameters: Parameters,
    statistics: Statistics,
    x: Float[Array, "1 height width channel"],
    label: Int[Array, ""] | np.int32,
    layer: int | None,
) -> Float[Array, "map_height map_width"]:
    start = 0 if layer is None else layer + 1
    y = through(model, parameters, statistics, x, 0, start)

    def logit(y: Array) -> Array:
        return through(model, parameters, statistics, y, start, len(model.layers))[0, label]

    weight = jax.grad(logit)(y)
    if layer is not None:
        weight = weight.mean(axis=(1, 2), keepdims=True)
    evidence = (weight * y)[0].sum(axis=-1)
    return evidence if layer is None else jax.nn.relu(evidence)
