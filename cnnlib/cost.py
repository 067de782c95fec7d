"""Exact counts of a spec on an input shape, in Python integers, without JAX and without allocating.

Conventions. A *connection* is an edge that carries a weight: biases and the unweighted edges of pooling do not count.
A *multiply-add* (MAC) is one use of a weight for one example, two FLOPs; so each connection is one multiply-add. Both
come in two readings: taps that fall on zero padding counted (what a plain loop over the padded map does), and not
counted (what XLA's cost analysis reports). An *activation* is an output node of a layer. A local layer has a weight for
every tap of every position, so for those on the padding as well, which never see a value; a full layer has no padding.
A norm has two parameters a channel, a scale and a bias. They are `norm_parameters`, neither weights nor biases, and
parameters all the same. No edges are theirs, so a norm has no connections and no multiply-adds; its running statistics
are not trained, and no parameters. That it lets positions and examples of a batch see one another through their mean,
while it trains, is left out of the receptive field, which is that of evaluation.

What a training step *keeps* for its backward pass is what derivatives need: the input of every layer with weights, the
output of every tanh, input and output of max pooling, each counted once, the input of every norm once it is normalised
(in float32 at least; a few numbers a channel as well, which do not grow with the batch and are not counted), and of
every ReLU's output a sign, one byte. So JAX does with the layers in the order of the spec; a compiler may compute again
what it could have kept.

XLA's cost analysis of one forward pass counts two FLOPs a multiply-add, without taps on padding in its convolutions and
with them in products of patches; one FLOP for each bias added, each ReLU, each sum of a residual, and each comparison
of a max pooling, which are the window's size less one an output; three for each output of a norm, beside a few for each
of its channels. tests/test_cost.py holds our counts against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from cnnlib.spec import (
    Activation,
    AvgPool,
    Conv,
    Dense,
    Full,
    Layer,
    Local,
    MaxPool,
    Model,
    Norm,
    Residual,
    Shape,
    Window,
)

BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
"""Bytes of one number."""


@dataclass(frozen=True)
class Count:
    """Numbers of one layer, or of a whole model, for one example."""

    weights: int = 0
    biases: int = 0
    connections: int = 0
    connections_without_padding: int = 0
    activations: int = 0
    kept_values: int = 0
    """Numbers that a training step keeps for its backward pass."""
    kept_signs: int = 0
    """Truth values that it keeps, each a byte."""
    norm_parameters: int = 0
    """Scales and biases of norms."""
    kept_norms: int = 0
    """Numbers that a training step keeps of norms, in float32 at least."""

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
        """Bytes of the parameters, once: gradients take as many, momentum again, Adam's moments twice."""
        return self.parameters * BYTES[dtype]

    def activation_bytes(self, batch_size: int, dtype: str = "float32") -> int:
        """Bytes of what a training step keeps of a batch for its backward pass."""
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
    """What the positions of a map see of the input along one axis: p sees `size` nodes from p * stride - padding on.

    That is the receptive field, the effective stride and the effective padding. A stride of 0 says that every position
    sees the same nodes, as after a full layer. Beyond the ends of the input are zeros.
    """

    size: int
    stride: int
    padding: int

    def through(self, size: int, stride: int, dilation: int, padding: int) -> Field:
        """The field of a window over this map, `padding` in front (Araujo, Norris and Sim, Distill 2019, eq. 2)."""
        return Field(
            self.size + (size - 1) * dilation * self.stride,
            self.stride * stride,
            self.padding + padding * self.stride,
        )

    def joined(self, other: Field, nodes: int) -> Field | None:
        """What a sum of two maps sees; None where that differs from position to position."""
        if self.stride != other.stride and min(self.stride, other.stride) > 0:
            return None
        if self.stride != other.stride:  # one of them sees the same everywhere: it does not matter unless it is all
            whole = self if self.stride == 0 else other
            return whole if whole == Field(nodes, 0, 0) else None
        padding = max(self.padding, other.padding)
        end = max(self.size - self.padding, other.size - other.padding)
        return Field(padding + end, self.stride, padding)


Fields = tuple[Field | None, ...]
"""A field an axis of the input; None where it differs from position to position."""


@dataclass(frozen=True)
class LayerCount:
    """One layer of a model on an input."""

    path: tuple[str, ...]
    """Where its parameters are in the model's tree, such as `("layer_3", "layer_0")`."""
    layer: Layer
    """A residual stands for its addition, after the layers of its branches."""
    input_shape: Shape
    output_shape: Shape
    count: Count
    fields: Fields


def count(model: Model, input_shape: Shape) -> Count:
    """Counts of a whole model; raises UserError where a layer does not fit its input."""
    model.shapes(input_shape)
    counts: list[LayerCount] = []
    _follow(model.layers, _Map(input_shape, (), ()), (), (), counts)  # without axes there are no fields to follow
    return sum((layer.count for layer in counts), Count())


def layers(model: Model, input_shape: Shape) -> tuple[LayerCount, ...]:
    """Every layer of a model with its counts and fields; raises UserError where a layer does not fit its input."""
    model.shapes(input_shape)
    spatial = input_shape[:-1]
    start = _Map(input_shape, tuple(Field(1, 1, 0) for _ in spatial), tuple((0, n - 1) for n in spatial))
    counts: list[LayerCount] = []
    _follow(model.layers, start, (), spatial, counts)
    return tuple(counts)


Ends = tuple[int, int]
NOTHING: Ends = (0, -1)
"""The ends of what positions see that lie on padding altogether."""


@dataclass
class _Map:
    """Values on their way through a model."""

    shape: Shape
    fields: Fields
    cover: tuple[Ends, ...]
    """An axis of the input: nodes before the first and after the last are seen by no position. Both are seen, unless
    several layers in a row have strides that step over nodes."""
    is_kept: bool = False

    def keep(self) -> int:
        """The values that are kept by keeping this map; none if it is kept already."""
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
    """Parameters and connections of a layer that is not a branch."""
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
    """The layer's output, with what it sees of the input."""
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
    """What all positions of a window see of the input together, given what those of its map do."""
    n, k, s, d = (numbers[axis] for numbers in (window.input_size, window.size, window.strides, window.dilation))
    low, last = window.padding[axis][0], window.output_size[axis] - 1
    # The first and the last place of the map that is under a tap; with gaps between taps, of up to d positions.
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
    """What a sum of two maps sees."""
    seen = [ends for ends in (one, other) if ends != NOTHING]
    return (min(low for low, _ in seen), max(high for _, high in seen)) if seen else NOTHING
