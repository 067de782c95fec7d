"""Count a model's parameters, connections and activations exactly for an input shape, without JAX or arrays.

A *connection* is an edge with a weight. Biases and the unweighted edges of pooling do not count. A *multiply-add* (MAC)
is one use of a weight for one example, which is two FLOPs; so each connection is one multiply-add. A *tap* is one place
of a window. Connections and multiply-adds are counted in two ways. The first count includes taps on zero padding, like
a plain loop over the padded map. The second count excludes these taps, like XLA's cost analysis of convolutions. An
*activation* is an output node of a layer. A local layer has weights for the taps on padding too, although these weights
never see a value. A full layer has no padding. A norm has two `norm_parameters` per channel: a scale and a bias. Both
count as parameters, but neither as weights nor as biases. A norm has no connections and no multiply-adds. The running
statistics of a norm are not trained, so they are no parameters. In training, a norm mixes positions and examples of a
batch. The receptive fields here ignore this mixing, because they describe evaluation.

A training step *keeps* the values that its backward pass needs: the input of every layer with weights, the output of
every tanh, the input and output of max pooling (each array once), the normalised input of every norm (in float32 or
wider), and one byte per ReLU output, which holds the sign. A norm also keeps a few numbers per channel. These numbers
do not grow with the batch and are not counted. JAX keeps exactly these values if layers run in the order of the spec. A
compiler may compute values again instead of keeping them.

XLA's cost analysis of one forward pass counts two FLOPs per multiply-add. It excludes taps on padding if the operation
is a convolution, and includes them if it is a product of patches. It counts one FLOP per added bias, per ReLU, per sum
of a residual, and per comparison of max pooling (window size - 1 per output). It counts three FLOPs per output of a
norm, and a few per channel. tests/spec/test_counts.py compares our counts with XLA's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from cnnlib.spec.layers import Activation, AvgPool, Conv, Dense, Full, Layer, Local, MaxPool, Norm, Residual
from cnnlib.spec.model import Model
from cnnlib.spec.window import Shape, Window

BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
"""Bytes per number."""


@dataclass(frozen=True)
class Count:
    """Counts of one layer or of a whole model, per example."""

    weights: int = 0
    biases: int = 0
    connections: int = 0
    connections_without_padding: int = 0
    activations: int = 0
    kept_values: int = 0
    """Numbers that a training step keeps for its backward pass."""
    kept_signs: int = 0
    """Booleans that a training step keeps, one byte each."""
    norm_parameters: int = 0
    """Scales and biases of norms."""
    kept_norms: int = 0
    """Numbers that a training step keeps for norms. Their type is float32, or wider if the model's type is wider."""

    @property
    def parameters(self) -> int:
        return self.weights + self.biases + self.norm_parameters

    @property
    def macs(self) -> int:
        return self.connections

    @property
    def macs_without_padding(self) -> int:
        return self.connections_without_padding

    def parameter_bytes(self, dtype: str = "float32") -> int:
        """Return the bytes of the parameters. Gradients or momentum take as many; Adam's moments take twice as many."""
        return self.parameters * BYTES[dtype]

    def activation_bytes(self, batch_size: int, dtype: str = "float32") -> int:
        """Return the bytes that a training step keeps per batch for its backward pass."""
        wide = max(BYTES[dtype], BYTES["float32"])
        return batch_size * (self.kept_values * BYTES[dtype] + self.kept_norms * wide + self.kept_signs)

    def __add__(self, other: Count) -> Count:
        return Count(
            self.weights + other.weights,
            self.biases + other.biases,
            self.connections + other.connections,
            self.connections_without_padding + other.connections_without_padding,
            self.activations + other.activations,
            self.kept_values + other.kept_values,
            self.kept_signs + other.kept_signs,
            self.norm_parameters + other.norm_parameters,
            self.kept_norms + other.kept_norms,
        )


