"""Generated scenes, on which a task can be learned in a minute on a CPU: shapes of random colours on random textures."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

SHAPES = ("disc", "square", "cross")
"""What may be in a scene; in a mask shape number n is n + 1, and 0 is the background."""


class Scenes:
    """A map-style dataset of *count* scenes of *size* x *size* pixels, each a function of the seed and the index alone.

    *target* is what a sample is to be learned to give:

    - "label": the class of the only shape.
    - "labels": float32 (3,), which of `SHAPES` can be seen; none to all of them.
    - "numbers": float32 (3,), centre (x, y) and radius of the only shape, a disc, in pixels.
    - "mask": uint8 (size, size), the class of each pixel.
    """

    def __init__(
        self, count: int, target: Literal["label", "labels", "numbers", "mask"], size: int = 32, seed: int = 0
    ) -> None:
        self.count, self.target, self.size, self.seed = count, target, size, seed
        self.classes = ["x", "y", "radius"] if target == "numbers" else list(SHAPES)
        if target == "mask":
            self.classes = ["background", *SHAPES]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        random = np.random.default_rng([self.seed, index])
        size = self.size
        rows, columns = np.mgrid[:size, :size]
        image, mask = _texture(random, size), np.zeros((size, size), np.uint8)
        present = random.random(len(SHAPES)) < 0.5
        if self.target == "numbers":
            present = np.array([True, False, False])
        elif self.target == "label":
            present = np.arange(len(SHAPES)) == random.integers(len(SHAPES))
        numbers = np.zeros(3, np.float32)
        for shape in random.permutation(np.flatnonzero(present)):
            radius = random.uniform(0.14, 0.25) * size
            x, y = random.uniform(radius, size - 1 - radius, 2)
            across, down = np.abs(columns - x), np.abs(rows - y)
            inside = (
                across**2 + down**2 <= radius**2,
                np.maximum(across, down) <= 0.85 * radius,
                (np.minimum(across, down) <= 0.3 * radius) & (np.maximum(across, down) <= radius),
            )[shape]
            image[inside] = random.uniform(0.65, 1, 3)
            mask[inside], numbers = shape + 1, np.array([x, y, radius], np.float32)
        pixels = np.clip(image + random.normal(0, 0.02, image.shape), 0, 1)
        targets = {
            "label": lambda: int(present.argmax()),
            "labels": lambda: np.isin(np.arange(len(SHAPES)) + 1, mask).astype(np.float32),
            "numbers": lambda: numbers,
            "mask": lambda: mask,
        }
        return torch.from_numpy((pixels * 255).astype(np.uint8).transpose(2, 0, 1).copy()), targets[self.target]()


def _texture(random: np.random.Generator, size: int) -> np.ndarray:
    """Dark stripes or blotches, (size, size, 3)."""
    rows, columns = np.mgrid[:size, :size] / size
    angle, waves, phase = random.uniform(0, np.pi), random.uniform(2, 8), random.uniform(0, 2 * np.pi)
    stripes = np.sin(2 * np.pi * waves * (rows * np.cos(angle) + columns * np.sin(angle)) + phase)
    blotches = np.kron(random.normal(size=(8, 8)), np.ones((-(-size // 8), -(-size // 8))))[:size, :size]
    values = stripes if random.random() < 0.5 else np.tanh(blotches)
    return 0.25 + 0.12 * values[..., None] * random.uniform(0.5, 1, 3) + random.uniform(-0.08, 0.08, 3)
