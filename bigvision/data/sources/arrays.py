"""Datasets that are arrays, in memory or in files, and made-up ones."""

from __future__ import annotations

import base64
import os
import zipfile
import zlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigvision.data.labels import Coded, class_file, coded, label_samples, other_task, read_classes
from bigvision.data.sources.base import Column, Labelled, Opening, Sample, Source, Split, Style, UnreadableSample
from bigvision.data.splits import hold_out, named_parts, part_for
from bigvision.data.targets import Sets, Vectors, find_indicators, find_numbers
from bigvision.errors import UserError, one_line
from bigvision.samples import seed_from

DIGITS_VAL = (
    "AAAEiDUkEEAABkEAk0IFABoACAEAJAAoBiwSABAAlAoAkBkSBCD4oAKBEKAACAqIIEQVJElCQKAKAAAAQATYAACBgCAASAXEABBA"
    "CKAQAAVASAAwEAACDsQJAAIkhACDqAE8IKaYCgAAAAsIQAgEoBhIAgJAQcEAgARARoQ3aoECFgBEgABAQqCkGApQAIQLhWHGCBCA"
    "CABMgMAgBAaOAAEIggCBADgIA8AIGQAAEA4BAIQQoCEAMygpBMBEwIBoDgECgwCCAIgipkAsJAQhCKhggJCBoAwCggJCEgE4pBUA"
)
"""A bit for each of the digits, set for validation: what scikit-learn's ``train_test_split(range(1797), test_size=0.2,
random_state=0, stratify=labels)`` gives."""


class ArraySource(Labelled):
    """Images in one tensor, which worker processes share rather than copy, or in a file."""

    file = ""
    """That they were read from; of several arrays in it followed by the name of this one."""

    def __init__(
        self, name: str, style: Style, classes: Sequence[str], images: Tensor | MappedFile, labels: Tensor | Vectors | Sets
    ) -> None:  # fmt: skip
        """Args: *images* uint8 (N, 1 or 3, H, W); *labels* int64 (N,), or a column of other targets."""
        self.name, self.classes = name, list(classes)
        self.style: Style = style
        self._images, self._labels = images, Column(labels) if isinstance(labels, Tensor) else labels

    def read(self, index: int) -> Sample:
        return Sample(self._images[index].expand(3, -1, -1), self.label(index))

    def image_size(self, index: int) -> tuple[int, int]:
        return self._images.shape[-2], self._images.shape[-1]

    def origins(self) -> Sequence[str]:
        return [self.file] if self.file else []


class MappedFile:
    """Images in a ``.npy`` file, which each process maps into its memory for itself: the system shares the pages."""

    def __init__(self, path: Path) -> None:
        self.path, self._mapped = path, None
        self.shape = self._images().shape

    def __getitem__(self, index: int) -> Tensor:
        try:
            return torch.from_numpy(np.array(self._images()[index]))
        except (OSError, ValueError) as error:
            raise UnreadableSample(one_line(error)) from error

    def _images(self) -> np.ndarray:
        if self._mapped is None:
            self._mapped = channels_first(np.load(self.path, mmap_mode="r", allow_pickle=False))
        return self._mapped

    def __getstate__(self) -> dict[str, Any]:
        # As an array it would be copied into each worker.
        return self.__dict__ | {"_mapped": None}


class Synthetic(Source):
    """Noise with ten classes, for tests and benchmarks. The pixels are a function of the index alone."""

    def __init__(self, samples: int = 1024, size: int = 224) -> None:
        self.name = f"synthetic:{samples}x{size}"
        self.classes = [str(label) for label in range(10)]
        self._samples, self._size = samples, size

    def __len__(self) -> int:
        return self._samples

    def read(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(seed_from("synthetic", index))
        shape = (3, self._size, self._size)
        return Sample(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), self.label(index))

    def label(self, index: int) -> int:
        return index % 10

    def image_size(self, index: int) -> tuple[int, int]:
        return self._size, self._size