class Field(NamedTuple):
    """The receptive field along one input axis. Output p sees `size` input nodes; the first is p * stride - padding.

    `stride` and `padding` are the effective stride and the effective padding. A stride of 0 means that every output
    sees the same nodes, as after a full layer. Nodes beyond the ends of the input are zeros.
    """

    size: int
    stride: int
    padding: int

    def through(self, size: int, stride: int, dilation: int, padding: int) -> Field:
        """Return the field after one more window (Araujo, Norris and Sim, Distill 2019, eq. 2).

        `padding` is the number of zeros in front of the map.
        """
        return Field(
            self.size + (size - 1) * dilation * self.stride,
            self.stride * stride,
            self.padding + padding * self.stride,
        )

    def joined(self, other: Field, nodes: int) -> Field | None:
        """Return the field of the sum of two maps; None if it differs between positions.

        `nodes` is the number of input nodes along the axis.
        """
        if self.stride != other.stride and min(self.stride, other.stride) > 0:
            return None
        if self.stride != other.stride:  # one map sees the same nodes everywhere. These must be all input nodes
            whole = self if self.stride == 0 else other
            return whole if whole == Field(nodes, 0, 0) else None
        padding = max(self.padding, other.padding)
        end = max(self.size - self.padding, other.size - other.padding)
        return Field(padding + end, self.stride, padding)


Fields = tuple[Field | None, ...]
"""One field per input axis; None if the field differs between positions."""


@dataclass(frozen=True)
class LayerCount:
    """Counts of one layer of a model on an input shape."""

    path: tuple[str, ...]
    """Path of the layer in the model's parameter tree, such as `("layer_3", "layer_0")`."""
    layer: Layer
    """The layer. A `Residual` here means only its addition; the layers of its branches come before it, each with its
    own counts."""
    input_shape: Shape
    output_shape: Shape
    count: Count
    fields: Fields


def count(model: Model, input_shape: Shape) -> Count:
    """Return the counts of a whole model. Raises UserError if a layer does not fit its input."""
    model.shapes(input_shape)
    counts: list[LayerCount] = []
    _follow(model.layers, _Map(input_shape, (), ()), (), (), counts)  # no axes: skip the receptive fields
    return sum((layer.count for layer in counts), Count())


def layers(model: Model, input_shape: Shape) -> tuple[LayerCount, ...]:
    """Return every layer with its counts and receptive fields. Raises UserError if a layer does not fit its input."""
    model.shapes(input_shape)
    spatial = input_shape[:-1]
    start = _Map(input_shape, tuple(Field(1, 1, 0) for _ in spatial), tuple((0, n - 1) for n in spatial))
    counts: list[LayerCount] = []
    _follow(model.layers, start, (), spatial, counts)
    return tuple(counts)


Ends = tuple[int, int]
NOTHING: Ends = (0, -1)
"""`Ends` are the first and the last input node seen. `NOTHING` means that only padding is seen."""


@dataclass
class _Map:
    """A map between two layers: its shape, and what its positions see of the input."""

    shape: Shape
    fields: Fields
    cover: tuple[Ends, ...]
    """First and last input node that any position sees, per input axis. If several layers in a row have strides that
    skip nodes, the true range may be smaller."""
    is_kept: bool = False

    def keep(self) -> int:
        """Mark this map as kept. Return the number of newly kept values: 0 if the map was already kept."""
        new = 0 if self.is_kept else math.prod(self.shape)
        self.is_kept = True
        return new


def _follow(
    sequence: tuple[Layer, ...], x: _Map, path: tuple[str, ...], spatial: Shape, counts: list[LayerCount]
) -> _Map:
    for index, layer in enumerate(sequence):
        inside = (*path, f"layer_{index}")
        if isinstance(layer, Residual):
            branch = _follow(layer.layers, x, inside, spatial, counts)
            shortcut = _follow(layer.shortcut, x, (*path, f"layer_{index}_shortcut"), spatial, counts)
            y = _Map(
                branch.shape,
                tuple(
                    None if a is None or b is None else a.joined(b, n)
                    for a, b, n in zip(branch.fields, shortcut.fields, spatial, strict=True)
                ),
                tuple(map(_joined, branch.cover, shortcut.cover)),
            )
            count = Count(activations=math.prod(y.shape))
        else:
            y = _seen(layer, x, spatial)
            count = _edges(layer, x.shape) + _kept(layer, x, y) + Count(activations=math.prod(y.shape))
        counts.append(LayerCount(inside, layer, x.shape, y.shape, count, y.fields))
        x = y
    return x


