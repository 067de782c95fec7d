"""Exact counts of a spec on an input shape, in Python integers, without JAX and without allocating.

Conventions. A *connection* is an edge that carries a weight: biases and the unweighted edges of pooling do not count.
A *multiply-add* (MAC) is one use of a weight for one example, two FLOPs; so each connection is one multiply-add. Both
come in two readings: taps that fall on zero padding counted (what a plain loop over the padded map does), and not
counted (what XLA's cost analysis reports). An *activation* is an output node of a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cnnlib.spec import Conv, Dense, Layer, Model, Residual, Shape


@dataclass(frozen=True)
class Count:
    """Numbers of one layer, or of a whole model, for one example."""

    weights: int = 0
    biases: int = 0
    connections: int = 0
    connections_without_padding: int = 0
    activations: int = 0

    @property
    def parameters(self) -> int:
        return self.weights + self.biases

    @property
    def macs(self) -> int:
        return self.connections

    @property
    def macs_without_padding(self) -> int:
        return self.connections_without_padding

    def __add__(self, other: Count) -> Count:
        return Count(
            self.weights + other.weights,
            self.biases + other.biases,
            self.connections + other.connections,
            self.connections_without_padding + other.connections_without_padding,
            self.activations + other.activations,
        )


def count_layer(layer: Layer, input_shape: Shape) -> Count:
    """Counts of one layer; a residual's addition adds no connection, its layers count as themselves."""
    output_shape = layer.output_shape(input_shape)
    activations = math.prod(output_shape)
    match layer:
        case Conv():
            window = layer.window(input_shape)
            channel_pairs = input_shape[-1] * layer.features
            weights = math.prod(window.size) * channel_pairs
            return Count(
                weights,
                layer.features * layer.use_bias,
                weights * math.prod(window.output_size),
                window.taps_inside * channel_pairs,
                activations,
            )
        case Dense():
            weights = math.prod(input_shape) * layer.num_units
            return Count(weights, layer.num_units * layer.use_bias, weights, weights, activations)
        case Residual():
            return sum(count_layers(layer.layers, input_shape), Count(activations=activations))
        case _:
            return Count(activations=activations)


def count_layers(layers: tuple[Layer, ...], input_shape: Shape) -> tuple[Count, ...]:
    """Counts of each layer of a sequence."""
    counts = []
    for layer in layers:
        counts.append(count_layer(layer, input_shape))
        input_shape = layer.output_shape(input_shape)
    return tuple(counts)


def count(model: Model, input_shape: Shape) -> Count:
    """Counts of a whole model; raises UserError where a layer does not fit its input."""
    model.shapes(input_shape)
    return sum(count_layers(model.layers, input_shape), Count())
