"""What samples have that is not one label: several labels each, or numbers; as columns that are read a sample at a time.

Sources find out how their data spells them, and come here with labels as they are stored (`Several`), or with a table of
numbers. Classes are found as for single labels (see ``labels.py``). Errors are `UserError`, begin with *key* and name *where*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bigvision.data.labels import Coded, coded, is_missing, joined, label_by
from bigvision.data.sources.base import Column
from bigvision.errors import UserError

SEPARATORS = "|;,"
"""What may part the labels in a text, the first of them that occurs in any."""


class Vectors:
    """A row of numbers for each sample: 0 and 1 for each class (uint8), shares (float32), or what is measured (float64)."""

    def __init__(self, values: Tensor) -> None:
        """Args: *values* (N, K)."""
        self._values = Column(values)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._values.array[index].copy()

    def of(self, places: np.ndarray) -> Vectors:
        """Those of the samples *places*."""
        return Vectors(self._values.values[torch.from_numpy(places)])


class Sets:
    """The labels of each sample, kept as places in the list of classes; read as 0 and 1 for each class, uint8."""

    def __init__(self, labels: np.ndarray, lengths: np.ndarray, classes: int) -> None:
        """Args: *labels* int64, of all samples, one after the other; *lengths*: how many each has."""
        self._labels = Column(torch.from_numpy(labels))
        self._ends = Column(torch.from_numpy(np.cumsum(lengths, dtype=np.int64)))
        self._classes = classes

    def of(self, places: np.ndarray) -> Sets:
        """Those of the samples *places*."""
        ends = self._ends.array
        begins = np.concatenate([[0], ends[:-1]])
        chosen = [self._labels.array[begins[place] : ends[place]] for place in places]
        return Sets(np.concatenate(chosen), np.array([len(labels) for labels in chosen]), self._classes)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> np.ndarray:
        found = np.zeros(self._classes, dtype=np.uint8)
        found[self._labels.array[self._ends[index - 1] if index else 0 : self._ends[index]]] = 1
        return found


@dataclass
class Several:
    """Labels as they are stored."""

    column: Coded
    """of all samples, one after the other"""
    lengths: np.ndarray
    """int64 (N,), how many each sample has"""

    @classmethod
    def of(cls, samples: Sequence[Sequence[Any]]) -> Several:
        """Of the labels of each sample. Missing ones (null, an empty text) do not count."""
        kept = [[label for label in labels if not is_missing(label)] for labels in samples]
        return cls(coded([label for labels in kept for label in labels]), np.array([len(labels) for labels in kept]))

    @classmethod
    def join(cls, parts: Sequence[Several]) -> Several:
        return cls(joined([part.column for part in parts]), np.concatenate([part.lengths for part in parts]))


class Found(NamedTuple):
    """The targets of all samples."""

    classes: list[str]
    """or the names of the numbers"""
    column: Vectors | Sets
    notes: tuple[str, ...] = ()


def find_sets(
    several: Several, known: Sequence[str] | None, folders: Sequence[Path] = (), *, key: str, where: str
) -> Found:  # fmt: skip
    """The *several* labels of each sample; classes as in :func:`~bigvision.data.labels.label_by`."""
    if not len(several.column.codes):
        raise UserError(f"{key}: no sample of {where} has a label; name the column that has them")
    found = label_by(several.column.distinct, known, folders, key=key, where=where, single=False)
    return Found(found.classes, Sets(found.values[several.column.codes], several.lengths, len(found.classes)), found.notes)


def find_indicators(
    values: np.ndarray, names: Sequence[str], known: Sequence[str] | None, *, key: str, where: str, at: Callable[[int], str]
) -> Found:  # fmt: skip
    """Of a table (N, classes) that has 1 where a sample has a label, and 0 elsewhere; *names* are those of its columns."""
    wrong = np.argwhere((values != 0) & (values != 1))
    if len(wrong):
        row, column = wrong[0].tolist()
        value = values[row, column]
        what = "no value" if value != value else f"{value:g}"
        raise UserError(f"{key}: {at(row)} has {what} in {names[column]!r}, a column of 0 and 1: correct it")
    classes, values = _ordered(values.astype(np.uint8), names, known, key, where)
    return Found(classes, Vectors(torch.from_numpy(np.ascontiguousarray(values))))


def find_numbers(
    values: np.ndarray, names: Sequence[str], known: Sequence[str] | None, *, key: str, where: str, at: Callable[[int], str]
) -> Found:  # fmt: skip
    """Of a table (N, numbers), float64."""
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        row, column = wrong[0].tolist()
        more = f", like {len(np.unique(wrong[:, 0])) - 1:,} more" if len(np.unique(wrong[:, 0])) > 1 else ""
        what = "no number" if np.isnan(values[row, column]) else str(values[row, column])
        raise UserError(f"{key}: {at(row)} has {what} in {names[column]!r}{more}; remove those samples or correct them")
    names, values = _ordered(values.astype(np.float64), names, known, key, where)
    return Found(names, Vectors(torch.from_numpy(np.ascontiguousarray(values))))


def as_numbers(cells: Sequence[Sequence[Any]], names: Sequence[str], *, key: str, at: Callable[[int], str]) -> np.ndarray:
    """A table of *cells*, a sequence for each sample, as float64 (N, K); missing ones are NaN. A text that is no number is a
    `UserError`."""
    found = np.empty((len(cells), len(names)))
    for row, some in enumerate(cells):
        for column, cell in enumerate(some):
            try:
                found[row, column] = np.nan if is_missing(cell) else float(cell)
            except (TypeError, ValueError):
                raise UserError(
                    f"{key}: {at(row)} has {str(cell)[:40]!r} in {names[column]!r}, where a number is needed; correct it"
                ) from None
    return found


def parted(texts: Sequence[str], separator: str | None) -> tuple[list[list[str]], str]:
    """The labels in each of *texts*, and what parts them: *separator*, or the first of `SEPARATORS` that occurs in any."""
    separator = separator or next((one for one in SEPARATORS if any(one in text for text in texts)), SEPARATORS[0])
    return [[label.strip() for label in text.split(separator) if label.strip()] for text in texts], separator


def _ordered(
    values: np.ndarray, names: Sequence[str], known: Sequence[str] | None, key: str, where: str
) -> tuple[list[str], np.ndarray]:
    """The columns *values* in the order of *known*, by their names."""
    if known is None or list(known) == list(names):
        return list(names), values
    if sorted(known) != sorted(names):
        raise UserError(
            f"{key}: {where} has the columns {', '.join(names[:5])}, but the training data has {', '.join(known[:5])}; "
            "name the same ones"
        )
    return list(known), values[:, [list(names).index(name) for name in known]]
