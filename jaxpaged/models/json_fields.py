"""Frozen dataclasses of facts as JSON values, and back with every name and type checked."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from jaxpaged.layers.rope import RopeScaling, parse_rope_scaling, rope_scaling_as_json

Facts = TypeVar("Facts")
ROPE_SCALINGS = frozenset(typing.get_args(RopeScaling))


def as_json(facts: Any) -> dict[str, Any]:
    """Return the fields as plain JSON values; those that are None are left out."""
    return {name: _value_as_json(value) for name, value in vars(facts).items() if value is not None}


def _value_as_json(value: Any) -> Any:
    if type(value) in ROPE_SCALINGS:
        return rope_scaling_as_json(value)
    if dataclasses.is_dataclass(value):
        return as_json(value)
    return [_value_as_json(entry) for entry in value] if isinstance(value, tuple) else value


def parse(kind: type[Facts], values: Mapping[str, Any]) -> Facts:
    """Return the facts that `as_json` wrote; unknown, missing and ill-typed fields raise ValueError by name."""
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"unknown fields {unknown}: this checkpoint was written by another version")
    missing = [
        name for name, field in fields.items() if field.default is dataclasses.MISSING and values.get(name) is None
    ]
    if missing:
        raise ValueError(f"missing fields {missing}: copy the whole config.json from the checkpoint's source")
    annotations = typing.get_type_hints(kind)
    return kind(**{
        name: _parse_value(name, annotations[name], value) for name, value in values.items() if value is not None
    })


def _parse_value(name: str, annotation: Any, value: object) -> Any:
    """Return a JSON value in the type of its field; ValueError, by name, if it is not of that kind."""
    if isinstance(annotation, types.UnionType):
        if value is None and types.NoneType in typing.get_args(annotation):
            return None
        choices = [choice for choice in typing.get_args(annotation) if choice is not types.NoneType]
        if set(choices) >= ROPE_SCALINGS:
            return _parse_rope_scaling(name, value)
        (annotation,) = choices
    if typing.get_origin(annotation) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name}={value!r} must be a list")
        (of_entries, _) = typing.get_args(annotation)
        return tuple(_parse_value(f"entry of {name}", of_entries, entry) for entry in value)
    if dataclasses.is_dataclass(annotation):
        if not isinstance(value, dict):
            raise ValueError(f"{name}={value!r} must be an object")
        return parse(typing.cast(type[Any], annotation), value)
    if annotation is int:
        return parse_integer(name, value)
    if annotation is float:
        return parse_number(name, value)
    if not isinstance(value, annotation):
        raise ValueError(f"{name}={value!r} must be {'a string' if annotation is str else 'true or false'}")
    return value


def _parse_rope_scaling(name: str, value: object) -> RopeScaling:
    if not isinstance(value, dict) or not isinstance(value.get("rope_type"), str):
        raise ValueError(f"{name}={value!r} must be an object with a rope_type")
    return parse_rope_scaling(value["rope_type"], {key: value[key] for key in value if key != "rope_type"})


def parse_integer(name: str, value: object) -> int:
    """Return a JSON value that must be a whole number; ValueError, by name, otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} must be a whole number")
    return value


def parse_number(name: str, value: object) -> float:
    """Return a JSON value that must be a finite number; ValueError, by name, otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise ValueError(f"{name}={value!r} must be a finite number below 1e30")
    return float(value)
