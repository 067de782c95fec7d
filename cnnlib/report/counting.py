"""Write the output of the command `count`, as JSON or as a table: counts of each layer of a model, and the total."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.console import Console

from cnnlib.spec.counts import Count, Fields, LayerCount, layers
from cnnlib.spec.layers import Connectivity, Residual
from cnnlib.spec.model import Model
from cnnlib.spec.window import Shape, shape_text
from cnnlib.system.tables import print_table

COLUMNS = ("layer", "output", "parameters", "connections", "multiply-adds", "field")


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The counts of a layer or a model. Counts are per example; bytes are per training step."""

    parameters: int
    weights: int
    biases: int
    norm_parameters: int
    connections: int
    connections_without_padding: int
    macs: int
    macs_without_padding: int
    activations: int
    parameter_bytes: int
    activation_bytes: int
    receptive_field: tuple[int, ...] | None
    """One size per axis; None if positions differ."""
    effective_stride: tuple[int, ...] | None
    effective_padding: tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class LayerCounts(Counts):
    """The counts of a layer."""

    name: str
    layer: str
    output_shape: Shape


@dataclass(frozen=True, kw_only=True)
class ModelCounts:
    """The counts of a model: one entry per layer, and the sum over layers."""

    model: str
    connectivity: Connectivity
    input_shape: Shape
    batch_size: int
    dtype: str
    layers: tuple[LayerCounts, ...]
    total: Counts


def summary(model: Model, input_shape: Shape, batch_size: int, dtype: str) -> ModelCounts:
    """Count a model. Raises UserError if a layer does not fit its input."""
    counts = layers(model, input_shape)
    total = sum((layer.count for layer in counts), Count())
    return ModelCounts(
        model=str(model),
        connectivity=model.connectivity,
        input_shape=input_shape,
        batch_size=batch_size,
        dtype=dtype,
        layers=tuple(
            LayerCounts(
                name=name_of(layer),
                layer=layer_text(layer),
                output_shape=layer.output_shape,
                **vars(numbers(layer.count, layer.fields, batch_size, dtype)),
            )
            for layer in counts
        ),
        total=numbers(total, counts[-1].fields, batch_size, dtype),
    )


def numbers(count: Count, fields: Fields, batch_size: int, dtype: str) -> Counts:
    """Return the counts, and the receptive field of the last layer."""
    known = [field for field in fields if field is not None]
    whole = len(known) == len(fields)
    return Counts(
        parameters=count.parameters,
        weights=count.weights,
        biases=count.biases,
        norm_parameters=count.norm_parameters,
        connections=count.connections,
        connections_without_padding=count.connections_without_padding,
        macs=count.macs,
        macs_without_padding=count.macs_without_padding,
        activations=count.activations,
        parameter_bytes=count.parameter_bytes(dtype),
        activation_bytes=count.activation_bytes(batch_size, dtype),
        receptive_field=tuple(field.size for field in known) if whole else None,
        effective_stride=tuple(field.stride for field in known) if whole else None,
        effective_padding=tuple(field.padding for field in known) if whole else None,
    )


def name_of(layer: LayerCount) -> str:
    """Return a layer's name. Layer `4.0` is inside the residual `4`; layer `4s.0` is inside its shortcut."""
    return ".".join(part.removeprefix("layer_").replace("_shortcut", "s") for part in layer.path)


def layer_text(layer: LayerCount) -> str:
    """Return a layer's notation; a residual is `sum`, because the layers inside it have their own entries."""
    return "sum" if isinstance(layer.layer, Residual) else str(layer.layer)


def axes_text(sizes: tuple[int, ...] | None) -> str:
    """Return sizes as text, such as `5` for equal axes and `5x3` for others. If `sizes` is None, return `varies`."""
    if sizes is None:
        return "varies"
    return str(sizes[0]) if len(set(sizes)) == 1 else "x".join(map(str, sizes)) or "-"


def field_text(counted: Counts) -> str:
    """Return the receptive field, or `all` if every node sees the same part of the input."""
    stride = counted.effective_stride
    return "all" if stride is not None and not any(stride) else axes_text(counted.receptive_field)


def bytes_text(count: int) -> str:
    """Return a number of bytes with a unit, such as `1.5 KiB`."""
    power = 0 if count < 1024 else min(6, int(math.log(count, 1024)))
    return f"{count:,} bytes" if power == 0 else f"{count / 1024**power:,.1f} {' KMGTPE'[power]}iB"


def print_summary(summary: ModelCounts, console: Console) -> None:
    """Print one row per layer and the total. Below the table, print the facts that have no column."""
    total = summary.total

    def counts_of(one: Counts) -> tuple[str, ...]:
        return (f"{one.parameters:,}", f"{one.connections:,}", f"{one.macs:,}", field_text(one))

    rows = [
        (f"{layer.name} {layer.layer}", shape_text(layer.output_shape), *counts_of(layer)) for layer in summary.layers
    ]
    rows.append(("total", "", *counts_of(total)))
    print_table(console, COLUMNS, rows, left=2, padding=1)
    norms = f"{total.norm_parameters:,} scales and biases of norms, " if total.norm_parameters else ""
    said = [
        f"{total.weights:,} weights, {total.biases:,} biases, {norms}{total.activations:,} activations",
        f"connections and multiply-adds of one example, taps on padding counted; without them "
        f"{total.connections_without_padding:,}",
        f"parameters {bytes_text(total.parameter_bytes)} in {summary.dtype}; a training step of "
        f"{summary.batch_size} keeps {bytes_text(total.activation_bytes)} of activations",
    ]
    if total.receptive_field and total.effective_stride and any(total.effective_stride):
        said.append(
            f"receptive field {axes_text(total.receptive_field)}, effective stride "
            f"{axes_text(total.effective_stride)}, effective padding {axes_text(total.effective_padding)}"
        )
    for line in said:
        console.print(line, markup=False, highlight=False)
