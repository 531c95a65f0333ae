"""Image files as RGB pixels of 8 bits: JPEGs by libjpeg-turbo, everything else by Pillow.

Both give the same pixels for a JPEG that both take: the slow, exact inverse transform and smooth upsampling.
"""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bigvision.data.sources.base import UnreadableSample
from bigvision.errors import one_line

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What brings an image with this EXIF orientation upright."""
OTHER_PROGRAMS = {"EPS", "WMF"}
"""Formats that Pillow hands to Ghostscript or to Windows."""
SCALED = {"PPM", "JPEG2000"}
"""Formats whose whole numbers Pillow scales to 16 bits itself, whatever their depth."""
WIDE = re.compile(r"'(\w+);16([LBN])'")
"""In Pillow's description of a file: colours of 16 bits, of which it keeps the upper 8, and their byte order."""
LEAST_16_BITS = 2**14
"""A 16-bit image whose values all lie below this may hold values of 10, 12 or 14 bits as well."""
BLOCK = 2**22
"""Values that are converted to 8 bits at a time, so that it takes little memory."""


@dataclass(frozen=True)
class Decoding:
    """How images are decoded."""

    max_pixels: int = 180_000_000
    """Pixels of the largest image that is decoded, and of the largest that a crop is resized to: 540 MB of memory by default,
    which is where Pillow too assumes an attack."""
    image_range: tuple[float, float] | None = None
    """The values that become 0 and 255 in images of more than 8 bits; None: what the file or its values tell."""


AS_USUAL = Decoding()


class Picture(Protocol):
    """An image whose size is known before its pixels are."""

    height: int
    width: int
    channels: int

    def pixels(self, reduce: int = 1) -> np.ndarray:
        """Return uint8 (H, W, C); the sides divided by *reduce* (1, 2, 4 or 8) and rounded up, where that can be had."""
        ...


def open_picture(image: bytes | Tensor | Image.Image, decoding: Decoding = AS_USUAL) -> Picture:
    """Look into *image*, which may still be encoded; of a JPEG only the header is read.

    Raises `UnreadableSample`: it is no image, too large, or of values whose black and white are not known.
    """
    if isinstance(image, bytes):
        return Jpeg.of(image, decoding) or Pixels(_from_file(image, decoding))
    picture = Pixels(image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else _from_pillow(image, decoding))
    check_size(picture.width, picture.height, decoding)
    return picture


class Pixels:
    """A picture that is decoded already."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.height, self.width, self.channels = values.shape

    def pixels(self, reduce: int = 1) -> np.ndarray:
        return self.values


@dataclass
class Jpeg:
    """A JPEG that libjpeg-turbo takes, upright."""

    data: bytes
    height: int
    width: int
    decoding: Decoding
    colours: str
    channels: int = 3

    @classmethod
    def of(cls, data: bytes, decoding: Decoding) -> Jpeg | None:
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
        check_size(width, height, decoding)
        return cls(data, height, width, decoding, colours)

    @property
    def for_devices(self) -> bool:
        """Whether a device's decoder can be given this file: it ends as it should, so that it is not one that was cut off, and
        is baseline in YCbCr, which every decoder takes. Others are left to those of the CPU."""
        return self.colours == "YCbCr" and self.data.endswith(b"\xff\xd9") and _frame(self.data) in (0xC0, 0xC1)

    def pixels(self, reduce: int = 1) -> np.ndarray:
        least = (-(-self.height // reduce), -(-self.width // reduce)) if reduce > 1 else (0, 0)
        try:
            return simplejpeg.decode_jpeg(self.data, min_height=least[0], min_width=least[1], min_factor=float(reduce))
        except ValueError:
            # Damaged, or only odd: Pillow knows.
            return _from_file(self.data, self.decoding)


def _frame(data: bytes) -> int:
    """The marker that begins a JPEG's frame, of which 0xC0 and 0xC1 are sequential; 0 where there is none."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return marker
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return 0


def check_size(width: int, height: int, decoding: Decoding) -> None:
    """Raise `UnreadableSample` for more pixels than are allowed, or none."""
    if width * height > decoding.max_pixels:
        raise UnreadableSample(f"{width}x{height} pixels are more than data.max_pixels: {decoding.max_pixels:,}")
    if not width or not height:
        raise UnreadableSample(f"it has no pixels: {width}x{height}")


