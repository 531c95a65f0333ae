"""Datasets of the user's own: whatever has ``__len__`` and ``__getitem__``, and what standard wrappers say of themselves."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import index as as_int
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from bigvision.data.labels import (
    OTHER_TASKS,
    Coded,
    Target,
    coded,
    is_missing,
    joined,
    label_samples,
    numbered,
    other_task,
    whole,
)
from bigvision.data.order import generators_kept
from bigvision.data.sources.arrow import ASKED, Columns, arrow_labels, fitting, the_only
from bigvision.data.sources.base import Opening, Sample, Source, Split, Style, UnreadableSample, described
from bigvision.data.sources.masks import as_mask, counted_classes, ids_of
from bigvision.data.splits import named_parts
from bigvision.errors import UserError, one_line

SOME = 100
"""Samples that are read to learn which classes there are, where a dataset of masks does not list them."""
BROKEN = (OSError, SyntaxError, Image.DecompressionBombError)
"""What opening and decoding a damaged file raises, in Pillow too ("broken PNG file" is a SyntaxError)."""


@runtime_checkable
class MapDataset(Protocol):
    """A map-style dataset, as torch's `Dataset`: ``dataset[i]`` is ``(image, label)``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class _WrongSample(UserError, TypeError, ValueError):
    """A sample that is none, though nothing failed: a mistake in the dataset, which another start would meet again."""


