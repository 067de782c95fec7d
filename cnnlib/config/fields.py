"""Convert the fields of frozen dataclasses to and from text (for overrides) and JSON (for config.json)."""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from cnnlib.errors import UserError, require
from cnnlib.spec.architectures import ARCHITECTURES
from cnnlib.spec.model import Model
from cnnlib.spec.notation import parse_model

T = TypeVar("T")


@functools.cache  # annotations are strings; evaluating them takes most of the time of an override
def types_of_fields(declared: type) -> dict[str, Any]:
    """Return the type of each field of a dataclass."""
    return typing.get_type_hints(declared)


def value_text(value: object) -> str:
    """Return a value in the notation of overrides, such as `0..9`, `0.1,0.3`, `true` or `none`."""
    if isinstance(value, tuple):
        is_span = len(value) > 2 and all(isinstance(v, int) for v in value)
        if is_span and value == tuple(range(value[0], value[-1] + 1)):
            return f"{value[0]}..{value[-1]}"
        return ",".join(map(value_text, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def parse(hint: Any, text: str, path: str) -> Any:
    """Convert an override's text to the type `hint`. Raise UserError, which names `path`, if the text is not valid."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if text in arguments:
            return text
        raise UserError(f"{path}={text}: expected one of {', '.join(arguments)}")
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none":
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return parse(hint, text, path)
    if origin is tuple:
        parts = text.split(",") if text else []
        return tuple(value for part in parts for value in _parse_part(arguments[0], part, path))
    if hint is Model:
        return ARCHITECTURES.get(text) if text in ARCHITECTURES else _parse_architecture(text, path)
    return _parse_scalar(hint, text, path)


def _parse_architecture(text: str, path: str) -> Model:
    try:
        return parse_model(text)
    except UserError as error:
        raise UserError(f"{path}: {error}; or an architecture: {', '.join(ARCHITECTURES)}") from None


def _parse_part(hint: type, text: str, path: str) -> tuple[Any, ...]:
    span = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if hint is int and span:
        first, last = (_parse_scalar(int, end, path) for end in span.groups())
        require(last - first < 100_000, f"{path}={text}: more than 100,000 values")
        return tuple(range(first, last + 1))
    return (_parse_scalar(hint, text, path),)


def _parse_scalar(hint: type, text: str, path: str) -> Any:
    try:
        if hint is bool:
            return {"true": True, "false": False}[text.lower()]
        if hint is int:
            return int(text)
        if hint is float:
            return float(text)
    except (KeyError, ValueError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[hint]
        raise UserError(f"{path}={text}: expected {expected}") from None
    assert hint is str, f"{path} has a type that no override can write: {hint}"
    return text


def to_dict(node: Any) -> Any:
    """Convert a dataclass to values that JSON can store. `from_dict` converts them back."""
    if isinstance(node, Model):
        return str(node)
    if dataclasses.is_dataclass(node):
        return {field.name: to_dict(getattr(node, field.name)) for field in dataclasses.fields(node)}
    if isinstance(node, dict):
        return {key: to_dict(value) for key, value in node.items()}
    return [to_dict(item) for item in node] if isinstance(node, tuple) else node


def flat(config: object, path: str = "") -> dict[str, object]:
    """Flatten a JSON configuration to `{path: value}`. The paths of an arm NAME look like `arms.NAME.model`."""
    if isinstance(config, dict):
        found: dict[str, object] = {}
        for key, value in config.items():
            found |= flat(value, f"{path}.{key}" if path else key)
        return found
    if path == "arms" and isinstance(config, list) and all(isinstance(arm, dict) and "name" in arm for arm in config):
        named: dict[str, object] = {"arms": [arm["name"] for arm in config]}
        for arm in config:
            named |= flat({key: value for key, value in arm.items() if key != "name"}, f"arms.{arm['name']}")
        return named
    return {path: config}


def from_dict(values: Any, hint: Any, path: str = "config") -> Any:
    """Undo `to_dict`. Raise UserError for an unknown field, a wrong type, or a missing field without a default."""
    if hint in (int, float, bool, str):
        return _scalar_of(values, hint, path)
    if hint in (Any, object):
        return values
    if hint is Model:
        require(isinstance(values, str), f"{path}: expected a model in short notation, not {values!r}")
        return parse_model(values)
    if dataclasses.is_dataclass(hint):
        return _dataclass_of(values, hint, path)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if values is None else from_dict(values, inner, path)
    if origin is Literal:
        if values not in arguments:
            raise UserError(f"{path}: expected one of {', '.join(arguments)}, not {_shown(values)}")
        return values
    if origin is dict:
        require(isinstance(values, dict), f"{path}: expected an object, not {_shown(values)}")
        return {name: from_dict(value, arguments[1], f"{path}.{name}") for name, value in values.items()}
    assert origin is tuple, f"{path} has a type that no file can hold: {hint}"
    require(isinstance(values, list), f"{path}: expected a list, not {_shown(values)}")
    hints = arguments[:1] * len(values) if arguments[1:] == (...,) else arguments
    require(len(values) == len(hints), f"{path}: expected {len(hints)} values, not {_shown(values)}")
    return tuple(from_dict(value, hints[i], f"{path}[{i}]") for i, value in enumerate(values))


def _dataclass_of(values: Any, build: Any, path: str) -> Any:
    fields, required = types_of_fields(build), _required_fields(build)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected an object with {', '.join(fields)}")
    if unknown := values.keys() - fields.keys():
        raise UserError(f"no field {path}.{min(unknown)}; there are: {', '.join(fields)}")
    if missing := required - values.keys():  # a field newer than the file gets its default
        raise UserError(f"{path}.{min(missing)} is missing")
    return build(**{name: from_dict(value, fields[name], f"{path}.{name}") for name, value in values.items()})


@functools.cache
def _required_fields(declared: type) -> frozenset[str]:
    """Return the fields of a dataclass that have no default."""
    missing = dataclasses.MISSING
    fields = dataclasses.fields(declared)
    return frozenset(field.name for field in fields if field.default is missing and field.default_factory is missing)


def _scalar_of(values: Any, hint: Any, path: str) -> Any:
    accepted = (int, float) if hint is float else hint
    if not isinstance(values, accepted) or (isinstance(values, bool) and hint is not bool):
        raise UserError(f"{path}: expected {hint.__name__}, not {_shown(values)}")
    if hint in (int, float) and not -1e300 < values < 1e300:
        raise UserError(f"{path}: expected a finite number, not {_shown(values)}")
    return hint(values)


def _shown(values: object) -> str:
    return repr(values)[:60]


def path_and_text(assignment: str) -> tuple[str, str]:
    """Split an override `FIELD=VALUE` into field and value. Raise UserError if it has no `=`."""
    path, equals, text = assignment.partition("=")
    if not equals:
        raise UserError(f"{assignment!r} is no override; expected FIELD=VALUE, such as epochs=3")
    return path, text


def replace_field(node: T, keys: Sequence[str], text: str, path: str) -> T:
    """Return a dataclass with one field replaced.

    Args:
        node: A frozen dataclass.
        keys: The path of the field, outermost name first, such as `["optim", "learning_rate"]`.
        text: The new value, in the notation of `parse`.
        path: The whole path, for error messages.

    Raises:
        UserError: If the field does not exist, or `text` is not a value of its type.
    """
    assert dataclasses.is_dataclass(node) and not isinstance(node, type)
    key, *rest = keys
    hints = types_of_fields(type(node))
    names = [field.name for field in dataclasses.fields(node)]
    if key not in names:
        raise UserError(f"no field {path!r}; {'there are' if len(names) > 1 else 'there is'}: {', '.join(names)}")
    if dataclasses.is_dataclass(hints[key]) and hints[key] is not Model:
        if not rest:
            inner = [f"{path}.{field.name}" for field in dataclasses.fields(hints[key])]
            raise UserError(f"{path!r} is a group of fields; set one of: {', '.join(inner)}")
        value: Any = replace_field(getattr(node, key), rest, text, path)
    elif rest:
        raise UserError(f"no field {path!r}; {path.removesuffix('.' + '.'.join(rest))!r} holds a value, not fields")
    else:
        value = parse(hints[key], text, path)
    return dataclasses.replace(node, **{key: value})
