"""From a decoded image to the pixels a model sees, still uint8."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from bigvision.data.sample import Style

Transform = Callable[[Image.Image | Tensor], Tensor]


def transform(
    style: Style,
    image_size: int,
    *,
    train: bool,
    augment: bool = True,
    interpolation: str = "bicubic",
    crop_pct: float = 0.875,
) -> Transform:
    """Return the function from an RGB image (Pillow, or uint8 (3, H, W)) to uint8 (3, image_size, image_size).

    What is random in it draws from the global generators of the process, which the loader seeds for each sample.

    Args:
        style: of the source. In training ``photo`` is cropped at random and flipped; ``tiny`` is shifted by up to an
            eighth and flipped; ``digit`` is shifted, turned and scaled a little, never flipped.
        train: whether for training; for evaluation the image is resized and cropped at its centre.
        augment: False to train on the images that evaluation would see.
        interpolation: timm's ``interpolation``: "bilinear", "bicubic", ...
        crop_pct: timm's: the share of a photo's shorter side that the centre crop keeps. Other styles are kept whole.
    """
    mode = InterpolationMode(interpolation)
    if not (train and augment):
        steps = _centre(image_size, mode, crop_pct if style == "photo" else 1.0)
    elif style == "photo":
        steps = [v2.RandomResizedCrop(image_size, interpolation=mode), v2.RandomHorizontalFlip()]
    elif style == "tiny":
        crop = v2.RandomCrop(image_size, padding=max(1, image_size // 8))
        steps = [*_centre(image_size, mode, 1.0), crop, v2.RandomHorizontalFlip()]
    else:
        # After the resize: at 8x8 a shift of a tenth would be less than a pixel.
        affine = v2.RandomAffine((-10, 10), translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=InterpolationMode.BILINEAR)
        steps = [*_centre(image_size, mode, 1.0), affine]
    return v2.Compose([*steps, v2.PILToTensor()])


def _centre(image_size: int, mode: InterpolationMode, crop_pct: float) -> list[v2.Transform]:
    return [v2.Resize(int(image_size / crop_pct), interpolation=mode), v2.CenterCrop(image_size)]
