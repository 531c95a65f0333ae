"""Image files as RGB pixels: JPEGs by libjpeg-turbo, and by Pillow whatever else there is.

Both give the same pixels for a JPEG that both take: the slow, exact inverse transform and smooth upsampling.
"""

from __future__ import annotations

import io
from typing import Protocol

import numpy as np
import simplejpeg
from PIL import Image, ImageOps
from torch import Tensor

from bigvision.data.sources.base import UnreadableSample
from bigvision.errors import one_line

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
LIMIT = 180_000_000
"""Pixels of the largest image that is decoded: 540 MB of memory, which is where Pillow too suspects an attack."""
ORIENTATION = 0x0112


class Picture(Protocol):
    """An image whose size is known before its pixels are."""

    height: int
    width: int
    channels: int

    def pixels(self, reduce: int = 1) -> np.ndarray:
        """Return uint8 (H, W, C); the sides divided by *reduce* (1, 2, 4 or 8) and rounded up, where that can be had."""
        ...


def open_picture(image: bytes | Tensor | Image.Image) -> Picture:
    """Look into *image*, which may still be encoded, without decoding it.

    Raises:
        UnreadableSample: it is no image, or too large.
    """
    if isinstance(image, bytes):
        return _Jpeg.of(image) or _File(image)
    return Pixels(image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else np.array(_converted(image)))


class Pixels:
    """One that is decoded already."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.height, self.width, self.channels = values.shape

    def pixels(self, reduce: int = 1) -> np.ndarray:
        return self.values


class _Jpeg:
    """A JPEG that libjpeg-turbo takes, upright."""

    channels = 3

    def __init__(self, data: bytes, height: int, width: int) -> None:
        self.data, self.height, self.width = data, height, width

    @classmethod
    def of(cls, data: bytes) -> _Jpeg | None:
        """None where Pillow is to try: no JPEG, or CMYK, turned, or not quite as it should be."""
        if data[:3] != b"\xff\xd8\xff" or _turned(data):
            return None
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            return None
        if colours in ("CMYK", "YCCK"):
            return None
        height, width = int(height), int(width)
        _check_size(width, height)
        return cls(data, height, width)

    def pixels(self, reduce: int = 1) -> np.ndarray:
        least = (-(-self.height // reduce), -(-self.width // reduce)) if reduce > 1 else (0, 0)
        try:
            return simplejpeg.decode_jpeg(self.data, min_height=least[0], min_width=least[1], min_factor=float(reduce))
        except ValueError:
            # Damaged, or only odd: Pillow knows.
            return _File(self.data).pixels()


class _File:
    """Any file that Pillow reads."""

    channels = 3

    def __init__(self, data: bytes) -> None:
        try:
            with Image.open(io.BytesIO(data)) as file:
                _check_size(*file.size)
                # Decoding is lazy: a truncated file fails here rather than in open().
                self.image = _converted(file)
        except UnreadableSample:
            raise
        except Exception as error:  # Pillow raises many types on bad files, struct.error and IndexError among them
            raise UnreadableSample(one_line(error)) from error
        self.width, self.height = self.image.size

    def pixels(self, reduce: int = 1) -> np.ndarray:
        return np.array(self.image)


def _converted(image: Image.Image) -> Image.Image:
    """*image* upright (EXIF orientation applied) and in mode RGB.

    An alpha channel is dropped, 16-bit greyscale is scaled to 8 bits, of an animation the first frame is taken.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # convert("RGB") would clip 16-bit values to 255, which leaves a white image.
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray(np.clip(wide >> 8, 0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _check_size(width: int, height: int) -> None:
    if width * height > LIMIT:
        raise UnreadableSample(f"{width}x{height} pixels are more than {LIMIT:,}")


def _turned(data: bytes) -> bool:
    """Whether the JPEG's EXIF data say that it is not upright."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF and 0xE0 <= data[position + 1] <= 0xFE:
        size = int.from_bytes(data[position + 2 : position + 4], "big")
        segment = data[position + 4 : position + 2 + size]
        if data[position + 1] == 0xE1 and segment[:6] == b"Exif\0\0":
            try:
                exif = Image.Exif()
                exif.load(segment)
                return exif.get(ORIENTATION, 1) != 1
            except Exception:  # as for a whole file
                return True
        position += 2 + size
    return False
