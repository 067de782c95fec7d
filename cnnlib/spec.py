"""Architectures as data: a model is a tuple of layers, and its shapes follow from the shape of its input.

Nothing here allocates or imports JAX. A shape is that of one example without the batch: `(*spatial, channels)`,
so `(28, 28, 1)` for a grey image and `(40, 1)` for a signal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex

import numpy as np

from cnnlib.errors import UserError

Shape = tuple[int, ...]
PerAxis = int | tuple[int, ...]
Padding = str | int | tuple[tuple[int, int], ...]
PerAxisLike = SupportsIndex | Sequence[SupportsIndex]
"""What is taken as `PerAxis`: numbers of NumPy and lists as well."""
PaddingLike = str | SupportsIndex | Sequence[SupportsIndex | Sequence[SupportsIndex]]
"""What is taken as `Padding`: lower case, numbers of NumPy, lists, and a number per axis as well."""
Connectivity = Literal["full", "local", "conv"]
READINGS: tuple[Connectivity, ...] = ("conv", "local", "full")
"""Each is a special case of the next."""

NUM_CLASSES = "classes"
"""As the units of a `Dense` layer: as many as the data has classes."""


MOST_UNITS = 10**15
"""Bound of the units of a dense layer."""
LARGEST = 1_000_000
"""Bound of a window's numbers, so that shapes stay within what XLA can index."""


def per_axis(value: PerAxis, axes: int, what: str) -> tuple[int, ...]:
    """One number an axis; an int stands for every axis. Raises UserError where the lengths differ."""
    if isinstance(value, int):
        return (value,) * axes
    if len(value) != axes:
        raise UserError(f"{what} {'x'.join(map(str, value))} has {len(value)} axes, its input has {axes}")
    return value