class MapStyle(Source):
    """A map-style dataset as a source: ``dataset[i]`` is ``(image, label)``, or a dict with both in columns.

    An image may be one of Pillow's, a uint8 tensor (C, H, W), a uint8 array (H, W) or (H, W, C), C being 1 or 3, the bytes
    of an image file, its path, or Hugging Face's ``{"bytes": ..., "path": ...}``; a label is a whole number or the name of a
    class. Where the dataset keeps all labels (in ``targets``, ``labels`` or ``_labels``, also below torch's wrappers), they are
    known without reading. `OSError` and Pillow's errors make a sample unreadable; others propagate. For worker processes the
    dataset must pickle, which is how multiprocessing hands it over.
    """

    def __init__(
        self,
        dataset: MapDataset,
        classes: Sequence[str] | None = None,
        style: Style = "photo",
        name: str | None = None,
        columns: tuple[str, str] | None = None,
        follow: Sequence[str] | None = None,
        target: Target = "label",
        ignore: int = 255,
    ) -> None:
        """Args:
        classes: by default the dataset's own ``classes``, or what its labels say. Whole numbers are places in the list.
        name: for messages; by default the type's.
        columns: which of a dict have the image and the label; by default those with well-known names.
        follow: the training data's classes, for a dataset that names none: where they are numbers, numbers are names.
        target: what the task needs. "label": a label is also a distribution over the classes, as floats. "labels": a list of
            classes; or an array, tensor or list of floats with 0 and 1 (or shares) for each class. "numbers": a number, or
            several. "mask": a class id for each pixel: whole numbers (H, W), an image of Pillow's, grey or with a palette, or a
            PNG's bytes or path. Others get the second of each pair as it is.
        ignore: of masks, the id that stands for no label.

        Raises:
            UserError: it is empty, has neither classes nor labels to count, or labels that are no classes.
        """
        self.name = name or type(dataset).__name__
        self.style: Style = style
        self._length = len(dataset)
        if not self._length:
            raise UserError(f"{self.name}: it has no samples")
        self.target, self.ignore = target, ignore
        chosen = Columns(*columns) if columns is not None else None
        found = Described(dataset, _names_of(dataset), None, chosen)
        if target == "label":
            found = describe(dataset, self.name, chosen)
        self.dataset, self.columns = found.dataset, found.columns
        self.lists_targets = found.labels is not None
        self.unit = "number" if target == "numbers" else "class"
        classes = classes if classes is not None else found.classes
        known = follow if classes is None else [str(one) for one in classes]
        self._labels: Tensor | None = None
        if found.labels is not None:
            mapped = label_samples(
                found.labels, known, key=self.name, where="the dataset", at=lambda index: f"sample {index}",
                places=classes is not None,
            )  # fmt: skip
            self.classes, self._labels, self.notes = mapped.classes, torch.from_numpy(mapped.values), mapped.notes
        elif known is not None or target not in ("label", "labels", "numbers"):
            self.classes = list(known or ())
            if target == "mask" and known is None:
                with generators_kept():
                    ids = lambda index: ids_of(self._item(index)[1])  # noqa: E731
                    self.classes, self.notes = counted_classes(self._length, ids, ignore, most=SOME)
        elif target != "label" and (count := self._width()) is not None:
            self.classes = list(map(str, range(count)))
        else:
            raise UserError(f"{self.name}: it has neither classes nor targets; give MapStyle its classes")
        self._place_of = {one: place for place, one in enumerate(self.classes)}
        self._numbers_are_names = classes is None and numbered(self.classes)

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Sample:
        """As :meth:`Source.read`. Raises `TypeError` or `ValueError` for what is no image or no label."""
        return self._sample(self._item(index), index)

    def label(self, index: int) -> Any:
        """As :meth:`Source.label`, or by reading; where that fails the next that can be read, or 0: it is not counted."""
        if self._labels is not None:
            return int(self._labels[index])
        try:
            return self.read(index).target
        except UnreadableSample:
            return self.label(index + 1) if index + 1 < len(self) else 0

    def origins(self) -> Iterator[str]:
        return sample_names(self.dataset)

    def check(self, key: str) -> None:
        """Raise `UserError`, which names *key*, where the first sample is not as it should be."""
        with generators_kept():
            try:
                item = self._item(0)
                label = self._sample(item, 0).target
            except UnreadableSample:
                return
            except (_WrongSample, UserError) as error:
                raise UserError(f"{key}: {error}") from error
        if self.target == "label" and self._labels is not None and label != self.label(0):
            raise UserError(
                f"{key}: {self.name}: sample 0 has label {label}, but {self.label(0)} in the labels that the dataset lists; "
                "correct one of them"
            )

    def _item(self, index: int) -> Any:
        """What the dataset has at *index*; files are read and opened."""
        try:
            item = self.dataset[index]
            if isinstance(item, Mapping):
                if self.columns is None:
                    # By their names, or else by what they hold.
                    held = {what: [name for name, value in item.items() if _may_be(what, value)] for what in ASKED}
                    fits = {what: fitting(what, list(item), {}) or held[what] for what in ASKED}
                    self.columns = _chosen(fits, list(item), self.name)
                missing = next((column for column in self.columns if column not in item), None)
                if missing is not None:
                    raise _WrongSample(f"{self.name}: sample {index} has no column {missing!r} but {', '.join(item)}")
                item = item[self.columns.image], item[self.columns.label]
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                what = described(item) if isinstance(item, (tuple, list)) else type(item).__name__
                raise _WrongSample(f"{self.name}: sample {index} is {what}; it must be (image, label) or a dict")
            image, label = item
            if isinstance(image, dict) and {"bytes", "path"} & set(image):
                image = image["bytes"] if image.get("bytes") is not None else image.get("path")
            if isinstance(image, (str, os.PathLike)):
                image = Path(image).read_bytes()
            if self.target == "mask" and isinstance(label, (str, os.PathLike)):
                label = Path(label).read_bytes()
            elif isinstance(image, Image.Image):
                image.load()  # Pillow opens a file without decoding it
            return image, label
        except UnreadableSample:
            raise
        except BROKEN as error:
            raise UnreadableSample(one_line(error)) from error

    def _sample(self, item: tuple[Any, Any], index: int) -> Sample:
        target = item[1]
        if self.target == "label":
            target = self._checked(target, index)
        elif self.target == "labels":
            target = self._indicated(target, index)
        elif self.target == "numbers":
            target = self._measured(target, index)
        elif self.target == "mask":
            target = as_mask(ids_of(target), self.classes, self.ignore)
        return Sample(self._image(item[0], index), target)

    def _width(self) -> int | None:
        """How many classes or numbers there are, from the first sample; None where its target is a list of classes."""
        target = self._item(0)[1]
        values = _numbers(target)
        return len(values) if values is not None and (self.target == "numbers" or _has_each(target)) else None

    def _indicated(self, labels: Any, index: int) -> np.ndarray:
        """1 (or a share) for each class that *labels* names, float32."""
        where = f"{self.name}: the labels of sample {index} are {described(labels)}"
        if _has_each(labels):
            values = _numbers(labels)
            if values is None or len(values) != len(self.classes) or not ((values >= 0) & (values <= 1)).all():
                raise _WrongSample(f"{where}; give a list of classes, or 0 and 1 for each of {len(self.classes)} classes")
            return values.astype(np.float32)
        if isinstance(labels, (str, bytes)) or not isinstance(labels, Iterable):
            raise _WrongSample(f"{where}; give a list of classes, or 0 and 1 for each of {len(self.classes)} classes")
        found = np.zeros(len(self.classes), dtype=np.float32)
        for label in labels:
            found[self._checked(label, index)] = 1
        return found

    def _measured(self, numbers: Any, index: int) -> np.ndarray:
        """The numbers of a sample, float64."""
        values = _numbers(numbers)
        if values is None or len(values) != len(self.classes):
            raise _WrongSample(
                f"{self.name}: the target of sample {index} is {described(numbers)}; give {len(self.classes)} numbers "
                f"({', '.join(self.classes[:5])})"
            )
        if not np.isfinite(values).all():
            raise _WrongSample(f"{self.name}: sample {index} has {values.tolist()} as its numbers; remove or correct it")
        return values

    def _image(self, image: Any, index: int) -> bytes | Tensor | Image.Image:
        if isinstance(image, (bytes, Image.Image)):
            return image
        found = image
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
            # A copy: torch takes no arrays of negative strides, and warns of those that are read-only.
            found = torch.from_numpy(np.array(image if image.ndim == 3 else image[..., None])).permute(2, 0, 1)
        if isinstance(found, Tensor) and found.dtype == torch.uint8 and found.ndim == 3 and found.shape[0] in (1, 3):
            return found.expand(3, -1, -1)
        hint = ""
        if isinstance(image, (np.ndarray, Tensor)) and "float" in str(image.dtype):
            hint = "; take ToTensor and Normalize out of the dataset: images are scaled and normalised on the device"
        raise _WrongSample(
            f"{self.name}: the image of sample {index} is {described(image)}; give Pillow's, a uint8 tensor (C, H, W), a uint8 "
            f"array (H, W) or (H, W, C) with C 1 or 3, a file's bytes or its path{hint}"
        )

    def _checked(self, label: Any, index: int) -> int | np.ndarray:
        """The place of the class of *label*; or the label itself, float32, where it is a distribution over the classes."""
        where = f"{self.name}: the label of sample {index} is"
        if isinstance(label, (np.generic, np.ndarray, Tensor)) and np.asarray(label).size == 1:
            label = label.item()
        if is_missing(label):
            raise _WrongSample(f"{self.name}: sample {index} has no label ({label!r}); remove or label it")
        label = whole(label)
        if isinstance(label, (list, tuple, np.ndarray, Tensor)):
            shares = _numbers(label) if "float" in str(getattr(label, "dtype", "")) else None
            if shares is not None and len(shares) == len(self.classes) > 1:
                if not ((shares >= 0).all() and abs(shares.sum() - 1) < 1e-3):
                    raise _WrongSample(f"{where} {described(label)} that adds up to {shares.sum():g}; shares of classes make 1")
                return shares.astype(np.float32)
            several, instead = OTHER_TASKS["labels"]
            raise _WrongSample(f"{where} {type(label).__name__} of {len(label)}, {several}; {instead}")
        if isinstance(label, bytes):
            label = label.decode(errors="replace")
        if isinstance(label, str) or (self._numbers_are_names and isinstance(label, int)):
            if str(label) not in self._place_of:
                raise _WrongSample(f"{where} {label!r}, which is none of the {len(self.classes)} classes")
            return self._place_of[str(label)]
        try:
            value = as_int(label)
        except TypeError:
            raise _WrongSample(f"{where} {type(label).__name__}, not an integer or the name of a class") from None
        if not 0 <= value < len(self.classes):
            raise _WrongSample(f"{where} {value}, but there are {len(self.classes)} classes")
        return value


