"""A recipe, a launcher's environment and flags made into one configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bigvision.config.checks import check
from bigvision.config.ds_file import keys_from_file, read_ds_file
from bigvision.config.schema import Config
from bigvision.config.values import (
    AUTO,
    PATHS,
    coerce,
    get,
    leaves,
    local_path,
    made_out,
    parse_flags,
    read_recipe,
    spell,
    with_values,
)
from bigvision.errors import UserError, nearest

Overrides = Mapping[str, tuple[Any, str]]
"""Dotted key → (value, where it came from)."""
WORDS = {("out", AUTO), ("checkpoint.resume", "auto"), ("checkpoint.resume", "never")}
"""The values that stand where a path may stand, and are none."""


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
    keywords: Overrides | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Config, dict[str, str]]:
    """As :func:`load_config`, and with it where each dotted key's value came from.

    *overrides* is what a launcher asks for, which a flag must not contradict; *keywords* what a caller in Python asks for,
    before the recipe. When all is right, *say* gets a line for each value that a launcher or a file changes and nobody has
    written down, and for each setting of a DeepSpeed file that has no meaning here.
    """
    kinds = dict(leaves(Config))
    given: dict[str, tuple[Any, str]] = {}
    notes: list[str] = []
    if recipe is not None:
        where = "the given mapping" if isinstance(recipe, Mapping) else str(recipe)
        tree = recipe if isinstance(recipe, Mapping) else read_recipe(recipe)
        given |= {key: (value, where) for key, value in flatten(tree, kinds, where).items()}
    given |= keywords or {}
    before, overrides = _build(given, kinds), overrides or {}
    if "parallel.offload" in overrides and before.parallel.offloads_activations:
        state, asker = overrides["parallel.offload"]  # of activations a launcher says nothing
        if not state.endswith("activations"):
            both = "activations" if state == "none" else f"{state}+activations"
            overrides = {**overrides, "parallel.offload": (both, asker)}
    for key, (value, asker) in overrides.items():
        if get(before, key) != value:
            origin = given[key][1] if key in given else "default"
            notes.append(f"{key}: {spell(value)} ({asker}) takes the place of {spell(get(before, key))} ({origin})")
    given |= overrides
    from_flags = parse_flags(_build(given, kinds), list(flags), kinds, prog)
    for key, value in from_flags.items():
        if key in overrides and coerce(value, kinds[key], key, "flag") != (asked := given[key])[0]:
            raise UserError(f"--{key} {value} contradicts {asked[1]}, which asks for {asked[0]!r}: drop one of the two")
        given[key] = (value, "flag")
    if "data.train" in given and "data.val" not in given:
        given["data.val"] = (given["data.train"][0], "data.train")
    config = _build(given, kinds)
    if path := config.parallel.deepspeed:
        origins = {key: origin for key, (_, origin) in given.items()}
        firm = {*overrides, *(keywords or {}), *from_flags}
        file = read_ds_file(path)
        taken = keys_from_file(file, config, origins, firm, kinds)
        if "parallel.strategy" in taken and taken["parallel.strategy"] != config.parallel.strategy:
            said = f"{config.parallel.strategy} ({origins.get('parallel.strategy', 'default')})"
            notes.append(f"parallel.strategy: {taken['parallel.strategy']} ({path}) takes the place of {said}")
        notes += [f"{path}: {note}" for note in file.notes]
        given |= {key: (value, path) for key, value in taken.items()}
        config = _build(given, kinds)
    check(config)
    if config.out == AUTO:
        stem = Path(recipe).stem if isinstance(recipe, (str, Path)) else ""
        config = dataclasses.replace(config, out=made_out(config, stem))
        given["out"] = (config.out, "recipe, data.train and model.name")
        notes.append(f"out: {config.out}")
    for note in notes:
        say(note)
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


def flatten(tree: Mapping[str, Any], kinds: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """The values of *tree*, sections as mappings, by dotted key; an unknown key is a `UserError` that begins with *where*."""
    flat: dict[str, Any] = {}
    sections = {key.rpartition(".")[0] for key in kinds}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        inner: dict[str, Any] = {}
        if key in kinds:
            inner = {key: value}
        elif key in sections and value is None:
            pass  # a section of which every key is commented out
        elif key in sections and isinstance(value, Mapping):
            inner = flatten(value, kinds, where, f"{key}.")
        elif key in sections:
            raise UserError(f"{where}: {key} must be a section of keys, not {spell(value)}")
        else:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, [*kinds, *sections])}")
        if twice := sorted(flat.keys() & inner.keys()):
            raise UserError(f"{where}: {twice[0]} is written twice, once with a dot: drop one of the two")
        flat |= inner
    return flat


def _build(given: Overrides, kinds: Mapping[str, Any]) -> Config:
    config = Config()
    for key, (value, where) in given.items():
        value = coerce(value, kinds[key], key, where)
        if key == "checkpoint.resume" and value.isdecimal():
            value = str(int(value))  # a step has one spelling, by which it is known that it was named before
        elif key in PATHS and isinstance(value, str) and (key, value) not in WORDS:
            value = local_path(key, value)
        config = with_values(config, {key: value})
    return config
