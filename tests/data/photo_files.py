from pathlib import Path

import numpy as np
from PIL import Image


def write_photos(root: Path, counts: dict[str, int], size: tuple[int, int] = (40, 30)) -> Path:
    """Write JPEG and PNG files of noise, a folder per class."""
    pixels = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            image = Image.fromarray(pixels.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
            image.save(root / name / f"{number:03}.{'png' if number % 2 else 'jpg'}")
    return root
