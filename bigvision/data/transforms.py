"""From an image file to the pixels a model sees, still uint8."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from bigvision.data.decode import Picture, open_picture
from bigvision.data.resize import resize_into
from bigvision.data.sources.base import Style
from bigvision.errors import UserError

Transform = Callable[["bytes | Tensor | Image.Image", Any], tuple[Tensor, Any]]
"""From an image and its target to uint8 pixels (C, H, W) and the target that belongs to them."""
Policy = Literal["none", "randaugment", "autoaugment", "trivialaugment", "three-augment"]


def transform(
    style: Style,
    image_size: int,
    *,
    train: bool,
    augment: bool = True,
    interpolation: str = "bicubic",
    crop_pct: float = 0.875,
    scale: tuple[float, float] = (0.08, 1.0),
    policy: Policy = "none",
    jitter: float = 0.0,
    erase: float = 0.0,
    reduce: bool = False,
    channels: int = 3,
) -> Transform:
    """Return the function from an image (a file's bytes, Pillow, or uint8 (C, H, W)) to uint8 (C, image_size, image_size).

    What is random in it draws from the global generators of the process, which the loader seeds for each sample.

    Args:
        style: of the source. In training ``photo`` is cropped at random and flipped; ``tiny`` is shifted by up to an
            eighth and flipped; ``digit`` is shifted, turned and scaled a little, never flipped.
        train: whether for training; for evaluation the image is resized and cropped at its centre.
        augment: False to train on the images that evaluation would see.
        interpolation: timm's ``interpolation``: "bilinear", "bicubic", ...
        crop_pct: timm's: the share of a photo's shorter side that the centre crop keeps. Other styles are kept whole.
        scale: the share of a photo's area that a random crop takes (Szegedy et al. 2015).
        policy: RandAugment (Cubuk et al. 2020), AutoAugment (2019), TrivialAugment (Müller and Hutter 2021), or one of
            grey, solarised and blurred (Touvron et al. 2022), after the crop.
        jitter: of brightness, contrast, saturation, and a quarter of it of hue.
        erase: how often a rectangle is erased (Zhong et al. 2020), with the mean of ImageNet.
        reduce: decode JPEGs at a half, a quarter or an eighth where the crop still has all of its pixels. Faster, and
            not quite the same pixels.
        channels: of the images.

    Raises:
        UserError: *policy* or *jitter* for images that are not RGB.
    """
    mode = InterpolationMode(interpolation)
    if not (train and augment):
        return Steps(_CentreCrop(image_size, mode, crop_pct if style == "photo" else 1.0, reduce), [])
    check_channels(channels, policy, jitter)
    if style == "photo":
        crop: _Crop = _RandomCrop(image_size, mode, scale, reduce)
        steps: list[v2.Transform] = []
    elif style == "tiny":
        crop = _CentreCrop(image_size, mode, 1.0, reduce)
        steps = [v2.RandomCrop(image_size, padding=max(1, image_size // 8)), v2.RandomHorizontalFlip()]
    else:
        # After the resize: at 8x8 a shift of a tenth would be less than a pixel.
        crop = _CentreCrop(image_size, mode, 1.0, reduce)
        steps = [v2.RandomAffine((-10, 10), translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=InterpolationMode.BILINEAR)]
    return Steps(crop, steps + _policy(policy) + _colours(jitter, erase, channels), flip=style == "photo")


def check_channels(channels: int, policy: Policy, jitter: float) -> None:
    """Raise `UserError` where images of so many channels cannot be augmented like that."""
    if channels != 3 and policy != "none":
        raise UserError(f"data.policy: {policy} is for RGB images, but these have {channels} channels: use none")
    if channels != 3 and jitter:
        raise UserError(f"data.jitter: {jitter:g} is for RGB images, but these have {channels} channels: use 0")


class Steps:
    """Decodes, crops and resizes, and then does the rest on pixels of the final size."""

    def __init__(self, crop: _Crop, steps: list[v2.Transform], flip: bool = False) -> None:
        """Args: *flip* half of the images after the crop, before *steps*."""
        self.crop, self.steps, self.flip = crop, steps, flip
        self.size = crop.size

    def __call__(self, image: bytes | Tensor | Image.Image, target: Any) -> tuple[Tensor, Any]:
        begun = self.begin(image, target)
        room = torch.empty(self.size, self.size, begun.picture.channels, dtype=torch.uint8).permute(2, 0, 1)
        begun.fill(room)
        return room, begun.finish(room)

    def begin(self, image: bytes | Tensor | Image.Image, target: Any) -> Begun:
        """Look into *image* and draw its crop, decoding nothing yet; draws from torch's generator alone.

        A loop that begins several images before it decodes the first is faster than one that does all of each: what decoding
        and resizing drive out of the processor's caches, Python and PyTorch need for the next draw.
        """
        picture = open_picture(image)
        rectangle = self.crop.choose(picture.height, picture.width)
        flipped = self.flip and torch.rand(1).item() < 0.5
        return Begun(self, picture, target, rectangle, flipped, torch.get_rng_state() if self.steps else None)


class Begun:
    """An image whose crop is drawn, and whose pixels are still to be made."""

    def __init__(
        self, steps: Steps, picture: Picture, target: Any, rectangle: Rectangle, flipped: bool, generator: Tensor | None
    ) -> None:  # fmt: skip
        self.steps, self.picture, self.target, self.rectangle = steps, picture, target, rectangle
        self.flipped, self.generator = flipped, generator

    def fill(self, room: Tensor) -> None:
        """Decode, crop and resize into *room*, uint8 (C, size, size). Raises `UnreadableSample`."""
        if self.picture.channels != len(room):
            raise ValueError(f"an image has {self.picture.channels} channels, but those of its source {len(room)}")
        self.steps.crop.into(room, self.picture, self.rectangle)

    def finish(self, room: Tensor) -> Any:
        """Do the rest of the steps to what :meth:`fill` left in *room*; returns the target that belongs to it."""
        if self.flipped:
            room.copy_(room.flip(-1))
        if self.generator is not None:
            torch.set_rng_state(self.generator)
            values = room
            for step in self.steps.steps:
                values = step(values)
            room.copy_(values)
        return self.target


class Rectangle(NamedTuple):
    """A part of a picture, and the size that it is to have."""

    top: int
    left: int
    height: int
    width: int
    resized: tuple[int, int]
    """height and width"""


class _Crop(ABC):
    """A rectangle of a picture, resized: pixels outside of it are never resized, and inside may be decoded smaller."""

    def __init__(self, size: int, mode: InterpolationMode, reduce: bool) -> None:
        self.size, self.mode, self.reduce = size, mode, reduce

    @abstractmethod
    def choose(self, height: int, width: int) -> Rectangle: ...

    def into(self, room: Tensor, picture: Picture, rectangle: Rectangle) -> None:
        top, left, height, width, resized = rectangle
        factor = 1
        if self.reduce:
            spare = min(height / resized[0], width / resized[1])
            factor = max((factor for factor in (2, 4, 8) if factor <= spare), default=1)
        values = picture.pixels(factor)
        if values.shape[0] != picture.height:
            # Reduced, or perhaps not.
            down, right = values.shape[0] / picture.height, values.shape[1] / picture.width
            top, height = round(top * down), max(1, round(height * down))
            left, width = round(left * right), max(1, round(width * right))
        part = torch.from_numpy(values[top : top + height, left : left + width])
        resize_into(room, part.unsqueeze(0).permute(0, 3, 1, 2), resized, self.mode)


class _RandomCrop(_Crop):
    """Drawn as torchvision's v2.RandomResizedCrop does, whose own function takes three times as long."""

    RATIO = (3 / 4, 4 / 3)

    def __init__(self, size: int, mode: InterpolationMode, scale: tuple[float, float], reduce: bool) -> None:
        super().__init__(size, mode, reduce)
        self.scale, self.resized = scale, (size, size)
        self.ratio = torch.log(torch.tensor(self.RATIO)).tolist()

    def choose(self, height: int, width: int) -> Rectangle:
        drawn = torch.empty(1)
        for _ in range(10):
            area = height * width * drawn.uniform_(*self.scale).item()
            ratio = drawn.uniform_(*self.ratio).exp_().item()
            right, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < right <= width and 0 < down <= height:
                top, left = (int(drawn.random_(0, spare + 1).item()) for spare in (height - down, width - right))
                return Rectangle(top, left, down, right, self.resized)
        # The largest part in the middle that is neither too flat nor too high.
        right = min(width, round(height * max(self.RATIO)))
        down = min(height, round(width / min(self.RATIO)))
        return Rectangle((height - down) // 2, (width - right) // 2, down, right, self.resized)


class _CentreCrop(_Crop):
    """The whole is resized, so that its shorter side is *size* / *share*, and its middle cut out."""

    def __init__(self, size: int, mode: InterpolationMode, share: float, reduce: bool) -> None:
        super().__init__(size, mode, reduce)
        self.side = int(size / share)

    def choose(self, height: int, width: int) -> Rectangle:
        shorter = min(height, width)
        return Rectangle(0, 0, height, width, (int(self.side * height / shorter), int(self.side * width / shorter)))


def _policy(name: Policy) -> list[v2.Transform]:
    bilinear = InterpolationMode.BILINEAR
    if name == "randaugment":
        return [v2.RandAugment(interpolation=bilinear)]
    if name == "autoaugment":
        return [v2.AutoAugment(interpolation=bilinear)]
    if name == "trivialaugment":
        return [v2.TrivialAugmentWide(interpolation=bilinear)]
    if name == "three-augment":
        return [v2.RandomChoice([v2.RandomGrayscale(1.0), v2.RandomSolarize(128, p=1.0), v2.GaussianBlur(9, (0.1, 2.0))])]
    return []


def _colours(jitter: float, erase: float, channels: int) -> list[v2.Transform]:
    steps: list[v2.Transform] = []
    if jitter:
        steps.append(v2.ColorJitter(jitter, jitter, jitter, min(0.5, jitter / 4)))
    if erase:
        mean: Any = [124, 116, 104] if channels == 3 else 115
        steps.append(v2.RandomErasing(erase, value=mean))
    return steps
