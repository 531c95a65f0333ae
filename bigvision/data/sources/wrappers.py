"""What a map-style dataset says of its classes, labels and columns: torchvision's, torch's wrappers and Hugging Face's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from bigvision.data.labels import Coded, coded, joined, other_task
from bigvision.data.sources.base import Split
from bigvision.data.sources.tabular import ASKED, Columns, arrow_labels, fitting
from bigvision.data.splits import named_parts
from bigvision.errors import UserError


@dataclass
class Described:
    """What is known of a dataset without reading a sample."""

    dataset: Any
    """the dataset, or another view of it that reads faster"""
    classes: list[str] | None = None
    """its own names; labels are their places"""
    labels: Coded | None = None
    """of all samples"""
    columns: Columns | None = None
    """of rows that are dicts"""


def describe(dataset: Any, name: str, columns: Columns | None) -> Described:
    """Look into *dataset*, which messages call *name*; *columns* are those that the user chose.

    Raises:
        UserError: its parts do not fit together, or its labels are not one for each sample.
    """
    if isinstance(dataset, Subset):
        inner = describe(dataset.dataset, name, columns)
        labels = inner.labels
        if labels is not None:
            labels = Coded(labels.distinct, labels.codes[np.asarray(dataset.indices, dtype=np.int64)])
        if labels is not None and inner.classes is not None:
            # Labels that only others have do not matter. Without names they count: the parts of a random_split are alike.
            used, codes = np.unique(labels.codes, return_inverse=True)
            labels = Coded([labels.distinct[code] for code in used], codes)
        return Described(dataset, inner.classes, labels, inner.columns)
    if isinstance(dataset, ConcatDataset):
        return _concatenated(dataset, [describe(one, name, columns) for one in dataset.datasets], name)
    if isinstance(dataset, TensorDataset):
        if len(dataset.tensors) != 2:
            raise UserError(f"{name}: it has {len(dataset.tensors)} tensors; give TensorDataset(images, labels)")
        return Described(dataset, None, _tensor_labels(dataset.tensors[1], name))
    if (hub := sys.modules.get("datasets")) and isinstance(dataset, getattr(hub, "Dataset", ())):
        return _hugging_face(hub, dataset, name, columns)
    classes = getattr(dataset, "classes", None)
    if classes is not None:
        # torchvision's ImageNet has tuples of synonyms.
        classes = [str(one[0] if isinstance(one, tuple) else one) for one in classes]
    return Described(dataset, classes, _listed_labels(dataset), columns)


def choose_part(dataset: Any, split: Split, key: str) -> Any:
    """*dataset*, or of several by name (a dict, a ``DatasetDict``) the one for *split*.

    Raises:
        UserError: it has no such part, or can only be iterated over.
    """
    hub = sys.modules.get("datasets")
    streams = (IterableDataset, *(getattr(hub, name, IterableDataset) for name in ("IterableDataset", "IterableDatasetDict")))
    kind = type(dataset).__name__
    if isinstance(dataset, DataLoader):
        raise UserError(f"{key}: a DataLoader makes batches, which is done here; give its dataset")
    if isinstance(dataset, streams):
        raise UserError(
            f"{key}: {kind} can only be iterated over, and a run resumes at any sample; give a dataset with __len__ and "
            "__getitem__, or write tar shards (webdataset:PATH)"
        )
    if not isinstance(dataset, Mapping) or not all(isinstance(name, str) for name in dataset):
        return dataset
    train, val = named_parts(list(dataset), key=key, where=kind)
    name = train if split == "train" else val
    if name is None:
        raise UserError(f"{key}: {kind} has {', '.join(dataset)} but no {split}; give one of them, as DATASET['NAME']")
    return dataset[name]


def sample_names(dataset: Any) -> Iterator[str]:
    """What tells the samples of *dataset* from others of this process: its files, or else the object and the index."""
    if isinstance(dataset, Subset):
        names = list(sample_names(dataset.dataset))
        return (names[index] for index in dataset.indices)
    if isinstance(dataset, ConcatDataset):
        return chain.from_iterable(map(sample_names, dataset.datasets))
    from torchvision.datasets import DatasetFolder

    if isinstance(dataset, DatasetFolder):
        return (os.path.abspath(file) for file, _ in dataset.samples)
    return (f"{type(dataset).__name__} {id(dataset)}/{index}" for index in range(len(dataset)))


def row_columns(row: Mapping[str, Any], name: str) -> Columns:
    """The columns of rows like *row*, by their names, or else by what they hold. Raises `UserError`: none or several may be."""
    found = []
    for what in ASKED:
        fits = fitting(what, list(row), {})
        fits = fits or [column for column, value in row.items() if _may_be(what, value)]
        if len(fits) != 1:
            raise unclear_columns(what, fits, list(row), name)
        found.append(fits[0])
    return Columns(*found)


def unclear_columns(what: str, fits: Sequence[str], names: Sequence[str], name: str) -> UserError:
    which = f"{' or '.join(fits)} may be" if fits else "none is known as"
    return UserError(
        f"{name}: its rows have the columns {', '.join(names)}, of which {which} the {what}; give "
        'MapStyle(dataset, columns=("IMAGE", "LABEL"))'
    )


def _may_be(what: str, value: Any) -> bool:
    if what == "label":
        return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    from PIL import Image

    return isinstance(value, (Image.Image, bytes)) or (isinstance(value, dict) and {"bytes", "path"} <= set(value))


def _concatenated(dataset: Any, parts: Sequence[Described], name: str) -> Described:
    """Of several datasets, one after the other."""
    named = [part.classes for part in parts if part.classes is not None]
    other = next((classes for classes in named if classes != named[0]), None)
    if other is not None:
        raise UserError(
            f"{name}: it joins datasets of other classes ({len(named[0])}, from {named[0][0]!r} on, and {len(other)}, from "
            f"{other[0]!r} on); give both the same classes"
        )
    labels = [part.labels for part in parts if part.labels is not None]
    return Described(
        dataset,
        named[0] if named else None,
        joined(labels) if len(labels) == len(parts) else None,
        next((part.columns for part in parts if part.columns is not None), None),
    )


def _tensor_labels(labels: Tensor, name: str) -> Coded:
    array = labels.numpy(force=True)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise other_task("labels", f"{array.dtype} {array.shape}", key=name, where="the dataset")
    return coded(array)


def _listed_labels(dataset: Any) -> Coded | None:
    """The labels that a dataset keeps as an attribute; None where it keeps none that are one for each sample."""
    if getattr(dataset, "target_transform", None) is not None:
        return None
    for name in ("targets", "labels", "_labels"):
        labels = getattr(dataset, name, None)
        if isinstance(labels, (list, tuple, np.ndarray, Tensor)) and 0 < len(labels) == len(dataset):
            try:
                array = np.asarray(labels)
            except ValueError:  # rows of different lengths
                continue
            if array.ndim == 1 and array.dtype.kind in "biufUS":
                return coded(array)
    return None


def _hugging_face(hub: Any, dataset: Any, name: str, columns: Columns | None) -> Described:
    """Of a ``datasets.Dataset``: rows with undecoded images, since decoding is ours."""
    if dataset.format["type"] == "custom":
        # Its set_transform makes other rows than its features say.
        return Described(dataset, None, None, columns)
    types = {column: type(feature).__name__ for column, feature in dataset.features.items()}
    if columns is None:
        found = []
        for what in ASKED:
            fits = fitting(what, dataset.column_names, types)
            if len(fits) != 1:
                raise unclear_columns(what, fits, dataset.column_names, name)
            found.append(fits[0])
        columns = Columns(*found)
    missing = next((column for column in columns if column not in dataset.column_names), None)
    if missing is not None:
        raise UserError(f"{name}: it has no column {missing!r} but {', '.join(dataset.column_names)}; correct columns")
    rows = dataset.with_format(None).select_columns(list(dict.fromkeys(columns)))
    if types[columns.image] == "Image":
        rows = rows.cast_column(columns.image, hub.Image(decode=False))
    column = dataset.with_format("arrow").select_columns([columns.label])[:].column(0)
    labels = arrow_labels(column, key=name, where="the dataset")
    return Described(rows, getattr(dataset.features[columns.label], "names", None), labels, columns)
