"""Parquet files with images in them, as the Hugging Face Hub has them."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from bigvision.data.sources.base import Sample, Source, Split, UnreadableSample
from bigvision.data.sources.columns import Column
from bigvision.data.sources.files import by_name, choose_files, label_by, part, stamp
from bigvision.data.sources.parquet_columns import Asked, class_names, find_columns, parse_asked
from bigvision.data.splits import Subset
from bigvision.data.workers import each
from bigvision.errors import UserError, one_line

CACHE = 256 << 20
"""Bytes of decoded row groups that each process keeps."""
OPEN_FILES = 64
"""In each process."""


class Parquet(Source):
    """The rows of Parquet files; files in the order given.

    A row group is read as a whole, and the last ones are kept: up to `CACHE` bytes, at least one. So an order that jumps
    about reads a row group for each image; ``data.shuffle_block`` near the rows of a group keeps reads near each other.
    """

    def __init__(self, name: str, classes: Sequence[str], files: Sequence[_File], labels: Tensor) -> None:
        """Args: *labels* int64 (N,), of all rows."""
        self.name, self.classes, self.column = name, list(classes), files[0].columns.image
        self.files = [str(file.path) for file in files]
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

    def read(self, index: int) -> Sample:
        group = self._group(index)
        value = self._column(group)[index - int(self._begins[group])].as_py()
        if isinstance(value, dict):
            content = value["bytes"]
            if content is None and value.get("path"):
                content = _beside(self.files[int(self._groups[group, 0])], value["path"])
        else:
            content = value
        if content is None:
            raise UnreadableSample("the row has no image")
        return Sample(content, self._labels[index])

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
    """What is needed of a file from the start."""

    def __init__(self, path: Path, key: str, asked: Asked) -> None:
        """Raises `UserError`: it is damaged, or lacks a column of the right type."""
        import pyarrow as pa

        self.path, shown = path, str(path)
        try:
            self.stamp = stamp(path.stat())
            with _parquet().ParquetFile(path) as file:
                schema = file.schema_arrow
                self.columns = find_columns(schema, asked, key=key, where=repr(shown))
                _check_types(schema.field(self.columns.image).type, schema.field(self.columns.label).type)
                self.classes = class_names(schema, self.columns.label)
                self.groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
                coded = file.read(columns=[self.columns.label]).column(0).combine_chunks().dictionary_encode()
        except TypeError as error:
            raise UserError(f"{key}: {shown!r}: {error}") from error
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{key}: {shown!r} cannot be read: {one_line(error)}; copy or write it again") from error
        if coded.null_count:
            row = coded.is_null().index(True).as_py()
            raise UserError(f"{key}: row {row} of {shown!r} has no label; remove or mend it")
        self.codes: np.ndarray = coded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        self.names = [str(name) for name in coded.dictionary.to_pylist()]


def open_parquet(
    argument: str, split: Split, *, key: str, shared: bool, classes: Sequence[str] | None = None, first: bool = True
) -> Source:  # fmt: skip
    """Open the Parquet files *argument* (see :func:`~bigvision.data.sources.files.choose_files`) for *split*.

    One column has encoded images, as binary or in a struct's ``bytes``, and one labels, integers or strings: those that
    ``?image=NAME&label=NAME`` at the end of *argument* names, or that :func:`find_columns` finds. The classes' names are
    those of the Hugging Face ``ClassLabel``, where there is one.

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
    files = [file for file in opened if file.groups and len(file.codes)]
    if not files:
        raise UserError(f"{key}: the files of {argument!r} have no rows; write them again")
    other = next((file for file in files if file.columns != files[0].columns), None)
    if other is not None:
        raise UserError(
            f"{key}: {str(other.path)!r} has its images and labels in {' and '.join(other.columns)}, {str(files[0].path)!r} in "
            f"{' and '.join(files[0].columns)}; open one of them"
        )
    other = next((file for file in files if file.classes != files[0].classes), None)
    if other is not None:
        raise UserError(f"{key}: {str(other.path)!r} names other classes than {str(files[0].path)!r}; open one of them")
    names = list(dict.fromkeys(name for file in files for name in file.names))
    own, where = files[0].classes, repr(argument)
    known, values = label_by(names, classes if own is None else own, chosen.folders, key=key, where=where)
    if classes is not None and known != list(classes):
        # By their names they agree with the training data's, whose order may be another.
        if len(set(known)) < len(known):
            raise UserError(f"{key}: {where} names a class twice, and not the same classes as the training data; use its own")
        known, values = list(classes), by_name([known[value] for value in values], classes, key=key, where=where)
    label = dict(zip(names, values))
    labels = np.concatenate([np.array([label[name] for name in file.names])[file.codes] for file in files])
    source = Parquet(f"parquet:{argument}", known, files, torch.from_numpy(labels))
    if chosen.hold_out:
        rows = [f"{file.path.name}/{row}" for file in files for row in range(len(file.codes))]
        hashes = np.array([xxhash.xxh3_64_intdigest(row.encode()) for row in rows], dtype=np.uint64)
        kept = part(hashes, labels, split)
        if not len(kept):
            raise UserError(f"{key}: {argument!r} has one image per class, none can be held out; add images or val files")
        return Subset(source, kept)
    return source


def _check_types(image: Any, label: Any) -> None:
    """Raise `TypeError` where the columns hold something else than images and labels."""
    types = _arrow().types
    content = image.field("bytes").type if types.is_struct(image) and image.get_field_index("bytes") >= 0 else image
    if not (types.is_binary(content) or types.is_large_binary(content)):
        raise TypeError(f"its images are {image}; they must be encoded, as binary or in a struct's 'bytes'")
    if not (types.is_integer(label) or types.is_string(label) or types.is_large_string(label)):
        raise TypeError(f"its labels are {label}; they must be integers or strings")


def _beside(file: str, path: str) -> bytes:
    """The image at *path*, which is relative to the folder of *file* and may not leave it."""
    folder = os.path.realpath(os.path.dirname(file))
    try:
        found = os.path.realpath(os.path.join(folder, path))
        if os.path.commonpath([folder, found]) != folder or not os.path.isfile(found):
            raise UnreadableSample(f"the row has no bytes, and its path {path!r} is no file in the folder of the Parquet file")
        with open(found, "rb") as image:
            return image.read()
    except (OSError, ValueError) as error:
        raise UnreadableSample(f"the row has no bytes, and its path {path!r} cannot be read: {one_line(error)}") from error


def _arrow() -> Any:
    import pyarrow

    return pyarrow


def _parquet() -> Any:
    import pyarrow.parquet

    return pyarrow.parquet
