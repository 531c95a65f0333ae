"""Which pixels an image of each mode and depth becomes, and which images are unreadable, with what reason."""

from __future__ import annotations

import io
import re
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from bigvision.data import UnreadableSample
from bigvision.data.decode import Decoding, open_picture

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2)


def pixels(image: bytes | Image.Image, **decoding: Any) -> np.ndarray:
    return open_picture(image, Decoding(**decoding)).pixels()


def reason(image: bytes | Image.Image, **decoding: Any) -> str:
    with pytest.raises(UnreadableSample) as caught:
        pixels(image, **decoding)
    return str(caught.value)


def saved(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def grey(values: Any) -> np.ndarray:
    return np.repeat(np.asarray(values, dtype=np.uint8)[..., None], 3, axis=2)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(values: np.ndarray, depth: int = 16, *more: bytes) -> bytes:
    """A PNG of the values (H, W, channels) of 16 bits, with the chunks *more*."""
    height, width, channels = values.shape
    head = struct.pack(">IIBBBBB", width, height, depth, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2" if depth == 16 else "u1"))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )  # fmt: skip


def tiff(values: np.ndarray, **tags: tuple[int, ...]) -> bytes:
    """An uncompressed TIFF of *values*, (H, W) or (H, W, 3), with tags as ``t281=(4095,)``."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    height, width, *channels = values.shape
    count = channels[0] if channels else 1
    formats = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    entries: dict[int, tuple[int, ...]] = {
        256: (width,), 257: (height,), 258: (8 * values.dtype.itemsize,) * count, 259: (1,), 262: (2 if count > 1 else 1,),
        273: (8,), 277: (count,), 278: (height,), 279: (values.nbytes,), 339: (formats,) * count,
    } | {int(name[1:]): value for name, value in tags.items()}  # fmt: skip
    data, extra, table = values.tobytes(), b"", b""
    place = 8 + len(data) + 2 + 12 * len(entries) + 4
    for tag, numbers in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(packed) > 4:
            extra, packed = extra + packed, struct.pack(order + "I", place + len(extra))
        table += struct.pack(order + "HHI", tag, 4, len(numbers)) + packed
    start = struct.pack(order + "2sHI", b"MM" if order == ">" else b"II", 42, 8 + len(data))
    return start + data + struct.pack(order + "H", len(entries)) + table + struct.pack(order + "I", 0) + extra


# Modes of up to 8 bits.


def palette(transparency: Any) -> bytes:
    image = Image.fromarray(RAMP % 4).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([10, 20, 30, 250, 0, 0, 0, 250, 0, 0, 0, 250])
    return saved(image, "PNG", transparency=transparency)


PALETTE = np.array([[10, 20, 30], [250, 0, 0], [0, 250, 0], [0, 0, 250]], dtype=np.uint8)[RAMP % 4]
ALPHA = np.dstack([COLOURS, RAMP])
MULTIPLIED = Image.merge(
    "RGBA", [Image.fromarray(part) for part in np.dstack([COLOURS, np.full_like(RAMP, 128)]).transpose(2, 0, 1)]
)
EIGHT: dict[str, tuple[Any, np.ndarray]] = {
    "1": (Image.fromarray(RAMP > 99), grey((RAMP > 99) * 255)),
    "1 in a PNG": (saved(Image.fromarray(RAMP > 99), "PNG"), grey((RAMP > 99) * 255)),
    "1, white is 0": (saved(Image.fromarray(RAMP > 99), "TIFF", compression="group4"), grey((RAMP > 99) * 255)),
    "2 bits": (saved(Image.fromarray(RAMP), "PNG", bits=2), grey(RAMP % 4 * 85)),
    "L": (Image.fromarray(RAMP), grey(RAMP)),
    "LA": (saved(np.dstack([RAMP, 255 - RAMP]), "PNG"), grey(RAMP)),
    "La": (Image.fromarray(np.dstack([RAMP, np.full_like(RAMP, 255)])).convert("La"), grey(RAMP)),
    "P, transparency of each colour": (palette(bytes([0, 128, 255])), PALETTE),
    "P, transparency of one colour": (palette(2), PALETTE),
    "P in a GIF": (saved(Image.open(io.BytesIO(palette(2))), "GIF", transparency=1), PALETTE),
    "PA": (Image.open(io.BytesIO(palette(2))).convert("PA"), PALETTE),
    "RGB": (COLOURS, COLOURS),
    "RGB in several pages": (saved(COLOURS, "TIFF", save_all=True, append_images=[Image.new("RGB", (9, 9))]), COLOURS),
    "RGB in a WebP": (saved(COLOURS, "WEBP", lossless=True), COLOURS),
    "RGBX": (Image.fromarray(COLOURS).convert("RGBX"), COLOURS),
    "RGBA": (saved(ALPHA, "PNG"), COLOURS),
    "RGBA in a WebP": (saved(ALPHA, "WEBP", lossless=True, exact=True), COLOURS),
    "RGBa": (MULTIPLIED.convert("RGBa"), np.array(MULTIPLIED.convert("RGBa").convert("RGBA"))[..., :3]),
    "YCbCr": (Image.fromarray(COLOURS).convert("YCbCr"), np.array(Image.fromarray(COLOURS).convert("YCbCr").convert("RGB"))),
    "HSV": (Image.new("HSV", (16, 16), (0, 255, 200)), np.broadcast_to([200, 0, 0], (16, 16, 3))),
    "CMYK": (saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF"), np.broadcast_to([255, 0, 0], (16, 16, 3))),
    # Pillow writes CMYK as Adobe does, inverted.
    "CMYK of Adobe": (saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), np.broadcast_to([254, 0, 0], (16, 16, 3))),
    # CIE Lab 53, 80, 67 is red.
    "LAB": (saved(Image.new("LAB", (16, 16), (136, 208, 195)), "TIFF"), np.broadcast_to([250, 3, 11], (16, 16, 3))),
}


@pytest.mark.parametrize("name", EIGHT)
def test_modes_of_8_bits(name: str) -> None:
    image, wanted = EIGHT[name]
    found = pixels(Image.fromarray(image) if isinstance(image, np.ndarray) else image)
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found.astype(int), wanted.astype(int), atol=8 if "LAB" in name else 2 if "Adobe" in name else 0)


# Depths of more.

DEEP = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
TWELVE = DEEP >> 4
HOUNSFIELD = (DEEP.astype(np.int32) // 16 - 1024).astype(np.int16)
UNIT = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
SIGNIFICANT = chunk(b"sBIT", b"\x0c")


def twelve_bits() -> bytes:
    """TWELVE in 12 bits each, as some cameras write them."""
    bits = "".join(f"{value:012b}" for value in TWELVE.flatten())
    packed = np.frombuffer(int(bits, 2).to_bytes(len(bits) // 8, "big"), np.uint8)
    made = tiff(packed.reshape(16, 24), t256=(16,), t258=(12,), t339=(1,))
    return made


def deflated(colours: np.ndarray) -> bytes:
    """A TIFF of 16-bit colours that libtiff reads."""
    data = zlib.compress(colours.tobytes())
    height, width = colours.shape[:2]
    shape = {"t256": (width,), "t257": (height,), "t258": (16,) * 3, "t262": (2,), "t277": (3,), "t278": (height,)}
    return tiff(np.frombuffer(data, np.uint8)[None], t259=(8,), t279=(len(data),), t339=(1, 1, 1), **shape)


KNOWN: dict[str, tuple[Any, np.ndarray, dict[str, Any]]] = {
    "16 bits in a PNG": (png(DEEP[..., None]), grey(DEEP >> 8), {}),
    "16 bits in a TIFF": (tiff(DEEP), grey(DEEP >> 8), {}),
    "16 bits in a TIFF, big-endian": (tiff(DEEP.astype(">u2")), grey(DEEP >> 8), {}),
    "16 bits in a TIFF, white is 0": (tiff(DEEP, t262=(0,)), grey(255 - (DEEP >> 8)), {}),
    "16 bits in a JPEG 2000": (saved(TWELVE, "JPEG2000", irreversible=False), grey(TWELVE >> 8), {}),
    "16 bits and alpha": (png(np.dstack([DEEP, 65535 - DEEP])), grey(DEEP >> 8), {}),
    "16 bits of colours": (png(np.dstack([DEEP, DEEP.T, DEEP])), np.dstack([DEEP, DEEP.T, DEEP]) >> 8, {}),
    "16 bits of colours in a TIFF": (tiff(np.dstack([DEEP, DEEP.T, DEEP])), np.dstack([DEEP, DEEP.T, DEEP]) >> 8, {}),
    "16 bits, 12 of them significant, scaled as PNG demands": (png(DEEP[..., None], 16, SIGNIFICANT), grey(DEEP >> 8), {}),
    "16 bits, black": (tiff(DEEP * 0), grey(DEEP * 0), {}),
    "16 bits from Pillow": (Image.fromarray(DEEP), grey(DEEP >> 8), {}),
    "I;16B from Pillow": (Image.frombytes("I;16B", (16, 16), DEEP.astype(">u2").tobytes()), grey(DEEP >> 8), {}),
    "10 bits in a PGM": (b"P5 16 16 1023\n" + (DEEP >> 6).astype(">u2").tobytes(), grey(DEEP >> 8), {}),
    "12 bits packed": (twelve_bits(), grey(TWELVE >> 4), {}),
    "12 bits by MaxSampleValue": (tiff(TWELVE, t281=(4095,)), grey(TWELVE >> 4), {}),
    "12 bits by SMaxSampleValue": (tiff(TWELVE, t341=(4095,)), grey(TWELVE >> 4), {}),
    "12 bits by the key": (png(TWELVE[..., None]), grey(TWELVE >> 4), {"image_range": (0, 4095)}),
    "12 bits of colours by the key": (
        png(np.dstack([TWELVE, TWELVE, TWELVE.T])), np.dstack([TWELVE, TWELVE, TWELVE.T]) >> 4, {"image_range": (0, 4095)}
    ),
    "12 bits of colours in a TIFF by the key": (
        tiff(np.dstack([TWELVE, TWELVE, TWELVE.T])), np.dstack([TWELVE, TWELVE, TWELVE.T]) >> 4, {"image_range": (0, 4095)}
    ),
    "12 bits of colours in a deflated TIFF by the key": (
        deflated(np.dstack([TWELVE, TWELVE, TWELVE.T])), np.dstack([TWELVE, TWELVE, TWELVE.T]) >> 4, {"image_range": (0, 4095)}
    ),
    "dark 16 bits by the key": (png(TWELVE[..., None]), grey(TWELVE >> 8), {"image_range": (0, 65535)}),
    "32 bits in 0..255": (tiff(RAMP.astype(np.int32)), grey(RAMP), {}),
    "32 bits in 0..255, unsigned": (tiff(RAMP.astype(np.uint32)), grey(RAMP), {}),
    "32 bits in 0..255, big-endian": (tiff(RAMP.astype(">i4")), grey(RAMP), {}),
    "32 bits from Pillow": (Image.fromarray(RAMP.astype(np.int32)), grey(RAMP), {}),
    "16 bits signed by the key": (
        tiff(HOUNSFIELD), grey(np.rint(np.clip((HOUNSFIELD + 160.0) * 255 / 400, 0, 255))), {"image_range": (-160, 240)}
    ),
    "fractions in 0..1": (tiff(UNIT), grey(RAMP), {}),
    "fractions in 0..1, big-endian": (tiff(UNIT.astype(">f4")), grey(RAMP), {}),
    "fractions in 0..1, white is 0": (tiff(UNIT, t262=(0,)), grey(255 - RAMP), {}),
    "fractions in 0..1, and a little rounded": (tiff(UNIT * np.float32(1.0001)), grey(RAMP), {}),
    "fractions in 0..1 in a PFM": (b"Pf 16 16 -1.0\n" + UNIT[::-1].astype("<f4").tobytes(), grey(RAMP), {}),
    "fractions in 0..1 from Pillow": (Image.fromarray(UNIT), grey(RAMP), {}),
    "fractions by the key, and gaps": (
        tiff(np.where(RAMP == 7, np.nan, UNIT * 40 - 20).astype(np.float32)), grey(np.where(RAMP == 7, 0, RAMP)),
        {"image_range": (-20, 20)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_depths_of_more_than_8_bits(name: str) -> None:
    image, wanted, decoding = KNOWN[name]
    found = pixels(image, **decoding)
    assert found.dtype == np.uint8 and (found == wanted).all(), (found[..., 0], wanted[..., 0])


UNKNOWN: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "12 bits in a PNG": (png(TWELVE[..., None]), "none of its 16-bit values is above 4095: .*image_range", {}),
    "10 bits in a TIFF": (tiff(DEEP >> 6), "none of its 16-bit values is above 1023: .*image_range", {}),
    "14 bits from Pillow": (Image.fromarray(DEEP >> 2), "above 16383: .*image_range", {}),
    "12 bits and alpha": (png(np.dstack([TWELVE, DEEP])), "above 38..: .*image_range", {}),
    "12 bits of colours": (png(np.dstack([TWELVE] * 3)), "above 4095: .*image_range", {}),
    "12 bits of colours in a TIFF": (tiff(np.dstack([TWELVE] * 3)), "above 4095: .*image_range", {}),
    "12 bits and alpha, with the key": (png(np.dstack([TWELVE, DEEP])), "only the upper 8 bits", {"image_range": (0, 4095)}),
    "12 bits, though 10 are stated": (tiff(TWELVE, t281=(1023,)), "above 4095", {}),
    "an image's own largest value": (tiff(TWELVE // 2, t281=(2047,)), "above 2047", {}),
    "16 bits signed": (tiff(HOUNSFIELD), "integers from -1024 to 3071.*image_range", {}),
    "32 bits": (tiff(DEEP.astype(np.int32)), "integers from 0 to 65535.*image_range", {}),
    "32 bits unsigned, all of them": (tiff(DEEP.astype(np.uint32) << 16), "integers from -.*image_range", {}),
    "fractions in 0..255": (tiff(UNIT * 255), "fractions from 0 to 255.*image_range", {}),
    "fractions around 0": (Image.fromarray(UNIT - 0.5), "fractions from -0.5 to 0.5.*image_range", {}),
    "NaN": (tiff(np.where(RAMP == 7, np.nan, UNIT).astype(np.float32)), "not numbers.*image_range", {}),
    "infinite": (tiff(np.where(RAMP == 7, np.inf, UNIT).astype(np.float32)), "infinite.*image_range", {}),
    "16-bit fractions": (tiff(UNIT.astype(np.float16)), "cannot be read", {}),
    "five channels": (tiff(np.dstack([RAMP] * 5)), ".", {}),
    "no pixels": (Image.new("RGB", (0, 5)), "it has no pixels: 0x5", {}),
    "fractions in 0..255 in a PFM": (b"Pf 16 16 -1.0\n" + (UNIT * 255).astype("<f4").tobytes(), "fractions from 0 to 255", {}),
    "Ghostscript's": (saved(COLOURS, "EPS"), "EPS files are not read", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_where_black_and_white_are_not_known(name: str) -> None:
    image, words, decoding = UNKNOWN[name]
    assert re.search(words, reason(image, **decoding))


# What else is in a file.


def jpeg(exif: bytes | None = None, **options: Any) -> bytes:
    return saved(Image.fromarray(np.kron(COLOURS, np.ones((2, 4, 1), np.uint8))), "JPEG", exif=exif or b"", **options)


def exif(orientation: Any, kind: int = 3, more: bytes = b"") -> bytes:
    """EXIF data with an orientation of a TIFF type, and another entry."""
    value = struct.pack("<HH", orientation, 0) if isinstance(orientation, int) else orientation
    entries = struct.pack("<HHI4s", 0x0112, kind, 1 if kind == 3 else len(value), value) + more
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries) // 12) + entries + b"\0\0\0\0"


WRONG_TYPE = struct.pack("<HHI4s", 0x0131, 200, 3, b"abc\0")
SOFTWARE = struct.pack("<HHII", 0x0131, 4, 1, 7)
METADATA: dict[str, tuple[bytes, int]] = {
    "turned": (exif(6), 6),
    "turned, another tag of an unknown type": (exif(6, more=WRONG_TYPE), 6),
    "turned, a number where a text should be": (exif(6, more=SOFTWARE), 6),
    "turned, an offset out of the file": (exif(8, more=struct.pack("<HHII", 0x0131, 2, 99, 10**6)), 8),
    "turned, a missing sub-directory": (exif(3, more=struct.pack("<HHII", 0x8769, 4, 1, 10**6)), 3),
    "truncated": (exif(6)[:16], 1),
    "no more than a head": (b"Exif\0\0II", 1),
    "no EXIF": (b"Exif\0\0" + b"\xff" * 40, 1),
    "an orientation that there is not": (exif(9), 1),
    "zero": (exif(0), 1),
    "a text": (exif(b"6\0\0\0", 2), 1),
}


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_metadata_leave_the_image_and_its_orientation(name: str, kind: str) -> None:
    data, orientation = METADATA[name]
    if kind == "JPEG":
        file, plain = jpeg(data), jpeg()
    elif kind == "PNG":
        file, plain = png(COLOURS, 8, chunk(b"eXIf", data[6:])), png(COLOURS, 8)
    else:
        file, plain = (saved(COLOURS, "WEBP", lossless=True, exif=value) for value in (data, b""))
    upright = Image.Exif()
    upright[0x0112] = orientation
    wanted = Image.fromarray(pixels(plain))
    wanted.info["exif"] = upright.tobytes()
    assert (pixels(file) == np.array(ImageOps.exif_transpose(wanted))).all()


@pytest.mark.parametrize("place", ["behind the tables", "after a fill byte", "in XMP"])
def test_orientations_where_they_are_rare(place: str) -> None:
    plain, segment = jpeg(), exif(6)
    if place == "in XMP":
        segment = b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='1' tiff:Orientation=\"6\"/>"
    marker = (b"\xff" if "fill" in place else b"") + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment
    cut = plain.index(b"\xff\xc0") if "tables" in place else 2
    turned = plain[:cut] + marker + plain[cut:]
    assert (pixels(turned) == np.rot90(pixels(plain), -1)).all()


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_turned_tiff_is_turned_once(compression: str | None) -> None:
    wide = np.ascontiguousarray(COLOURS[:9])
    file = saved(wide, "TIFF", tiffinfo={0x0112: 6}, compression=compression)
    assert (pixels(file) == np.rot90(wide, -1)).all()


# Sizes.


def test_more_pixels_than_are_allowed_are_not_decoded() -> None:
    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(9 * 10**6), 9)) + chunk(b"IEND", b"")
    )
    tall = saved(Image.new("1", (1, 60_000)), "JPEG")
    tiles = tiff(RAMP, t322=(40_000,), t323=(40_000,), t324=(8,), t325=(256,))
    tracemalloc.start()
    try:
        for file, options, words in (
            (bomb, {}, "its pixels are more than data.max_pixels: 180,000,000"),
            (tall, {"max_pixels": 59_999}, "1x60000 pixels are more than data.max_pixels: 59,999"),
            (png(COLOURS, 8), {"max_pixels": 255}, "16x16 pixels"),
            (saved(COLOURS, "GIF"), {"max_pixels": 255}, "16x16 pixels"),
            (tiles, {}, "40000x40000 pixels"),
        ):
            assert words in reason(file, **options)
        assert tracemalloc.get_traced_memory()[1] < 30 * 2**20
    finally:
        tracemalloc.stop()
    assert pixels(png(COLOURS, 8), max_pixels=256).shape == (16, 16, 3)


def test_the_key_allows_more_than_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert (pixels(png(COLOURS, 8), max_pixels=256) == COLOURS).all() and Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP"], ids=["text", "profile"])
def test_compressed_metadata_cannot_take_memory(name: bytes) -> None:
    bomb = chunk(name, b"a\0\0" + zlib.compress(bytes(10**8), 9))
    tracemalloc.start()
    try:
        assert "large" in reason(png(COLOURS, 8, bomb))
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()