def _from_file(data: bytes, decoding: Decoding) -> np.ndarray:
    """The pixels of any file that Pillow reads, uint8 (H, W, 3)."""
    try:
        with _pillow_limit(decoding.max_pixels), Image.open(io.BytesIO(data)) as file:
            if file.format in OTHER_PROGRAMS:
                raise UnreadableSample(f"{file.format} files are not read: another program would have to decode them")
            return _from_pillow(file, decoding, data)
    except Image.DecompressionBombError as error:
        raise UnreadableSample(f"its pixels are more than data.max_pixels: {decoding.max_pixels:,}") from error
    except UnidentifiedImageError as error:
        raise UnreadableSample("it is not an image, or of a kind that cannot be read") from error
    except UnreadableSample:
        raise
    except Exception as error:  # Pillow raises many types on bad files, struct.error and IndexError among them
        raise UnreadableSample(one_line(error)) from error


@contextmanager
def _pillow_limit(pixels: int) -> Iterator[None]:
    """Have Pillow allow so many pixels: its own limit may be lower, and warns at half of it."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _from_pillow(image: Image.Image, decoding: Decoding, data: bytes = b"") -> np.ndarray:
    """The pixels of *image*, opened from the file *data*, upright: uint8 (H, W, 3). Of several frames or pages the first is
    taken."""
    check_size(*image.size, decoding)
    tags = getattr(image, "tag_v2", {})
    # A TIFF is decoded tile by tile, and a tile may be larger than the image.
    check_size(tags.get(322, 1), tags.get(323, 1), decoding)
    wide = WIDE.search(str(getattr(image, "tile", "")))
    image.load()  # decoding is lazy: a truncated file fails here rather than in open()
    turn = _turn(image)  # not before: Pillow itself turns a TIFF while it loads it
    depth = _Depth.of(image, tags, wide, data)
    if depth is not None:
        rgb = Image.fromarray(depth.bytes(decoding.image_range)).convert("RGB")
    else:
        rgb = _as_rgb(image)
    return np.array(rgb if turn is None else rgb.transpose(turn))


def _as_rgb(image: Image.Image) -> Image.Image:
    """*image*, of 8 bits, in mode RGB. An alpha channel is dropped, and colours that were multiplied by it are divided."""
    if image.mode == "LAB":
        cms, change = _lab_to_rgb()
        return cms.applyTransform(image, change)
    if image.mode == "La":
        image = image.convert("LA")
    elif image.mode in ("RGBa", "PA") or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")
    return image.convert("RGB")


@cache
def _lab_to_rgb() -> tuple[Any, Any]:
    # Imported here: Pillow may be built without LittleCMS.
    from PIL import ImageCms

    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms, ImageCms.buildTransform(lab, rgb, "LAB", "RGB")


# The orientation.


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What brings *image* upright. Only the one tag is looked at, as others may be damaged; `ImageOps.exif_transpose` writes
    all of them anew."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # as for a whole file
        return None


def _turned(data: bytes) -> bool:
    """Whether the JPEG's EXIF or XMP data say that it is not upright, or may say so."""
    position, xmp = 2, False
    # Up to the start of the scan.
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        if data[position + 1] == 0xFF:  # a fill byte
            position += 1
            continue
        size = int.from_bytes(data[position + 2 : position + 4], "big")
        segment = data[position + 4 : position + 2 + size] if data[position + 1] == 0xE1 else b""
        if segment[:6] == b"Exif\0\0":
            try:
                exif = Image.Exif()
                exif.load(segment)
                if ORIENTATION in exif:
                    return exif[ORIENTATION] != 1
            except Exception:  # as for a whole file
                return True
        xmp = xmp or b"tiff:Orientation" in segment
        position += 2 + size
    return xmp


# Depths of more than 8 bits.


