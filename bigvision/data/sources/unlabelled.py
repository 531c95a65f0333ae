"""Images to be predicted: a folder or file of any layout, or a dataset whose targets nobody asks for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigvision.data.layouts import IMAGES, Tree
from bigvision.data.sources.base import PassedOver, Sample, Source, View
from bigvision.data.sources.folder import ImageFolder
from bigvision.data.splits import near_path
from bigvision.errors import UserError


class Unlabelled(View):
    """The samples of another source in their order, without targets."""

    def __init__(self, source: Source, classes: Sequence[str] = ()) -> None:
        """Args: *classes*: of the model."""
        self.source, self.classes = source, list(classes)
        for name in ("name", "style", "channels", "location", "linked", "noun", "passed_over", "notes"):
            setattr(self, name, getattr(source, name))

    def __len__(self) -> int:
        return len(self.source)

    def _find(self, index: int) -> tuple[Source, int]:
        return self.source, index

    def read(self, index: int) -> Sample:
        return Sample(self.source.read(index).image, None)

    def label(self, index: int) -> Any:
        return None

    def called(self, index: int) -> str:
        """What a table calls the sample: its path or key, else its place."""
        return os.fsdecode(self.source.key(index)).encode(errors="backslashreplace").decode() or str(index)


def open_images(path: str, key: str) -> Source:
    """Open the image file *path*, or all images below the folder, sorted by their paths; `UserError` where there are none."""
    root, passed_over = os.path.expanduser(path), PassedOver()
    if os.path.isfile(root):
        folder, name = os.path.split(os.path.abspath(root))
        return ImageFolder(f"images:{root}", folder, [], [(name, 0)])
    if not os.path.isdir(root):
        raise UserError(f"{key}: no file or folder {path!r}{near_path(root) or '; give images, or a dataset as in data.val'}")
    files: list[tuple[str, int]] = []
    try:
        for folder, listing in Tree(IMAGES.extensions).walk(str(Path(root))):
            relative = os.path.relpath(folder, root)
            files += [(os.path.normpath(os.path.join(relative, name)), 0) for name in listing.files]
            for reason, name in listing.skipped:
                passed_over.add(reason, os.path.normpath(os.path.join(relative, name)))
    except OSError as error:
        raise UserError(f"{key}: cannot list {error.filename!r}: {error.strerror}; make it readable") from error
    if not files:
        raise UserError(f"{key}: {path!r} holds no images ({', '.join(IMAGES.extensions)}); give a folder with some")
    source = ImageFolder(f"images:{root}", root, [], sorted(files))
    source.passed_over = passed_over
    return source
