"""3-D volumes, a folder per class: each sample is a slice with its neighbours as channels (2.5-D).

``python -m bigvision.data.sources.volumes OUT`` writes some to try it with.
"""

from __future__ import annotations

import argparse
import gzip
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch

from bigvision.data.layouts import Kind
from bigvision.data.sources.base import Opening, Sample, Style, UnreadableSample, View
from bigvision.data.sources.folder import ImageFolder, open_image_folder
from bigvision.errors import UserError, how_to_install, nearest, one_line

VOLUMES = Kind("volumes", "volume", (".npy", ".nii", ".nii.gz"))
KEPT = 4
"""Volumes that a process keeps open; of a .nii.gz that is all of its bytes."""
COUNTED = 2**24
"""Voxels of a larger volume that its percentiles are taken of: whole slices, evenly spread."""


@dataclass(frozen=True)
class Cut:
    """How volumes are cut into samples: what follows the ? of ``volumes:PATH?slices=5&stride=2``."""

    slices: int = 3
    """channels of a sample: slices next to each other"""
    axis: int = 2
    """along which they lie, of the array as it is stored"""
    stride: int = 1
    """every n-th slice is the centre of a sample"""
    window: tuple[float, float] | None = None
    """the intensities that become 0 and 255; None: the 1st and 99th percentile of each volume"""


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "slices": (lambda value: value >= 1, "an integer from 1 on"),
    "axis": (lambda value: 0 <= value <= 2, "0, 1 or 2"),
    "stride": (lambda value: value >= 1, "an integer from 1 on"),
    "window": (lambda value: len(value) == 2 and -math.inf < value[0] < value[1] < math.inf, "LOW,HIGH with LOW below HIGH"),
}
"""What each value of a `Cut` must be."""


