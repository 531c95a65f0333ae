"""Datasets that are arrays, in memory or in files, and made-up ones."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigvision.data.labels import Coded, class_file, coded, label_samples, other_task
from bigvision.data.sources.base import Column, Labelled, Opening, Sample, Source, Split, Style, UnreadableSample
from bigvision.data.splits import hold_out, named_parts, part_for
from bigvision.errors import UserError, one_line
from bigvision.samples import seed_from


class ArraySource(Labelled):
    """Images in one tensor, which worker processes share rather than copy, or in a file."""

    file = ""
    """That they were read from; of several arrays in it followed by the name of this one."""

    def __init__(
        self, name: str, style: Style, classes: Sequence[str], images: Tensor | MappedFile, labels: Tensor
    ) -> None:  # fmt: skip
        """Args: *images* uint8 (N, 1 or 3, H, W); *labels* int64 (N,)."""
        self.name, self.classes = name, list(classes)
        self.style: Style = style
        self._images, self._labels = images, Column(labels)

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
    """Open scikit-learn's digits: 1797 images of 8x8, four fifths for training, a fixed fifth for validation."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, target = load_digits(return_X_y=True)
    rows = range(len(target))
    train, val = train_test_split(rows, test_size=0.2, random_state=0, stratify=target)
    chosen = torch.tensor(sorted(train if split == "train" else val))
    images = torch.from_numpy(pixels).mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    labels = torch.from_numpy(target).to(torch.int64)
    return ArraySource("digits", "digit", [str(label) for label in range(10)], images[chosen], labels[chosen])


def open_arrays(argument: str, opening: Opening) -> Source:
    """Open arrays of images and labels: the folder or the ``.npz`` file *argument*.

    A folder holds ``images.npy`` and ``labels.npy``, or has them in subfolders ``train`` and ``val`` (or of other names
    of splits). A file holds ``images`` and ``labels``, or ``train_images``, ``train_labels``, ``val_images``
    and ``val_labels``, as MedMNIST's do. Without a validation part all is used for both, or, when training and validation
    share it, a fixed tenth is held out. Images are uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3, labels
    whole numbers or names, (N,) or (N, 1), or one-hot (N, number of classes). A ``classes.txt`` beside them has a name on
    each line, by which labels follow the training data's.
    """
    key = opening.key
    path = Path(argument).expanduser()
    try:
        images, labels, part, hold = (_open_folder if path.is_dir() else _open_npz)(path, opening)
    except FileNotFoundError as error:
        raise UserError(
            f"{key}: no {error.filename!r}; give a folder with images.npy and labels.npy, or a .npz file"
        ) from error
    except KeyError as error:
        raise UserError(f"{key}: {argument!r}: {error.args[0]}; it must have images and labels") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{key}: {argument!r} cannot be read ({one_line(error)}); give .npy or .npz files of numbers"
        ) from error

    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and {images.shape[1], images.shape[3]} & {1, 3})):
        raise UserError(
            f"{key}: the images of {argument!r} are {images.dtype} {images.shape}; "
            "they must be uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3"
        )
    column, listed = _label_column(labels, key, repr(argument))
    if len(images) != len(labels) or not len(labels):
        raise UserError(f"{key}: {argument!r} has {len(images)} images and {len(labels)} labels; it must have as many of both")

    folders = [path / part, path] if path.is_dir() else [path.parent]
    found = label_samples(
        column, opening.classes or (None if class_file(folders) else listed), folders, key=key, where=repr(argument),
        at=lambda index: f"sample {index} of {argument!r}",
    )  # fmt: skip
    pixels = MappedFile(path / part / "images.npy") if path.is_dir() else channels_first(torch.from_numpy(images))
    style: Style = "photo" if min(pixels.shape[2:]) >= 64 else "tiny"
    source = ArraySource(f"arrays:{argument}", style, found.classes, pixels, torch.from_numpy(found.values))
    if path.is_dir():
        source.file = str(path / part / "images.npy")
        source.linked = os.path.islink(source.file)
    else:
        source.file = str(path / f"{part}_images".lstrip("_"))
    source.location, source.notes = str(path / part if path.is_dir() else path), found.notes
    otherwise = f"{key}: {argument!r} has one image, none can be held out; add images or a validation part"
    return hold_out(source, opening.split, otherwise) if hold else source


def _label_column(labels: np.ndarray, key: str, where: str) -> tuple[Coded, list[str] | None]:
    """The label of each sample, and which classes there are where *labels* are one-hot. Raises `UserError` for others."""
    if labels.ndim and labels.shape[1:] in ((), (1,)) and labels.dtype.kind in "biufUS":
        return coded(labels.reshape(-1)), None
    if labels.ndim == 2 and labels.dtype.kind in "biuf":
        if np.isin(labels, (0, 1)).all() and (labels.sum(1, dtype=np.int64) == 1).all():
            return coded(labels.argmax(1)), [str(label) for label in range(labels.shape[1])]
        raise other_task("labels", f"{labels.dtype} {labels.shape}, not one-hot", key=key, where=where)
    raise UserError(
        f"{key}: the labels of {where} are {labels.dtype} {labels.shape}; they must be whole numbers or names, (N,) or (N, 1)"
    )


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
