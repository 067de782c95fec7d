"""Describe a model as data: a tuple of layers. The input shape determines all other shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cnnlib.errors import UserError
from cnnlib.spec.layers import FILTERS, NUM_CLASSES, Connectivity, Conv, Dense, Filter, Layer, Local, Residual
from cnnlib.spec.window import Shape, shape_text


@dataclass(frozen=True)
class Model:
    """A sequence of layers, from the input to the logits."""

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise UserError("a model needs at least one layer")

    def shapes(self, input_shape: Shape) -> tuple[Shape, ...]:
        """Return the output shape of every layer. Raises UserError if a layer does not fit its input."""
        shapes = []
        shape = input_shape
        for index, layer in enumerate(self.layers):
            try:
                shape = layer.output_shape(shape)
            except UserError as error:
                raise UserError(f"layer {index} ({layer}) on {shape_text(shape)}: {error}") from None
            shapes.append(shape)
        return tuple(shapes)

    def replaced(self, change: Callable[[Layer], Layer]) -> Model:
        """Replace each layer by `change(layer)`. A `Residual` stays, but the layers inside it are replaced too."""
        return Model(_replaced(self.layers, change))

    def with_num_classes(self, num_classes: int) -> Model:
        """Return the model with `num_classes` units in every `Dense(NUM_CLASSES)`."""
        return self.replaced(
            lambda layer: (
                dataclasses.replace(layer, units=num_classes)
                if isinstance(layer, Dense) and layer.units == NUM_CLASSES
                else layer
            )
        )

    @property
    def has_classes(self) -> bool:
        """Whether the model has a `Dense(NUM_CLASSES)`."""
        return any(isinstance(layer, Dense) and layer.units == NUM_CLASSES for layer in walk(self.layers))

    @property
    def connectivity(self) -> Connectivity:
        """`conv` if at least one layer is a `Conv`, else `local` if at least one is a `Local`, else `full`."""
        kinds = {type(layer) for layer in walk(self.layers)}
        return "conv" if Conv in kinds else "local" if Local in kinds else "full"

    def with_connectivity(self, connectivity: Connectivity) -> Model:
        """Return the model with every `Conv`, `Local` and `Full` layer replaced by the layer of the given connectivity.

        Every layer keeps its nodes and its arguments, so the change can be undone. All other layers stay as they are;
        `Dense` layers are always fully connected.
        """
        kind = FILTERS[connectivity]
        return self.replaced(lambda layer: kind(**vars(layer)) if isinstance(layer, Filter) else layer)

    def conv(self) -> Model:
        """Return the model in which all positions share one filter bank."""
        return self.with_connectivity("conv")

    def local(self) -> Model:
        """Return the model in which every position has its own filter bank."""
        return self.with_connectivity("local")

    def full(self) -> Model:
        """Return the model in which every input node is connected to every output node."""
        return self.with_connectivity("full")

    def __str__(self) -> str:
        return " ".join(map(str, self.layers))


def _replaced(layers: tuple[Layer, ...], change: Callable[[Layer], Layer]) -> tuple[Layer, ...]:
    return tuple(
        Residual(_replaced(layer.layers, change), _replaced(layer.shortcut, change))
        if isinstance(layer, Residual)
        else change(layer)
        for layer in layers
    )


def walk(layers: tuple[Layer, ...]) -> Iterator[Layer]:
    """Yield all layers in order. Instead of a `Residual`, yield the layers of its branch, then of its shortcut."""
    for layer in layers:
        if isinstance(layer, Residual):
            yield from walk(layer.layers)
            yield from walk(layer.shortcut)
        else:
            yield layer
