"""Images with a mask each: folders of both, and what a mask may be."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.tv_tensors import Mask

from bigvision.data.decode import EXTENSIONS
from bigvision.data.labels import class_file, read_classes
from bigvision.data.layouts import Tree
from bigvision.data.sources.base import (
    Opening,
    PassedOver,
    Sample,
    Source,
    Texts,
    UnreadableSample,
    described,
    size_in_header,
)
from bigvision.data.splits import blake2_hashes, named_parts, near_path, part, part_for
from bigvision.disk import open_to_read, read_at
from bigvision.errors import UserError, either, one_line

IMAGES = ("images", "image", "imgs", "img")
MASKS = ("masks", "mask", "annotations", "annotation", "labels")
"""Names of the folders, in any case."""
LOOKED_AT = 1000
"""Masks, evenly spread, in which the largest id is looked for where no classes are listed."""
STEPS = {"L;2": 85, "L;4": 17}
"""Pillow spreads grey values of 2 and 4 bits over 0 to 255: by what it multiplies them."""


class MaskFolder(Source):
    """Image files and a PNG for each, whose values are the classes of the pixels."""

    lists_targets = False

    def __init__(self, name: str, root: str, pairs: Sequence[tuple[str, str]], classes: Sequence[str], ignore: int) -> None:
        """Args: *pairs*: the paths of each image and its mask below *root*."""
        self.name, self.classes, self.ignore = name, list(classes), ignore
        self.root = self.location = root
        self._images, self._masks = (Texts.of([os.fsencode(pair[which]) for pair in pairs]) for which in (0, 1))

    def __len__(self) -> int:
        return len(self._images)

    def path(self, index: int) -> str:
        """Return the image file of sample *index*."""
        return os.path.join(self.root, os.fsdecode(self._images[index]))

    def mask(self, index: int) -> np.ndarray:
        """The ids in the mask of sample *index*, (H, W). Raises `UnreadableSample`."""
        path = os.path.join(self.root, os.fsdecode(self._masks[index]))
        try:
            return ids_of(_content(path))
        except UnreadableSample as error:
            raise UnreadableSample(f"its mask {path}: {error}") from error

    def read(self, index: int) -> Sample:
        return Sample(_content(self.path(index)), as_mask(self.mask(index), self.classes, self.ignore))

    def label(self, index: int) -> Mask:
        """A mask without any label, of one pixel."""
        return as_mask(np.full((1, 1), self.ignore), self.classes, self.ignore)

    def where(self, index: int) -> str:
        return self.path(index)

    def key(self, index: int) -> bytes:
        return self._images[index]

    def size(self, index: int) -> int:
        # Of the mask: its size changes when its labels do, those of images are seen elsewhere.
        try:
            return os.stat(os.path.join(self.root, os.fsdecode(self._masks[index]))).st_size
        except OSError:
            return 0  # reading it will name the reason

    def image_size(self, index: int) -> tuple[int, int] | None:
        return size_in_header(self.path(index))

    def origins(self) -> Iterable[str]:
        return map(self.path, range(len(self)))


def _content(path: str) -> bytes:
    try:
        descriptor = open_to_read(path)
        try:
            return read_at(descriptor, 0, os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UnreadableSample(error.strerror or type(error).__name__) from error


# Masks.


def ids_of(mask: Any) -> np.ndarray:
    """The class ids in *mask*, (H, W), whole numbers: a PNG's bytes, an image of Pillow's, an array or a tensor.

    Raises `UnreadableSample`: it is damaged, or has no id for each pixel.
    """
    if isinstance(mask, bytes):
        try:
            with Image.open(io.BytesIO(mask)) as opened:
                # Before the pixels are loaded, which forgets how they were stored.
                step = STEPS.get(str(opened.tile[0][3]), 1) if opened.tile and opened.mode == "L" else 1
                return ids_of_pillow(opened) // step
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise UnreadableSample(one_line(error)) from error
    if isinstance(mask, Image.Image):
        return ids_of_pillow(mask)
    array = mask.numpy(force=True) if isinstance(mask, Tensor) else mask
    if isinstance(array, np.ndarray) and array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "biu":
        raise UnreadableSample(f"its mask is {described(mask)}; give a class id for each pixel: whole numbers (H, W)")
    return array


def ids_of_pillow(image: Image.Image) -> np.ndarray:
    """The values of a grey image or one with a palette."""
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        raise UnreadableSample(f"its mask has colours ({image.mode}); save class ids as grey values or as those of a palette")
    return np.asarray(image)


def as_mask(ids: np.ndarray, classes: Sequence[str], ignore: int) -> Mask:
    """*ids*, (H, W), as the target of a sample. Raises `UnreadableSample` for an id that is none of *classes*, nor *ignore*."""
    dtype = np.uint8 if max(len(classes) - 1, ignore) < 256 else np.int32
    low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
    if low < 0 or high >= len(classes):
        wrong = ids[((ids < 0) | (ids >= len(classes))) & (ids != ignore)]
        if wrong.size:
            raise UnreadableSample(
                f"its mask has the id {int(wrong[0])}, but classes are 0 to {len(classes) - 1} and task.ignore is {ignore}"
            )
    return Mask(torch.from_numpy(ids.astype(dtype)))


def counted_classes(
    count: int, ids: Callable[[int], np.ndarray], ignore: int, most: int = LOOKED_AT
) -> tuple[list[str], tuple[str, ...]]:
    """The classes of *count* masks, whose ids *ids* gives: numbers up to the largest that occurs; and notes on that.

    Of many masks *most* are read, evenly spread, and those that cannot be read are passed over.
    """
    looked = min(count, most)
    largest = 0
    for number in range(looked):
        try:
            found = ids(number * count // looked)
        except UnreadableSample:
            continue
        largest = max(largest, int(found[found != ignore].max(initial=0)))
    some = f"{looked:,} of {count:,} masks" if looked < count else "the masks"
    note = f"classes are the ids 0 to {largest}, the largest in {some}; name them in data.classes"
    return [str(number) for number in range(largest + 1)], (note,)


# Folders.


def open_mask_folder(argument: str, opening: Opening) -> MaskFolder:
    """Open the folder *argument*, which holds ``images`` and ``masks`` (or ``annotations``) with files of the same names.

    Folders named like splits may be in both of them, ``images/training``, as in ADE20k, or around them, ``train/images``.
    Without any a tenth is held out where training and validation share the folder, by hashes of the image names.
    """
    root, key = os.path.expanduser(argument), opening.key
    if not os.path.isdir(root):
        hint = near_path(root) or "; give an existing one as imagefolder:PATH"
        raise UserError(f"{key}: no folder {argument!r}{hint}")
    tree, passed_over = Tree(EXTENSIONS), PassedOver()
    try:
        (images, masks), hold_out = _folders(root, tree, opening)
        pairs, skipped = _pairs(root, images, masks, tree, key)
    except OSError as error:
        raise UserError(f"{key}: cannot list {error.filename!r}: {error.strerror}; make it readable") from error
    for reason, path in skipped:
        passed_over.add(reason, path)
    if hold_out:
        # Before it is divided, so that both parts have the same classes.
        otherwise = f"{key}: {argument!r} has one image, none can be held out; add some or validation data"
        hashes = blake2_hashes(os.path.relpath(image, images) for image, _ in pairs)
        chosen = [pairs[index] for index in part(hashes, np.zeros(len(pairs), np.int64), opening.split, otherwise)]
    else:
        chosen = pairs
    source = MaskFolder(f"imagefolder:{root}", root, chosen, opening.classes or [], opening.ignore)
    if opening.classes is None:
        folders = list(dict.fromkeys((root, os.path.dirname(os.path.join(root, images)))))
        if (listed := class_file(list(map(Path, folders)))) is not None:
            source.classes = read_classes(str(listed), key)
        else:
            whole = MaskFolder(source.name, root, pairs, [], opening.ignore)
            source.classes, source.notes = counted_classes(len(whole), whole.mask, opening.ignore)
    source.passed_over, source.linked = passed_over, tree.linked
    source.divided = hold_out and not tree.linked
    return source


def _folders(root: str, tree: Tree, opening: Opening) -> tuple[tuple[str, str], bool]:
    """The folders of the split's images and masks below *root*, and whether to hold out a part of them."""
    key, inside = opening.key, tree.list(root).folders
    both = [_one(root, inside, names, key) for names in (IMAGES, MASKS)]
    if all(both):
        images, masks = both
        inner = [set(tree.list(os.path.join(root, folder)).folders) for folder in both]
        train, val = named_parts(inner[0] & inner[1], key=key, where=repr(os.path.join(root, images)))
        if (train or val) and not tree.list(os.path.join(root, images)).files:
            has, fix = f"{os.path.join(root, images)!r} has {val or train}/", "add one in images and masks"
            name, hold_out = part_for(opening, train, val, has=has, fix=fix, slash="/")
            return (os.path.join(images, name), os.path.join(masks, name)), hold_out
        return (images, masks), opening.shared
    if not any(both):
        train, val = named_parts(inside, key=key, where=repr(root))
        if train or val:
            has, fix = f"{root!r} has {val or train}/", "add one, or name this split's folder itself"
            name, hold_out = part_for(opening, train, val, has=has, fix=fix, slash="/")
            folder = os.path.join(root, name)
            both = [_one(folder, tree.list(folder).folders, names, key) for names in (IMAGES, MASKS)]
            if all(both):
                return (os.path.join(name, both[0]), os.path.join(name, both[1])), hold_out
            root = folder
    lacks = " and ".join(either([f"{name}/" for name in names[::2]]) for names, one in zip((IMAGES, MASKS), both) if not one)
    raise UserError(
        f"{key}: {root!r} has no folder {lacks}: put images in images/ and a PNG of the same name for each in masks/"
    )