def _numbers(values: Any) -> np.ndarray | None:
    """A number, or a sequence of them, as float64 (K,); None for anything else."""
    try:
        array = np.asarray(values.numpy(force=True) if isinstance(values, Tensor) else values)
    except (TypeError, ValueError):
        return None
    if array.dtype.kind not in "biuf" or array.ndim > 1:
        return None
    return array.reshape(-1).astype(np.float64)


def _has_each(labels: Any) -> bool:
    """Whether *labels* has a number for each class, not the classes that are there: its type decides, not its values."""
    if isinstance(labels, (np.ndarray, Tensor)):
        return True
    return isinstance(labels, (list, tuple)) and len(labels) > 0 and all(isinstance(one, (float, bool)) for one in labels)


def as_source(dataset: Any, opening: Opening) -> Source:
    """Return *dataset* itself where it is a source, else as a `MapStyle`; of several by name, the one for the split."""
    key = opening.key
    dataset = choose_part(dataset, opening.split, key)
    if not isinstance(dataset, (Source, MapDataset)):
        raise UserError(f"{key}: {type(dataset).__name__} has no __len__ and __getitem__; give a dataset or its name")
    if isinstance(dataset, MapStyle) and dataset.target == "label" and opening.target in ("labels", "numbers"):
        raise UserError(
            f"{key}: the task needs {opening.target}: give the dataset itself, or MapStyle(..., target={opening.target!r})"
        )
    try:
        source = dataset if isinstance(dataset, Source) else MapStyle(
            dataset, follow=opening.classes, target=opening.target, ignore=opening.ignore
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    check_classes(source, opening)
    if isinstance(source, MapStyle):
        source.check(key)
    return source


def check_classes(source: Source, opening: Opening) -> None:
    """Raise `UserError` where the classes of *source* are not those that labels must follow."""
    known, own = opening.classes, source.classes
    if known is not None and list(known) != own:
        what = "numbers" if opening.target == "numbers" else "classes"
        raise UserError(f"{opening.key}: the {len(own)} {what} of {source.name} are not the {len(known)} of the training data")


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
    """Look into *dataset*, which messages call *name*; *columns* are those that the user chose."""
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
    return Described(dataset, _names_of(dataset), _listed_labels(dataset), columns)


def _names_of(dataset: Any) -> list[str] | None:
    """The classes that *dataset* names itself, also below torch's wrappers."""
    if isinstance(dataset, Subset):
        return _names_of(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return _names_of(dataset.datasets[0])
    classes = getattr(dataset, "classes", None)
    # torchvision's ImageNet has tuples of synonyms.
    return None if classes is None else [str(one[0] if isinstance(one, tuple) else one) for one in classes]


def choose_part(dataset: Any, split: Split, key: str) -> Any:
    """*dataset*, or of several by name (a dict, a ``DatasetDict``) the one for *split*."""
    hub = sys.modules.get("datasets")
    streams = (IterableDataset, *(getattr(hub, name, IterableDataset) for name in ("IterableDataset", "IterableDatasetDict")))
    kind = type(dataset).__name__
    if isinstance(dataset, DataLoader):
        raise UserError(f"{key}: a DataLoader makes batches, which is done here; give its dataset")
    if isinstance(dataset, streams):
        give = "give a dataset with __len__ and __getitem__, or write tar shards (webdataset:PATH)"
        raise UserError(f"{key}: {kind} can only be iterated over, and a run resumes at any sample; {give}")
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


def _chosen(fits: Mapping[str, Sequence[str]], names: Sequence[str], name: str) -> Columns:
    """The columns, where one of *names* *fits* for each. Raises `UserError`."""
    fix = 'give MapStyle(dataset, columns=("IMAGE", "LABEL"))'
    return Columns(*(the_only(fits[what], what, names, f"{name}: its rows have", fix) for what in ASKED))


def _may_be(what: str, value: Any) -> bool:
    if what == "label":
        return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
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
    columns = next((part.columns for part in parts if part.columns is not None), None)
    return Described(dataset, named[0] if named else None, joined(labels) if len(labels) == len(parts) else None, columns)


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
        fits = {what: fitting(what, dataset.column_names, types) for what in ASKED}
        columns = _chosen(fits, dataset.column_names, name)
    missing = next((column for column in columns if column not in dataset.column_names), None)
    if missing is not None:
        raise UserError(f"{name}: it has no column {missing!r} but {', '.join(dataset.column_names)}; correct columns")
    rows = dataset.with_format(None).select_columns(list(dict.fromkeys(columns)))
    if types[columns.image] == "Image":
        rows = rows.cast_column(columns.image, hub.Image(decode=False))
    column = dataset.with_format("arrow").select_columns([columns.label])[:].column(0)
    labels = arrow_labels(column, key=name, where="the dataset")
    return Described(rows, getattr(dataset.features[columns.label], "names", None), labels, columns)
