"""Describe layers as data. The input shape of a layer determines its output shape.

Nothing here allocates memory or imports JAX. A shape describes one example, without the batch axis:
`(*spatial, channels)`, such as `(28, 28, 1)` for a grey image and `(40, 1)` for a signal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cnnlib.errors import UserError
from cnnlib.spec.window import (
    Padding,
    PerAxis,
    Shape,
    Window,
    axes_text,
    count_of,
    padding_text,
    pool_window,
    set_fields,
    shape_text,
    window_arguments,
    window_over,
)

Connectivity = Literal["full", "local", "conv"]
READINGS: tuple[Connectivity, ...] = ("conv", "local", "full")
"""All connectivities. A conv layer is a special local layer, and a local layer is a special full layer."""

NUM_CLASSES = "classes"
"""`Dense(NUM_CLASSES)` has as many units as the data has classes."""


MOST_UNITS = 10**15
"""Largest number of units of a dense layer."""


@dataclass(frozen=True)
class Filter:
    """Base class of `Conv`, `Local` and `Full`. A window slides over a map and makes `features` nodes at each position.

    The three layers take the same arguments and make maps of the same shape. Two things differ: which nodes are
    connected, and which connections share a weight.

    `groups` divides channels and features into groups. Each group of features sees only its own group of channels. A
    convolution with one group per channel is depthwise. `Full` ignores `groups` and connects all nodes.
    """

    features: int
    kernel_size: PerAxis
    strides: PerAxis = 1
    padding: Padding = "SAME"
    dilation: PerAxis = 1
    use_bias: bool = True
    groups: int = 1

    def __post_init__(self) -> None:
        name = _NAME_OF[type(self)]
        numbers = {"kernel_size": self.kernel_size, "strides": self.strides, "dilation": self.dilation}
        kept, padding = window_arguments(name, numbers, self.padding)
        features, groups = count_of(self.features, f"{name}: features"), count_of(self.groups, f"{name}: groups")
        if features % groups:
            raise UserError(f"{name}: {features} features do not divide into {groups} groups")
        set_fields(self, **kept, features=features, groups=groups, padding=padding)

    def window(self, input_shape: Shape) -> Window:
        if input_shape[-1] % self.groups:
            raise UserError(f"kernel {self}: {input_shape[-1]} channels do not divide into {self.groups} groups")
        return window_over(input_shape, f"kernel {self}", self.kernel_size, self.strides, self.dilation, self.padding)

    def output_shape(self, input_shape: Shape) -> Shape:
        return (*self.window(input_shape).output_size, self.features)

    def __str__(self) -> str:
        text = f"{_NAME_OF[type(self)]}:{self.features}@{axes_text(self.kernel_size)}"
        text += "" if self.strides == 1 else f"/{axes_text(self.strides)}"
        text += "" if self.padding == "SAME" else f":{padding_text(self.padding)}"
        text += "" if self.dilation == 1 else f":d{axes_text(self.dilation)}"
        text += "" if self.groups == 1 else f":g{self.groups}"
        return text + ("" if self.use_bias else ":nobias")


class Conv(Filter):
    """A convolution (in fact a correlation, as in every deep-learning library): all positions share one filter bank."""


class Local(Filter):
    """A convolution without weight sharing: every position has its own filter bank and its own biases."""


class Full(Filter):
    """A convolution without locality: every input node is connected to every output node; each output has its own bias.

    The window only determines how many output nodes there are.
    """


@dataclass(frozen=True)
class Dense:
    """A dense layer: every input node is connected to every unit.

    If the input is a map, it is flattened row by row; the channel index changes fastest.
    """

    units: int | str
    use_bias: bool = True

    def __post_init__(self) -> None:
        if self.units != NUM_CLASSES and (not isinstance(self.units, int) or not 1 <= self.units <= MOST_UNITS):
            raise UserError(f"dense: units must be in 1..{MOST_UNITS:,} or {NUM_CLASSES!r}, not {str(self.units)[:30]}")

    @property
    def num_units(self) -> int:
        if not isinstance(self.units, int):
            raise UserError(f"{self}: the number of classes is not known here; use with_num_classes first")
        return self.units

    def output_shape(self, input_shape: Shape) -> Shape:
        return (self.num_units,)

    def __str__(self) -> str:
        return f"dense:{self.units}" + ("" if self.use_bias else ":nobias")


@dataclass(frozen=True)
class Pool:
    """A window that slides over each channel separately.

    If `strides` is None, the strides equal the window, so that windows do not overlap.
    """

    window_shape: PerAxis
    strides: PerAxis | None = None
    padding: Padding = "VALID"

    def __post_init__(self) -> None:
        strides = {} if self.strides is None else {"strides": self.strides}
        kept, padding = window_arguments("pool", {"window": self.window_shape, **strides}, self.padding)
        set_fields(self, window_shape=kept["window"], strides=kept.get("strides"), padding=padding)

    def window(self, input_shape: Shape) -> Window:
        return pool_window(input_shape, f"window {self}", self.window_shape, self.strides, self.padding)

    def output_shape(self, input_shape: Shape) -> Shape:
        return (*self.window(input_shape).output_size, input_shape[-1])

    def __str__(self) -> str:
        text = f"{_NAME_OF[type(self)]}:{axes_text(self.window_shape)}"
        text += "" if self.strides is None else f"/{axes_text(self.strides)}"
        return text + ("" if self.padding == "VALID" else f":{padding_text(self.padding)}")


class MaxPool(Pool):
    """The largest value of each window. Padding never counts as the largest value."""


class AvgPool(Pool):
    """The mean of each window. The zeros of the padding are included."""


@dataclass(frozen=True)
class Activation:
    """A function that is applied to each node."""

    function: Literal["relu", "tanh"]

    def __post_init__(self) -> None:
        if self.function not in ("relu", "tanh"):
            raise UserError(f"no activation {self.function!r}; there are: relu, tanh")

    def output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def __str__(self) -> str:
        return self.function


@dataclass(frozen=True)
class Norm:
    """Batch normalisation (Ioffe and Szegedy 2015) of each channel of a map, or of each unit of a vector.

    A channel's mean and variance are taken over the batch and all positions. A channel has one scale and one bias.
    Norms are the same in every connectivity. If a norm had statistics per node, a local or full network would not
    compute the same function of a batch as the convolution that it comes from. If a convolution or dense layer right
    before the norm has a bias, the norm subtracts the bias together with the mean. `nobias` in the notation of that
    layer leaves the bias out.
    """

    def output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def __str__(self) -> str:
        return "norm"


@dataclass(frozen=True)
class Residual:
    """The sum f(x) + g(x), where `layers` compute f and `shortcut` computes g.

    f and g must have equal output shapes. If `shortcut` is empty, g(x) = x.
    """

    layers: tuple[Layer, ...]
    shortcut: tuple[Layer, ...] = ()

    def output_shape(self, input_shape: Shape) -> Shape:
        branch, shortcut = input_shape, input_shape
        for layer in self.layers:
            branch = layer.output_shape(branch)
        for layer in self.shortcut:
            shortcut = layer.output_shape(shortcut)
        if branch != shortcut:
            expected = f"its shortcut makes {shape_text(shortcut)}" if self.shortcut else "it must keep the shape"
            raise UserError(f"{self} turns {shape_text(input_shape)} into {shape_text(branch)}: {expected}")
        return branch

    def __str__(self) -> str:
        shortcut = f"|{','.join(map(str, self.shortcut))}" if self.shortcut else ""
        return f"residual({','.join(map(str, self.layers))}{shortcut})"


Layer = Conv | Local | Full | Dense | MaxPool | AvgPool | Activation | Norm | Residual
FILTERS: dict[Connectivity, type[Conv] | type[Local] | type[Full]] = {"conv": Conv, "local": Local, "full": Full}
_NAME_OF: dict[type, str] = {
    Conv: "conv",
    Local: "local",
    Full: "full",
    MaxPool: "max",
    AvgPool: "avg",
}
