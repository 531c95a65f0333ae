"""Which files and samples are a split's: by the names of folders and files, or held out by a hash.

A dataset without a validation part is divided by `part`, in the same way for every source: samples are ranked by a hash, and
the first tenth of each class is held out. What is hashed differs, since runs of earlier versions resume with the samples that
they had: image folders and volumes hash relative file names with BLAKE2b, tar shards keys and Parquet files rows with XXH3, and
data that has no names (arrays, some of torchvision's sets) counts as one class that is ranked by its index (`hold_out`).
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
import re
from collections.abc import Collection, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import xxhash

from bigvision.data.labels import CLASS_FILES
from bigvision.data.sources.base import Opening, PassedOver, Source, Split, Subset
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
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
MOST_FILES = 1_000_000


# Holdouts


def part(hashes: np.ndarray, labels: np.ndarray, split: Split, otherwise: str) -> np.ndarray:
    """The samples of *split*, as ascending indices, in a set that training and validation share: a fixed tenth of each class is
    held out, and at least one stays for training. *otherwise* is the error where each class has one sample.

    Each sample's hash is of what it is called, so that samples added later hardly move others between the splits.
    """
    order = np.lexsort((hashes, labels))
    _, begin, which, counts = np.unique(labels[order], return_index=True, return_inverse=True, return_counts=True)
    held = np.minimum(np.maximum(1, np.rint(HELD_OUT * counts)), counts - 1)
    is_held = np.arange(len(order)) - begin[which] < held[which]
    kept = np.sort(order[is_held if split == "val" else ~is_held])
    if not len(kept):
        raise UserError(otherwise)
    return kept


def hold_out(source: Source, split: Split, otherwise: str) -> Subset:
    """A fixed tenth of *source* for ``val``, the rest for ``train``, whatever the classes: for data that has no names."""
    if len(source) < 2:
        raise UserError(otherwise)
    # A counter-based generator is a hash of the index.
    hashes = np.random.Philox(key=0).random_raw(len(source))
    return Subset(source, part(hashes, np.zeros(len(source), dtype=np.int64), split, otherwise))


def blake2_hashes(names: Iterable[str]) -> np.ndarray:
    return np.array([int.from_bytes(hashlib.blake2b(os.fsencode(name)).digest()[:8], "big") for name in names], dtype=np.uint64)


def xxh3_hashes(names: Iterable[bytes]) -> np.ndarray:
    return np.array([xxhash.xxh3_64_intdigest(name) for name in names], dtype=np.uint64)


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


def part_for(
    opening: Opening, train: str | None, val: str | None, *, has: str, fix: str, slash: str = ""
) -> tuple[str, bool]:  # fmt: skip
    """Which of the parts that `named_parts` found the split is in, and whether to hold out a tenth of it; "" is data without
    parts. *has* and *fix* are how the error begins and ends where there is none.
    """
    if opening.split == "val" and val is not None:
        return val, False
    if train is None or (train and opening.split == "val" and not opening.shared):
        lacks = "train" if opening.split == "train" or opening.shared else "val"
        raise UserError(f"{opening.key}: {has} but no {lacks}{slash}; {fix}")
    return train, opening.shared and val is None


def first_val(names: Collection[str]) -> str | None:
    """The name of the validation part among *names*, which are as in `VAL_FOLDERS`."""
    return next((name for name in VAL_FOLDERS if name in names), None)


# Files


class Chosen(NamedTuple):
    files: list[Path]
    hold_out: bool
    """Whether training and validation share these files, so that a part of the samples is to be held out."""
    folders: list[Path]
    """Where a file with the classes may lie."""
    passed_over: PassedOver
    """Other files in the folder."""


def choose_files(argument: str, suffix: str, opening: Opening) -> Chosen:
    """Find a split's files in *argument*: a file, a pattern (with ``{000..009}``, ``{a,b}``, ``*``, ``?``), or a folder.

    A folder's files belong to the splits whose names (train; val, valid, validation, test; or another spelling) its subfolders
    have, or else words of the files' names; without such names they are used whole. So are a pattern's, unless it matches
    files of both splits. Raises `UserError` where there are none, or they are compressed.
    """
    path, key, passed_over = Path(argument).expanduser(), opening.key, PassedOver()
    try:
        if path.is_dir():
            found, folders = _in_folder(path, suffix, key)
            _count_others([path] if "" in found else {files[0].parent: None for files in found.values()}, suffix, passed_over)
        else:
            files = [path] if path.is_file() else matching(str(path), suffix, key)
            for file in files:
                _refuse_compressed(file, key)
            found, folders = _by_name(files), [files[0].parent, files[0].parent.parent]
            if "train" not in found or not first_val(found):
                found = {"": files}
    except OSError as error:
        raise UserError(f"{key}: cannot list {error.filename!r}: {error.strerror}; make it readable") from error
    if "" in found and len(found) > 1:
        raise UserError(f"{key}: is {str(found[''][0])!r} for training or validation? rename it, or name files by a pattern")
    train, val = "train" if "train" in found else None, first_val(found)
    if train is None and val is None:
        return Chosen(found[""], opening.shared, folders, passed_over)
    fix = "add it, or name this split's files by a pattern"
    name, hold = part_for(opening, train, val, has=f"{argument!r} has {val or train}", fix=fix)
    files = found[name]
    # Each split's own list of the classes is the one that its numbers are places in.
    folders.sort(key=lambda folder: folder != files[0].parent)
    return Chosen(files, hold, folders, passed_over)


def _in_folder(root: Path, suffix: str, key: str) -> tuple[dict[str, list[Path]], list[Path]]:
    """The files by split, "" where there are no splits, and the folders in which a file with the classes may lie."""
    inside = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and split_name(entry.name) is not None)
    parts = {name: files for name in inside if (files := _listed(root / name, suffix, key))}
    train, val = named_parts(parts, key=key, where=repr(str(root)))
    if train is not None or val is not None:
        known = val if val in VAL_FOLDERS else "val"
        chosen = {role: parts[name] for role, name in (("train", train), (known, val)) if name is not None}
        return chosen, [root, *dict.fromkeys(files[0].parent for files in chosen.values())]
    # The Hub keeps a dataset's files in data/.
    for folder in (root, root / "data"):
        if files := _listed(folder, suffix, key):
            return _by_name(files), [root, folder]
    inside = [entry for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")]
    if len(inside) == 1:  # one more level, as archives have it
        found, folders = _in_folder(Path(inside[0].path), suffix, key)
        return found, [root, *folders]
    raise UserError(f"{key}: {str(root)!r} holds no *{suffix} file, nor do train/, val/ or data/ in it; give their folder")


def _count_others(folders: Iterable[Path], suffix: str, passed_over: PassedOver) -> None:
    for folder in folders:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_dir() or entry.name.lower().endswith((suffix, ".index")) or entry.name in CLASS_FILES:
                continue
            reason = os.path.splitext(entry.name)[1].lower() or "without an extension"
            passed_over.add("hidden" if entry.name.startswith(".") else reason, entry.name)


def _listed(folder: Path, suffix: str, key: str) -> list[Path]:
    if not folder.is_dir():
        return []
    files = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith("."))
    found = [file for file in files if file.name.lower().endswith(suffix)]
    for file in files:
        plain = file.with_suffix(".tar" if file.suffix == ".tgz" else "")
        if plain.name.lower().endswith(suffix) and plain not in found:
            _refuse_compressed(file, key)
    return found


def _refuse_compressed(file: Path, key: str) -> None:
    # Samples are read where they lie, which a compressed stream does not allow; and images hardly get smaller.
    if file.suffix.lower() in (*COMPRESSED, ".tgz"):
        raise UserError(f"{key}: {str(file)!r} is compressed; decompress it")


def _by_name(files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files by the split that their names tell, ``""`` where they do not."""
    found: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[-_.]", file.name.lower())
        found.setdefault(next((word for word in words if word in ("train", *VAL_FOLDERS)), ""), []).append(file)
    roles = [split.role if (split := split_name(file.stem)) else "" for file in files]
    if "" in found and "" not in roles and {"train"} < set(roles):
        # Words such as "training" and "dev" count where all files have one.
        return {role: [file for file, other in zip(files, roles) if other == role] for role in dict.fromkeys(roles)}
    return found