def open_digits(split: Split) -> ArraySource:
    """Open scikit-learn's digits: 1797 images of 8x8, four fifths for training, a fixed, stratified fifth for validation."""
    # Its file alone: importing scikit-learn takes each rank a second of processor time.
    package = find_spec("sklearn")
    assert package is not None and package.origin is not None, "scikit-learn is among bigvision's requirements"
    rows = torch.from_numpy(np.loadtxt(Path(package.origin).parent / "datasets/data/digits.csv.gz", delimiter=","))
    held_out = np.unpackbits(np.frombuffer(base64.b64decode(DIGITS_VAL), np.uint8), count=len(rows)) == 1
    rows = rows[torch.from_numpy(held_out if split == "val" else ~held_out)]
    images = rows[:, :-1].mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    return ArraySource("digits", "digit", [str(label) for label in range(10)], images, rows[:, -1].to(torch.int64))


def open_arrays(argument: str, opening: Opening) -> Source:
    """Open arrays of images and labels: the folder or the ``.npz`` file *argument*.

    A folder holds ``images.npy`` and ``labels.npy``, or has them in subfolders ``train`` and ``val`` (or of other names
    of splits). A file holds ``images`` and ``labels``, or ``train_images``, ``train_labels``, ``val_images``
    and ``val_labels``, as MedMNIST's do. Without a validation part all is used for both, or, when training and validation
    share it, a fixed tenth is held out. Images are uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3, labels
    whole numbers or names, (N,) or (N, 1), or one-hot (N, number of classes), or the shares of the classes that add up to 1.
    For several labels they are 0 and 1, (N, number of classes); numbers are (N,) or (N, how many). A ``classes.txt`` beside
    them has a name on each line, by which labels follow the training data's.
    """
    key, where, path = opening.key, repr(argument), Path(argument).expanduser()
    try:
        images, labels, part, hold = (_open_folder if path.is_dir() else _open_npz)(path, opening)
    except FileNotFoundError as error:
        raise UserError(f"{key}: no {error.filename!r}; give a folder with images.npy and labels.npy or a .npz file") from error
    except KeyError as error:
        raise UserError(f"{key}: {where}: {error.args[0]}; it must have images and labels") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{key}: {where} cannot be read ({one_line(error)}); give .npy or .npz files of numbers") from error

    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and {images.shape[1], images.shape[3]} & {1, 3})):
        shapes = "(N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3"
        raise UserError(f"{key}: the images of {where} are {images.dtype} {images.shape}; they must be uint8 {shapes}")
    if labels.ndim and (len(images) != len(labels) or not len(labels)):
        raise UserError(f"{key}: {where} has {len(images)} images and {len(labels)} labels; it must have as many of both")

    is_folder = path.is_dir()
    folders = [path / part, path] if is_folder else [path.parent]
    classes, targets, notes = _targets(labels, folders, opening, where)
    file = path / part / "images.npy" if is_folder else path / f"{part}_images".lstrip("_")
    pixels = MappedFile(file) if is_folder else channels_first(torch.from_numpy(images))
    style: Style = "photo" if min(pixels.shape[2:]) >= 64 else "tiny"
    source = ArraySource(f"arrays:{argument}", style, classes, pixels, targets)
    source.file, source.linked, source.location, source.notes = str(file), file.is_symlink(), str(file.parent), notes
    otherwise = f"{key}: {where} has one image, none can be held out; add images or a validation part"
    return hold_out(source, opening.split, otherwise) if hold else source


