"""torchvision's datasets, downloaded where they are missing."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bigvision.data.sources.arrays import ArraySource
from bigvision.data.sources.base import Source, Split, Style, size_in_header
from bigvision.data.sources.custom import MapStyle
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
    encoded: bool = True
    """whether its class leaves reading a file to a function that it is given"""


_SETS = {
    "mnist": _Set("MNIST", "MNIST/raw", "digit", {"train": True}, {"train": False}, False),
    "fashion-mnist": _Set("FashionMNIST", "FashionMNIST/raw", "tiny", {"train": True}, {"train": False}, False),
    "cifar10": _Set("CIFAR10", "cifar-10-batches-py", "tiny", {"train": True}, {"train": False}, False),
    "cifar100": _Set("CIFAR100", "cifar-100-python", "tiny", {"train": True}, {"train": False}, False),
    "svhn": _Set("SVHN", ".", "digit", {"split": "train"}, {"split": "test"}, False),
    "stl10": _Set("STL10", "stl10_binary", "photo", {"split": "train"}, {"split": "test"}, False),
    "aircraft": _Set("FGVCAircraft", "fgvc-aircraft-2013b", "photo", {"split": "train"}, {"split": "val"}),
    "caltech101": _Set("Caltech101", "caltech101", "photo", {}, {}, False),
    "country211": _Set("Country211", "country211", "photo", {"split": "train"}, {"split": "valid"}),
    "dtd": _Set("DTD", "dtd", "photo", {"split": "train"}, {"split": "val"}),
    "eurosat": _Set("EuroSAT", "eurosat", "photo", {}, {}),
    "flowers102": _Set("Flowers102", "flowers-102", "photo", {"split": "train"}, {"split": "val"}),
    "food101": _Set("Food101", "food-101", "photo", {"split": "train"}, {"split": "test"}),
    "imagenette": _Set("Imagenette", "imagenette2", "photo", {"split": "train"}, {"split": "val"}),
    "oxford-pets": _Set("OxfordIIITPet", "oxford-iiit-pet", "photo", {"split": "trainval"}, {"split": "test"}, False),
}
TORCHVISION = tuple(_SETS)


def open_torchvision(name: str, split: Split, *, key: str, root: str | None, download: bool) -> Source:
    """Open torchvision's dataset *name* in the folder *root*, with *download* after fetching what is missing.

    ``val`` is the published validation split, or the test split where there is no other; where there is neither, a fixed
    tenth is held out.

    Raises:
        UserError: it is not there, damaged, or cannot be downloaded; the message names the folder for the files.
    """
    from torchvision import datasets

    found = _SETS[name]
    check_local(root or "", "data.root")
    base = Path(root or DEFAULT_ROOT).expanduser()
    folder = base / found.folder
    options = found.train if split == "train" else found.val
    if found.encoded:
        options = options | {"loader": _read}

    opener = getattr(datasets, found.opener)
    try:
        if name == "caltech101" and not (folder / "101_ObjectCategories").is_dir():
            raise RuntimeError("torchvision would make an empty folder before it says so")
        dataset = opener(base, **options)
    except RuntimeError as missing:
        # torchvision says "not found" and "corrupted" alike, and fixes both by downloading.
        if not download:
            raise UserError(f"{key}: {name} is not complete in {str(folder)!r}; put its files there") from missing
        try:
            with _timeout(30):
                dataset = opener(base, **options, download=True)
        except Exception as error:
            raise UserError(
                f"{key}: {name} could not be downloaded ({one_line(error)}); put its files in {str(folder)!r}"
            ) from error
    except Exception as error:
        raise UserError(
            f"{key}: the files of {name} in {str(folder)!r} are damaged ({one_line(error)}); delete and fetch them again"
        ) from error
    # Some classes are tuples of names, some are in another attribute, STL10's in a file that may be missing.
    named = getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or range(10)
    classes = [label[0] if isinstance(label, tuple) else str(label) for label in named]
    if hasattr(dataset, "data"):
        in_memory = _in_memory(name, found.style, classes, dataset)
        in_memory.location = str(folder)
        return in_memory
    dataset.files, dataset.targets = zip(*_listed(dataset))
    inside = os.path.join(os.path.abspath(folder), "")
    if outside := [file for file in dataset.files if not os.path.abspath(file).startswith(inside)]:
        raise UserError(f"{key}: {name} lists {str(outside[0])!r}, which is not in {str(folder)!r}; fetch its files again")
    source = _Files(dataset, classes, found.style, name)
    source.location = str(folder)
    return hold_out(source, split) if found.train == found.val else source


class _Files(MapStyle):
    """A dataset of image files, which its attribute ``files`` names."""

    def where(self, index: int) -> str:
        return str(self.dataset.files[index])  # type: ignore[attr-defined]

    def key(self, index: int) -> bytes:
        return os.fsencode(os.path.relpath(self.where(index), self.location))

    def origins(self) -> Iterator[str]:
        return map(self.where, range(len(self)))

    def image_size(self, index: int) -> tuple[int, int] | None:
        return size_in_header(self.where(index))

    def size(self, index: int) -> int:
        try:
            return os.stat(self.where(index)).st_size
        except OSError:
            return 0  # reading it will name the reason


def _in_memory(name: str, style: Style, classes: list[str], dataset: Any) -> ArraySource:
    images = torch.as_tensor(dataset.data)
    if images.ndim == 3:
        images = images.unsqueeze(1)
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    labels = dataset.labels if hasattr(dataset, "labels") else dataset.targets
    return ArraySource(name, style, classes, images.contiguous(), torch.as_tensor(labels, dtype=torch.int64))


def _listed(dataset: Any) -> list[tuple[Any, int]]:
    """Each image's file and label."""
    if hasattr(dataset, "index"):  # Caltech's
        folders = [os.path.join(dataset.root, "101_ObjectCategories", name) for name in dataset.categories]
        return [(os.path.join(folders[y], f"image_{number:04}.jpg"), y) for y, number in zip(dataset.y, dataset.index)]
    for files in ("_image_files", "_images"):
        if hasattr(dataset, files):
            return list(zip(getattr(dataset, files), dataset._labels))
    return dataset.samples if hasattr(dataset, "samples") else dataset._samples


def _read(path: str | Path) -> bytes:
    """For torchvision's ``loader``: decoding is ours."""
    return Path(path).read_bytes()


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Bound each wait for the network: torchvision sets no bound, and behind a firewall that drops packets all would hang."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
