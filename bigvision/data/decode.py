"""An image file as RGB pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def read_image(path: str | Path) -> Image.Image:
    """Return the image in the file *path*, fully decoded, upright (EXIF orientation applied) and in mode RGB.

    An alpha channel is dropped, 16-bit greyscale is scaled to 8 bits, of an animation the first frame is taken.
    Raises whatever Pillow raises on a bad file: `OSError`, `SyntaxError`, `ValueError`, ...
    """
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):
            # convert("RGB") would clip 16-bit values to 255, which leaves a white image.
            wide = np.asarray(image).astype(np.int64)
            image = Image.fromarray(np.clip(wide >> 8, 0, 255).astype(np.uint8))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        # Decoding is lazy: a truncated file fails here rather than in open().
        return image.convert("RGB")
