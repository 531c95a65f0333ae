"""A recipe and keywords made into a configuration, and the objects that no configuration can hold."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bigvision.config import Config, DataConfig, resolve
from bigvision.config.paths import AUTO
from bigvision.config.resolve import flatten
from bigvision.config.values import leaves
from bigvision.errors import UserError, either, nearest
from bigvision.models import given_name
from bigvision.runtime import identify

Recipe = str | Path | Mapping[str, Any] | Config | None
"""The path of a YAML file, a mapping like one, a configuration, or None for the defaults."""
SECTIONS = tuple(field.name for field in fields(Config))


@dataclass(frozen=True)
class Objects:
    """What the caller has, in the place of names."""

    model: Any = None
    """A module, or a function that builds one."""
    data: Any = None
    val: Any = None
    """Datasets; both or none."""
    data_named: bool = False
    """Whether the caller or the recipe has said what is trained on."""

    @property
    def none(self) -> bool:
        return self.model is None and self.data is None and self.val is None


def configured(
    caller: str,
    recipe: Recipe,
    model: Any,
    data: Any,
    val: Any,
    image_size: int | tuple[int, int] | None,
    keys: Mapping[str, Any],
) -> tuple[Config, Objects]:
    """The configuration that is asked for, keywords before the recipe, and the objects.

    Args:
        caller: for messages.
        model, data, val: names, sections as mappings, or objects.
        keys: sections as mappings, and dotted keys.

    Raises:
        UserError: unknown keywords, with the nearest right one; what cannot be together; and all that a configuration can
            have wrong.
    """
    kinds = dict(leaves(Config))
    _check_names(caller, keys, kinds)
    given = flatten(keys, kinds, caller)
    objects = {}
    for name, value, key in (("model", model, "model.name"), ("data", data, "data.train"), ("val", val, "data.val")):
        if isinstance(value, Mapping) and name in SECTIONS:
            given |= flatten({name: value}, kinds, caller)
        elif isinstance(value, str):
            given[key] = value
        elif value is not None:
            objects[name] = value
    if isinstance(data, str) and val is None and "data.val" not in given:
        given["data.val"] = data
    if image_size is not None:
        given["model.image_size"] = image_size
    if "data" in objects and val is None:
        raise UserError(f"val: {caller} got a dataset in data, but none to validate on: give val, a dataset or a name")
    if "val" in objects and "data" not in objects:
        raise UserError(f"data: {caller} got a dataset in val, but none to train on: give both")
    if "data" in objects and "val" not in objects:
        objects["val"] = given.pop("data.val")
    names = {"model": ("model.name", given_name), "data": ("data.train", _class_name), "val": ("data.val", _class_name)}
    for name, value in objects.items():
        key, named = names[name]
        given[key] = value if isinstance(value, str) else named(value)  # what a folder is named after
    if isinstance(recipe, Config):
        if not given and recipe.out != AUTO:
            return recipe, Objects(data_named=recipe.data.train != DataConfig.train)
        recipe = recipe.to_dict()
    if recipe is not None and not isinstance(recipe, (str, Path, Mapping)):
        raise UserError(f"{caller}: {type(recipe).__name__} is no recipe: give a path, a mapping or a Config")
    keywords = {key: (str(value) if isinstance(value, Path) else value, f"{caller}(...)") for key, value in given.items()}
    notes: list[str] = []
    config, origins = resolve(recipe, keywords=keywords, say=notes.append)
    if notes and identify(os.environ).rank == 0:
        print("\n".join(notes))
    return config, Objects(**objects, data_named=origins["data.train"] != "default")


def _class_name(data: Any) -> str:
    return f"python:{type(data).__name__}"


def _check_names(caller: str, keys: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name in keys:
        if name in SECTIONS or name in known:
            continue
        homes = [key for key in known if key.rpartition(".")[2] == name]
        if homes:
            places = [f"{section}={{{name!r}: ...}}" for section in (key.rpartition(".")[0] for key in homes)]
            raise UserError(f"{caller}: unknown keyword {name!r}; did you mean {either(places)}?")
        raise UserError(f"{caller}: unknown keyword {name!r}{nearest(name, [*SECTIONS, *ARGUMENTS, *known])}")


ARGUMENTS = ("model", "data", "val", "devices", "image_size", "callbacks", "max_restarts")