class Volumes(View):
    """Slices of the volumes of a folder, one volume after the other."""

    noun = "slice"

    def __init__(self, name: str, files: ImageFolder, depths: Sequence[int], cut: Cut, style: Style) -> None:
        """Args: *depths*: slices of each volume; 0 for one that cannot be read, which is one sample to be found bad."""
        self.name, self.files, self.cut = name, files, cut
        self.classes, self.channels = files.classes, cut.slices
        self.style: Style = style
        self.location, self.linked, self.divided = files.location, files.linked, files.divided
        self.passed_over, self.notes = files.passed_over, files.notes
        centres = [max(1, -(-depth // cut.stride)) for depth in depths]
        self._ends = torch.tensor(centres).cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> Sample:
        volume, centre = self._place(index)
        path, cut = self.files.path(volume), self.cut
        try:
            opened = _open(path)
            last = opened.shape[cut.axis] - 1
            wanted = np.clip(np.arange(cut.slices) + centre - cut.slices // 2, 0, last)
            values = _slices(opened, cut.axis, slice(int(wanted[0]), int(wanted[-1]) + 1))
            low, high = cut.window or _percentiles(path, cut.axis)
        except Exception as error:  # nibabel and zlib have many
            raise UnreadableSample(one_line(error)) from error
        return Sample(torch.from_numpy(_as_bytes(values, low, high)[wanted - wanted[0]]), self.label(index))

    def where(self, index: int) -> str:
        volume, centre = self._place(index)
        return f"{self.files.path(volume)}, slice {centre}"

    def key(self, index: int) -> bytes:
        volume, centre = self._place(index)
        return b"%s:%d" % (self.files.key(volume), centre)

    def origins(self) -> Iterable[str]:
        return self.files.origins()

    def image_size(self, index: int) -> None:
        return None

    def _find(self, index: int) -> tuple[ImageFolder, int]:
        return self.files, self._place(index)[0]

    def _place(self, index: int) -> tuple[int, int]:
        """The volume of a sample and its centre slice."""
        volume = int(torch.searchsorted(self._ends, index, right=True))
        return volume, (index - (int(self._ends[volume - 1]) if volume else 0)) * self.cut.stride


def open_volumes(argument: str, opening: Opening) -> Volumes:
    """Open the folder of class folders in *argument*, ``PATH[?slices=3&axis=2&stride=1&window=LOW,HIGH]``.

    Volumes are ``.npy``, ``.nii`` and ``.nii.gz`` files of numbers in three dimensions. Splits are those of
    :func:`~bigvision.data.sources.folder.open_image_folder`: what is held out are whole volumes. Only headers are read.
    """
    path, _, query = argument.partition("?")
    key = opening.key
    cut = parse_cut(query, key)
    files = open_image_folder(path, opening, VOLUMES)
    depths, sides = [], []
    for number in range(len(files)):
        file = files.path(number)
        if not file.lower().endswith(".npy"):
            _nibabel(key)
        try:
            shape, kind = _header(file)
        except Exception:
            depths.append(0)  # its reason is told when it is read
            continue
        if len(shape) != 3 or 0 in shape or kind not in "biuf":
            what = "numbers" if kind in "biuf" else "something other than numbers"
            raise UserError(f"{key}: {file!r} holds {what} of shape {shape}; a volume is numbers in three dimensions")
        depths.append(shape[cut.axis])
        sides += [side for axis, side in enumerate(shape) if axis != cut.axis]
    style: Style = "photo" if np.median(sides or [64]) >= 64 else "tiny"
    return Volumes(f"volumes:{argument}", files, depths, cut, style)


def parse_cut(query: str, key: str) -> Cut:
    """Read ``slices=5&axis=2&stride=1&window=-160,240``, any of it. Raises `UserError`, which names *key*."""
    found: dict[str, Any] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in RULES:
            hint = nearest(name, RULES) or f"; known are {', '.join(RULES)}"
            raise UserError(f"{key}: unknown {name!r} in ?{query}{hint}")
        if name in found:
            raise UserError(f"{key}: {name} is twice in ?{query}; remove one")
        fits, fix = RULES[name]
        try:
            found[name] = tuple(float(part) for part in text.split(",")) if name == "window" else int(text)
            right = fits(found[name])
        except ValueError:
            right = False
        if not right:
            raise UserError(f"{key}: {name} in ?{query} must be {fix}")
    return Cut(**found)


def _header(path: str) -> tuple[tuple[int, ...], str]:
    """Shape and kind of number of a volume, without reading it."""
    if path.lower().endswith(".npy"):
        volume = np.load(path, mmap_mode="r", allow_pickle=False)
        return volume.shape, volume.dtype.kind
    image = _nibabel().load(path)
    shape = tuple(image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape, image.get_data_dtype().kind


@lru_cache(maxsize=KEPT)
def _open(path: str) -> Any:
    """The volume in the file *path*, of which slices can be taken."""
    if path.lower().endswith(".npy"):
        return np.load(path, mmap_mode="r", allow_pickle=False)
    image = _nibabel().load(path)
    if path.lower().endswith(".gz"):
        # Nothing in it can be found without decompressing what is before, so it is kept.
        size = image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize
        with gzip.open(path) as file:
            content = file.read(size)
        if len(content) < size:
            raise EOFError(f"it ends after {len(content)} of {size} bytes")
        image = type(image).from_bytes(content)
    return image.dataobj


def _slices(volume: Any, axis: int, span: slice) -> np.ndarray:
    """Slices (S, H, W) of a volume that was opened, as floating-point numbers: the two other axes in their order."""
    chosen: list[Any] = [slice(None)] * 3 + [0] * (len(volume.shape) - 3)
    chosen[axis] = span
    values = np.moveaxis(np.asarray(volume[tuple(chosen)]), axis, 0)
    return values.astype(np.result_type(values.dtype, np.float32))


@cache
def _percentiles(path: str, axis: int) -> tuple[float, float]:
    """The 1st and 99th percentile of a volume's finite values."""
    volume = _open(path)
    step = max(1, -(-math.prod(volume.shape) // COUNTED))
    values = _slices(volume, axis, slice(None, None, step))
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, (1, 99)) if values.size else (0.0, 1.0)
    return float(low), float(high)


def _as_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8: *low* becomes 0 and *high* 255; where they are one, what is above becomes 255. What is no number is low."""
    with np.errstate(invalid="ignore", over="ignore"):
        values -= low
        values *= 255 / max(high - low, 1e-30)
    return np.rint(np.clip(np.nan_to_num(values, copy=False, nan=0.0), 0, 255)).astype(np.uint8)


def _nibabel(key: str = "data") -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise UserError(f"{key}: .nii files need nibabel; {how_to_install('volumes')}") from error
    return nibabel


def write_examples(folder: Path, volumes: int = 24, size: int = 32) -> None:
    """Write spheres and cubes in noise, a class each: int16 ``.npy`` files (size, size, size) below *folder*."""
    random = np.random.default_rng(0)
    for name in ("cube", "sphere"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(volumes):
            centre = size / 2 + random.uniform(-2, 2, 3)
            away = np.abs(np.indices((size, size, size)) - centre[:, None, None, None])
            inside = away.max(0) < 0.35 * size if name == "cube" else (away**2).sum(0) < (0.43 * size) ** 2
            values = random.normal(0, 50, inside.shape) + 150 * inside
            np.save(folder / name / f"{number:03}.npy", values.round().astype(np.int16))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write volumes of spheres and cubes in noise, to try bigvision with.")
    parser.add_argument("out", type=Path, help="a folder, which need not be there")
    out = parser.parse_args(arguments).out
    write_examples(out)
    print(f"train with data.train and data.val volumes:{out}?slices=5")


if __name__ == "__main__":
    main()
