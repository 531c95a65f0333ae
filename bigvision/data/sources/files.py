"""Datasets in a few large files: which files are a split's, and which samples are held out."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from bigvision.data.labels import CLASS_FILES
from bigvision.data.sources.base import PassedOver, Split
from bigvision.data.splits import VAL_FOLDERS, by_role, first_val, from_the_hub, named_parts, near_path, split_name
from bigvision.errors import UserError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
MOST_FILES = 1_000_000


class Chosen(NamedTuple):
    files: list[Path]
    hold_out: bool
    """Whether training and validation share these files, so that a part of the samples is to be held out."""
    folders: list[Path]
    """Where a file with the classes may lie."""
    passed_over: PassedOver
    """Other files in the folder."""


def choose_files(argument: str, split: Split, suffix: str, *, key: str, shared: bool) -> Chosen:
    """Find the files of *split* in *argument*: a file, a pattern (with ``{000..009}``, ``{a,b}``, ``*``, ``?``), or a folder.

    A folder's files belong to the splits whose names (train; val, valid, validation, test; or another spelling) its subfolders
    have, or else words of the files' names; without such names they are used whole. So are a pattern's, unless it matches
    files of both splits.

    Raises:
        UserError: there are none, they are compressed, or the split is missing; the message names *key*.
    """
    path, passed_over = Path(argument).expanduser(), PassedOver()
    try:
        if path.is_dir():
            found, folders = _in_folder(path, suffix, key)
            _count_others([path] if "" in found else [files[0].parent for files in found.values()], suffix, passed_over)
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
    train, val = found.get("train"), first_val(found)
    if not train and not val:
        return Chosen(found[""], shared, folders, passed_over)
    if not train and split == "train":
        raise UserError(f"{key}: {argument!r} has {val} but no train; add it, or name the training files by a pattern")
    if not val and split == "val" and not shared:
        raise UserError(f"{key}: {argument!r} has train but no val; add it, or name the validation files by a pattern")
    files = found[val] if val and split == "val" else train
    assert files
    # Each split's own list of the classes is the one that its numbers are places in.
    folders.sort(key=lambda folder: folder != files[0].parent)
    return Chosen(files, shared and not val, folders, passed_over)


def location_of(files: Sequence[str]) -> tuple[str, bool]:
    """The folder of *files*, or the only one of them; and whether one may lie elsewhere, as `Source.linked` has it."""
    folders = {os.path.dirname(file) for file in files}
    return os.path.commonpath(list(map(os.path.abspath, files))), any(map(os.path.islink, files)) or len(folders) > 1


def stamp(file: os.stat_result) -> tuple[int, int]:
    """What tells that a file has changed."""
    return file.st_size, file.st_mtime_ns


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


def _count_others(folders: Sequence[Path], suffix: str, passed_over: PassedOver) -> None:
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
    if "" in found and (roles := by_role(file.stem for file in files)):
        # Words such as "training" and "dev" count where all files have one.
        return {role: [file for file in files if file.stem in stems] for role, stems in roles.items()}
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
