"""Datasets of the user's own, and torchvision's: whatever has ``__len__`` and ``__getitem__``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from operator import index as as_int
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bigvision.data.labels import (
    OTHER_TASKS,
    by_name,
    by_place,
    check_all_labelled,
    from_one,
    is_missing,
    label_samples,
    numbered,
    whole,
)
from bigvision.data.order import generators_kept
from bigvision.data.sources.base import Sample, Source, Split, Style, UnreadableSample
from bigvision.data.sources.tabular import Columns
from bigvision.data.sources.wrappers import choose_part, describe, row_columns, sample_names
from bigvision.errors import UserError, one_line

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
    ) -> None:
        """Args:
        classes: by default the dataset's own ``classes``, or what its labels say. Whole numbers are places in the list.
        name: for messages; by default the type's.
        columns: which of a dict have the image and the label; by default those with well-known names.
        follow: the training data's classes, for a dataset that names none: where they are numbers, numbers are names.

        Raises:
            UserError: it is empty, has neither classes nor labels to count, or labels that are no classes.
        """
        self.name = name or type(dataset).__name__
        self.style: Style = style
        self._length = len(dataset)
        if not self._length:
            raise UserError(f"{self.name}: it has no samples")
        found = describe(dataset, self.name, Columns(*columns) if columns is not None else None)
        self.dataset, self.columns = found.dataset, found.columns
        classes = classes if classes is not None else found.classes
        labels, where, at = found.labels, "the dataset", lambda index: f"sample {index}"
        values: np.ndarray | None = None
        if classes is not None:
            self.classes = [str(one) for one in classes]
            if labels is not None:
                check_all_labelled(labels, where, at, self.name)
                distinct = [whole(value) for value in labels.distinct]
                numbers = all(isinstance(value, int) for value in distinct)
                place = by_place if numbers else by_name
                values = place(distinct, self.classes, key=self.name, where=where)[labels.codes]
                self.notes = from_one(distinct, self.classes) if numbers else ()
        elif labels is not None:
            mapped = label_samples(labels, follow, key=self.name, where=where, at=at)
            self.classes, values, self.notes = mapped.classes, mapped.values, mapped.notes
        elif follow is not None:
            self.classes = list(follow)
        else:
            raise UserError(f"{self.name}: it has neither classes nor targets; give MapStyle its classes")
        self._place_of = {one: place for place, one in enumerate(self.classes)}
        self._numbers_are_names = classes is None and numbered(self.classes)
        self._labels = None if values is None else torch.from_numpy(values)

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Sample:
        """As :meth:`Source.read`. Raises `TypeError` or `ValueError` for what is no image or no label."""
        return self._sample(self._item(index), index)

    def label(self, index: int) -> int:
        """As :meth:`Source.label`, or by reading; 0 where that fails, since what cannot be read is not counted."""
        if self._labels is not None:
            return int(self._labels[index])
        try:
            return self.read(index).label
        except UnreadableSample:
            return 0

    def origins(self) -> Iterator[str]:
        return sample_names(self.dataset)

    def check(self, key: str) -> None:
        """Raise `UserError`, which names *key*, where the first sample is not as it should be."""
        with generators_kept():
            try:
                item = self._item(0)
                label = self._sample(item, 0).label
            except UnreadableSample:
                return
            except (_WrongSample, UserError) as error:
                raise UserError(f"{key}: {error}") from error
        if label != self.label(0):
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
                    self.columns = row_columns(item, self.name)
                missing = next((column for column in self.columns if column not in item), None)
                if missing is not None:
                    raise _WrongSample(f"{self.name}: sample {index} has no column {missing!r} but {', '.join(item)}")
                item = item[self.columns.image], item[self.columns.label]
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                several = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
                raise _WrongSample(
                    f"{self.name}: sample {index} is {type(item).__name__}{several}; it must be (image, label) or a dict"
                )
            image, label = item
            if isinstance(image, dict) and {"bytes", "path"} & set(image):
                image = image["bytes"] if image.get("bytes") is not None else image.get("path")
            if isinstance(image, (str, os.PathLike)):
                image = Path(image).read_bytes()
            elif isinstance(image, Image.Image):
                image.load()  # Pillow opens a file without decoding it
            return image, label
        except UnreadableSample:
            raise
        except BROKEN as error:
            raise UnreadableSample(one_line(error)) from error

    def _sample(self, item: tuple[Any, Any], index: int) -> Sample:
        return Sample(self._image(item[0], index), self._checked(item[1], index))

    def _image(self, image: Any, index: int) -> bytes | Tensor | Image.Image:
        if isinstance(image, (bytes, Image.Image)):
            return image
        found = image
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
            # A copy: torch takes no arrays of negative strides, and warns of those that are read-only.
            found = torch.from_numpy(np.array(image if image.ndim == 3 else image[..., None])).permute(2, 0, 1)
        if isinstance(found, Tensor) and found.dtype == torch.uint8 and found.ndim == 3 and found.shape[0] in (1, 3):
            return found.expand(3, -1, -1)
        what, hint = type(image).__name__, ""
        if isinstance(image, (np.ndarray, Tensor)):
            what = f"{what} of {str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}"
            if "float" in what:
                hint = "; take ToTensor and Normalize out of the dataset: images are scaled and normalised on the device"
        raise _WrongSample(
            f"{self.name}: the image of sample {index} is {what}; give Pillow's, a uint8 tensor (C, H, W), a uint8 array "
            f"(H, W) or (H, W, C) with C 1 or 3, a file's bytes or its path{hint}"
        )

    def _checked(self, label: Any, index: int) -> int:
        """The place of the class of *label*."""
        where = f"{self.name}: the label of sample {index} is"
        if isinstance(label, (np.generic, np.ndarray, Tensor)) and np.asarray(label).size == 1:
            label = label.item()
        if is_missing(label):
            raise _WrongSample(f"{self.name}: sample {index} has no label ({label!r}); remove or label it")
        label = whole(label)
        if isinstance(label, (list, tuple, np.ndarray, Tensor)):
            several, task, instead = OTHER_TASKS["labels"]
            raise _WrongSample(f"{where} {type(label).__name__} of {len(label)}; {several} are for a task {task!r}; {instead}")
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


def as_source(dataset: Any, split: Split = "train", *, key: str, classes: Sequence[str] | None) -> Source:
    """Return *dataset* itself where it is a source, else as a `MapStyle`; of several by name, the one for *split*.

    Args:
        classes: that labels must follow; taken over by a dataset that names none.

    Raises:
        UserError: it is no dataset, of other classes, or its first sample is no image with a label.
    """
    dataset = choose_part(dataset, split, key)
    if not isinstance(dataset, (Source, MapDataset)):
        raise UserError(f"{key}: {type(dataset).__name__} has no __len__ and __getitem__; give a dataset or its name")
    try:
        source = dataset if isinstance(dataset, Source) else MapStyle(dataset, follow=classes)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    if classes is not None and list(classes) != source.classes:
        raise UserError(
            f"{key}: the {len(source.classes)} classes of {source.name} are not the {len(classes)} of the training data"
        )
    if isinstance(source, MapStyle):
        source.check(key)
    return source
