"""Exact counts of a spec on an input shape, in Python integers, without JAX and without allocating.

Conventions. A *connection* is an edge that carries a weight: biases and the unweighted edges of pooling do not count.
A *multiply-add* (MAC) is one use of a weight for one example, two FLOPs; so each connection is one multiply-add. Both
come in two readings: taps that fall on zero padding counted (what a plain loop over the padded map does), and not
counted (what XLA's cost analysis reports). An *activation* is an output node of a layer. A local layer has a weight for
every tap of every position, so for those on the padding as well, which never see a value; a full layer has no padding.

What a training step *keeps* for its backward pass are the values that derivatives need: the input of every layer with
weights, the output of every activation function, input and output of max pooling, each counted once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
    kept: int = 0
    """Values that a training step keeps for its backward pass."""

    @property
    def parameters(self) -> int:
        return self.weights + self.biases

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
        return self.kept * batch_size * BYTES[dtype]

    def __add__(self, other: Count) -> Count:
        return Count(
            self.weights + other.weights,
            self.biases + other.biases,
            self.connections + other.connections,
            self.connections_without_padding + other.connections_without_padding,
            self.activations + other.activations,
            self.kept + other.kept,
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

    def seen(self, positions: int, nodes: int) -> Field:
        """What all positions see together of the `nodes` of the input, from the first to the last."""
        first = max(0, -self.padding)
        last = min(nodes - 1, (positions - 1) * self.stride - self.padding + self.size - 1)
        return Field(last - first + 1, 0, -first)

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
    return sum((layer.count for layer in layers(model, input_shape)), Count())


def layers(model: Model, input_shape: Shape) -> tuple[LayerCount, ...]:
    """Every layer of a model with its counts and fields; raises UserError where a layer does not fit its input."""
    model.shapes(input_shape)
    spatial = input_shape[:-1]
    start = _Map(input_shape, tuple(Field(1, 1, 0) for _ in spatial))
    counts: list[LayerCount] = []
    _follow(model.layers, start, (), spatial, counts)
    return tuple(counts)


@dataclass
class _Map:
    """Values on their way through a model."""

    shape: Shape
    fields: Fields
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
            )
            count = Count(activations=math.prod(y.shape))
        else:
            y = _Map(layer.output_shape(x.shape), tuple(_fields(layer, x, spatial)))
            count = _edges(layer, x.shape) + Count(activations=math.prod(y.shape), kept=_kept(layer, x, y))
        counts.append(LayerCount(inside, layer, x.shape, y.shape, count, y.fields))
        x = y
    return x


def _edges(layer: Layer, input_shape: Shape) -> Count:
    """Weights, biases and connections of a layer that is not a branch."""
    match layer:
        case Conv() | Local():
            window = layer.window(input_shape)
            positions, channel_pairs = math.prod(window.output_size), input_shape[-1] * layer.features
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
        case _:
            return Count()


def _kept(layer: Layer, x: _Map, y: _Map) -> int:
    match layer:
        case Conv() | Local() | Full() | Dense():
            return x.keep()
        case Activation():
            return y.keep()
        case MaxPool():
            return x.keep() + y.keep()
        case _:
            return 0


def _fields(layer: Layer, x: _Map, spatial: Shape) -> Iterator[Field | None]:
    window: Window | None = layer.window(x.shape) if isinstance(layer, (Conv, Local, MaxPool, AvgPool)) else None
    for axis, (field, nodes) in enumerate(zip(x.fields, spatial, strict=True)):
        if isinstance(layer, Dense | Full):
            # Where the field differs by position, together they see all that one full layer can.
            positions = x.shape[axis] if len(x.shape) > 1 else 1
            yield Field(nodes, 0, 0) if field is None else field.seen(positions, nodes)
        elif window is None or field is None:
            yield field
        else:
            low, _ = window.padding[axis]
            yield field.through(window.size[axis], window.strides[axis], window.dilation[axis], low)
