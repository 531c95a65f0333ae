"""Images and labels in the columns of Arrow tables (Parquet, Hugging Face): which columns, and what their values mean."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qsl

import numpy as np
import xxhash

from bigvision.data.labels import Coded, Labels, by_name, by_place, check_all_labelled, joined, label_by, other_task
from bigvision.data.sources.base import Source, Split, UnreadableSample
from bigvision.data.splits import Subset, part
from bigvision.errors import UserError, nearest, one_line

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
LABELS = ("label", "cls", "class", "target", "category", "labels", "class_id", "label_id", "fine_label", "coarse_label")
ASKED = ("image", "label")
"""What may be named after a path's question mark."""


class Columns(NamedTuple):
    image: str
    label: str


class RowFile(Protocol):
    """What is needed of each file of rows from the start."""

    path: Path
    columns: Columns
    classes: list[str] | None
    """the names of Hugging Face's ``ClassLabel``"""
    labels: Coded


def parse_asked(argument: str, key: str, known: Sequence[str] = ASKED) -> tuple[str, dict[str, str]]:
    """Part ``PATH?image=img&label=fine_label`` into the path and what is named after it. Raises `UserError`."""
    # A question mark may also be a part of the path's pattern.
    match = re.fullmatch(r"(.*)\?([A-Za-z_]+=[^?]*)", argument, re.DOTALL)
    if not match or ("root" not in known and "/" in match[2]):
        return argument, {}
    found: dict[str, str] = {}
    for name, column in parse_qsl(match[2], keep_blank_values=True):
        if name not in known:
            hint = nearest(name, known) or f"; known are {', '.join(known[:-1])} and {known[-1]}"
            raise UserError(f"{key}: unknown {name!r} in ?{match[2]}{hint}")
        if name in found or not column:
            raise UserError(f"{key}: {name} in ?{match[2]} must be the name of one column")
        found[name] = column
    return match[1], found


def find_columns(schema: Any, asked: dict[str, str], *, key: str, where: str) -> Columns:
    """Return those that are *asked* for, or else those that are :func:`fitting`.

    Raises:
        UserError: there is none, or several that it might be; the message lists the columns, and names *key* and *where*.
    """
    types = {name: feature.get("_type") for name, feature in _features(schema).items() if isinstance(feature, dict)}
    found = []
    for what in ASKED:
        name, columns = asked.get(what), ", ".join(schema.names)
        if name is not None and name not in schema.names:
            raise UserError(f"{key}: {where} has no column {name!r} but {columns}; correct ?{what}={name}")
        fits = [name] if name is not None else fitting(what, schema.names, types)
        if len(fits) != 1:
            which = f"{' or '.join(fits)} may be" if fits else "none is known as"
            raise UserError(
                f"{key}: {where} has the columns {columns}, of which {which} the {what}; add ?{what}=NAME to the path"
            )
        if schema.names.count(fits[0]) > 1:
            raise UserError(f"{key}: {where} has {schema.names.count(fits[0])} columns {fits[0]!r}; rename all but one")
        found.append(fits[0])
    return Columns(*found)


def fitting(what: str, names: Sequence[str], types: Mapping[str, str | None]) -> list[str]:
    """The columns among *names* that may have *what* (image or label): the one of this name, else those of Hugging Face's
    types ``Image`` and ``ClassLabel``, else those with well-known names, in any case."""
    if what in names:
        return [what]
    kind, known = ("Image", IMAGES) if what == "image" else ("ClassLabel", LABELS)
    return [name for name in names if types.get(name) == kind] or [name for name in names if name.casefold() in known]


def class_names(schema: Any, label: str) -> list[str] | None:
    """The names of Hugging Face's ``ClassLabel``."""
    feature = _features(schema).get(label)
    names = feature.get("names") if isinstance(feature, dict) else None
    return names if isinstance(names, list) and names and all(isinstance(name, str) for name in names) else None


def check_images(kind: Any) -> None:
    """Raise `TypeError` where a column of the type *kind* holds something else than encoded images."""
    import pyarrow as pa

    content = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(content) or pa.types.is_large_binary(content) or pa.types.is_binary_view(content)):
        raise TypeError(f"its images are {kind}; they must be encoded, as binary or in a struct's 'bytes'")


