"""A folder of made-up photos, whose files are as large and as hard to decode as those of ImageNet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 4


def write_photos(root: Path, count: int, width: int = 500, height: int = 375, seed: int = 0) -> None:
    """Write *count* JPEGs of quality 90 into a folder for each class below *root*; the same files for the same *seed*."""
    for number in range(count):
        folder = root / f"class{number % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        photo(np.random.default_rng([seed, number]), width, height).save(folder / f"{number:05}.jpg", quality=90)


def photo(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """Light with a spectrum like a landscape's, cut by a few edges, in colours that vary slowly, under mild grain.

    Not noise, of which a JPEG is several times as large and as slow to decode.
    """
    down, across = np.mgrid[:height, :width] / [[[height]], [[width]]] - 0.5
    light = _field(random, 1.2, width, height)
    bend = 0.03 * _field(random, 1.8, width, height)
    for _ in range(6):
        angle, place = random.uniform(0, 2 * np.pi), random.uniform(-0.4, 0.4)
        light += random.normal(0, 0.6) * (np.cos(angle) * across + np.sin(angle) * down + bend > place)
    colours = np.stack([light + 0.35 * _field(random, 1.7, width, height) for _ in range(3)], axis=2)
    values = colours * 38 + random.uniform(90, 150, 3) + random.normal(0, 2.5, (height, width, 1))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _field(random: np.random.Generator, smoothness: float, width: int, height: int) -> np.ndarray:
    """A random field (height, width) of variance 1, whose amplitudes fall with the frequency to the power *smoothness*."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    waves = random.standard_normal((2, *frequency.shape))
    field = np.fft.irfft2((waves[0] + 1j * waves[1]) / frequency**smoothness, (height, width))
    return field / field.std()
