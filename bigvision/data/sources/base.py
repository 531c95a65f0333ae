"""What a dataset is to the rest of bigvision, several of them as one, and the files that samples are read from."""

from __future__ import annotations

import io
import os
import warnings
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bigvision.data.labels import Target
from bigvision.data.order import Part, shares

Split = Literal["train", "val"]
Style = Literal["photo", "tiny", "digit"]
"""What the images are like; picks the default training augmentation (see `bigvision.data.transforms`)."""

HEADER = 1 << 16
"""Bytes at the start of an image file that tell its size, unless much else is before it."""


class Opening(NamedTuple):
    """How a dataset is opened. Whatever is missing, damaged or not as described is a `UserError` that begins with *key*."""

    split: Split
    key: str
    """the configuration's"""
    shared: bool = True
    """Whether training and validation both name this dataset: only then what has no validation part is divided."""
    classes: Sequence[str] | None = None
    """that labels follow; by default the data's own"""
    target: Target = "label"
    """What the task needs of each sample."""
    ignore: int = 255
    """of masks: what stands for no label"""
    root: str | None = None
    """the folder of downloaded datasets"""
    first: bool = False
    """Whether to download what is missing, write indexes beside files, and report on stderr what takes long."""


class Column:
    """Whole numbers in a tensor that are read one at a time. A million of Python's own would be copied and pickled for each
    worker, and a tensor's own indexing takes ten times as long as NumPy's."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._array, self._begin = values.numpy(), values.data_ptr()

    def __len__(self) -> int:
        return len(self.values)

    @property
    def array(self) -> np.ndarray:
        # When a tensor is first sent to another process, its numbers move to shared memory, and the array is left behind.
        if self.values.data_ptr() != self._begin:
            self._array, self._begin = self.values.numpy(), self.values.data_ptr()
        return self._array

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.values,)

    def __getitem__(self, index: int) -> int:
        return self.array.item(index)


class Texts:
    """Texts that are read one at a time."""

    def __init__(self, values: Tensor, ends: Tensor) -> None:
        """Args: *values* uint8 (bytes of all), *ends* int64 (N,), where each one ends."""
        self._values, self._ends = Column(values), Column(ends)

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> Texts:
        return cls(*strung(texts))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        return self._values.array[self._ends[index - 1] if index else 0 : self._ends[index]].tobytes()


def strung(texts: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """The bytes of all *texts*, uint8, and where each one ends, int64 (N,)."""
    ends = torch.tensor([len(text) for text in texts], dtype=torch.int64).cumsum(0)
    return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8), ends


class Sample(NamedTuple):
    image: bytes | Tensor | Image.Image
    """An image file's content, still encoded; or pixels: a uint8 tensor (C, H, W), or an image from Pillow."""
    target: Any
    """What the task is to learn of it: a label, several numbers, a mask, a dict of such; None where there is none."""

    @property
    def label(self) -> Any:
        """The target, as classification calls it."""
        return self.target


class PassedOver(dict[str, tuple[int, str]]):
    """What a source did not take: for each reason the number of files, members or rows, and the first of them."""

    def add(self, reason: str, example: str, more: int = 1) -> None:
        """Count *more*. *reason* is a noun phrase that follows a number: "hidden", ".txt", "without an image"."""
        count, first = self.get(reason, (0, example))
        self[reason] = (count + more, first)

    def include(self, other: Mapping[str, tuple[int, str]]) -> None:
        """Count what *other* counts, too."""
        for reason, (more, example) in other.items():
            self.add(reason, example, more)


class Source(ABC):
    """Labelled images by index. It is sent to worker processes, so it must pickle, and reading must not change it."""

    name: str
    """As the configuration names it, for messages."""
    classes: list[str]
    style: Style = "photo"
    channels: int = 3
    location: str = ""
    """The folder or file that the samples of this split were read from, where there is one."""
    linked: bool = False
    """Whether symbolic links were followed below it, so that samples may lie elsewhere."""
    divided: bool = False
    """Whether it is one of the two parts, without samples in common, of data that training and validation share."""
    noun: str = "image"
    """What a sample is, in the report at the start."""
    unit: str = "class"
    """What `classes` are the names of, in that report: classes or numbers."""
    lists_targets: bool = True
    """Whether :meth:`label` knows the targets without reading samples."""
    passed_over: Mapping[str, tuple[int, str]] = PassedOver()
    """See `PassedOver`; reported at the start."""
    notes: tuple[str, ...] = ()
    """What else the user should know, as how labels were mapped to classes; a line each, reported at the start."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Sample:
        """Return the sample *index*, the same at every call. Raises `UnreadableSample`, with the reason alone."""

    @abstractmethod
    def label(self, index: int) -> Any:
        """Return the target of the sample *index* without reading its image; any of its shape where that cannot be had."""

    def where(self, index: int) -> str:
        """What messages call the sample: its file, where it has one."""
        return f"{self.name}, sample {index}"

    def key(self, index: int) -> bytes:
        """The sample's name within its data, the same wherever the data lie: a relative path or a key; b"" without one."""
        return b""

    def size(self, index: int) -> int:
        """Bytes of the encoded image where they are known without reading it, else 0. For files this is a call of stat."""
        return 0

    def image_size(self, index: int) -> tuple[int, int] | None:
        """Height and width of the image as it is stored, where they are known without decoding it."""
        return None

    def origins(self) -> Iterable[str]:
        """The files that the samples are read from, to find what is in the training data and in the validation data."""
        return ()

    @property
    def parts(self) -> list[Part]:
        """The runs of indices that are mixed with weights; most sources are one."""
        return [Part(0, len(self), len(self))]