def pad_pairs(
    padding: Padding, size: Shape, window: Shape, strides: Shape, dilation: Shape
) -> tuple[tuple[int, int], ...]:
    """Zeros before and after each spatial axis.

    `SAME` gives ceil(size / stride) outputs and puts the odd zero at the end, as XLA and TensorFlow do; `VALID` pads
    nothing; an int pads every side; pairs are taken as they are.
    """
    if isinstance(padding, int):
        return ((padding, padding),) * len(size)
    if isinstance(padding, tuple):
        if len(padding) != len(size):
            raise UserError(f"padding {padding} has {len(padding)} axes, its input has {len(size)}")
        return padding
    if padding == "VALID":
        return ((0, 0),) * len(size)
    pairs = []
    for n, k, s, d in zip(size, window, strides, dilation, strict=True):
        total = max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
        pairs.append((total // 2, total - total // 2))
    return tuple(pairs)


@dataclass(frozen=True)
class Window:
    """A window placed over a map: its sizes resolved to one number an axis."""

    input_size: Shape
    size: Shape
    strides: Shape
    dilation: Shape
    padding: tuple[tuple[int, int], ...]

    @functools.cached_property
    def output_size(self) -> Shape:
        """Positions an axis: floor((n + zeros - span) / stride) + 1, where span = (k - 1) dilation + 1."""
        return tuple(
            (n + low + high - ((k - 1) * d + 1)) // s + 1
            for n, k, s, d, (low, high) in zip(
                self.input_size, self.size, self.strides, self.dilation, self.padding, strict=True
            )
        )

    @functools.cached_property
    def taps_inside(self) -> int:
        """Pairs of a position and a tap that fall on the map itself, not on its padding."""
        product = 1
        for n, k, s, d, (low, _), outputs in zip(
            self.input_size, self.size, self.strides, self.dilation, self.padding, self.output_size, strict=True
        ):
            inside = 0
            for tap in range(k):
                first = max(0, math.ceil((low - tap * d) / s))
                last = min(outputs - 1, (n - 1 + low - tap * d) // s)
                inside += max(0, last - first + 1)
            product *= inside
        return product


def window_over(
    input_shape: Shape, what: str, size: PerAxis, strides: PerAxis, dilation: PerAxis, padding: Padding
) -> Window:
    """The window of a layer over a map `(*spatial, channels)`; raises UserError where it does not fit the map."""
    spatial = input_shape[:-1]
    if not spatial:
        raise UserError(f"{what} needs a map with spatial axes, its input is a vector of {input_shape[0]}")
    axes = len(spatial)
    sizes = per_axis(size, axes, "window")
    steps = per_axis(strides, axes, "stride")
    spread = per_axis(dilation, axes, "dilation")
    pairs = pad_pairs(padding, spatial, sizes, steps, spread)
    for n, k, d, (low, high) in zip(spatial, sizes, spread, pairs, strict=True):
        span = (k - 1) * d + 1
        if span > n + low + high:
            raise UserError(f"{what} spans {span}, its map has only {n + low + high} ({n} and {low + high} of padding)")
        # SAME pads for any kernel. 3 taps on a map of 1 happen in deep nets; beyond that most taps meet no node at all.
        if span > 2 * n + 1:
            raise UserError(f"{what} spans {span}, its map has only {n}")
    return Window(spatial, sizes, steps, spread, pairs)


def pool_window(
    input_shape: Shape, what: str, window_shape: PerAxis, strides: PerAxis | None, padding: Padding
) -> Window:
    """The window of a pooling; raises UserError as well for padding that could fill a whole window."""
    window = window_over(input_shape, what, window_shape, window_shape if strides is None else strides, 1, padding)
    for k, pair in zip(window.size, window.padding, strict=True):
        if max(pair) >= k:
            raise UserError(
                f"{what} has padding of {max(pair)}: it must be less than the window, or one sees nothing else"
            )
    return window


def _text(value: PerAxis) -> str:
    return str(value) if isinstance(value, int) else "x".join(map(str, value))


def _padding_text(padding: Padding) -> str:
    if isinstance(padding, tuple):
        return "x".join(f"{low}+{high}" for low, high in padding)
    return str(padding).lower()


def whole(value: Any) -> int:
    """Return a whole number of any type as an int. Raises TypeError for others; a bool is none."""
    if isinstance(value, bool | np.bool_):  # of the second, NumPy 2.1 still makes 1, with a warning
        raise TypeError
    return operator.index(value)


def count_of(value: Any, what: str) -> int:
    """Return a single whole number from 1 on as an int. Raises UserError for anything else."""
    try:
        count = whole(value)
    except TypeError:
        raise UserError(f"{what} must be one whole number, not {_shortened(value)}") from None
    if not 1 <= count <= LARGEST:
        raise UserError(f"{what} must be in 1..{LARGEST:,}, not {count}")
    return count


def whole_per_axis(value: Any, what: str) -> PerAxis:
    """Return a whole number, or a sequence of one per axis, as int or tuple. Raises UserError for anything else."""
    with contextlib.suppress(TypeError):
        return whole(value)
    with contextlib.suppress(TypeError):
        return tuple(whole(number) for number in value)
    raise UserError(f"{what} must be a whole number or one per axis, not {_shortened(value)}")


def padding_of(value: Any, name: str) -> Padding:
    """Return padding in the one form that specs keep.

    Args:
        value: `"SAME"` or `"VALID"`, in lower case as well; a whole number for all sides; or per axis a whole number,
            or a pair of them, before and after.
        name: What has the padding, for the error.

    Raises UserError for anything else.
    """
    if isinstance(value, str) and value.upper() in ("SAME", "VALID"):
        return value.upper()
    if not isinstance(value, str):
        with contextlib.suppress(TypeError):
            return whole(value)
        with contextlib.suppress(TypeError, ValueError):  # the second where there are not two
            return tuple(_before_and_after(one) for one in value)
    raise UserError(
        f"{name}: padding must be SAME, VALID, a whole number, or a number or a pair per axis, not {_shortened(value)}"
    )


def _before_and_after(value: Any) -> tuple[int, int]:
    """Return a whole number twice, or a pair of them. Raises TypeError or ValueError for anything else."""
    with contextlib.suppress(TypeError):
        return whole(value), whole(value)
    before, after = value
    return whole(before), whole(after)


def _shortened(value: Any) -> str:
    return text if len(text := repr(value)) <= 60 else f"{text[:57]}..."


def window_arguments(name: str, numbers: dict[str, Any], padding: Any) -> tuple[dict[str, PerAxis], Padding]:
    """Return the arguments of a layer's window as specs keep them.

    Raises UserError for numbers that are not whole or below 1, and for padding that is none, whatever the map.
    """
    kept = {what: whole_per_axis(value, f"{name}: {what}") for what, value in numbers.items()}
    for what, value in kept.items():
        if not all(1 <= v <= LARGEST for v in ((value,) if isinstance(value, int) else value)):
            raise UserError(f"{name}: {what} must be in 1..{LARGEST:,}, not {_text(value)}")
    pads = padding_of(padding, name)
    pairs = ((pads,),) if isinstance(pads, int) else pads
    if not isinstance(pairs, str) and not all(0 <= v <= LARGEST for pair in pairs for v in pair):
        raise UserError(f"{name}: padding must be in 0..{LARGEST:,}, not {_padding_text(pads)}")
    return kept, pads


def set_fields(instance: Any, **fields: Any) -> None:
    """Set fields of a frozen dataclass while it is made."""
    for name, value in fields.items():
        object.__setattr__(instance, name, value)


@dataclass(frozen=True)
class Filter:
    """A window slid over a map, which makes `features` nodes at each of its positions: what three layers share.

    `Conv`, `Local` and `Full` read the same numbers. They make maps of one shape, so of the same nodes, and differ in
    which nodes are joined and which of those edges have a weight of their own.

    With `groups` channels and features are divided into as many, and a group of features sees its own group of channels
    only. With as many groups as channels a convolution is depthwise. `Full` joins all nodes, whatever the groups.
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
        text = f"{_NAME_OF[type(self)]}:{self.features}@{_text(self.kernel_size)}"
        text += "" if self.strides == 1 else f"/{_text(self.strides)}"
        text += "" if self.padding == "SAME" else f":{_padding_text(self.padding)}"
        text += "" if self.dilation == 1 else f":d{_text(self.dilation)}"
        text += "" if self.groups == 1 else f":g{self.groups}"
        return text + ("" if self.use_bias else ":nobias")


class Conv(Filter):
    """A convolution (in fact a correlation, as in every deep-learning library): one filter bank at every position."""


class Local(Filter):
    """A convolution without weight sharing: every position has a filter bank and biases of its own."""


class Full(Filter):
    """A convolution without locality: every node of the input joined to every node of the map, each with its own bias.

    The window says no more than how many nodes the map has.
    """


@dataclass(frozen=True)
class Dense:
    """Every input node joined to every unit; a map is flattened first, row by row, channels last."""

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
    """A window slid over each channel by itself; `strides` defaults to the window, so that windows tile the map."""

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
        text = f"{_NAME_OF[type(self)]}:{_text(self.window_shape)}"
        text += "" if self.strides is None else f"/{_text(self.strides)}"
        return text + ("" if self.padding == "VALID" else f":{_padding_text(self.padding)}")


class MaxPool(Pool):
    """The largest value of each window; padding never wins."""


class AvgPool(Pool):
    """The mean of each window; zeros of the padding count as values."""


@dataclass(frozen=True)
class Activation:
    """An elementwise function of each node."""

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
    """Batch normalisation (Ioffe and Szegedy 2015): each channel of a map, or each unit of a vector, by itself.

    A channel's mean and variance are taken over the batch and all positions, and it has one scale and one bias, in
    every reading of a model: with statistics of every node a local or full reading would not be the same function of a
    batch as the convolution that it comes from. The bias of a convolution or a dense layer right before it comes off
    with the mean: `nobias` leaves it out.
    """

    def output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def __str__(self) -> str:
        return "norm"


@dataclass(frozen=True)
class Residual:
    """g(x) + f(x), two sequences of layers whose outputs have one shape; without `shortcut`, g(x) is x itself."""

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


def shape_text(shape: Shape) -> str:
    """`28x28x1`, as the command line writes and reads a shape."""
    return "x".join(map(str, shape))


@dataclass(frozen=True)
class Model:
    """A sequence of layers, from the input to the logits."""

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise UserError("a model needs at least one layer")

    def shapes(self, input_shape: Shape) -> tuple[Shape, ...]:
        """The output shape of every layer; raises UserError where a layer does not fit its input."""
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
        """The same model with every layer that is not a branch replaced by what `change` makes of it."""
        return Model(_replaced(self.layers, change))

    def with_num_classes(self, num_classes: int) -> Model:
        """The same model with every `Dense(NUM_CLASSES)` given its number of units."""
        return self.replaced(
            lambda layer: (
                dataclasses.replace(layer, units=num_classes)
                if isinstance(layer, Dense) and layer.units == NUM_CLASSES
                else layer
            )
        )

    @property
    def has_classes(self) -> bool:
        """Whether a layer has as many units as the data has classes."""
        return any(isinstance(layer, Dense) and layer.units == NUM_CLASSES for layer in walk(self.layers))

    @property
    def connectivity(self) -> Connectivity:
        """`conv` as soon as one layer shares weights over positions, else `local` as soon as one sees windows only."""
        kinds = {type(layer) for layer in walk(self.layers)}
        return "conv" if Conv in kinds else "local" if Local in kinds else "full"

    def with_connectivity(self, connectivity: Connectivity) -> Model:
        """The model read as `full`, `local` or `conv`: the same nodes in every layer, all else kept.

        Readings are of layers with a window (`Conv`, `Local`, `Full`) and can be exchanged any number of times; `Dense`
        layers are full in each of them.
        """
        kind = FILTERS[connectivity]
        return self.replaced(lambda layer: kind(**vars(layer)) if isinstance(layer, Filter) else layer)

    def conv(self) -> Model:
        """The reading that shares one filter bank over all positions."""
        return self.with_connectivity("conv")

    def local(self) -> Model:
        """The reading with a filter bank of its own at every position."""
        return self.with_connectivity("local")

    def full(self) -> Model:
        """The reading that joins every node to every node."""
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
    """Every layer that is not a branch, in the order in which data meets them."""
    for layer in layers:
        if isinstance(layer, Residual):
            yield from walk(layer.layers)
            yield from walk(layer.shortcut)
        else:
            yield layer


# The short notation: what `str(model)` writes, read back.

NOTATION = (
    "conv:FEATURES@KERNEL[/STRIDES][:PADDING][:dDILATION][:gGROUPS][:nobias], local:..., full:..., "
    "dense:UNITS[:nobias], "
    "max:WINDOW[/STRIDES][:PADDING], avg:..., norm, relu, tanh, residual(BRANCH[|SHORTCUT])"
)


def parse_model(text: str) -> Model:
    """A model from its short notation, layers apart by blanks or commas: `conv:6@5 relu max:2 dense:classes`.

    Raises UserError for what is no notation, with the notation.
    """
    tokens = re.findall(r"residual\(|[)|(]|[^\s,()|]+", text)

    def sequence(depth: int, ends: str = "") -> tuple[tuple[Layer, ...], str]:
        """Layers up to one of `ends`, and which one it was."""
        if depth > 32:
            raise UserError("residuals are nested more than 32 deep")
        layers: list[Layer] = []
        while tokens:
            token = tokens.pop(0)
            if token in ends:
                return tuple(layers), token
            layers.append(residual(depth + 1) if token == "residual(" else _parse_layer(token))
        if depth:
            raise UserError(f"{text!r}: a residual( is not closed")
        return tuple(layers), ""

    def residual(depth: int) -> Residual:
        branch, end = sequence(depth, "|)")
        if not branch:
            raise UserError(f"{text!r}: a residual needs at least one layer")
        if end == "|":
            shortcut, _ = sequence(depth, ")")
            return Residual(branch, shortcut)
        return Residual(branch)

    return Model(sequence(0)[0])


def parse_shape(text: str) -> Shape:
    """`28x28x1` as a shape; raises UserError for what is none."""
    if not re.fullmatch(r"[1-9]\d{0,8}(x[1-9]\d{0,8}){0,2}", text):
        raise UserError(f"{text!r} is no shape of an example; expected HEIGHTxWIDTHxCHANNELS, such as 32x32x3")
    return tuple(map(int, text.split("x")))


_WINDOW = re.compile(r"(?P<size>\d+(?:x\d+)*)(?:/(?P<strides>\d+(?:x\d+)*))?")


def _numbers(text: str) -> PerAxis:
    values = tuple(map(int, text.split("x")))
    return values[0] if len(values) == 1 else values


def _parse_padding(text: str) -> Padding:
    if text in ("same", "valid"):
        return text.upper()
    if re.fullmatch(r"\d+", text):
        return int(text)
    if re.fullmatch(r"\d+\+\d+(x\d+\+\d+)*", text):
        pairs = (pair.split("+") for pair in text.split("x"))
        return tuple((int(low), int(high)) for low, high in pairs)
    raise ValueError(text)


def _parse_layer(token: str) -> Layer:
    name, *parts = token.split(":")
    try:
        if name in ("relu", "tanh") and not parts:
            return Activation(name)  # type: ignore[arg-type]  # the line above narrows it, mypy does not see it
        if token == "norm":
            return Norm()
        use_bias = "nobias" not in parts
        parts = [part for part in parts if part != "nobias"]
        if name == "dense":
            (units,) = parts
            return Dense(units if units == NUM_CLASSES else int(units), use_bias)
        if name in FILTERS:
            features, _, window = parts.pop(0).partition("@")
            match = _WINDOW.fullmatch(window)
            dilation = [_numbers(part[1:]) for part in parts if part.startswith("d")] or [1]
            groups = [int(part[1:]) for part in parts if part.startswith("g")] or [1]
            padding = [_parse_padding(part) for part in parts if not part.startswith(("d", "g"))] or ["SAME"]
            if match and len(dilation) == len(groups) == len(padding) == 1:
                size, strides = _numbers(match["size"]), _numbers(match["strides"] or "1")
                kind = FILTERS[name]
                return kind(int(features), size, strides, padding[0], dilation[0], use_bias, groups[0])
        if name in ("max", "avg") and use_bias:
            match = _WINDOW.fullmatch(parts.pop(0))
            padding = [_parse_padding(part) for part in parts] or ["VALID"]
            if match and len(padding) == 1:
                pool = MaxPool if name == "max" else AvgPool
                return pool(
                    _numbers(match["size"]), _numbers(match["strides"]) if match["strides"] else None, padding[0]
                )
    except (ValueError, IndexError):
        pass  # no notation: said below, with the token itself
    raise UserError(f"no layer {token!r}; there are: {NOTATION}")
