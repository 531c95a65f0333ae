"""Parquet files with images in them, as the Hugging Face Hub has them."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigvision.data.sources.base import Sample, Source, Split, UnreadableSample
from bigvision.data.sources.columns import Column
from bigvision.data.sources.files import choose_files, location_of, stamp
from bigvision.data.sources.tabular import (
    arrow_labels,
    check_images,
    class_names,
    encoded_image,
    find_columns,
    held_out_rows,
    label_rows,
    parse_asked,
)
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
