"""Which samples are a split's: by the names of folders and files, or held out by a hash.

A dataset without a validation part is divided by `part`, in the same way for every source: samples are ranked by a hash, and
the first tenth of each class is held out. What is hashed differs, since runs of earlier versions resume with the samples that
they had: image folders and volumes hash relative file names with BLAKE2b, tar shards keys and Parquet files rows with XXH3, and
data that has no names (arrays, some of torchvision's sets) counts as one class that is ranked by its index (`hold_out`).
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from bigvision.data.sources.base import Sample, Source, Split
from bigvision.errors import UserError

HELD_OUT = 0.1
"""The share of a dataset without a validation part that is held out for it."""
VAL_FOLDERS = ("val", "valid", "validation", "test")
"""The names of a validation part, the first that is there. Other spellings count where these are missing."""
Role = Literal["train", "val", "test"]
ROLES: dict[str, Role] = {
    **dict.fromkeys(("train", "training", "trn", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "development", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
FILLERS = ("set", "data", "dataset", "split", "folder", "images", "image", "imgs", "img")
"""Words that say nothing in the name of a split's folder: train_set, TestImages, val-data."""


# Holdouts


class Subset(Source):
    """The samples *indices* of another source, in that order: what training or validation gets of data that both share."""

    divided = True

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray) -> None:
        self.source = source
        self.name, self.classes, self.style, self.channels = source.name, source.classes, source.style, source.channels
        self.location, self.linked = source.location, source.linked
        self.noun, self.passed_over, self.notes = source.noun, source.passed_over, source.notes
        # A tensor: workers share it.
        self.indices = torch.as_tensor(np.asarray(indices, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Sample:
        return self.source.read(int(self.indices[index]))

    def label(self, index: int) -> int:
        return self.source.label(int(self.indices[index]))

    def where(self, index: int) -> str:
        return self.source.where(int(self.indices[index]))

    def key(self, index: int) -> bytes:
        return self.source.key(int(self.indices[index]))

    def size(self, index: int) -> int:
        return self.source.size(int(self.indices[index]))

    def image_size(self, index: int) -> tuple[int, int] | None:
        return self.source.image_size(int(self.indices[index]))

    def origins(self) -> Iterable[str]:
        return self.source.origins()


def part(hashes: np.ndarray, labels: np.ndarray, split: Split) -> np.ndarray:
    """The samples of *split* in a set that training and validation share: a fixed tenth of each class is held out.

    Args:
        hashes: (N,) of what each sample is called, so that samples added later hardly move others between the splits.
        labels: (N,) whole numbers.

    Returns:
        Ascending indices, int64. At least one of each class stays for training.
    """
    order = np.lexsort((hashes, labels))
    _, begin, which, counts = np.unique(labels[order], return_index=True, return_inverse=True, return_counts=True)
    held = np.minimum(np.maximum(1, np.rint(HELD_OUT * counts)), counts - 1)
    is_held = np.arange(len(order)) - begin[which] < held[which]
    return np.sort(order[is_held if split == "val" else ~is_held])


def hold_out(source: Source, split: Split) -> Subset:
    """A fixed tenth of *source* for ``val``, the rest for ``train``, whatever the classes: for data that has no names."""
    # A counter-based generator is a hash of the index.
    hashes = np.random.Philox(key=0).random_raw(len(source))
    return Subset(source, part(hashes, np.zeros(len(source), dtype=np.int64), split))


def hash_file_names(names: Iterable[str]) -> np.ndarray:
    """uint64 (N,): the first bytes of a BLAKE2b hash of each name."""
    return np.array([int.from_bytes(hashlib.blake2b(os.fsencode(name)).digest()[:8], "big") for name in names], dtype=np.uint64)


# The names of splits


class SplitName(NamedTuple):
    role: Role
    rest: str
    """What the name says besides: "seg" of seg_train. Folders are splits of one dataset where it is the same."""


def split_name(name: str) -> SplitName | None:
    """What *name* says of a split, in any case, with or without words such as set and images; None for another name."""
    words, role = [], None
    for word in re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).casefold()):
        word = word.rstrip("0123456789")  # train2017
        bare = next((word.removesuffix(filler) for filler in FILLERS if word.removesuffix(filler) in ROLES), word)
        if bare in ROLES and role is None:
            role = ROLES[bare]
        elif bare in ROLES:
            return None  # of both: train_val
        elif word and word not in FILLERS:
            words.append(word)
    return SplitName(role, "_".join(words)) if role is not None else None


def by_role(names: Iterable[str]) -> dict[str, list[str]] | None:
    """The *names* by the role that they have as splits, where each has one and both training and validation are there."""
    found: dict[str, list[str]] = {}
    for name in names:
        if (split := split_name(name)) is None:
            return None
        found.setdefault(split.role, []).append(name)
    return found if "train" in found and len(found) > 1 else None


