"""torchvision's datasets, downloaded where they are missing."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bigvision.data.sources.arrays import ArraySource, channels_first
from bigvision.data.sources.base import Opening, Sample, Source, Style
from bigvision.data.sources.custom import MapStyle
from bigvision.data.sources.folder import ImageFolder
from bigvision.data.splits import check_local, hold_out
from bigvision.errors import UserError, one_line

DEFAULT_ROOT = "data"


class _Set(NamedTuple):
    opener: str
    """its class in torchvision.datasets"""
    folder: str
    """of its files, below the root"""
    style: Style
    train: dict[str, Any]
    val: dict[str, Any]
    """what its class takes for each split; the same for both: a tenth is held out"""
    decodes: bool = False
    """whether its class, of image files, decodes them itself: `data.reduce` does not act on them"""


_SETS = {
    "mnist": _Set("MNIST", "MNIST/raw", "digit", {"train": True}, {"train": False}),
    "fashion-mnist": _Set("FashionMNIST", "FashionMNIST/raw", "tiny", {"train": True}, {"train": False}),
    "cifar10": _Set("CIFAR10", "cifar-10-batches-py", "tiny", {"train": True}, {"train": False}),
    "cifar100": _Set("CIFAR100", "cifar-100-python", "tiny", {"train": True}, {"train": False}),
    "svhn": _Set("SVHN", ".", "digit", {"split": "train"}, {"split": "test"}),
    "stl10": _Set("STL10", "stl10_binary", "photo", {"split": "train"}, {"split": "test"}),
    "aircraft": _Set("FGVCAircraft", "fgvc-aircraft-2013b", "photo", {"split": "train"}, {"split": "val"}),
    "caltech101": _Set("Caltech101", "caltech101", "photo", {}, {}, True),
    "country211": _Set("Country211", "country211", "photo", {"split": "train"}, {"split": "valid"}),
    "dtd": _Set("DTD", "dtd", "photo", {"split": "train"}, {"split": "val"}),
    "eurosat": _Set("EuroSAT", "eurosat", "photo", {}, {}),
    "flowers102": _Set("Flowers102", "flowers-102", "photo", {"split": "train"}, {"split": "val"}),
    "food101": _Set("Food101", "food-101", "photo", {"split": "train"}, {"split": "test"}),
    "imagenette": _Set("Imagenette", "imagenette2", "photo", {"split": "train"}, {"split": "val"}),
    "oxford-pets": _Set("OxfordIIITPet", "oxford-iiit-pet", "photo", {"split": "trainval"}, {"split": "test"}, True),
}
TORCHVISION = tuple(_SETS)


def open_torchvision(name: str, _: str, opening: Opening) -> Source:
    """Open torchvision's dataset *name*, after fetching what is missing where *opening* is the first.

    ``val`` is the published validation split, or the test split where there is no other; where there is neither, a fixed
    tenth is held out.
    """
    from torchvision import datasets

    found, key, split = _SETS[name], opening.key, opening.split
    check_local(opening.root or "", "data.root")
    base = Path(opening.root or DEFAULT_ROOT).expanduser()
    folder = base / found.folder
    where = repr(str(folder))
    options = found.train if split == "train" else found.val
    opener = getattr(datasets, found.opener)
    try:
        if name == "caltech101" and not (folder / "101_ObjectCategories").is_dir():
            raise RuntimeError("torchvision would make an empty folder before it says so")
        dataset = opener(base, **options)
    except RuntimeError as missing:
        # torchvision says "not found" and "corrupted" alike, and fixes both by downloading.
        if not opening.first:
            raise UserError(f"{key}: {name} is not complete in {where}; put its files there") from missing
        try:
            with _timeout(30):
                dataset = opener(base, **options, download=True)
        except Exception as error:
            raise UserError(f"{key}: {name} could not be downloaded ({one_line(error)}); put its files in {where}") from error
    except Exception as error:
        raise UserError(f"{key}: files of {name} in {where} are damaged: {one_line(error)}; delete and refetch them") from error
    # Some classes are tuples of names, some are in another attribute, STL10's in a file that may be missing.
    named = getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or range(10)
    classes = [label[0] if isinstance(label, tuple) else str(label) for label in named]
    if hasattr(dataset, "data"):
        labels = torch.as_tensor(dataset.labels if hasattr(dataset, "labels") else dataset.targets, dtype=torch.int64)
        source = ArraySource(name, found.style, classes, channels_first(torch.as_tensor(dataset.data)).contiguous(), labels)
        source.location = str(folder)
        return source
    files = [(os.path.relpath(file, folder), label) for file, label in _listed(dataset)]
    if outside := [file for file, _ in files if file.startswith(os.pardir + os.sep)]:
        raise UserError(f"{key}: {name} lists {outside[0]!r}, which is not in {where}; fetch its files again")
    source = ImageFolder(name, str(folder), classes, files)
    if found.decodes:
        source = _Decoded(name, str(folder), classes, files)
        source.decoded = MapStyle(dataset, classes, found.style, name)
    if found.train != found.val:
        return source
    return hold_out(source, split, f"{key}: {name} has one image in {where}; fetch its files again")


class _Decoded(ImageFolder):
    """Image files that torchvision's class decodes."""

    decoded: MapStyle

    def read(self, index: int) -> Sample:
        return self.decoded.read(index)


def _listed(dataset: Any) -> list[tuple[Any, int]]:
    """Each image's file and label."""
    if hasattr(dataset, "index"):  # Caltech's
        folders = [os.path.join(dataset.root, "101_ObjectCategories", name) for name in dataset.categories]
        return [(os.path.join(folders[y], f"image_{number:04}.jpg"), y) for y, number in zip(dataset.y, dataset.index)]
    for files in ("_image_files", "_images"):
        if hasattr(dataset, files):
            return list(zip(getattr(dataset, files), dataset._labels))
    return dataset.samples if hasattr(dataset, "samples") else dataset._samples


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Bound each wait for the network: torchvision sets no bound, and behind a firewall that drops packets all would hang."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
