"""Looking inside a trained net, from pixels to classes: what its layers put out, respond to, and know of the classes.

For full, local and convolutional nets alike. A layer is meant by its position in `net.model.layers`; a residual is one
layer. Images are `(height, width, channel)` as stored, so before they are normalised for the net. `activations` and
`linear_probes` take signals as well; what is about images raises UserError for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num
from threadpoolctl import threadpool_limits

from cnnlib import cost
from cnnlib.cost import Field, LayerCount
from cnnlib.data import DataSet
from cnnlib.errors import UserError
from cnnlib.models import Parameters, Statistics, network
from cnnlib.spec import Activation, Filter, Model, Norm, Residual, Shape, shape_text, walk
from cnnlib.trained import Net

BATCH_SIZE = 250
"""Examples that are on the device together."""


# What each layer puts out.


def activations(
    net: Net, x: Num[np.ndarray, "count ..."], layers: Sequence[int] | None = None
) -> list[Float[np.ndarray, "count ..."]]:
    """The output of each of the layers (None: of all), `(count, *its shape)`, for stored examples.

    Norms use their running statistics; the last layer's output are the logits. Device memory is that of `BATCH_SIZE`
    examples, the host's that of all that is returned. Raises UserError for examples of another shape than the net's,
    and for a layer that does not exist.
    """
    wanted = tuple(range(len(net.model.layers)) if layers is None else (_checked_layer(net, at) for at in layers))
    parts = [
        jax.device_get(_outputs(net.model, net.parameters, net.statistics, batch, wanted))
        for batch in _batches(net, x, BATCH_SIZE)
    ]
    return [np.concatenate(rows)[: len(x)] for rows in zip(*parts, strict=True)]


@partial(jax.jit, static_argnames=("model", "wanted"))
def _outputs(
    model: Model,
    parameters: Parameters,
    statistics: Statistics,
    x: Float[Array, "batch ..."],
    wanted: tuple[int, ...],
) -> list[Float[Array, "batch ..."]]:
    found = {}
    for layer in range(max(wanted, default=-1) + 1):
        x = found[layer] = _through(model, parameters, statistics, x, layer, layer + 1)
    return [found[layer] for layer in wanted]


def _through(model: Model, parameters: Parameters, statistics: Statistics, x: Array, first: int, end: int) -> Array:
    """The layers from `first` up to, but without, `end` applied to the output of those before."""
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


def _batches(net: Net, x: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Stored examples as the net sees them, equally many at a time: the last ones are filled up with the last one."""
    if len(x) == 0 or x.shape[1:] != net.input_shape:
        raise UserError(f"the net sees examples of {shape_text(net.input_shape)}, one or more, not {x.shape}")
    size = min(size, len(x))
    for start in range(0, len(x), size):
        yield net.seen(x[np.minimum(np.arange(start, start + size), len(x) - 1)])


# Where a layer looks.


class Rectangle(NamedTuple):
    """Rows `top` to `bottom` and columns `left` to `right` of an image, each without its end.

    It may reach beyond the image, onto the zeros around it.
    """

    top: int
    bottom: int
    left: int
    right: int


def receptive_field(net: Net, layer: int, position: tuple[int, ...] = ()) -> Rectangle:
    """What the units at a position `(row, column)` of a layer see of the image; those of a vector have no position.

    Nothing outside it changes them. Of a full layer it is all that the layers before let it see. Raises UserError for a
    layer or position that does not exist, and for a net of signals.
    """
    found = _counted(net, layer)
    places = found.output_shape[:-1]
    if len(position) != len(places) or any(not 0 <= at < n for at, n in zip(position, places, strict=True)):
        known = f"positions within {shape_text(places)}" if places else "no positions"
        raise UserError(f"layer {layer} has {known}, not {position}")
    fields = [_known(field, layer) for field in found.fields]
    starts = [
        at * field.stride - field.padding for at, field in zip(position or (0,) * len(fields), fields, strict=True)
    ]
    (top, left), (height, width) = starts, (field.size for field in fields)
    return Rectangle(top, top + height, left, left + width)


class Patches(NamedTuple):
    """The places that excite each unit of a layer most, strongest first; a unit of a map is one of its channels."""

    examples: Int[np.ndarray, "unit count"]
    """Which of the images, each at most once a unit."""
    positions: Int[np.ndarray, "unit count axis"]
    """Row and column in the layer's map; of a vector there are none, and the last axis has length 0."""
    values: Float[np.ndarray, "unit count"]
    """What the unit puts out there; 0 after a ReLU says that the unit is silent."""
    pixels: Float[np.ndarray, "unit count height width channel"]
    """What it sees there; beyond the image the mean of the training examples, which is what the net's zeros are."""


