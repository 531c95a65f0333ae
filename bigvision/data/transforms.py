"""From an image file to the pixels a model sees, still uint8; masks and boxes move with them."""

from __future__ import annotations

import math
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import Image as ImageTensor
from torchvision.tv_tensors import Mask, TVTensor

from bigvision.data.decode import AS_USUAL, Decoding, Jpeg, Picture, open_picture
from bigvision.data.sources.base import Style, UnreadableSample
from bigvision.errors import UserError
from bigvision.samples import each_tensor

Transform = Callable[["bytes | Tensor | Image.Image", Any], tuple[Tensor, Any]]
"""From an image and its target to uint8 pixels (C, H, W) and the target that belongs to them."""
Policy = Literal["none", "randaugment", "autoaugment", "trivialaugment", "three-augment"]
CropMode = Literal["center", "squash", "border"]
Size = tuple[int, int]
"""height and width"""
MOVING = (v2.RandomCrop, v2.RandomHorizontalFlip, v2.RandomVerticalFlip, v2.RandomAffine)
"""The steps after the crop that act on masks and boxes too."""
POLICY: dict[Policy, Callable[[], v2.Transform]] = {
    "randaugment": lambda: v2.RandAugment(interpolation=InterpolationMode.BILINEAR),
    "autoaugment": lambda: v2.AutoAugment(interpolation=InterpolationMode.BILINEAR),
    "trivialaugment": lambda: v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR),
    "three-augment": lambda: v2.RandomChoice(
        [v2.RandomGrayscale(1.0), v2.RandomSolarize(128, p=1.0), v2.GaussianBlur(9, (0.1, 2.0))]
    ),
}
ON_DEVICES = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
"""The filters that PyTorch has on every device."""
POLICIES = (v2.RandAugment, v2.AutoAugment, v2.TrivialAugmentWide)
"""Steps that turn and shift an image, which torchvision cannot do to masks and boxes."""