class Labelled(Source):
    """A source that keeps the targets of all samples in memory."""

    _labels: Any  # a `Column`, or one of `bigvision.data.targets`

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> Any:
        return self._labels[index]


class View(Source):
    """Samples of other sources under other indices."""

    @abstractmethod
    def _find(self, index: int) -> tuple[Source, int]:
        """The source of a sample, and its index there."""

    def read(self, index: int) -> Sample:
        source, index = self._find(index)
        return source.read(index)

    def label(self, index: int) -> Any:
        source, index = self._find(index)
        return source.label(index)

    def where(self, index: int) -> str:
        source, index = self._find(index)
        return source.where(index)

    def key(self, index: int) -> bytes:
        source, index = self._find(index)
        return source.key(index)

    def size(self, index: int) -> int:
        source, index = self._find(index)
        return source.size(index)

    def image_size(self, index: int) -> tuple[int, int] | None:
        source, index = self._find(index)
        return source.image_size(index)


class Subset(View):
    """The samples *indices* of another source, in that order: what training or validation gets of data that both share."""

    divided = True

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray) -> None:
        self.source = source
        for name in (
            "name", "classes", "style", "channels", "location", "linked", "noun", "unit", "lists_targets", "passed_over",
            "notes",
        ):  # fmt: skip
            setattr(self, name, getattr(source, name))
        # A tensor: workers share it.
        self.indices = Column(torch.as_tensor(np.asarray(indices, dtype=np.int64)))

    def __len__(self) -> int:
        return len(self.indices)

    def _find(self, index: int) -> tuple[Source, int]:
        return self.source, self.indices[index]

    def origins(self) -> Iterable[str]:
        return self.source.origins()


class Mixture(View):
    """The samples of *sources* one after the other; an epoch has of each as many as its weight says."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        self.sources = list(sources)
        self.name = " + ".join(f"{weight:g}*{source.name}" for weight, source in zip(weights, sources))
        self.classes, self.style, self.channels = sources[0].classes, sources[0].style, sources[0].channels
        self.lists_targets, self.unit = all(source.lists_targets for source in sources), sources[0].unit
        self.notes = tuple(f"{source.name}: {note}" for source in sources for note in source.notes)
        lengths = [len(source) for source in sources]
        self._begins = [0, *accumulate(lengths)]
        self._parts = [Part(*part) for part in zip(self._begins, lengths, shares(lengths, weights))]

    def __len__(self) -> int:
        return self._begins[-1]

    def _find(self, index: int) -> tuple[Source, int]:
        number = bisect_right(self._begins, index) - 1
        return self.sources[number], index - self._begins[number]

    def key(self, index: int) -> bytes:
        # Two datasets may have samples of the same name.
        return b"%d/%s" % (bisect_right(self._begins, index) - 1, super().key(index))

    @property
    def parts(self) -> list[Part]:
        return self._parts


# Files


class Packed(Labelled):
    """Samples that lie many to a file. Each process opens the files for itself, and the ones used last stay open."""

    def __init__(
        self, files: Sequence[Path], stamps: Sequence[tuple[int, int]], most: int, open: Callable[[str], Any],
        close: Callable[[Any], object],
    ) -> None:  # fmt: skip
        """Args: *stamps*: of each file when the source was opened. *most*: how many files are open at a time."""
        self.files = [str(file) for file in files]
        self.location = os.path.commonpath(list(map(os.path.abspath, self.files)))
        self.linked = any(map(os.path.islink, self.files)) or len(set(map(os.path.dirname, self.files))) > 1
        self._stamps, self._most, self._open, self._close = torch.tensor(stamps), most, open, close
        self._opened: OrderedDict[int, Any] = OrderedDict()

    def origins(self) -> Sequence[str]:
        return self.files

    def opened(self, number: int) -> Any:
        """What was opened of the file *number*. Raises `UnreadableSample` if it has changed, or what opening it raises."""
        if number not in self._opened:
            if list(stamp(os.stat(self.files[number]))) != self._stamps[number].tolist():
                raise UnreadableSample("its file has changed since the run began")
            self._opened[number] = self._open(self.files[number])
            if len(self._opened) > self._most:
                self._close(self._opened.popitem(last=False)[1])
        self._opened.move_to_end(number)
        return self._opened[number]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": OrderedDict()}

    def __del__(self) -> None:
        for opened in getattr(self, "_opened", {}).values():
            self._close(opened)


def stamp(file: os.stat_result) -> tuple[int, int]:
    """What shows that a file has changed."""
    return file.st_size, file.st_mtime_ns


def size_in_header(path: str, offset: int = 0) -> tuple[int, int] | None:
    """Height and width of the image in the file *path* from the byte *offset* on; None where its first bytes do not tell."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            start = io.BytesIO(file.read(HEADER))
        with warnings.catch_warnings(action="ignore"), Image.open(start) as image:
            return image.height, image.width
    except Exception:  # Pillow raises many types; reading the sample will name the reason
        return None


class UnreadableSample(RuntimeError):
    """A sample that cannot be read; one line."""


def described(value: Any) -> str:
    """Type, and of arrays and tensors the kind of number and the shape, for messages."""
    kind = type(value).__name__
    if not isinstance(value, (np.ndarray, Tensor)):
        return f"{kind} of {len(value)}" if isinstance(value, (tuple, list)) else kind
    return f"{kind} of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
