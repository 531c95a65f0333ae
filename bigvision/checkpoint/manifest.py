"""The manifest: what a checkpoint consists of, and the checksum of every byte of it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_intdigest

from bigvision.checkpoint.disk import open_existing

VERSION = 2
NAME = "manifest.json"
LARGEST = 1 << 30
"""Bytes of the largest JSON file that is read."""
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
"""The names of files that a checkpoint may have."""
CHUNK = 8 << 20
"""Bytes read, written and summed at a time."""


class Damaged(Exception):
    """A checkpoint that does not verify; says which file and what is wrong with it."""


@dataclass(frozen=True)
class Run:
    """Bytes that were written in one piece."""

    file: str
    offset: int
    length: int
    checksum: int
    """XXH3, 64 bits."""


def checksum(data: Any) -> int:
    """The checksum of bytes: XXH3 (Collet 2019), 64 bits, faster than memory is read."""
    return xxh3_64_intdigest(data)


def build(sizes: dict[str, int], runs: list[Run]) -> bytes:
    """The manifest of files of these *sizes*, made of *runs*."""
    files: dict[str, Any] = {name: {"size": size, "runs": []} for name, size in sizes.items()}
    for run in sorted(runs, key=lambda run: (run.file, run.offset)):
        files[run.file]["runs"].append([run.offset, run.length, run.checksum])
    for name, file in files.items():
        assert _covered(file), f"{name}: the runs written do not add up to the file"
    content = {"format": "bigvision", "version": VERSION, "files": files}
    # Last, so that the rest can be summed as it is: a manifest that was changed anywhere is noticed.
    return _text(content | {"checksum": checksum(_text(content))})


def read(folder: Path) -> dict[str, list[Run]]:
    """Return the runs of each file of the checkpoint *folder*, after checking the manifest and the files' sizes.

    Raises:
        Damaged: the manifest or a file is missing, cut or not what the manifest says.
    """
    text = _read_text(folder)
    try:
        manifest = json.loads(text)
        if manifest["format"] != "bigvision" or manifest["version"] != VERSION:
            raise Damaged(f"{NAME}: format {manifest['format']!r} version {manifest['version']!r}, this is bigvision {VERSION}")
        found = manifest.pop("checksum")
        if text != _text(manifest | {"checksum": found}) or found != checksum(_text(manifest)):
            raise Damaged(f"{NAME} differs from its checksum")
        files = manifest["files"]
        runs = {name: [Run(name, *(int(n) for n in run)) for run in file["runs"]] for name, file in files.items()}
        complete = all(_covered(file) for file in files.values())
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Damaged(f"{NAME} cannot be read: {type(error).__name__}: {error}") from None
    if not complete or not {"progress.json", "config.json"} <= set(files):
        raise Damaged(f"{NAME} does not describe whole files")
    for name, file in files.items():
        # A name is never a path: nothing outside the folder is ever opened.
        if not PLAIN.fullmatch(name):
            raise Damaged(f"{NAME} names {name!r}, which is not a plain file name")
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise Damaged(f"{name} is missing")
        if (size := path.stat().st_size) != file["size"]:
            raise Damaged(f"{name} has {size} bytes, not {file['size']}")
    return runs


def verify(folder: Path, runs: list[Run]) -> None:
    """Read the bytes of *runs* and compare their checksums.

    Raises:
        Damaged: names the file and the first byte of the run that differs.
    """
    for run in runs:
        read_run(folder, run)


def read_run(folder: Path, run: Run) -> bytes:
    """Return the bytes of *run*, verified.

    Raises:
        Damaged: they are not what was written, or cannot be read.
    """
    try:
        descriptor = open_existing(folder / run.file, os.O_RDONLY)
        try:
            data = os.pread(descriptor, run.length, run.offset)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise Damaged(f"{run.file} cannot be read: {error.strerror}") from None
    if checksum(data) != run.checksum:
        raise Damaged(differs(run))
    return data


def read_document(folder: Path, runs: dict[str, list[Run]], name: str) -> dict[str, Any]:
    """Return the JSON object in a file of the checkpoint.

    Raises:
        Damaged: not what was written, or no JSON object.
    """
    try:
        content = json.loads(b"".join(read_run(folder, run) for run in runs[name]))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise Damaged(f"{name} holds no JSON object")
    return content


def differs(run: Run) -> str:
    """What is wrong with a run whose checksum is another."""
    return f"{run.file} differs from its checksum in the {run.length} bytes from {run.offset}"


def chunks(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut the bytes [offset, offset + length) into pieces of at most :data:`CHUNK`."""
    for begin in range(offset, offset + length, CHUNK):
        yield begin, min(begin + CHUNK, offset + length)


def _read_text(folder: Path) -> bytes:
    try:
        if (folder / NAME).is_symlink() or not (folder / NAME).is_file():
            raise Damaged(f"{NAME} is missing")
        descriptor = open_existing(folder / NAME, os.O_RDONLY)
        with open(descriptor, "rb") as file:
            text = file.read(LARGEST + 1)
    except OSError as error:
        raise Damaged(f"{NAME} cannot be read: {error.strerror}") from None
    if len(text) > LARGEST:
        raise Damaged(f"{NAME} is larger than {LARGEST} bytes")
    return text


def _text(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def _covered(file: dict[str, Any]) -> bool:
    position = 0
    for offset, length, _ in file["runs"]:
        if offset != position or length < 0:
            return False
        position += length
    return position == file["size"]