def named_parts(names: Collection[str], *, key: str, where: str) -> tuple[str | None, str | None]:
    """The names of the training and of the validation part among *names*: "train" and those of `VAL_FOLDERS`, or else the only
    ones in other spellings. Raises `UserError` where there are several."""
    found: dict[Role, list[str]] = {"train": [], "val": [], "test": []}
    for name in sorted(names):
        if (split := split_name(name)) is not None and not split.rest:
            found[split.role].append(name)
    val = first_val(names)
    if val == "test":  # earlier versions took it, whatever else there was
        val = None if found["val"] else "test"
        found["val"] += ["test"] if found["val"] else []

    def only(several: list[str]) -> str | None:
        if len(several) > 1:
            raise UserError(f"{key}: {where} could mean {several[0]} or {several[1]} as a split: rename all but one")
        return several[0] if several else None

    return "train" if "train" in names else only(found["train"]), val or only(found["val"]) or only(found["test"])


def first_val(names: Collection[str]) -> str | None:
    """The name of the validation part among *names*, which are as in `VAL_FOLDERS`."""
    return next((name for name in VAL_FOLDERS if name in names), None)


# Paths


REMOTE = re.compile(r"(?:[a-z0-9.+-]+:)?([a-z][a-z0-9.+-]*)://", re.IGNORECASE)
HUB = re.compile(
    r"(?:[a-z]+:)?(?:(?:hf|https?)://(?:huggingface\.co/)?datasets/)?(\w[\w.-]*/\w[\w.-]*)/?", re.IGNORECASE | re.ASCII
)  # fmt: skip


def check_local(text: str, key: str) -> None:
    """Raise `UserError` where *text* is a URL, with what to do instead: data is read from files that all hosts see."""
    if match := REMOTE.match(text):
        instead = from_the_hub(text) or "download it, or mount it as a folder, and give that"
        raise UserError(f"{key}: {text!r} is not read, {match[1]}:// is not supported: {instead}")


def from_the_hub(text: str) -> str:
    """How to get the dataset of the Hugging Face Hub that *text* may name; "" where it does not look like one."""
    if (match := HUB.fullmatch(text)) is None:
        return ""
    name, folder = match[1], match[1].partition("/")[2]
    return f"download it with: hf download {name} --repo-type dataset --local-dir {folder}, and give parquet:{folder}"


def near_path(path: str) -> str:
    """``"; did you mean 'x'?"`` for the existing path most like *path*, which does not exist, or ``""``."""
    parent, missing = os.path.split(path.rstrip(os.sep))
    rest: list[str] = []
    while parent and not os.path.isdir(parent):
        parent, name = os.path.split(parent)
        rest, missing = [missing, *rest], name
    try:
        names = [name for name in sorted(os.listdir(parent or ".")) if not name.startswith(".")]
    except OSError:
        return ""
    close = difflib.get_close_matches(missing, names, n=1) or [name for name in names if name.lower() == missing.lower()]
    if not close:
        return ""
    found = os.path.join(parent, close[0])
    whole = os.path.join(found, *rest)
    return f"; did you mean {whole if os.path.exists(whole) else found!r}?"


def is_within(path: str, folder: str) -> bool:
    """Whether *path* is *folder* or below it; both are absolute and resolved."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def check_apart(train: Source, val: Source) -> str:
    """Return a note of the files that both sources read, "" where there is none.

    Raises:
        UserError: they are half of the validation data or more, or all of the training data.
    """
    ours, theirs = in_both(train, val)
    if not (both := ours & theirs):
        return ""
    if 2 * len(both) >= len(theirs) or both == ours:
        raise UserError(
            f"data.val: {val.name} has {len(both):,} files that data.train, {train.name}, trains on, as {min(both)!r}: give "
            "other validation data, or the same in both, without a validation part, so that a tenth is held out"
        )
    number = f"{len(both):,} of the {len(theirs):,} files of {val.name}"
    return f"{number} are in the training data too, as {min(both)!r}: what was seen in training tells little of other images"


def in_both(train: Source, val: Source) -> tuple[set[str], set[str]]:
    """The files of each source, resolved; nothing where they have none in common."""
    ends = [os.path.realpath(source.location) for source in (train, val) if source.location]
    apart = len(ends) == 2 and not is_within(*ends) and not is_within(*reversed(ends))
    # Links lead anywhere; without them folders that are apart have no file in common.
    if not train.linked and not val.linked and (apart or not _folders(train) & _folders(val)):
        return set(), set()
    return _resolved(train), _resolved(val)


def _folders(source: Source) -> set[str]:
    """The folders of its files, resolved: few, where the files may be millions."""
    return set(map(os.path.realpath, {os.path.dirname(file) for file in source.origins()}))


def _resolved(source: Source) -> set[str]:
    """The files of *source*, resolved: a file's folder once, and itself where it is a link, since there may be millions."""
    folders: dict[str, str] = {}
    found = set()
    for file in source.origins():
        folder, name = os.path.split(file)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        path = os.path.join(folders[folder], name)
        found.add(os.path.realpath(path) if source.linked and os.path.islink(path) else path)
    return found