def strongest_patches(net: Net, x: Num[np.ndarray, "count height width channel"], layer: int, count: int) -> Patches:
    """The patches of stored images that excite each unit of a layer most, one an image at most.

    A patch is the unit's receptive field (as in Zeiler and Fergus, "Visualizing and understanding convolutional
    networks", 2014, there with a deconvolution beside it). Of positions and images that tie the first is taken. Raises
    UserError for more patches than images, a layer that does not exist, and a net of signals.
    """
    places = _counted(net, layer).output_shape[:-1]
    if not 1 <= count <= len(x):
        raise UserError(f"count={count}: there are {len(x)} images, each with one patch a unit at most")
    values, at = (
        np.concatenate(rows)[: len(x)]
        for rows in zip(
            *(
                jax.device_get(_peaks(net.model, net.parameters, net.statistics, batch, layer))
                for batch in _batches(net, x, BATCH_SIZE)
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
    """The largest value of each unit over the positions of its map, and where it is, row by row."""
    y = _through(model, parameters, statistics, x, 0, layer + 1)
    y = y.reshape(y.shape[0], -1, y.shape[-1])
    return y.max(axis=1), y.argmax(axis=1)


def patch(
    net: Net, image: Num[np.ndarray, "height width channel"], seen: Rectangle
) -> Float[np.ndarray, "patch_height patch_width channel"]:
    """A rectangle of a stored image; beyond the image it has the mean of the training examples."""
    height, width, _ = image.shape
    patch = np.broadcast_to(net.mean, (seen.bottom - seen.top, seen.right - seen.left, image.shape[-1])).copy()
    top, bottom = max(seen.top, 0), min(seen.bottom, height)
    left, right = max(seen.left, 0), min(seen.right, width)
    if top < bottom and left < right:
        inside = image[top:bottom, left:right]
        patch[top - seen.top : bottom - seen.top, left - seen.left : right - seen.left] = inside
    return patch


# The first layer.


def first_filters(net: Net) -> Float[np.ndarray, "filter height width channel"]:
    """The kernels of the first layer with weights, as images of what they see of that layer's input.

    A convolution has one for each feature. Where weights are not shared each node has its own, row by row, features
    fastest: of a local layer as large as the window, of a full or dense one as large as the whole input. Raises
    UserError where that input is no image.
    """
    first = next((layer for layer in cost.layers(net.model, net.input_shape) if layer.count.weights), None)
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


class Tuning(NamedTuple):
    """How units respond to bars of each orientation."""

    angles: Float[np.ndarray, " angle"]
    """In degrees: 0 is a horizontal bar, 45 one that rises to the right, 90 a vertical one."""
    responses: Float[np.ndarray, "unit angle"]
    selectivity: Float[np.ndarray, " unit"]
    """1 less the circular variance: 0 is as much for every orientation, 1 for a single one only. Not a number for a
    unit that no bar excites."""
    preferred: Float[np.ndarray, " unit"]
    """The angle of the largest response; not a number for a unit that no bar excites."""


def orientation_tuning(net: Net, angles: Sequence[int | float] | np.ndarray, deviation: float = 0.7) -> Tuning:
    """The response of each first filter to a bright bar of each orientation: the largest over all places of the bar.

    The response is by how much the bar, 1 on 0, raises the unit's weighted sum, all channels alike, and 0 where it
    raises it nowhere. The bar is longer than the filter, moves by a quarter of a pixel, and fades from its middle line
    as a Gaussian of a deviation in pixels: with 0.7 or more the grid of pixels favours no orientation, which a sharp
    bar along a column does. Selectivity is 1 - circular variance (Ringach, Shapley and Hawken, "Orientation selectivity
    in macaque V1", 2002). Long bars cover more of a square window along its diagonals, by up to 1.41: a filter that is
    equal everywhere has a selectivity near 0, not 0. Raises UserError where the first layer sees no image, and for
    angles that do not divide 180 degrees equally.
    """
    filters = first_filters(net).sum(axis=-1)
    asked = np.asarray(angles, np.float64)
    if asked.ndim != 1 or len(asked) < 3 or not np.allclose(np.diff(asked), 180 / len(asked)):
        raise UserError("angles: three or more, equally far apart, that divide 180 degrees, such as 0, 45, 90, 135")
    if not 0 < deviation < np.inf:
        raise UserError(f"deviation={deviation}: a bar is wider than 0 pixels")
    shape = filters.shape[1:]
    steps = np.ceil(2 * np.hypot(*shape))
    offsets = np.arange(-steps, steps + 1) / 4  # from corner to corner
    weights = filters.reshape(len(filters), -1).astype(np.float64)
    responses = np.stack(
        [(weights @ bars(shape, angle, offsets, deviation).reshape(len(offsets), -1).T).max(axis=1) for angle in asked],
        axis=1,
    )
    responses = np.maximum(responses, 0.0)
    total = responses.sum(axis=1)
    silent = total <= 0
    resultant = np.abs(responses @ np.exp(2j * np.deg2rad(asked))) / np.where(silent, 1.0, total)
    preferred = asked[responses.argmax(axis=1)]
    return Tuning(asked, responses, np.where(silent, np.nan, resultant), np.where(silent, np.nan, preferred))


def bars(
    shape: tuple[int, int], angle: int | float, offsets: Float[np.ndarray, " bar"], deviation: float = 0.7
) -> Float[np.ndarray, "bar height width"]:
    """Images of one bar each, from edge to edge: 1 on its middle line, beside it a Gaussian of a deviation in pixels.

    Angles in degrees as in `Tuning`; an offset, in pixels, is that of the middle line from the image's middle, along
    the bar's normal (down for a horizontal bar, to the right for a vertical one).
    """
    across, down = np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))
    rows, columns = (np.arange(side) - (side - 1) / 2 for side in shape)
    distance: np.ndarray = columns[None, :] * across + rows[:, None] * down - offsets[:, None, None]
    return np.asarray(np.exp(-(distance**2) / (2 * deviation**2)))


# What speaks for a class.


def class_evidence(
    net: Net, image: Num[np.ndarray, "height width channel"], label: int
) -> Float[np.ndarray, "height width"]:
    """Where in a stored image a net finds evidence for a class, of the image's size.

    Of a net with windows, in any reading: Grad-CAM (Selvaraju et al. 2017), the ReLU of the sum of the last such
    layer's maps (after the norm and activation that follow it), each weighted by the mean over its positions of the
    gradient of the class's logit. It is zero or more, and brought to the image's size by interpolation between the
    middles of receptive fields, as they are in the convolutional reading, down to 0 a step beyond the outermost.

    Of a net without windows, which has no maps: gradient times input (Shrikumar et al. 2016), summed over channels; it
    has both signs, and is relative to an image that is the mean of the training examples everywhere. Raises UserError
    for a class that does not exist, an image of another shape, and a net of signals.
    """
    _check_image_net(net)
    num_classes = net.model.shapes(net.input_shape)[-1][-1]
    if not 0 <= label < num_classes:
        raise UserError(f"no class {label}; there are 0 to {num_classes - 1}")
    layer = last_map(net.model)
    (x,) = _batches(net, image[None], 1)
    evidence = np.asarray(_evidence(net.model, net.parameters, net.statistics, x, np.int32(label), layer))
    if layer is None:
        return evidence
    (geometry,) = _counts(net.model.conv(), net.input_shape, layer)
    for axis, field in enumerate(geometry.fields):
        known = _known(field, layer)
        middles = np.arange(-1, evidence.shape[axis] + 1) * known.stride - known.padding + (known.size - 1) / 2
        places = np.arange(net.input_shape[axis])
        evidence = np.apply_along_axis(partial(_interpolated, places, middles), axis, evidence)
    return np.asarray(evidence, np.float32)


def _interpolated(places: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.asarray(np.interp(places, known, np.pad(values, 1)))


def last_map(model: Model) -> int | None:
    """The layer whose maps Grad-CAM weighs: the last with a window, or the norm or activation right after it."""
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
    y = _through(model, parameters, statistics, x, 0, start)

    def logit(y: Array) -> Array:
        return _through(model, parameters, statistics, y, start, len(model.layers))[0, label]

    weight = jax.grad(logit)(y)
    if layer is not None:
        weight = weight.mean(axis=(1, 2), keepdims=True)
    evidence = (weight * y)[0].sum(axis=-1)
    return evidence if layer is None else jax.nn.relu(evidence)


# What a linear classifier can read off a layer.

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3)
"""Of the probes, relative to the features' sum of squares."""


class Probe(NamedTuple):
    """A linear classifier on what a layer puts out."""

    layer: int | None
    """None: on the pixels, as the net sees them."""
    name: str
    features: int
    penalty: float
    """The one of `PENALTIES` that was chosen."""
    accuracy: float
    """Share of the test examples that it gets right."""


def linear_probes(net: Net, data: DataSet, layers: Sequence[int | None] | None = None) -> list[Probe]:
    """How well a linear classifier tells the classes apart by each layer's output, or by the pixels (a layer of None).

    Without `layers` by the pixels, and then by each layer.
    Alain and Bengio, "Understanding intermediate layers using linear classifier probes", 2016; theirs are logistic,
    these are least-squares ones with an L2 penalty (ridge, one class against the others), in closed form and so without
    chance. Fitted on the training examples, which the net was trained on too; the penalty of the highest accuracy on
    the validation examples is taken, the largest of those that tie; scored once, on the test examples. Raises UserError
    without validation examples.
    """
    if not len(data.validation.y):
        raise UserError("probes choose their penalty on validation examples: data.validation must be 1 or more")
    wanted = (None, *range(len(net.model.layers))) if layers is None else layers
    inside = [layer for layer in wanted if layer is not None]
    splits = (data.train, data.validation, data.test)
    outputs = [dict(zip(inside, activations(net, split.x, inside), strict=True)) for split in splits]
    labels = [np.asarray(split.y) for split in splits]
    targets = np.eye(data.description.num_classes)[labels[0]]
    probes = []
    # These matrices are small: where another program has a core as well, threads would wait for one another, spinning.
    with threadpool_limits(limits=1, user_api="blas"):
        for layer in wanted:
            parts = (
                net.seen(split.x) if layer is None else output[layer]
                for split, output in zip(splits, outputs, strict=True)
            )
            features = [part.reshape(len(part), -1).astype(np.float64) for part in parts]
            best, chosen = -1.0, (0.0, 0.0)
            for penalty, scores in ridge(features[0], targets, PENALTIES[::-1]):
                validation, test = (
                    float((scores(x).argmax(axis=1) == y).mean()) for x, y in zip(features[1:], labels[1:], strict=True)
                )
                if validation > best:
                    best, chosen = validation, (penalty, test)
            name = "input" if layer is None else f"{layer} {net.model.layers[layer]}"
            probes.append(Probe(layer, name, features[0].shape[1], *chosen))
    return probes


def ridge(
    x: Float[np.ndarray, "count feature"], y: Float[np.ndarray, "count target"], penalties: Sequence[float]
) -> Iterator[tuple[float, Callable[[np.ndarray], np.ndarray]]]:
    """For each penalty p the linear function that minimises |y - f(x)|^2 + p s |weights|^2, its intercept left alone.

    s is the sum of squares of the centred features, so that the scale of a layer does not matter. In closed form, over
    features or over examples, whichever are fewer.
    """
    mean, target_mean = x.mean(axis=0), y.mean(axis=0)
    x, y = x - mean, y - target_mean
    over_features = x.shape[1] <= x.shape[0]
    gram = x.T @ x if over_features else x @ x.T
    scale = float(np.trace(gram)) or 1.0  # features that do not vary have weights of 0, whatever the penalty
    right = x.T @ y if over_features else y
    for penalty in penalties:
        solved = np.linalg.solve(gram + penalty * scale * np.eye(len(gram)), right)
        weights = solved if over_features else x.T @ solved
        yield penalty, partial(_affine, weights, target_mean - mean @ weights)


def _affine(weights: np.ndarray, intercept: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.asarray(x @ weights + intercept)


# What was asked for, checked.


def _checked_layer(net: Net, layer: int) -> int:
    if not 0 <= layer < len(net.model.layers):
        raise UserError(f"no layer {layer}: {net.model} has layers 0 to {len(net.model.layers) - 1}")
    return layer


def _check_image_net(net: Net) -> None:
    if len(net.input_shape) != 3:
        raise UserError(f"this net sees signals of {shape_text(net.input_shape)}; height x width x channel is needed")


def _counts(model: Model, input_shape: Shape, layer: int) -> list[LayerCount]:
    return [found for found in cost.layers(model, input_shape) if found.path == (f"layer_{layer}",)]


def _counted(net: Net, layer: int) -> LayerCount:
    """A layer with its shapes and fields."""
    _check_image_net(net)
    (found,) = _counts(net.model, net.input_shape, _checked_layer(net, layer))
    return found


def _known(field: Field | None, layer: int) -> Field:
    if field is None:
        raise UserError(f"layer {layer}: what it sees differs from position to position, in size too")
    return field
