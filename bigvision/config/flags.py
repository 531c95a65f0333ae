"""Command-line flags: one for each key."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bigvision.config.schema import Config
from bigvision.config.values import get, kind_name, spell
from bigvision.config.yaml_file import parse
from bigvision.errors import UserError, nearest


def parse_flags(defaults: Config, flags: list[str], kinds: Mapping[str, Any], prog: str) -> dict[str, Any]:
    """Return the YAML value of each ``--section.key value``; *defaults* are what ``--help`` shows."""
    if not flags:
        return {}
    import tyro  # a fifth of a second, and only flags need it
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    # The text is kept as it was given: only afterwards is it known which key an error has to name.
    @registry.primitive_rule
    def _(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if dataclasses.is_dataclass(info.type):
            return None
        choices = typing.get_args(info.type) if typing.get_origin(info.type) is Literal else ()
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="|".join(choices) or kind_name(info.type).upper().replace(" ", "-"),
            instance_from_str=lambda texts: _Given(texts[0]),
            is_instance=lambda value: True,
            str_from_instance=lambda value: [spell(value)],
        )

    show_help = any(flag in ("-h", "--help") for flag in flags)
    try:
        parsed, unknown = tyro.cli(
            Config,
            prog=prog,
            description="Train a timm model: bigvision train [RECIPE.yaml] [--section.key value ...]. "
            "--resume X is another spelling of --checkpoint.resume X, --deepspeed FILE of --parallel.deepspeed FILE.",
            args=flags,
            default=defaults,
            registry=registry,
            return_unknown_args=True,
            use_underscores=True,
            console_outputs=show_help,
            config=(tyro.conf.FlagConversionOff,),
        )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f"flags: a value is missing in {' '.join(flags)!r}: write --section.key value") from None
    if unknown:
        name = unknown[0].split("=")[0]
        known = [f"--{key}" for key in kinds]
        raise UserError(f"unknown {'flag' if name.startswith('-') else 'argument'} {name!r}{nearest(name, known)}")
    values: dict[str, Any] = {}
    for key in kinds:
        if isinstance(value := get(parsed, key), _Given):
            # A folder named 2024 is still a text.
            if kinds[key] is str:
                values[key] = value.text
            else:
                values[key] = parse(value.text, f"--{key} {value.text!r}", key == "model.options") if value.text else ""
    return values


@dataclass(frozen=True)
class _Given:
    text: str
