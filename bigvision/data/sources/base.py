"""What a dataset is to the rest of bigvision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, NamedTuple

from PIL import Image
from torch import Tensor

from bigvision.data.position import Part

Split = Literal["train", "val"]
Style = Literal["photo", "tiny", "digit"]
"""What the images are like; picks the default training augmentation (see `bigvision.data.transforms`)."""


class Sample(NamedTuple):
    image: bytes | Tensor | Image.Image
    """An image file's content, still encoded; or pixels: a uint8 tensor (C, H, W), or an image from Pillow."""
    label: int


class PassedOver(dict[str, tuple[int, str]]):
    """What a source did not take: for each reason the number of files, members or rows, and the first of them."""

    def add(self, reason: str, example: str) -> None:
        """Count one more. *reason* is a noun phrase that follows a number: "hidden", ".txt", "without an image"."""
        count, first = self.get(reason, (0, example))
        self[reason] = (count + 1, first)


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
    noun: str = "image"
    """What a sample is, in the report at the start."""
    passed_over: Mapping[str, tuple[int, str]] = PassedOver()
    """See `PassedOver`; reported at the start."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Sample:
        """Return the sample *index*, the same at every call. Raises `UnreadableSample`, with the reason alone."""

    @abstractmethod
    def label(self, index: int) -> int:
        """Return the label of the sample *index* without reading its image."""

    def where(self, index: int) -> str:
        """What messages call the sample: its file, where it has one."""
        return f"{self.name}, sample {index}"

    def key(self, index: int) -> bytes:
        """The sample's name within its data, the same wherever the data lie: a relative path or a key; b"" without one."""
        return b""

    def size(self, index: int) -> int:
        """Bytes of the encoded image where they are known without reading it, else 0. For files this is a call of stat."""
        return 0

    @property
    def parts(self) -> list[Part]:
        """The runs of indices that are mixed with weights; most sources are one."""
        return [Part(0, len(self), len(self))]


class UnreadableSample(RuntimeError):
    """A sample that cannot be read; one line."""
