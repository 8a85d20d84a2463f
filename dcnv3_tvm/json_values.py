"""Decode JSON values to typed ones, and reject values of other types by name."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any


def decode(kind: Any, value: Any, name: str) -> Any:
    """Return a JSON value as a type, which is written as in an annotation.

    Parameters
    ----------
    kind : type
        str, int, float, bool, None or `Any`; a union, ``list[T]``, ``tuple[T, ...]`` or
        ``dict[str, T]`` or ``Mapping[str, T]`` of these; a dataclass or `typing.TypedDict` with
        such fields.
    value : object
        From `json.loads`.
    name : str
        Name of the value in errors.

    Raises
    ------
    ValueError
        If a value has another type, or a field without default is missing. Unknown fields are
        ignored.

    Examples
    --------
    >>> decode(tuple[int | str, ...], ["n", 3], "shape")
    ('n', 3)
    """
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, name)
    if typing.is_typeddict(kind):
        missing = sorted(kind.__required_keys__ - _checked(dict, value, name).keys())
        if missing:
            raise ValueError(f"{name} has no {missing[0]}")
        return _decode_fields(kind, value, name)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(arguments, value, name)
    if origin in (list, tuple):
        items = _checked(list, value, name)
        return origin(decode(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(items))
    if origin in (dict, Mapping):
        items = _checked(dict, value, name).items()
        return {key: decode(arguments[1], item, f"{name}.{key}") for key, item in items}
    if kind is float and type(value) is int:
        return value
    return _checked(kind, value, name)


def _decode_dataclass(kind: Any, value: Any, name: str) -> Any:
    given = _checked(dict, value, name)
    for field in dataclasses.fields(kind):
        factory = field.default_factory
        required = field.default is dataclasses.MISSING and factory is dataclasses.MISSING
        if required and field.name not in given:
            raise ValueError(f"{name} has no {field.name}")
    return kind(**_decode_fields(kind, given, name))


def _decode_fields(kind: Any, given: dict[str, Any], name: str) -> dict[str, Any]:
    return {
        field: decode(hint, given[field], f"{name}.{field}")
        for field, hint in typing.get_type_hints(kind).items()
        if field in given
    }


def _decode_union(kinds: tuple[Any, ...], value: Any, name: str) -> Any:
    for kind in kinds:
        plain = typing.get_origin(kind) or kind
        json_type = {tuple: list}.get(plain, plain)
        if type(value) is json_type:
            return decode(kind, value, name)
    raise _wrong_type(
        value, " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds), name
    )


def _checked(kind: type, value: Any, name: str) -> Any:
    if type(value) is not kind:  # bool is a subclass of int
        raise _wrong_type(value, kind.__name__, name)
    return value


def _wrong_type(value: Any, expected: str, name: str) -> ValueError:
    return ValueError(f"{name} is of type {type(value).__name__}, not {expected}")
