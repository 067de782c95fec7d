"""Parse models, such as `conv:6@5 relu max:2 dense:classes`, and shapes, such as `28x28x1`, from text."""

from __future__ import annotations

import re

from cnnlib.errors import UserError
from cnnlib.spec.layers import FILTERS, NUM_CLASSES, Activation, AvgPool, Dense, Layer, MaxPool, Norm, Residual
from cnnlib.spec.model import Model
from cnnlib.spec.window import Padding, PerAxis, Shape

NOTATION = (
    "conv:FEATURES@KERNEL[/STRIDES][:PADDING][:dDILATION][:gGROUPS][:nobias], local:..., full:..., "
    "dense:UNITS[:nobias], "
    "max:WINDOW[/STRIDES][:PADDING], avg:..., norm, relu, tanh, residual(BRANCH[|SHORTCUT])"
)


def parse_model(text: str) -> Model:
    """Parse a model from the notation that `str(model)` writes. Spaces or commas separate the layers.

    Raises UserError if the text is invalid. The message shows the allowed notation.
    """
    tokens = re.findall(r"residual\(|[)|(]|[^\s,()|]+", text)

    def sequence(depth: int, ends: str = "") -> tuple[tuple[Layer, ...], str]:
        """Return the layers up to a token in `ends`, and that token."""
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
    """Parse a shape from text: `28x28x1` becomes (28, 28, 1). Raises UserError if the text is invalid."""
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
            return Activation(name)  # type: ignore[arg-type]  # mypy does not see that `name` is one of the two
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
        pass  # invalid: the error below names the token
    raise UserError(f"no layer {token!r}; there are: {NOTATION}")
