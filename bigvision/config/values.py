"""Values of keys: their kinds, their spelling, and what YAML gives made into them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

import yaml

from bigvision.config.schema import Config
from bigvision.errors import UserError, nearest


def leaves(cls: type, prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from leaves(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def get(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def coerce(value: Any, kind: Any, key: str, where: str) -> Any:
    """Return *value*, as YAML gives it, as *kind*; YAML 1.1 reads 1e-3 as text, so numbers in text are accepted."""
    for option in typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,):
        if option is type(None):
            if value is None:
                return None
        elif typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
        elif option is bool:
            if isinstance(value, bool):
                return value
        elif option is str:
            if isinstance(value, str):
                return value
            if isinstance(value, int) and not isinstance(value, bool):
                return str(value)  # a folder that is called 2024, the step 200
        elif option is int:
            if (number := _whole(value)) is not None:
                return number
        elif option is float:
            if isinstance(value, (int, float, str)) and not isinstance(value, bool):
                try:
                    return float(value)
                except (ValueError, OverflowError):
                    pass
        elif typing.get_origin(option) is tuple:
            if isinstance(value, (list, tuple)) and len(value) == len(typing.get_args(option)):
                return tuple(coerce(item, part, key, where) for item, part in zip(value, typing.get_args(option)))
        elif isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            return dict(value)
    if str in (kind, *typing.get_args(kind)) and isinstance(value, (bool, float)):
        raise UserError(
            f"{key}: {spell(value)} ({where}) is not {kind_name(kind)}: write it in quotes where it is meant as one"
        )
    choices = [choice for choice in typing.get_args(kind) if isinstance(choice, str)]
    hint = nearest(str(value), choices) if choices else ""
    raise UserError(f"{key}: {spell(value)} ({where}) is not {kind_name(kind)}{hint}")


def _whole(value: Any) -> int | None:
    """*value* as a whole number, also 1e4, which YAML 1.1 reads as text, and 1.0e4; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, int):
        return value
    try:
        if isinstance(value, str) and value.isdecimal():
            return int(value)
        number = float(value)
        return int(number) if number.is_integer() else None
    except (ValueError, OverflowError):
        return None


def kind_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    if typing.get_origin(kind) in (Union, types.UnionType):
        return " or ".join(kind_name(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"a list of {len(typing.get_args(kind))} numbers"
    if typing.get_origin(kind) is dict:
        return "a mapping of names to values"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
    return names.get(kind, "a value")


def spell(value: Any) -> str:
    """*value* on one line as YAML spells it."""
    value = list(value) if isinstance(value, tuple) else value
    style = {"default_flow_style": True, "width": 10**6, "sort_keys": False}
    text = yaml.safe_dump(value, **style).removesuffix("...\n").strip()
    # Texts with line breaks, and bytes: escaped.
    return " ".join(yaml.safe_dump(value, **style, default_style='"').split()) if "\n" in text else text


def parse_size(text: str, key: str) -> int:
    """Bytes in a size such as ``5GB`` (decimal) or ``512MiB`` (binary).

    Raises:
        UserError: not a positive number followed by a known unit.
    """
    units = {"B": 1, "": 1}
    for power, letter in enumerate("KMGT", start=1):
        units |= {f"{letter}B": 1000**power, f"{letter}IB": 1024**power}
    number = text.rstrip("BbKkMmGgTtIi ").strip()
    unit = text[len(number) :].strip().upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UserError(f"{key}: {text!r} is not a size: write a number and a unit, such as 5GB or 512MiB")
    return size