@dataclass(frozen=True)
class _Depth:
    """The values of an image of more than 8 bits."""

    values: np.ndarray
    """(H, W) or (H, W, 3)"""
    stated: tuple[float, float] | None = None
    """The values of black and white, where the file has them"""
    inverted: bool = False
    """Whether 0 is white"""
    halved: bool = False
    """Whether of each value only the upper 8 of 16 bits are known"""

    @classmethod
    def of(cls, image: Image.Image, tags: Any, wide: re.Match[str] | None, data: bytes) -> _Depth | None:
        """None where *image*, which is loaded, has no more than 8 bits, or was loaded before."""
        if image.mode == "F" or image.mode[0] == "I":
            stated = (0.0, 65535.0) if image.format in SCALED and image.mode != "F" else _stated(tags)
            return cls(np.asarray(image), stated, tags.get(262) == 0)
        if wide is None:
            return None
        upper = np.asarray(_as_rgb(image))
        if data and image.format in ("PNG", "TIFF") and wide[1] in ("RGB", "RGBA", "RGBX"):
            return cls(upper.astype(np.uint16) << 8 | _lower_bytes(data)[..., :3], _stated(tags))
        return cls(upper, _stated(tags), halved=True)

    def bytes(self, image_range: tuple[float, float] | None) -> np.ndarray:
        """The values as uint8."""
        if self.halved:  # which is enough where the lower 8 bits are not needed
            if (image_range or self.stated or (0, 65535)) != (0, 65535):
                raise UnreadableSample(
                    "of its 16-bit colours only the upper 8 bits can be read, which is too little for data.image_range: write "
                    "it as an RGB PNG"
                )
            if image_range is None and self.stated is None:
                _check_16_bits(int(self.values.max()) * 256)
            return self.values
        values, (low, high) = self.values, image_range or self.stated or (0.0, 0.0)
        if image_range is None and (self.stated is None or not low <= values.min() <= values.max() <= high):
            low, high = _range(values)
        flat, found = values.reshape(-1), np.empty(values.size, np.uint8)
        for first in range(0, values.size, BLOCK):
            found[first : first + BLOCK] = _scaled(flat[first : first + BLOCK], low, high)
        return (255 - found if self.inverted else found).reshape(values.shape)


def _lower_bytes(data: bytes) -> np.ndarray:
    """The lower 8 bits of 16-bit colours. Pillow has no mode for them, and takes the upper 8 of each: in the other byte order
    these are the lower ones."""
    other = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
    with Image.open(io.BytesIO(data)) as file:
        for place, tile in enumerate(file.tile):
            layout, *more = (tile.args,) if isinstance(tile.args, str) else tile.args or ("",)
            layout = layout[:-1] + other[layout[-1]]
            file.tile[place] = tile._replace(args=(layout, *more) if more else layout)
        file.load()
        return np.asarray(file)


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8: *low* becomes 0 and *high* 255. What is no number is low. Integers of n bits keep the upper 8."""
    bits = math.log2(high + 1) if low == 0 and high >= 255 else 0.5
    if values.dtype.kind in "iu" and bits.is_integer():
        return (np.clip(values, 0, int(high)) >> (int(bits) - 8)).astype(np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        stretched = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.rint(np.clip(np.nan_to_num(stretched, copy=False, nan=0.0), 0, 255)).astype(np.uint8)


def _range(values: np.ndarray) -> tuple[float, float]:
    """The values of black and white, where *values* tell them. Raises `UnreadableSample`."""
    least, most = float(values.min()), float(values.max())
    if values.dtype.kind == "f":
        if not math.isfinite(least) or not math.isfinite(most):
            raise UnreadableSample("some values are infinite or not numbers: data.image_range says which are black and white")
        if np.rint(least * 255) >= 0 and np.rint(most * 255) <= 255:
            return 0.0, 1.0
        raise UnreadableSample(
            f"its values are fractions from {least:g} to {most:g}, not from 0 to 1: set data.image_range to those of black and "
            "white"
        )
    if values.dtype.itemsize == 2:
        _check_16_bits(int(most))
        return 0.0, 65535.0
    if least >= 0 and most <= 255:
        return 0.0, 255.0
    raise UnreadableSample(
        f"its values are integers from {least:.0f} to {most:.0f}, not from 0 to 255: set data.image_range to those of black "
        "and white"
    )


def _check_16_bits(most: int) -> None:
    """Raise `UnreadableSample` where 16 bits may hold values of fewer; black is black in any case."""
    if 0 < most < LEAST_16_BITS:
        raise UnreadableSample(
            f"none of its 16-bit values is above {most}: it may be a dark image, or one of 10, 12 or 14 bits; set "
            "data.image_range to [0, 65535], or to what is black and white, such as [0, 4095]"
        )


def _stated(tags: Any) -> tuple[float, float] | None:
    """The values of black and white that a TIFF states, in BitsPerSample, SMaxSampleValue or MaxSampleValue."""
    if (stored := _numbers(tags, 258)) and 8 < stored[0] < 16:
        return 0.0, 2.0 ** stored[0] - 1
    # Any other largest value is that of this image alone.
    depths = (largest for tag in (341, 281) for largest in _numbers(tags, tag) if largest in (1023, 4095, 16383, 65535))
    return next(((0.0, float(largest)) for largest in depths), None)


def _numbers(tags: Any, tag: int) -> tuple[float, ...]:
    value = tags.get(tag, ())
    value = value if isinstance(value, tuple) else (value,)
    return tuple(number for number in value if isinstance(number, (int, float)))