def _one(root: str, inside: Sequence[str], names: Sequence[str], key: str) -> str:
    """The folder in *root*, which has the folders *inside*, that has one of *names*; "" for none."""
    found = [name for name in inside if name.casefold() in names]
    if len(found) > 1:
        raise UserError(f"{key}: {root!r} has {found[0]}/ and {found[1]}/, which may both be meant: rename one of them")
    return found[0] if found else ""


def _pairs(
    root: str, images: str, masks: str, tree: Tree, key: str
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:  # fmt: skip
    """The paths of each image and its mask below *root*, and the reasons and paths of what else lies there."""
    found: dict[str, dict[str, str]] = {images: {}, masks: {}}
    skipped: list[tuple[str, str]] = []
    for folder, files in found.items():
        for path, listing in tree.walk(os.path.join(root, folder)):
            skipped += [(reason, os.path.relpath(os.path.join(path, name), root)) for reason, name in listing.skipped]
            for name in sorted(listing.files):
                file = os.path.relpath(os.path.join(path, name), root)
                stem, extension = os.path.splitext(os.path.relpath(file, folder))
                if folder == masks and extension.lower() != ".png":
                    raise UserError(
                        f"{key}: {os.path.join(root, file)!r} is no PNG, which masks are, since it keeps each value"
                    )
                if stem in files:
                    raise UserError(f"{key}: {root!r} has {files[stem]!r} and {file!r}, of one name: remove one of them")
                files[stem] = file
    for ours, theirs, fix in ((images, masks, "add it, or remove the image"), (masks, images, "add it, or remove the mask")):
        without = sorted(found[ours].keys() - found[theirs].keys())
        if without:
            what, lacks = ("image", "mask") if ours == images else ("mask", "image")
            more = f", like {len(without) - 1:,} more" if len(without) > 1 else ""
            file = os.path.join(root, found[ours][without[0]])
            raise UserError(f"{key}: the {what} {file!r} has no {lacks} of this name in {theirs}/{more}: {fix}")
    if not found[images]:
        raise UserError(f"{key}: {os.path.join(root, images)!r} holds no image ({', '.join(EXTENSIONS)}); add some")
    return [(found[images][stem], found[masks][stem]) for stem in sorted(found[images])], skipped
