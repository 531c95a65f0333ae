"""From an image file to the pixels a model sees, still uint8."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from bigvision.data.decode import Picture, open_picture
from bigvision.data.sample import Style
from bigvision.errors import UserError

Transform = Callable[["bytes | Tensor | Image.Image"], Tensor]
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
        return _Steps(_CentreCrop(image_size, mode, crop_pct if style == "photo" else 1.0, reduce), [])
    check_channels(channels, policy, jitter)
    if style == "photo":
        crop: _Crop = _RandomCrop(image_size, mode, scale, reduce)
        steps: list[v2.Transform] = [v2.RandomHorizontalFlip()]
    elif style == "tiny":
        crop = _CentreCrop(image_size, mode, 1.0, reduce)
        steps = [v2.RandomCrop(image_size, padding=max(1, image_size // 8)), v2.RandomHorizontalFlip()]
    else:
        # After the resize: at 8x8 a shift of a tenth would be less than a pixel.
        crop = _CentreCrop(image_size, mode, 1.0, reduce)
        steps = [v2.RandomAffine((-10, 10), translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=InterpolationMode.BILINEAR)]
    return _Steps(crop, steps + _policy(policy) + _colours(jitter, erase, channels))


def check_channels(channels: int, policy: Policy, jitter: float) -> None:
    """Raise `UserError` where images of so many channels cannot be augmented like that."""
    if channels != 3 and policy != "none":
        raise UserError(f"data.policy: {policy} is for RGB images, but these have {channels} channels: use none")
    if channels != 3 and jitter:
        raise UserError(f"data.jitter: {jitter:g} is for RGB images, but these have {channels} channels: use 0")


class _Steps:
    """Decodes, crops and resizes, and then does the rest on pixels of the final size."""

    def __init__(self, crop: _Crop, steps: list[v2.Transform]) -> None:
        self.crop, self.steps = crop, steps

    def __call__(self, image: bytes | Tensor | Image.Image) -> Tensor:
        values = self.crop(open_picture(image))
        for step in self.steps:
            values = step(values)
        return values


class _Crop(ABC):
    """A rectangle of a picture, resized: pixels outside of it are never resized, and inside may be decoded smaller."""

    def __init__(self, size: int, mode: InterpolationMode, reduce: bool) -> None:
        self.size, self.mode, self.reduce = size, mode, reduce

    def __call__(self, picture: Picture) -> Tensor:
        top, left, height, width, resized = self.choose(picture.height, picture.width)
        spare = min(height / resized[0], width / resized[1])
        values = picture.pixels(max((factor for factor in (2, 4, 8) if self.reduce and factor <= spare), default=1))
        if values.shape[-2] != picture.height:
            # Reduced, or perhaps not.
            down, right = values.shape[-2] / picture.height, values.shape[-1] / picture.width
            top, height = round(top * down), max(1, round(height * down))
            left, width = round(left * right), max(1, round(width * right))
        # Pixel by pixel, as decoders write them: PyTorch would first sort a part of them into planes, and at last back again.
        values = values.permute(1, 2, 0)[top : top + height, left : left + width].contiguous()[None].permute(0, 3, 1, 2)
        return F.resize_image(values, list(resized), interpolation=self.mode, antialias=True)[0]

    @abstractmethod
    def choose(self, height: int, width: int) -> tuple[int, int, int, int, tuple[int, int]]:
        """Top, left, height and width of the rectangle, and the size that it is to have."""


class _RandomCrop(_Crop):
    def __init__(self, size: int, mode: InterpolationMode, scale: tuple[float, float], reduce: bool) -> None:
        super().__init__(size, mode, reduce)
        self.crop = v2.RandomResizedCrop(size, scale=scale, interpolation=mode)

    def choose(self, height: int, width: int) -> tuple[int, int, int, int, tuple[int, int]]:
        drawn = self.crop.make_params([torch.empty(3, height, width, device="meta")])
        return drawn["top"], drawn["left"], drawn["height"], drawn["width"], (self.size, self.size)


class _CentreCrop(_Crop):
    """The whole is resized, so that its shorter side is *size* / *share*, and its middle cut out."""

    def __init__(self, size: int, mode: InterpolationMode, share: float, reduce: bool) -> None:
        super().__init__(size, mode, reduce)
        self.side = int(size / share)

    def __call__(self, picture: Picture) -> Tensor:
        return F.center_crop_image(super().__call__(picture), [self.size, self.size])

    def choose(self, height: int, width: int) -> tuple[int, int, int, int, tuple[int, int]]:
        shorter = min(height, width)
        return 0, 0, height, width, (int(self.side * height / shorter), int(self.side * width / shorter))


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
