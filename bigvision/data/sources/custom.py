"""Datasets of the user's own, and torchvision's: whatever has ``__len__`` and ``__getitem__``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from operator import index as as_int
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bigvision.data.sources.base import Sample, Source, Style, UnreadableSample
from bigvision.errors import UserError, one_line

BROKEN = (OSError, SyntaxError, Image.DecompressionBombError)
"""What opening and decoding a damaged file raises, in Pillow too ("broken PNG file" is a SyntaxError)."""


@runtime_checkable
class MapDataset(Protocol):
    """A map-style dataset, as torch's `Dataset`: ``dataset[i]`` is ``(image, label)``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class MapStyle(Source):
    """A map-style dataset as a source.

    An image may be one of Pillow's, a uint8 tensor (C, H, W), a uint8 array (H, W) or (H, W, C), C being 1 or 3, the bytes
    of an image file, or its path; a label is an integer. Where the dataset keeps all labels (in ``targets``, ``labels`` or
    ``_labels``), they are known without reading. `OSError` and Pillow's errors make a sample unreadable; others propagate.
    For worker processes the dataset must pickle, which is how multiprocessing hands it over.
    """

    def __init__(
        self, dataset: MapDataset, classes: Sequence[str] | None = None, style: Style = "photo", name: str | None = None
    ) -> None:
        """Args:
        classes: by default the dataset's own ``classes``, or "0", "1", ... up to its largest label.
        name: for messages; by default the type's.

        Raises:
            UserError: it is empty, or has neither classes nor labels to count.
        """
        self.name = name or type(dataset).__name__
        self.style: Style = style
        self.dataset = dataset
        self._length = len(dataset)
        self._labels = _labels(dataset)
        if not self._length:
            raise UserError(f"{self.name}: it has no samples")
        if classes is None:
            classes = getattr(dataset, "classes", None)
        if classes is None and self._labels is not None:
            classes = [str(label) for label in range(int(self._labels.max()) + 1)]
        if classes is None:
            raise UserError(f"{self.name}: it has neither classes nor targets; give MapStyle its classes")
        self.classes = [str(name) for name in classes]
        if self._labels is not None and not 0 <= self._labels.min() <= self._labels.max() < len(self.classes):
            raise UserError(
                f"{self.name}: its labels are from {int(self._labels.min())} to {int(self._labels.max())}, but there are "
                f"{len(self.classes)} classes; they must be from 0 to {len(self.classes) - 1}"
            )

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Sample:
        """As :meth:`Source.read`. Raises `TypeError` or `ValueError` for what is no image or no label."""
        try:
            image, label = self.dataset[index]
            if isinstance(image, (str, os.PathLike)):
                image = Path(image).read_bytes()
            elif isinstance(image, Image.Image):
                image.load()  # Pillow opens a file without decoding it
        except UnreadableSample:
            raise
        except BROKEN as error:
            raise UnreadableSample(one_line(error)) from error
        return Sample(self._image(image, index), self._checked(label, index))

    def label(self, index: int) -> int:
        """As :meth:`Source.label`, or by reading; 0 where that fails, since what cannot be read is not counted."""
        if self._labels is not None:
            return int(self._labels[index])
        try:
            return self.read(index).label
        except UnreadableSample:
            return 0

    def _image(self, image: Any, index: int) -> bytes | Tensor | Image.Image:
        if isinstance(image, (bytes, Image.Image)):
            return image
        found = image
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
            # A copy: torch takes no arrays of negative strides, and warns of those that are read-only.
            found = torch.from_numpy(np.array(image)).reshape(*image.shape[:2], -1).permute(2, 0, 1)
        if isinstance(found, Tensor) and found.dtype == torch.uint8 and found.ndim == 3 and found.shape[0] in (1, 3):
            return found.expand(3, -1, -1)
        what = type(image).__name__
        if isinstance(image, (np.ndarray, Tensor)):
            what = f"{what} of {str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}"
        raise TypeError(
            f"{self.name}: the image of sample {index} is {what}; give Pillow's, a uint8 tensor (C, H, W), a uint8 array "
            "(H, W) or (H, W, C) with C 1 or 3, a file's bytes or its path"
        )

    def _checked(self, label: Any, index: int) -> int:
        try:
            value = as_int(label)
        except TypeError:
            raise TypeError(f"{self.name}: the label of sample {index} is {type(label).__name__}, not an integer") from None
        if not 0 <= value < len(self.classes):
            raise ValueError(f"{self.name}: the label of sample {index} is {value}, but there are {len(self.classes)} classes")
        return value


def as_source(dataset: Source | MapDataset, *, key: str, classes: Sequence[str] | None) -> Source:
    """Return *dataset* itself where it is a source, else as a `MapStyle`.

    Args:
        classes: that labels must follow; taken over by a dataset that names none.

    Raises:
        UserError: it is no dataset, or of other classes.
    """
    if not isinstance(dataset, (Source, MapDataset)):
        raise UserError(f"{key}: {type(dataset).__name__} has no __len__ and __getitem__; give a dataset or its name")
    if isinstance(dataset, Source):
        source = dataset
    else:
        source = MapStyle(dataset, None if getattr(dataset, "classes", None) is not None else classes)
    if classes is not None and list(classes) != source.classes:
        raise UserError(
            f"{key}: the {len(source.classes)} classes of {source.name} are not the {len(classes)} of the training data"
        )
    return source


def _labels(dataset: Any) -> Tensor | None:
    """The labels of all samples, int64 (N,), where the dataset keeps them: in a tensor, which worker processes share."""
    if getattr(dataset, "target_transform", None) is not None:
        return None
    for name in ("targets", "labels", "_labels"):
        labels = getattr(dataset, name, None)
        if isinstance(labels, (list, tuple, np.ndarray, Tensor)) and 0 < len(labels) == len(dataset):
            try:
                array = np.asarray(labels)
            except ValueError:  # rows of different lengths
                continue
            if array.ndim == 1 and array.dtype.kind in "iu":
                return torch.from_numpy(array.astype(np.int64))
    return None
