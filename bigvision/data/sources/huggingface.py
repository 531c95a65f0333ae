"""Folders that Hugging Face's ``Dataset.save_to_disk`` writes: Arrow files, which are mapped into memory."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigvision.data.sources.base import Column, Sample, Source, Split, UnreadableSample
from bigvision.data.sources.files import location_of, stamp
from bigvision.data.sources.parquet import (
    arrow_labels,
    check_images,
    class_names,
    encoded_image,
    find_columns,
    held_out_rows,
    label_rows,
    parse_asked,
)
from bigvision.data.splits import named_parts
from bigvision.errors import UserError, one_line


class SavedRows(Source):
    """The rows of Arrow files in the order given. Each process maps them for itself; the system shares the pages."""

    def __init__(self, name: str, classes: Sequence[str], files: Sequence[_File], labels: Tensor) -> None:
        """Args: *labels* int64 (N,), of all rows."""
        self.name, self.classes, self._image = name, list(classes), files[0].columns.image
        self.files = [str(file.path) for file in files]
        self._stamps = [file.stamp for file in files]
        self._begins = torch.tensor([0, *(len(file.labels.codes) for file in files)]).cumsum(0)
        self._labels = Column(labels)
        self._opened: dict[int, tuple[Any, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> int:
        return self._labels[index]

    def where(self, index: int) -> str:
        number, row = self._find(index)
        return f"{self.files[number]}: row {row}"

    def key(self, index: int) -> bytes:
        number, row = self._find(index)
        return os.fsencode(f"{os.path.basename(self.files[number])}/{row}")

    def origins(self) -> Sequence[str]:
        return self.files

    def read(self, index: int) -> Sample:
        number, row = self._find(index)
        try:
            chunks, begins = self._open(number)
            chunk = int(np.searchsorted(begins, row, side="right")) - 1
            value = chunks[chunk][row - int(begins[chunk])].as_py()
        except (OSError, _arrow().ArrowException, IndexError) as error:
            raise UnreadableSample(one_line(error)) from error
        return Sample(encoded_image(value, self.files[number]), self._labels[index])

    def _find(self, index: int) -> tuple[int, int]:
        """The file that has the sample, and its row there."""
        number = int(torch.searchsorted(self._begins, index, right=True)) - 1
        return number, index - int(self._begins[number])

    def _open(self, number: int) -> tuple[Any, np.ndarray]:
        """The image column of a file in chunks, and the first row of each."""
        if number not in self._opened:
            if stamp(os.stat(self.files[number])) != self._stamps[number]:
                raise UnreadableSample("its file has changed since the run began")
            chunks = _read(self.files[number]).column(self._image).chunks
            self._opened[number] = chunks, np.cumsum([0, *(len(chunk) for chunk in chunks)])
        return self._opened[number]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_opened": {}}


class _File:
    """What is needed of a file from the start, as `RowFile`."""

    def __init__(self, path: Path, key: str, asked: dict[str, str]) -> None:
        """Raises `UserError`: it is damaged, or lacks a column of the right type."""
        self.path, shown = path, repr(str(path))
        try:
            self.stamp = stamp(path.stat())
            table = _read(str(path))
            self.columns = find_columns(table.schema, asked, key=key, where=shown)
            check_images(table.schema.field(self.columns.image).type)
            self.classes = class_names(table.schema, self.columns.label)
            self.labels = arrow_labels(table.column(self.columns.label), key=key, where=shown)
        except TypeError as error:
            raise UserError(f"{key}: {shown}: {error}") from error
        except (_arrow().ArrowException, OSError) as error:
            raise UserError(f"{key}: {shown} cannot be read: {one_line(error)}; save the dataset again") from error


def open_saved(
    argument: str, split: Split, *, key: str, shared: bool, classes: Sequence[str] | None = None
) -> Source:  # fmt: skip
    """Open the folder *argument*, which ``save_to_disk`` of a ``Dataset`` or ``DatasetDict`` has written, for *split*.

    Columns and labels are as for Parquet files, and so is what is held out of a dataset without a validation part.

    Raises:
        UserError: pyarrow is not installed, or the folder is missing or not as described; the message names *key*.
    """
    try:
        _arrow()
    except ImportError as error:
        raise UserError(f'{key}: hf needs pyarrow; install it with: pip install "bigvision[parquet]"') from error
    path, asked = parse_asked(argument, key)
    folder, hold_out = _choose(Path(path).expanduser(), path, split, shared, key)
    state = _json(folder / "state.json", key)
    names = [str(file.get("filename")) for file in state.get("_data_files") or [] if isinstance(file, dict)]
    if state.get("_indices_data_files") or any(os.path.basename(name) != name for name in names):
        raise UserError(f"{key}: {str(folder / 'state.json')!r} is of another version; save the dataset again")
    files = [_File(folder / name, key, asked) for name in names]
    files = [file for file in files if len(file.labels.codes)]
    if not files:
        raise UserError(f"{key}: {str(folder)!r} has no rows; save the dataset again")
    where = repr(argument)
    labels = label_rows(files, classes, [folder, folder.parent], key=key, where=where)
    source = SavedRows(f"hf:{argument}", labels.classes, files, torch.from_numpy(labels.values))
    source.location, source.linked, source.notes = str(folder), location_of(source.files)[1], labels.notes
    return held_out_rows(source, files, labels.values, split, key, where) if hold_out else source


def _choose(folder: Path, argument: str, split: Split, shared: bool, key: str) -> tuple[Path, bool]:
    """The folder of a ``Dataset``, and whether to hold out a part of it."""
    if not folder.is_dir():
        raise UserError(
            f"{key}: no folder {argument!r}; hf:PATH reads what Dataset.save_to_disk(PATH) wrote. For a dataset of the Hub, "
            "download its Parquet files and name them as parquet:PATH"
        )
    if (folder / "state.json").is_file():
        return folder, shared
    if not (folder / "dataset_dict.json").is_file():
        kind = next((kind for kind in ("parquet", "csv", "tsv") if any(folder.rglob(f"*.{kind}"))), None)
        hint = f"did you mean {kind}:{argument}?" if kind else "give the folder of Dataset.save_to_disk"
        raise UserError(f"{key}: {argument!r} has no state.json or dataset_dict.json; {hint}")
    splits = _json(folder / "dataset_dict.json", key).get("splits")
    names = [name for name in splits if isinstance(name, str) and (folder / name / "state.json").is_file()] if splits else []
    train, val = named_parts(names, key=key, where=repr(argument))
    if split == "val" and val is not None:
        return folder / val, False
    if train is None or (split == "val" and not shared):
        lacks = "train" if split == "train" or shared else "val"
        raise UserError(
            f"{key}: {argument!r} has {', '.join(names) or 'no splits'} but no {lacks}; name one as hf:{argument}/NAME"
        )
    return folder / train, shared and val is None


def _json(file: Path, key: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
        if isinstance(found, dict):
            return found
        raise ValueError("it is no object")
    except OSError as error:
        raise UserError(f"{key}: {str(file)!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{key}: {str(file)!r} is damaged: {one_line(error)}; save the dataset again") from error


def _read(file: str) -> Any:
    """The table in an Arrow stream, whose columns stay in the file until they are used."""
    with _arrow().memory_map(file) as mapped:
        return _arrow().ipc.open_stream(mapped).read_all()


def _arrow() -> Any:
    import pyarrow
    import pyarrow.ipc

    return pyarrow