def arrow_labels(column: Any, *, key: str, where: str) -> Coded:
    """The labels of an Arrow column of any type, checked to be one for each row of the file *where*. Raises `UserError`."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_struct(column.type) or pa.types.is_map(column.type):
        raise UserError(f"{key}: {where}: its labels are {column.type}; they must be whole numbers or names")
    if pa.types.is_nested(column.type):
        raise other_task("labels", str(column.type), key=key, where=where)
    encoded = column.combine_chunks().dictionary_encode()
    distinct = encoded.dictionary.to_pylist()
    codes = encoded.indices.fill_null(len(distinct)).to_numpy(zero_copy_only=False).astype(np.int64)
    found = Coded([*distinct, None], codes)
    check_all_labelled(found, where, lambda row: f"row {row} of {where}", key)
    return Coded(distinct, codes)


def label_rows(
    files: Sequence[RowFile], classes: Sequence[str] | None, folders: Sequence[Path], *, key: str, where: str
) -> Labels:
    """The classes of all *files*, and the label of each row.

    Args:
        classes: label by these instead of by the files' own, by name where the files name theirs.
        folders: where a file with the classes may lie.

    Raises:
        UserError: files have other columns or classes than the first, or their labels are not as :func:`label_by` wants them.
    """
    first = files[0]
    other = next((file for file in files if file.columns != first.columns), None)
    if other is not None:
        raise UserError(
            f"{key}: {str(other.path)!r} has its images and labels in {' and '.join(other.columns)}, {str(first.path)!r} in "
            f"{' and '.join(first.columns)}; open one of them"
        )
    other = next((file for file in files if file.classes != first.classes), None)
    if other is not None:
        raise UserError(f"{key}: {str(other.path)!r} names other classes than {str(first.path)!r}; open one of them")
    column = joined([file.labels for file in files])
    if first.classes is None:
        found = label_by(column.distinct, classes, folders, key=key, where=where)
        return Labels(found.classes, found.values[column.codes], found.notes)
    # Numbers are places in the list of names, also where the names are numbers.
    place = by_place if all(type(value) is int for value in column.distinct) else by_name
    values = place(column.distinct, first.classes, key=key, where=where)[column.codes]
    if classes is None or first.classes == list(classes):
        return Labels(first.classes, values)
    # By their names they agree with the training data's, whose order may be another.
    if len(set(first.classes)) < len(first.classes):
        raise UserError(f"{key}: {where} names a class twice, and not the same classes as the training data; use its own")
    present = np.unique(values)
    places = np.zeros(len(first.classes), dtype=np.int64)
    places[present] = by_name([first.classes[value] for value in present], classes, key=key, where=where)
    return Labels(list(classes), places[values])


def held_out_rows(source: Source, files: Sequence[RowFile], labels: np.ndarray, split: Split, key: str, where: str) -> Subset:
    """The part of *source*, whose rows are those of *files*, that belongs to *split*: by the names of files and rows."""
    rows = [f"{file.path.name}/{row}" for file in files for row in range(len(file.labels.codes))]
    hashes = np.array([xxhash.xxh3_64_intdigest(row.encode()) for row in rows], dtype=np.uint64)
    kept = part(hashes, labels, split)
    if not len(kept):
        raise UserError(f"{key}: {where} has one image per class, none can be held out; add images or val files")
    return Subset(source, kept)


def encoded_image(value: Any, file: str) -> bytes:
    """The image in a row of *file*: bytes, or a struct's ``bytes``, or the file beside it at its ``path``.

    Raises:
        UnreadableSample: there is none.
    """
    content = value
    if isinstance(value, dict):
        content = value.get("bytes")
        if content is None and value.get("path"):
            return _beside(file, value["path"])
    if content is None:
        raise UnreadableSample("the row has no image")
    return content


def _beside(file: str, path: str) -> bytes:
    """The image at *path*, which is relative to the folder of *file* and may not leave it."""
    folder = os.path.realpath(os.path.dirname(file))
    try:
        found = os.path.realpath(os.path.join(folder, path))
        if os.path.commonpath([folder, found]) != folder or not os.path.isfile(found):
            raise UnreadableSample(f"the row has no bytes, and its path {path!r} is no file in the folder of its data file")
        with open(found, "rb") as image:
            return image.read()
    except (OSError, ValueError) as error:
        raise UnreadableSample(f"the row has no bytes, and its path {path!r} cannot be read: {one_line(error)}") from error


def _features(schema: Any) -> dict[str, Any]:
    """Hugging Face's, which its library writes into the schema."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
