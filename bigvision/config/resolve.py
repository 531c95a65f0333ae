"""A recipe, a launcher's wishes and flags made into one configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bigvision.config.checks import check
from bigvision.config.ds_file import read_ds_file
from bigvision.config.ds_merge import merge
from bigvision.config.flags import parse_flags
from bigvision.config.schema import Config
from bigvision.config.values import coerce, get, leaves, spell
from bigvision.errors import UserError, nearest

Overrides = Mapping[str, tuple[Any, str]]
"""Dotted key → (value, where it came from)."""


def load_config(
    recipe: str | Path | Mapping[str, Any] | None = None, flags: Sequence[str] = (), overrides: Overrides | None = None
) -> Config:
    """Build the configuration from a recipe (a YAML file or a mapping), then *overrides*, then command-line *flags*.

    A DeepSpeed file (``parallel.deepspeed``) decides the strategy and what nothing else has decided.

    Raises:
        UserError: an unknown key (with the nearest right name), a wrong type or an impossible value, or a DeepSpeed file that
            contradicts the rest.
    """
    return resolve(recipe, flags, overrides)[0]


def resolve(
    recipe: str | Path | Mapping[str, Any] | None = None,
    flags: Sequence[str] = (),
    overrides: Overrides | None = None,
    prog: str = "bigvision train",
) -> tuple[Config, dict[str, str]]:
    """As :func:`load_config`, and with it where each dotted key's value came from."""
    kinds = dict(leaves(Config))
    given: dict[str, tuple[Any, str]] = {}
    if recipe is not None:
        where = "the given mapping" if isinstance(recipe, Mapping) else str(recipe)
        tree = recipe if isinstance(recipe, Mapping) else _read_yaml(Path(recipe))
        given |= {key: (value, where) for key, value in flatten(tree, kinds, where).items()}
    given |= overrides or {}
    from_flags = parse_flags(_build(given, kinds), list(flags), kinds, prog)
    for key, value in from_flags.items():
        if key in (overrides or {}) and coerce(value, kinds[key], key, "flag") != (asked := given[key])[0]:
            raise UserError(f"--{key} {value} contradicts {asked[1]}, which asks for {asked[0]!r}: drop one of the two")
        given[key] = (value, "flag")
    config = _build(given, kinds)
    if path := config.parallel.deepspeed:
        origins = {key: origin for key, (_, origin) in given.items()}
        firm = {*(overrides or {}), *from_flags}
        given |= {key: (value, path) for key, value in merge(read_ds_file(path), config, origins, firm, kinds).items()}
        config = _build(given, kinds)
    check(config)
    return config, {key: given[key][1] if key in given else "default" for key in kinds}


def describe(config: Config, origins: Mapping[str, str]) -> str:
    """The configuration as YAML, each value followed by where it came from."""
    lines = []
    section = ""
    for key, origin in origins.items():
        head, _, name = key.rpartition(".")
        if head != section:
            section = head
            lines.append(f"{head}:")
        indent = "  " if head else ""
        text = f"{indent}{name or key}: {spell(get(config, key))}"
        lines.append(f"{text:<60}  # {origin}")
    return "\n".join(lines)


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, Mapping):
        raise UserError(f"recipe {path}: must hold sections such as 'model:' and 'train:', not {spell(tree)}")
    return tree


def flatten(tree: Mapping[str, Any], kinds: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """The values of *tree*, sections as mappings, by dotted key; an unknown key is a `UserError` that begins with *where*."""
    flat: dict[str, Any] = {}
    sections = {key.rpartition(".")[0] for key in kinds}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in kinds:
            flat[key] = value
        elif key in sections and isinstance(value, Mapping):
            flat |= flatten(value, kinds, where, f"{key}.")
        elif key in sections:
            raise UserError(f"{where}: {key} must be a section of keys, not {spell(value)}")
        else:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, [*kinds, *sections])}")
    return flat


def _build(given: Overrides, kinds: Mapping[str, Any]) -> Config:
    config = Config()
    for key, (value, where) in given.items():
        value = coerce(value, kinds[key], key, where)
        section, _, name = key.rpartition(".")
        if section:
            name, value = section, dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{name: value})
    return config