def transform(
    style: Style,
    image_size: int | Size,
    *,
    train: bool,
    augment: bool = True,
    interpolation: str = "bicubic",
    crop_pct: float = 0.875,
    crop_mode: CropMode = "center",
    mean: Sequence[float] = (0.0,),
    scale: tuple[float, float] = (0.08, 1.0),
    hflip: float | None = None,
    vflip: float = 0.0,
    policy: Policy = "none",
    jitter: float = 0.0,
    erase: float = 0.0,
    reduce: bool = False,
    channels: int = 3,
    decoding: Decoding = AS_USUAL,
    ignore: int = 0,
) -> Transform:
    """Return the function from an image (a file's bytes, Pillow, or uint8 (C, H, W)) and its target to uint8 (C, height,
    width) and the target.

    What is random in it draws from the global generators of the process, which the loader seeds for each sample. In a target,
    also within its mappings, lists and tuples, torchvision's `Mask`, `BoundingBoxes`, `KeyPoints` and `Image` are cropped,
    resized, shifted, turned and flipped with the image; everything else is passed through. Boxes are cut at the border, and
    may have no area afterwards.

    Args:
        image_size: the side of a square, or height and width.
        style: of the source. In training ``photo`` is cropped at random and flipped; ``tiny`` is shifted by up to an
            eighth and flipped; ``digit`` is shifted, turned and scaled a little, and only flipped where it is asked for.
        train: whether for training; for evaluation the image is resized and cropped at its centre.
        augment: False to train on the images that evaluation would see.
        interpolation: timm's ``interpolation``: "bilinear", "bicubic", ...
        crop_pct: timm's: the share of a photo's shorter side that the centre crop keeps. Other styles are kept whole.
        crop_mode: timm's, of photos in an evaluation. center: the shorter side is resized to image_size / crop_pct. squash:
            both sides are. border: the longer side is, and what is missing gets the colour *mean*.
        mean: per channel, of images in 0..1.
        scale: the share of a photo's area that a random crop takes (Szegedy et al. 2015).
        hflip: how often an image is mirrored, left to right; None: half of them, and no digits.
        vflip: how often it is turned upside down.
        policy: RandAugment (Cubuk et al. 2020), AutoAugment (2019), TrivialAugment (Müller and Hutter 2021), or one of
            grey, solarised and blurred (Touvron et al. 2022), after the crop.
        jitter: of brightness, contrast, saturation, and a quarter of it of hue.
        erase: how often a rectangle is erased (Zhong et al. 2020), with the mean of ImageNet.
        reduce: decode JPEGs at a half, a quarter or an eighth where the crop still has all of its pixels. Faster, and
            not quite the same pixels.
        channels: of the images.
        decoding: how files are decoded.
        ignore: what masks are where nothing of them is.

    Raises:
        UserError: *policy* or *jitter* for images that are not RGB.
    """
    mode, size = InterpolationMode(interpolation), (image_size, image_size) if isinstance(image_size, int) else image_size
    if not (train and augment):
        share, crop_mode = (crop_pct, crop_mode) if style == "photo" else (1.0, "center")
        outside = [round(255 * value) for value in mean] if crop_mode == "border" else (0,)
        return Steps(_WholeImage(size, mode, reduce, outside, share, crop_mode), [], decoding, ignore=ignore)
    check_channels(channels, policy, jitter)
    crop: _Crop = _WholeImage(size, mode, reduce)
    outside: Any = {Mask: ignore, "others": 0}
    mirrored = (0.0 if style == "digit" else 0.5) if hflip is None else hflip
    flips: list[v2.Transform] = [v2.RandomHorizontalFlip(mirrored)] if mirrored else []
    flips += [v2.RandomVerticalFlip(vflip)] if vflip else []
    if style == "photo":
        crop = _RandomCrop(size, mode, reduce, scale=scale)
        steps: list[v2.Transform] = []
    elif style == "tiny":
        padding = [max(1, side // 8) for side in reversed(size)]
        steps = [v2.RandomCrop(size, padding=padding, fill=outside), *flips]
    else:
        # After the resize: at 8x8 a shift of a tenth would be less than a pixel.
        turned: dict[str, Any] = {"translate": (0.1, 0.1), "scale": (0.9, 1.1), "interpolation": InterpolationMode.BILINEAR}
        steps = [v2.RandomAffine((-10, 10), fill=outside, **turned), *flips]
    if policy != "none":
        steps.append(POLICY[policy]())
    if jitter:
        steps.append(v2.ColorJitter(jitter, jitter, jitter, min(0.5, jitter / 4)))
    if erase:
        mean_colour: Any = [124, 116, 104] if channels == 3 else 115
        steps.append(v2.RandomErasing(erase, value=mean_colour))
    # Those of a photo are drawn with its crop, before it is decoded.
    of_photos = {-1: mirrored, -2: vflip} if style == "photo" else {}
    return Steps(crop, steps, decoding, flips=of_photos, ignore=ignore)


def check_channels(channels: int, policy: Policy, jitter: float) -> None:
    """Raise `UserError` where images of so many channels cannot be augmented like that."""
    if channels != 3 and policy != "none":
        raise UserError(f"data.policy: {policy} is for RGB images, but these have {channels} channels: use none")
    if channels != 3 and jitter:
        raise UserError(f"data.jitter: {jitter:g} is for RGB images, but these have {channels} channels: use 0")


class Steps:
    """Decodes, crops and resizes, and then does the rest on pixels of the final size."""

    def __init__(
        self, crop: _Crop, steps: list[v2.Transform], decoding: Decoding, flips: Mapping[int, float] | None = None,
        ignore: int = 0,
    ) -> None:  # fmt: skip
        """Args: *flips*: how often the images are flipped along a dimension after the crop, before *steps*; *ignore*: what
        masks are where nothing of them is."""
        self.crop, self.steps, self.decoding, self.flips, self.ignore = crop, steps, decoding, flips or {}, ignore
        self.size = crop.size

    def __call__(self, image: bytes | Tensor | Image.Image, target: Any) -> tuple[Tensor, Any]:
        begun = self.begin(image, target)
        buffer = torch.empty(*self.size, begun.picture.channels, dtype=torch.uint8).permute(2, 0, 1)
        begun.fill(buffer)
        return buffer, begun.finish(buffer)

    def stand_in(self, target: Any) -> Any:
        """*target*, of a sample that is not counted, with masks and the like of the size that others have."""

        def sized(part: Tensor) -> Tensor:
            if not isinstance(part, (Mask, ImageTensor)):
                return part
            return torch.full((*part.shape[:-2], *self.size), self.ignore if isinstance(part, Mask) else 0, dtype=part.dtype)

        return _each(target, sized)

    def begin(self, image: bytes | Tensor | Image.Image, target: Any) -> Begun:
        """Look into *image* and draw its crop, decoding nothing yet; draws from torch's generator alone.

        A loop that begins several images before it decodes the first is faster than one that does all of each: what decoding
        and resizing drive out of the processor's caches, Python and PyTorch need for the next draw.

        Raises `UnreadableSample`: the image, its size, or a target of another size.
        """
        picture = open_picture(image, self.decoding)
        rectangle = self.crop.choose(picture.height, picture.width)
        rectangle.check(self.decoding.max_pixels)
        flipped = tuple(side for side, share in self.flips.items() if share and torch.rand(1).item() < share)
        moving: list[Tensor] = []
        _each(target, lambda part: moving.append(part) or part)
        if moving and any(isinstance(step, POLICIES) for step in self.steps):
            raise UserError("data.policy: it turns and shifts images, but not their masks and boxes: use none or three-augment")
        if moving:
            target = _each(target, lambda part: self._moved(part, (picture.height, picture.width), rectangle, flipped))
        return Begun(self, picture, target, rectangle, flipped, bool(moving), torch.get_rng_state() if self.steps else None)

    def fill_from(self, buffer: Tensor, pixels: Tensor, rectangle: Rectangle) -> None:
        """Crop and resize *pixels*, uint8 (C, H, W) on any device, into *buffer* there, uint8 (C, height, width).

        As devices resize: in fp32, rounded once. On the CPU `Begun.fill` rounds after the columns and after the rows.
        """
        top, left, height, width, resized = rectangle
        part = pixels[None, :, top : top + height, left : left + width].float()
        part = F.resize_image(part, list(resized), interpolation=self.crop.mode, antialias=True)
        _put_middle(buffer, part.round_().clamp_(0, 255).to(torch.uint8), self.crop.outside)

    def finish(self, buffer: Tensor, flipped: Sequence[int], generator: Tensor | None, moving: Any = None) -> Any:
        """Do the steps after the crop to *buffer*, on any device; returns *moving*, a target with masks or boxes, moved."""
        if flipped:
            buffer.copy_(buffer.flip(*flipped))
        if generator is not None:
            torch.set_rng_state(generator)
            values = buffer
            for step in self.steps:
                if moving is not None and isinstance(step, MOVING):
                    values, moving = step(ImageTensor(values), moving)
                else:
                    values = step(values)
            buffer.copy_(values)
        return moving

    def _moved(self, part: Tensor, whole: Size, rectangle: Rectangle, flipped: Sequence[int]) -> Tensor:
        """What belongs to an image of the size *whole*, with the crop and the flips of its pixels."""
        top, left, height, width, resized = rectangle
        if tuple(F.get_size(part)) != whole:
            raise UnreadableSample(f"its {type(part).__name__} is of {F.get_size(part)} pixels, but the image of {list(whole)}")
        part = F.crop(part, top, left, height, width)
        if isinstance(part, Mask):
            # torchvision would take the pixel nearest to a corner, half a pixel away from what the image's filters take.
            planes = part.view(-1, *part.shape[-2:])
            planes = F.resize_image(planes, list(resized), interpolation=InterpolationMode.NEAREST_EXACT)
            part = Mask(planes.view(*part.shape[:-2], *resized))
        else:
            part = F.resize(part, list(resized), interpolation=self.crop.mode)
        if isinstance(part, Mask) and (resized[0] < self.size[0] or resized[1] < self.size[1]):
            # As `center_crop` puts images that are too small, which has zeros around them.
            down, right = (max(0, side - has) for side, has in zip(self.size, resized))
            edges = [right // 2, down // 2, (right + 1) // 2, (down + 1) // 2]
            part = Mask(F.pad(part, edges, fill=self.ignore))
        part = F.center_crop(part, list(self.size))
        part = F.horizontal_flip(part) if -1 in flipped else part
        return F.vertical_flip(part) if -2 in flipped else part


@dataclass
class Begun:
    """An image whose crop is drawn, and whose pixels are still to be made."""

    steps: Steps
    picture: Picture
    target: Any
    rectangle: Rectangle
    flipped: tuple[int, ...]
    """dimensions along which it is flipped"""
    moves: bool
    """whether the target has masks, boxes or the like"""
    generator: Tensor | None
    """torch's state for the steps after the crop"""

    @property
    def file(self) -> bytes | None:
        """The JPEG, where a device can do the rest: decode it, `fill_from` it and finish."""
        later = self.moves and any(isinstance(step, MOVING) for step in self.steps.steps)
        if later or self.steps.crop.mode not in ON_DEVICES or not isinstance(self.picture, Jpeg):
            return None
        return self.picture.data if self.picture.for_devices else None

    def fill(self, buffer: Tensor) -> None:
        """Decode, crop and resize into *buffer*, uint8 (C, height, width). Raises `UnreadableSample`."""
        if self.picture.channels != len(buffer):
            raise ValueError(f"an image has {self.picture.channels} channels, but those of its source {len(buffer)}")
        self.steps.crop.into(buffer, self.picture, self.rectangle)

    def finish(self, buffer: Tensor) -> Any:
        """Do the rest of the steps to what :meth:`fill` left in *buffer*; returns the target that belongs to it."""
        moved = self.steps.finish(buffer, self.flipped, self.generator, self.target if self.moves else None)
        return moved if self.moves else self.target


def _each(target: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """*target* with each of torchvision's tensors in it changed."""
    return each_tensor(lambda part: change(part) if isinstance(part, TVTensor) else part, target)


class Rectangle(NamedTuple):
    """A part of a picture, and the size that it is to have."""

    top: int
    left: int
    height: int
    width: int
    resized: Size

    def check(self, max_pixels: int) -> None:
        """Raise `UnreadableSample` where too many pixels would come out, or none."""
        height, width = self.resized
        what = f"{self.width}x{self.height} pixels resized to {width}x{height}"
        # Rows are resized first, so that in between there are as many as before.
        if max(self.height, height) * width > max_pixels:
            raise UnreadableSample(f"{what} are more than data.max_pixels: {max_pixels:,}")
        if not height or not width:
            raise UnreadableSample(f"nothing is left of {what}")


@dataclass
class _Crop(ABC):
    """A rectangle of a picture, resized: pixels outside of it are never resized, and inside may be decoded smaller."""

    size: Size
    mode: InterpolationMode
    reduce: bool
    outside: Sequence[int] = (0,)
    """Per channel, of what the resized rectangle leaves of the result."""

    @abstractmethod
    def choose(self, height: int, width: int) -> Rectangle: ...

    def into(self, buffer: Tensor, picture: Picture, rectangle: Rectangle) -> None:
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
        _resize_into(buffer, part.unsqueeze(0).permute(0, 3, 1, 2), resized, self.mode, self.outside)


@dataclass
class _RandomCrop(_Crop):
    """Drawn as torchvision's v2.RandomResizedCrop does, whose own function takes three times as long."""

    RATIO = (3 / 4, 4 / 3)
    LOG_RATIO = torch.log(torch.tensor(RATIO)).tolist()
    scale: tuple[float, float] = (0.08, 1.0)

    def choose(self, height: int, width: int) -> Rectangle:
        drawn = torch.empty(1)
        for _ in range(10):
            area = height * width * drawn.uniform_(*self.scale).item()
            ratio = drawn.uniform_(*self.LOG_RATIO).exp_().item()
            right, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < right <= width and 0 < down <= height:
                top, left = (int(drawn.random_(0, spare + 1).item()) for spare in (height - down, width - right))
                return Rectangle(top, left, down, right, self.size)
        # The largest part in the middle that is neither too flat nor too high.
        right = min(width, round(height * max(self.RATIO)))
        down = min(height, round(width / min(self.RATIO)))
        return Rectangle((height - down) // 2, (width - right) // 2, down, right, self.size)


@dataclass
class _WholeImage(_Crop):
    """The whole is resized and its middle cut out, as timm's `transforms_imagenet_eval` does."""

    share: float = 1.0
    crop_mode: CropMode = "center"

    def choose(self, height: int, width: int) -> Rectangle:
        down, right = (math.floor(side / self.share) for side in self.size)
        if self.crop_mode == "squash":
            resized = down, right
        elif self.crop_mode == "center" and down == right:
            shorter = min(height, width)
            resized = int(down * height / shorter), int(down * width / shorter)
        else:
            ratio = (max if self.crop_mode == "border" else min)(height / down, width / right)
            resized = round(height / ratio), round(width / ratio)
        return Rectangle(0, 0, height, width, resized)


_IN_PLACE = {
    InterpolationMode.BILINEAR: getattr(torch.ops.aten._upsample_bilinear2d_aa, "out", None),
    InterpolationMode.BICUBIC: getattr(torch.ops.aten._upsample_bicubic2d_aa, "out", None),
}
"""What `torch.nn.functional.interpolate` calls, but to an output of ours: no memory to get, nothing to copy."""


def _resize_into(buffer: Tensor, pixels: Tensor, size: Size, mode: InterpolationMode, outside: Sequence[int]) -> None:
    """Resize *pixels*, uint8 (1, C, H, W), to *size*, antialiased, and put their middle into *buffer*, (C, h, w).

    Each pixel is what torchvision's v2 functions make it. Where there are too few, the rest becomes *outside*.
    """
    operator = _IN_PLACE.get(mode) if _native(mode) else None
    if operator is not None and size == tuple(buffer.shape[1:]) and size != tuple(pixels.shape[2:]):
        if pixels.stride(1) != 1:
            # From planes it cannot write pixel by pixel: an assertion of its own fails.
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        operator(pixels, size, False, None, None, out=buffer.unsqueeze(0))
        return
    _put_middle(buffer, F.resize_image(pixels, list(size), interpolation=mode, antialias=True), outside)


def _put_middle(buffer: Tensor, resized: Tensor, outside: Sequence[int]) -> None:
    """Put the middle of *resized*, uint8 (1, C, H, W), into *buffer*, (C, h, w); what it leaves becomes *outside*."""
    height, width = (min(has, wants) for has, wants in zip(resized.shape[2:], buffer.shape[1:]))
    if (height, width) != tuple(buffer.shape[1:]):
        buffer.copy_(torch.tensor(outside, dtype=torch.uint8, device=buffer.device).view(-1, 1, 1))
    top, left = (buffer.shape[1] - height) // 2, (buffer.shape[2] - width) // 2
    middle = F.center_crop_image(resized, [height, width])[0]
    buffer[:, top : top + height, left : left + width] = middle


def _native(mode: InterpolationMode) -> bool:
    """Whether torchvision has PyTorch resize bytes as they are; elsewhere it goes through floats, which round otherwise."""
    wide = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or platform.machine() in ("aarch64", "arm64")
    return wide or mode != InterpolationMode.BILINEAR
