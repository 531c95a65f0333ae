"""What a dataset is to the rest of bigvision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple

from PIL import Image
from torch import Tensor

from bigvision.data.order import Part

Split = Literal["train", "val"]
Style = Literal["photo", "tiny", "digit"]
"""What the images are like; picks the default training augmentation (see `bigvision.data.transforms`)."""


class Sample(NamedTuple):
    image: bytes | Tensor | Image.Image
    """An image file's content, still encoded; or pixels: a uint8 tensor (C, H, W), or an image from Pillow."""
    target: Any
    """What the task is to learn of it: a label, several numbers, a mask, a dict of such; None where there is none."""

    @property
    def label(self) -> Any:
        """The target, as classification calls it."""
        return self.target


class Source(ABC):
    """Labelled images by index. It is sent to worker processes, so it must pickle, and reading must not change it."""

    name: str
    classes: list[str]
    style: Style = "photo"
    channels: int = 3

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

    @property
    def parts(self) -> list[Part]:
        """The runs of indices that are mixed with weights; most sources are one."""
        return [Part(0, len(self), len(self))]


class UnreadableSample(RuntimeError):
    """A sample that cannot be read; one line."""
