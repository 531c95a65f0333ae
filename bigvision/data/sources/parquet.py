"""Parquet files: images and labels in the columns of Arrow tables."""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qsl

import numpy as np
import torch
import xxhash
from torch import Tensor

from bigvision.data.labels import Coded, Labels, by_name, by_place, check_all_labelled, joined, label_by, other_task
from bigvision.data.sources.base import Column, Sample, Source, Split, UnreadableSample
from bigvision.data.sources.files import choose_files, location_of, stamp
from bigvision.data.splits import Subset, part
from bigvision.data.workers import each
from bigvision.errors import UserError, nearest, one_line

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
LABELS = ("label", "cls", "class", "target", "category", "labels", "class_id", "label_id", "fine_label", "coarse_label")
ASKED = ("image", "label")
"""What may be named after a path's question mark."""
CACHE = 256 << 20
"""Bytes of decoded row groups that each process keeps."""
OPEN_FILES = 64
"""In each process."""


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


class Parquet(Source):
    """The rows of Parquet files; files in the order given.

    A row group is read as a whole, and the last ones are kept: up to `CACHE` bytes, at least one. So an order that jumps
    about reads a row group for each image; ``data.shuffle_block`` near the rows of a group keeps reads near each other.
    """

    def __init__(self, name: str, classes: Sequence[str], files: Sequence[_File], labels: Tensor) -> None:
        """Args: *labels* int64 (N,), of all rows."""
        self.name, self.classes, self.column = name, list(classes), files[0].columns.image
        self.files = [str(file.path) for file in files]
        self.location, self.linked = location_of(self.files)
        self._stamps = [file.stamp for file in files]
        groups = [(number, group, rows) for number, file in enumerate(files) for group, rows in enumerate(file.groups)]
        self._groups = torch.tensor([(number, group) for number, group, _ in groups])
        # The first row of each group, and then how many rows there are in all.
        self._begins = torch.tensor([0, *accumulate(rows for _, _, rows in groups)])
        self._firsts = [0, *accumulate(sum(file.groups) for file in files)]
        self._labels = Column(labels)
        self._opened: OrderedDict[int, Any] = OrderedDict()
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> int:
        return self._labels[index]

    def where(self, index: int) -> str:
        number = int(self._groups[self._group(index), 0])
        return f"{self.files[number]}: row {index - self._firsts[number]}"

    def key(self, index: int) -> bytes:
        number = int(self._groups[self._group(index), 0])
        return os.fsencode(f"{os.path.basename(self.files[number])}/{index - self._firsts[number]}")

    def origins(self) -> Sequence[str]:
        return self.files

    def read(self, index: int) -> Sample:
        group = self._group(index)
        value = self._column(group)[index - int(self._begins[group])].as_py()
        return Sample(encoded_image(value, self.files[int(self._groups[group, 0])]), self._labels[index])

    def _group(self, row: int) -> int:
        return int(torch.searchsorted(self._begins, row, right=True)) - 1

    def _column(self, group: int) -> Any:
        """The images of a row group, decoded or kept from before."""
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        number, within = self._groups[group].tolist()
        try:
            # Workers are many already: a thread pool in each only gets in their way.
            column = self._open(number).read_row_group(within, columns=[self.column], use_threads=False).column(0)
        except OSError as error:
            raise UnreadableSample(one_line(error)) from error
        except (_arrow().ArrowException, IndexError) as error:
            raise UnreadableSample(f"row group {within} cannot be read: {one_line(error)}") from error
        if len(column) != int(self._begins[group + 1] - self._begins[group]):
            raise UnreadableSample(f"row group {within} is cut short")
        self._kept[group] = column
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > CACHE:
            self._kept.popitem(last=False)
        return column

    def _open(self, number: int) -> Any:
        if number in self._opened:
            self._opened.move_to_end(number)
            return self._opened[number]
        if stamp(os.stat(self.files[number])) != self._stamps[number]:
            raise UnreadableSample("its file has changed since the run began")
        self._opened[number] = _parquet().ParquetFile(self.files[number])
        if len(self._opened) > OPEN_FILES:
            self._opened.popitem(last=False)[1].close(force=True)
        return self._opened[number]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_opened": OrderedDict(), "_kept": OrderedDict()}


class _File:
    """What is needed of a file from the start, as `RowFile`."""

    def __init__(self, path: Path, key: str, asked: dict[str, str]) -> None:
        """Raises `UserError`: it is damaged, or lacks a column of the right type."""
        import pyarrow as pa

        self.path, shown = path, repr(str(path))
        try:
            self.stamp = stamp(path.stat())
            with _parquet().ParquetFile(path) as file:
                schema = file.schema_arrow
                self.columns = find_columns(schema, asked, key=key, where=shown)
                check_images(schema.field(self.columns.image).type)
                self.classes = class_names(schema, self.columns.label)
                self.groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
                self.labels = arrow_labels(file.read(columns=[self.columns.label]).column(0), key=key, where=shown)
        except TypeError as error:
            raise UserError(f"{key}: {shown}: {error}") from error
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{key}: {shown} cannot be read: {one_line(error)}; copy or write it again") from error


def open_parquet(
    argument: str, split: Split, *, key: str, shared: bool, classes: Sequence[str] | None = None, first: bool = True
) -> Source:  # fmt: skip
    """Open the Parquet files *argument* (see :func:`~bigvision.data.sources.files.choose_files`) for *split*.

    One column has encoded images, as binary or in a struct's ``bytes``, and one labels, whole numbers, truth values or texts:
    those that ``?image=NAME&label=NAME`` at the end of *argument* names, or that :func:`find_columns` finds. The classes'
    names are those of the Hugging Face ``ClassLabel``, where there is one.

    Args:
        shared: by training and validation; without a validation part a tenth of each class is held out by file and row.
        classes: label by these classes instead of by the files' own.
        first: tell how many of the files have been read, where that takes long.

    Raises:
        UserError: pyarrow is not installed, files are missing or damaged, or not as described; the message names *key*.
    """
    try:
        _parquet()
    except ImportError as error:
        raise UserError(f'{key}: parquet needs pyarrow; install it with: pip install "bigvision[parquet]"') from error
    argument, asked = parse_asked(argument, key)
    chosen = choose_files(argument, split, ".parquet", key=key, shared=shared)
    opened = each(lambda path: _File(path, key, asked), chosen.files, f"{key}: Parquet files read", tell=first)
    files = [file for file in opened if file.groups and len(file.labels.codes)]
    if not files:
        raise UserError(f"{key}: the files of {argument!r} have no rows; write them again")
    labels = label_rows(files, classes, chosen.folders, key=key, where=repr(argument))
    source = Parquet(f"parquet:{argument}", labels.classes, files, torch.from_numpy(labels.values))
    source.notes, source.passed_over = labels.notes, chosen.passed_over
    return held_out_rows(source, files, labels.values, split, key, repr(argument)) if chosen.hold_out else source


def _arrow() -> Any:
    import pyarrow

    return pyarrow


def _parquet() -> Any:
    import pyarrow.parquet

    return pyarrow.parquet
