"""Folders of images, a folder per class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from bigvision.data.decode import EXTENSIONS
from bigvision.data.sources.base import Sample, Source, Split, UnreadableSample
from bigvision.data.sources.columns import Column, Texts
from bigvision.data.splits import HELD_OUT
from bigvision.errors import UserError

VAL_FOLDERS = ("val", "valid", "validation", "test")


class Kind(NamedTuple):
    """What the files of a folder are."""

    dataset: str
    noun: str
    extensions: tuple[str, ...]


IMAGES = Kind("imagefolder", "image", EXTENSIONS)


class ImageFolder(Source):
    """The images below ``root/CLASS/``; classes and files in the order of their names."""

    def __init__(
        self, root: Path, classes: Sequence[str], files: Sequence[tuple[str, int]], dataset: str = IMAGES.dataset
    ) -> None:
        self.name = f"{dataset}:{root}"
        self.root = str(root)
        self.classes = list(classes)
        self._names = Texts.of([os.fsencode(name) for name, _ in files])
        self._labels = Column(torch.tensor([label for _, label in files]))

    def __len__(self) -> int:
        return len(self._labels)

    def path(self, index: int) -> str:
        """Return the file of sample *index*."""
        return os.path.join(self.root, os.fsdecode(self._names[index]))

    def read(self, index: int) -> Sample:
        try:
            return Sample(_content(self.path(index)), self._labels[index])
        except OSError as error:
            raise UnreadableSample(error.strerror or type(error).__name__) from error

    def where(self, index: int) -> str:
        return self.path(index)

    def label(self, index: int) -> int:
        return self._labels[index]

    def key(self, index: int) -> bytes:
        return self._names[index]

    def size(self, index: int) -> int:
        try:
            return os.stat(self.path(index)).st_size
        except OSError:
            return 0  # reading it will name the reason


def _content(path: str) -> bytes:
    """What `Path.read_bytes` returns, with half of its calls of the system, which are not free where a sandbox takes them."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        content = os.read(descriptor, size)
        while len(content) < size and (more := os.read(descriptor, size - len(content))):
            content += more
        return content
    finally:
        os.close(descriptor)


def open_image_folder(
    argument: str, split: Split, *, key: str, shared: bool, classes: Sequence[str] | None = None, kind: Kind = IMAGES
) -> ImageFolder:
    """Open the folder *argument* for *split*.

    With subfolders ``train`` and ``val`` (or ``valid``, ``validation``, ``test``) of class folders, those are the
    splits. Otherwise the folder holds the class folders itself: it is used whole, or, when *shared* by training and
    validation, split by file name, a fixed tenth of each class for validation.

    Args:
        classes: label by these classes instead of by the folder's own.
        kind: of the files, which may be others than images.

    Raises:
        UserError: the folder is missing, empty, or not as described; the message names *key*.
    """
    root = Path(argument).expanduser()
    if not root.exists():
        raise UserError(f"{key}: no folder {argument!r}; give an existing one as {kind.dataset}:PATH")
    if not root.is_dir():
        raise UserError(f"{key}: {argument!r} is not a folder; give the folder that holds the class folders")
    try:
        folder, hold_out, labelled = _choose(root, split, key, shared, kind)
        known = list(classes) if classes is not None else _class_folders(labelled, key, kind)
        return ImageFolder(folder, known, _files(folder, known, split if hold_out else None, key, kind))
    except OSError as error:
        raise UserError(f"{key}: cannot list {error.filename!r}: {error.strerror}; make it readable") from error


def _choose(root: Path, split: Split, key: str, shared: bool, kind: Kind) -> tuple[Path, bool, Path]:
    """Return the folder with the files of *split*, whether to hold out a part of it, and the folder that names the classes."""
    train = root / "train"
    val = next((root / name for name in VAL_FOLDERS if _holds_folders(root / name, kind)), None)
    if not _holds_folders(train, kind):
        if val is None:
            return root, shared, root
        if split == "val":
            return val, False, val
        raise UserError(f"{key}: {str(root)!r} has {val.name}/ but no train/; add one, or name the training folder itself")
    if val is None and split == "val" and not shared:
        raise UserError(f"{key}: {str(root)!r} has train/ but no val/; add one, or name the validation folder itself")
    if val is None:
        return train, shared, train
    return (val if split == "val" else train), False, train


def _files(folder: Path, classes: Sequence[str], part: Split | None, key: str, kind: Kind) -> list[tuple[str, int]]:
    """Return each file's path relative to *folder* and its label; with *part* only that part of each class."""
    labels = {name: label for label, name in enumerate(classes)}
    files: list[tuple[str, int]] = []
    for name in _class_folders(folder, key, kind):
        if name not in labels:
            raise UserError(f"{key}: class {name!r} in {str(folder)!r} is not a class of the training data; remove it")
        images = _images(folder, name, kind)
        if not images:
            raise UserError(f"{key}: class folder {str(folder / name)!r} holds no {kind.noun} ({', '.join(kind.extensions)})")
        files += [(image, labels[name]) for image in (_part(images, part) if part else images)]
    if not files:
        raise UserError(
            f"{key}: {str(folder)!r} has one {kind.noun} per class, none can be held out; add {kind.noun}s or a val/ folder"
        )
    return files


def _holds_folders(folder: Path, kind: Kind) -> bool:
    """Whether *folder* may be a split: a class that happens to be called "train" or "test" holds its images directly."""
    if not folder.is_dir():
        return False
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    return any(entry.is_dir() for entry in entries) and not any(_is_one(entry.name, kind) for entry in entries)


def _class_folders(folder: Path, key: str, kind: Kind) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(
            f"{key}: {str(folder)!r} holds no class folder; put each class's {kind.noun}s in a folder named after it"
        )
    return names


def _images(folder: Path, name: str, kind: Kind) -> list[str]:
    """Return the files at any depth below ``folder/name``, relative to *folder*, sorted."""
    images = []
    for parent, folders, files in os.walk(folder / name, onerror=_raise, followlinks=True):
        folders[:] = [entry for entry in folders if not entry.startswith(".")]
        relative = os.path.relpath(parent, folder)
        images += [os.path.join(relative, file) for file in files if _is_one(file, kind)]
    return sorted(images)


def _raise(error: OSError) -> NoReturn:
    raise error  # os.walk would leave the folder out


def _is_one(name: str, kind: Kind) -> bool:
    return name.lower().endswith(kind.extensions) and not name.startswith(".")


def _part(images: list[str], split: Split) -> list[str]:
    """Return the part of one class's images that belongs to *split*; at least one stays for training."""
    count = min(max(1, round(HELD_OUT * len(images))), len(images) - 1)
    # Ranked by a hash of the name, so that images added later hardly move others between the splits.
    ranked = sorted(images, key=lambda name: hashlib.blake2b(os.fsencode(name)).digest())
    return sorted(ranked[:count] if split == "val" else ranked[count:])
