"""Folders of images, a folder per class."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigvision.data.labels import lookalikes
from bigvision.data.layouts import IMAGES, Finder, Kind, Layout, Tree
from bigvision.data.sources.base import Column, Labelled, Opening, PassedOver, Sample, Texts, UnreadableSample, size_in_header
from bigvision.data.splits import blake2_hashes, near_path, part
from bigvision.disk import open_to_read, read_at
from bigvision.errors import UserError, nearest


class ImageFolder(Labelled):
    """Image files below a folder, in the order given."""

    def __init__(
        self, name: str, root: str, classes: Sequence[str], files: Sequence[tuple[str, int]], targets: Any = None
    ) -> None:  # fmt: skip
        """Args: *files*: the path below *root* and the label of each. *targets*: a column of what they have instead."""
        self.name, self.classes = name, list(classes)
        self.root = self.location = root
        self._names = Texts.of([os.fsencode(name) for name, _ in files])
        self._labels = Column(torch.tensor([label for _, label in files])) if targets is None else targets

    def path(self, index: int) -> str:
        """Return the file of sample *index*."""
        return os.path.join(self.root, os.fsdecode(self._names[index]))

    def read(self, index: int) -> Sample:
        try:
            # Half of the system calls of Path.read_bytes: they are not free where a sandbox takes them.
            descriptor = open_to_read(self.path(index))
            try:
                return Sample(read_at(descriptor, 0, os.fstat(descriptor).st_size), self._labels[index])
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UnreadableSample(error.strerror or type(error).__name__) from error

    def where(self, index: int) -> str:
        return self.path(index)

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


def open_image_folder(argument: str, opening: Opening, kind: Kind = IMAGES) -> ImageFolder:
    """Open the folder *argument* in one of the layouts of :class:`~bigvision.data.layouts.Finder`.

    A folder without splits that training and validation share is divided, by hashes of the file names. The *kind* of
    files may be others than images.
    """
    root, key = os.path.expanduser(argument), opening.key
    if not os.path.exists(root):
        hint = near_path(root) or f"; give an existing one as {kind.dataset}:PATH"
        raise UserError(f"{key}: no folder {argument!r}{hint}")
    if not os.path.isdir(root):
        raise UserError(f"{key}: {argument!r} is not a folder; give the folder that holds the class folders")
    tree, passed_over = Tree(kind.extensions), PassedOver()
    try:
        layout = Finder(tree, opening, kind).find(str(Path(root)))
        files, skipped = _files(tree, layout, key)
    except OSError as error:
        raise UserError(f"{key}: cannot list {error.filename!r}: {error.strerror}; make it readable") from error
    if layout.hold_out:
        otherwise = f"{key}: {layout.folder!r} has one {kind.noun} per class, none can be held out; add some or a val/ folder"
        hashes, labels = blake2_hashes(name for name, _ in files), np.array([label for _, label in files])
        files = [files[index] for index in part(hashes, labels, opening.split, otherwise)]
    source = ImageFolder(f"{kind.dataset}:{layout.folder}", layout.folder, layout.known, files)
    for reason, path in [*layout.skipped, *skipped]:
        passed_over.add(reason, os.path.relpath(path, root) + (os.sep if path.endswith(os.sep) else ""))
    source.passed_over, source.linked = passed_over, tree.linked
    source.notes = lookalikes(layout.known) if opening.classes is None else ()
    # A link may lead to a file of the other part.
    source.divided = layout.hold_out and not tree.linked
    return source


def _files(tree: Tree, layout: Layout, key: str) -> tuple[list[tuple[str, int]], list[tuple[str, str]]]:
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