def matching(pattern: str, suffix: str, key: str) -> list[Path]:
    """The files that *pattern* names, those ending in *suffix* or compressed. Raises `UserError` where there are none."""
    files: dict[str, None] = {}
    for name in _braces(pattern, key):
        if glob.has_magic(name):
            matched = (file for file in sorted(glob.glob(name)) if os.path.isfile(file))
            files.update((file, None) for file in matched if file.lower().endswith((suffix, ".tgz", *COMPRESSED)))
        elif os.path.isfile(name):
            files[name] = None
        else:
            hint = near_path(name) or f"; {from_the_hub(pattern) or 'give an existing file, pattern or folder'}"
            raise UserError(f"{key}: no file {name!r}{hint}")
    if not files:
        raise UserError(f"{key}: no file matches {pattern!r}; give an existing file, pattern or folder")
    return [Path(file) for file in files]


def _braces(pattern: str, key: str) -> list[str]:
    """Expand ``{000..009}`` and ``{a,b}`` as shells do."""
    pieces: list[list[str]] = []
    count = 1
    for piece in re.split(r"(\{[^{}]*\})", pattern):
        span = re.fullmatch(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}", piece)
        if span:
            begin, end = int(span[1]), int(span[2])
            count *= max(0, end - begin + 1)
            if count > MOST_FILES:
                raise UserError(f"{key}: {pattern!r} names more than {MOST_FILES:,} files; correct the braces")
            width = max(len(span[1]), len(span[2])) if "0" in (span[1][0], span[2][0]) else 0
            pieces.append([f"{number:0{width}}" for number in range(begin, end + 1)])
        elif piece.startswith("{") and "," in piece:
            pieces.append(piece[1:-1].split(","))
        else:
            pieces.append([piece])
    return ["".join(parts) for parts in product(*pieces)]


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


def check_apart(train: Source, val: Source) -> None:
    """Add a note to *val* where both sources read the same files; if these are much of it, raise `UserError`."""
    ends = [os.path.realpath(source.location) for source in (train, val) if source.location]
    apart = len(ends) == 2 and not is_within(*ends) and not is_within(*reversed(ends))
    # Links lead anywhere; without them folders that are apart have no file in common.
    if not train.linked and not val.linked and (apart or not _folders(train) & _folders(val)):
        return
    ours, theirs = _resolved(train), _resolved(val)
    if not (both := ours & theirs):
        return
    if 2 * len(both) >= len(theirs) or both == ours:
        raise UserError(
            f"data.val: {val.name} has {len(both):,} files that data.train, {train.name}, trains on, as {min(both)!r}: give "
            "other validation data, or the same in both, without a validation part, so that a tenth is held out"
        )
    number = f"{len(both):,} of the {len(theirs):,} files of {val.name}"
    note = f"{number} are in the training data too, as {min(both)!r}: what was seen in training tells little of other images"
    val.notes = (*val.notes, note)


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