def _targets(
    labels: np.ndarray, folders: Sequence[Path], opening: Opening, where: str
) -> tuple[list[str], Tensor | Vectors | Sets, tuple[str, ...]]:
    """The classes, the targets of all samples, and notes. Raises `UserError` where *labels* are not what the task needs."""
    key, known = opening.key, opening.classes

    def at(index: int) -> str:
        return f"sample {index} of {where}"

    table = labels.reshape(len(labels), -1) if labels.ndim in (1, 2) and labels.dtype.kind in "biuf" else None
    if opening.target != "label" or (table is not None and _are_shares(table)):
        if table is None:
            has = f"{labels.dtype} {labels.shape}"
            raise UserError(f"{key}: the labels of {where} are {has}; they must be numbers, (N,) or (N, how many)")
        file = class_file(folders)
        names = read_classes(str(file), key) if file else list(known or map(str, range(table.shape[1])))
        if len(names) != table.shape[1]:
            raise UserError(
                f"{key}: {where} has {table.shape[1]} columns of labels, but there are {len(names)} names: {names[:5]}"
            )
        if opening.target == "label":
            return names, Vectors(torch.from_numpy(table.astype(np.float32))), ()
        find = find_indicators if opening.target == "labels" else find_numbers
        found = find(table, names, known, key=key, where=where, at=at)
        return found.classes, found.column, found.notes
    column, listed = _label_column(labels, key, where)
    found = label_samples(column, known or (None if class_file(folders) else listed), folders, key=key, where=where, at=at)
    return found.classes, torch.from_numpy(found.values), found.notes


def _are_shares(table: np.ndarray) -> bool:
    """Whether the rows of *table* are distributions, and not all of them one-hot."""
    if table.dtype.kind != "f" or table.shape[1] < 2 or not (table >= 0).all():
        return False
    return bool((np.abs(table.sum(1, dtype=np.float64) - 1) < 1e-3).all() and ((table != 0) & (table != 1)).any())


def _label_column(labels: np.ndarray, key: str, where: str) -> tuple[Coded, list[str] | None]:
    """The label of each sample, and which classes there are where *labels* are one-hot. Raises `UserError` for others."""
    if labels.ndim and labels.shape[1:] in ((), (1,)) and labels.dtype.kind in "biufUS":
        return coded(labels.reshape(-1)), None
    if labels.ndim == 2 and labels.dtype.kind in "biuf":
        if np.isin(labels, (0, 1)).all() and (labels.sum(1, dtype=np.int64) == 1).all():
            return coded(labels.argmax(1)), [str(label) for label in range(labels.shape[1])]
        raise other_task("labels", f"{labels.dtype} {labels.shape}, not one-hot", key=key, where=where)
    has = f"{labels.dtype} {labels.shape}"
    raise UserError(f"{key}: the labels of {where} are {has}; they must be whole numbers or names, (N,) or (N, 1)")


def _open_folder(path: Path, opening: Opening) -> tuple[np.ndarray, np.ndarray, str, bool]:
    """Images, labels, the subfolder that they are in, and whether to hold out a tenth of them."""
    names = [entry.name for entry in os.scandir(path) if (path / entry.name / "images.npy").exists()]
    part, hold = _part(names, (path / "images.npy").exists(), opening, path)
    images = np.load(path / part / "images.npy", mmap_mode="r", allow_pickle=False)
    return images, np.load(path / part / "labels.npy", allow_pickle=False), part, hold


def _open_npz(path: Path, opening: Opening) -> tuple[np.ndarray, np.ndarray, str, bool]:
    opened = np.load(path, allow_pickle=False)
    if not isinstance(opened, np.lib.npyio.NpzFile):
        raise ValueError("it is a single array")
    with opened as file:
        names = [name.removesuffix("_images") for name in file if name.endswith("_images")]
        part, hold = _part(names, "images" in file, opening, path)
        images, labels = (file[f"{part}_{name}".lstrip("_")] for name in ("images", "labels"))
        return images, labels, part, hold


def _part(names: list[str], whole: bool, opening: Opening, path: Path) -> tuple[str, bool]:
    """The part of the data that the split is in, of those called *names*; "" where there are none, or where the training data
    has no name (*whole*). And whether to hold out a tenth of it."""
    train, val = named_parts(names, key=opening.key, where=repr(str(path)))
    if train is None and (whole or val is None):
        train = ""
    return part_for(opening, train, val, has=f"{str(path)!r} has a part {val or train}", fix="add one")


def channels_first(images: Any) -> Any:
    """A view (N, C, H, W) of an array or tensor in any of the shapes of :func:`open_arrays`."""
    if images.ndim == 3:
        return images[:, None]
    if images.shape[3] not in (1, 3):
        return images
    return images.permute(0, 3, 1, 2) if isinstance(images, Tensor) else images.transpose(0, 3, 1, 2)