def _edges(layer: Layer, input_shape: Shape) -> Count:
    """Return the parameters and connections of a layer other than `Residual`."""
    match layer:
        case Conv() | Local():
            window = layer.window(input_shape)
            positions, channel_pairs = math.prod(window.output_size), input_shape[-1] // layer.groups * layer.features
            bank = math.prod(window.size) * channel_pairs
            banks = 1 if isinstance(layer, Conv) else positions
            return Count(
                bank * banks,
                layer.features * banks * layer.use_bias,
                bank * positions,
                window.taps_inside * channel_pairs,
            )
        case Dense() | Full():
            nodes = math.prod(layer.output_shape(input_shape))
            weights = math.prod(input_shape) * nodes
            return Count(weights, nodes * layer.use_bias, weights, weights)
        case Norm():
            return Count(norm_parameters=2 * input_shape[-1])
        case _:
            return Count()


def _kept(layer: Layer, x: _Map, y: _Map) -> Count:
    match layer:
        case Conv() | Local() | Full() | Dense():
            return Count(kept_values=x.keep())
        case Norm():
            return Count(kept_norms=math.prod(y.shape))
        case Activation(function="relu"):
            return Count(kept_signs=math.prod(y.shape))
        case Activation():
            return Count(kept_values=y.keep())
        case MaxPool():
            return Count(kept_values=x.keep() + y.keep())
        case _:
            return Count()


def _seen(layer: Layer, x: _Map, spatial: Shape) -> _Map:
    """Return the layer's output map: its shape, and what its positions see of the input."""
    shape = layer.output_shape(x.shape)
    if isinstance(layer, Dense | Full):
        return _Map(shape, tuple(Field(last - first + 1, 0, -first) for first, last in x.cover), x.cover)
    if not isinstance(layer, Conv | Local | MaxPool | AvgPool):
        return _Map(shape, x.fields, x.cover)
    window = layer.window(x.shape)
    axes = range(len(spatial))
    fields = tuple(
        field and field.through(window.size[a], window.strides[a], window.dilation[a], window.padding[a][0])
        for a, field in zip(axes, x.fields, strict=True)
    )
    return _Map(shape, fields, tuple(_covered(window, a, x.fields[a], x.cover[a]) for a in axes))


def _covered(window: Window, axis: int, field: Field | None, cover: Ends) -> Ends:
    """Return the first and last input node that any position of a window sees.

    The window slides over a map. `field` and `cover` say what the positions of this map see of the input.
    """
    n, k, s, d = (numbers[axis] for numbers in (window.input_size, window.size, window.strides, window.dilation))
    low, last = window.padding[axis][0], window.output_size[axis] - 1
    # Find the first and the last node of the map under a tap. Dilation can leave gaps, so try d more positions.
    used = []
    first = max(0, -(((k - 1) * d - low) // s))
    for p in range(first, min(last, first + d) + 1):
        tap = max(0, -((p * s - low) // d))
        used += [p * s - low + tap * d] if tap < k else []
    end = min(last, (n - 1 + low) // s)
    for p in range(max(0, end - d), end + 1):
        tap = min(k - 1, (n - 1 + low - p * s) // d)
        used += [p * s - low + tap * d] if tap >= 0 else []
    used = [place for place in used if 0 <= place < n]
    if not used or cover == NOTHING:
        return NOTHING
    left, right = cover
    if field is not None and field.stride:
        if min(used) > 0:
            left = max(left, min(used) * field.stride - field.padding)
        if max(used) < n - 1:
            right = min(right, max(used) * field.stride - field.padding + field.size - 1)
    return (left, right) if left <= right else NOTHING


def _joined(one: Ends, other: Ends) -> Ends:
    """Return the first and last input node that the sum of two maps sees."""
    seen = [ends for ends in (one, other) if ends != NOTHING]
    return (min(low for low, _ in seen), max(high for _, high in seen)) if seen else NOTHING
