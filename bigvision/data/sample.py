"""What a dataset is to the rest of bigvision."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from PIL import Image
from torch import Tensor

Split = Literal["train", "val"]
Style = Literal["photo", "tiny", "digit"]
"""What the images are like; picks the default training augmentation (see `bigvision.data.transforms`)."""


class Sample(NamedTuple):
    image: Image.Image | Tensor
    """An RGB image: from Pillow, or a uint8 tensor (3, H, W)."""
    label: int


class Source(Protocol):
    """Labelled images by index. It is sent to worker processes, so it must pickle, and reading must not change it."""

    name: str
    classes: list[str]
    style: Style

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample:
        """Return the sample *index*, the same at every call. Raises `UnreadableSample`."""
        ...

    def label(self, index: int) -> int:
        """Return the label of the sample *index* without reading its image."""
        ...


class UnreadableSample(RuntimeError):
    """A sample that cannot be read; the one-line message names its file and index."""
