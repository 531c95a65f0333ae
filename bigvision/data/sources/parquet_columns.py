"""Which columns of a Parquet file have the images and the labels."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from bigvision.errors import UserError, nearest

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
LABELS = ("label", "cls", "class", "target", "category", "labels", "class_id", "label_id", "fine_label", "coarse_label")


class Columns(NamedTuple):
    image: str
    label: str


class Asked(NamedTuple):
    """Those that the user names."""

    image: str | None = None
    label: str | None = None


def parse_asked(argument: str, key: str) -> tuple[str, Asked]:
    """Part ``PATH?image=img&label=fine_label`` into the path and the columns. Raises `UserError`, which names *key*."""
    # A question mark may also be a part of the path's pattern.
    match = re.fullmatch(r"(.*)\?([A-Za-z_]+=[^?/]*)", argument, re.DOTALL)
    if not match:
        return argument, Asked()
    found: dict[str, str] = {}
    for name, column in parse_qsl(match[2], keep_blank_values=True):
        if name not in Asked._fields:
            raise UserError(
                f"{key}: unknown {name!r} in ?{match[2]}{nearest(name, Asked._fields) or '; known are image and label'}"
            )
        if name in found or not column:
            raise UserError(f"{key}: {name} in ?{match[2]} must be the name of one column")
        found[name] = column
    return match[1], Asked(**found)


def find_columns(schema: Any, asked: Asked, *, key: str, where: str) -> Columns:
    """Return those that are *asked* for, else ``image`` and ``label``, else those of Hugging Face's types ``Image`` and
    ``ClassLabel``, else those with well-known names.

    Raises:
        UserError: there is none, or several that it might be; the message lists the columns, and names *key* and *where*.
    """
    types = {name: feature.get("_type") for name, feature in _features(schema).items() if isinstance(feature, dict)}
    found = []
    for what, name, kind, known in (("image", asked.image, "Image", IMAGES), ("label", asked.label, "ClassLabel", LABELS)):
        columns = ", ".join(schema.names)
        if name is not None and name not in schema.names:
            raise UserError(f"{key}: {where} has no column {name!r} but {columns}; correct ?{what}={name}")
        fits = [name] if name is not None else [what] if what in schema.names else []
        fits = fits or [column for column in schema.names if types.get(column) == kind]
        fits = fits or [column for column in schema.names if column in known]
        if len(fits) != 1:
            which = f"{' or '.join(fits)} may be" if fits else "none is known as"
            raise UserError(
                f"{key}: {where} has the columns {columns}, of which {which} the {what}; add ?{what}=NAME to the path"
            )
        found.append(fits[0])
    return Columns(*found)


def class_names(schema: Any, label: str) -> list[str] | None:
    """The names of Hugging Face's ``ClassLabel``."""
    feature = _features(schema).get(label)
    names = feature.get("names") if isinstance(feature, dict) else None
    return names if isinstance(names, list) and names and all(isinstance(name, str) for name in names) else None


def _features(schema: Any) -> dict[str, Any]:
    """Hugging Face's, which its library writes into the schema."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
