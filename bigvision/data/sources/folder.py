"""Folders of images, a folder per class."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bigvision.data.decode import EXTENSIONS
from bigvision.data.labels import lookalikes
from bigvision.data.layouts import Layout, Tree, find_layout
from bigvision.data.sources.base import Column, PassedOver, Sample, Source, Split, Texts, UnreadableSample, size_in_header
from bigvision.data.splits import hash_file_names, near_path, part
from bigvision.errors import UserError, nearest


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
        self.root = self.location = str(root)
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

    def image_size(self, index: int) -> tuple[int, int] | None:
        return size_in_header(self.path(index))

    def origins(self) -> Iterable[str]:
        return map(self.path, range(len(self)))

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
    """Open the folder *argument* for *split*, in one of the layouts of :func:`~bigvision.data.layouts.find_layout`.

    Args:
        shared: by training and validation: a folder without splits is divided, by hashes of the file names.
        classes: label by these classes instead of by the folder's own.
        kind: of the files, which may be others than images.

    Raises:
        UserError: the folder is missing, empty, or not as described; the message names *key*.
    """
    root = os.path.expanduser(argument)
    if not os.path.exists(root):
        hint = near_path(root) or f"; give an existing one as {kind.dataset}:PATH"
        raise UserError(f"{key}: no folder {argument!r}{hint}")
    if not os.path.isdir(root):
        raise UserError(f"{key}: {argument!r} is not a folder; give the folder that holds the class folders")
    tree = Tree(kind.extensions)
    try:
        layout = find_layout(
            tree, str(Path(root)), split, shared=shared, known=classes, key=key, dataset=kind.dataset, noun=kind.noun
        )
        files, skipped = _files(tree, layout, key, kind)
    except OSError as error:
        raise UserError(f"{key}: cannot list {error.filename!r}: {error.strerror}; make it readable") from error
    if layout.hold_out:
        kept = part(hash_file_names(name for name, _ in files), np.array([label for _, label in files]), split)
        files = [files[index] for index in kept]
    if not files:
        raise UserError(
            f"{key}: {layout.folder!r} has one {kind.noun} per class, none can be held out; add {kind.noun}s or a val/ folder"
        )
    source = ImageFolder(Path(layout.folder), layout.known, files, kind.dataset)
    passed_over = PassedOver()
    for reason, path in [*layout.skipped, *skipped]:
        passed_over.add(reason, os.path.relpath(path, root) + (os.sep if path.endswith(os.sep) else ""))
    source.passed_over, source.linked = passed_over, tree.linked
    source.notes = lookalikes(layout.known) if classes is None else ()
    # A link may lead to a file of the other part.
    source.divided = layout.hold_out and not tree.linked
    return source


def _files(tree: Tree, layout: Layout, key: str, kind: Kind) -> tuple[list[tuple[str, int]], list[tuple[str, str]]]:
    """Return each file's path relative to the layout's folder and its label, and the reasons and paths of what is skipped."""
    labels = {name: label for label, name in enumerate(layout.known)}
    composed = {unicodedata.normalize("NFC", name): label for name, label in labels.items()}
    files: list[tuple[str, int]] = []
    skipped: list[tuple[str, str]] = []
    for name in layout.classes:
        label = labels.get(name, composed.get(unicodedata.normalize("NFC", name)))
        if label is None:
            where = f"class {name!r} in {layout.folder!r}"
            hint = nearest(name, labels) or "; remove it"
            raise UserError(f"{key}: {where} is not a class of the training data{hint}")
        found: list[str] = []
        for path, listing in tree.walk(os.path.join(layout.folder, name, layout.inner.get(name, ""))):
            relative = os.path.relpath(path, layout.folder)
            found += [os.path.join(relative, file) for file in listing.files]
            skipped += [(reason, os.path.join(path, other)) for reason, other in listing.skipped]
        files += [(file, label) for file in sorted(found)]
    return files, skipped
