"""The manifest: what a checkpoint consists of, and the checksum of every byte of it."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = 1
NAME = "manifest.json"
CHUNK = 16 << 20
"""Bytes read, written and summed at a time."""


class Damaged(Exception):
    """A checkpoint that does not verify; says which file and what is wrong with it."""


@dataclass(frozen=True)
class Run:
    """Bytes that were written in one piece."""

    file: str
    offset: int
    length: int
    crc32: int


def build(sizes: dict[str, int], runs: list[Run]) -> dict[str, Any]:
    """The manifest of files of these *sizes*, made of *runs*."""
    files: dict[str, Any] = {name: {"size": size, "runs": []} for name, size in sizes.items()}
    for run in sorted(runs, key=lambda run: (run.file, run.offset)):
        files[run.file]["runs"].append([run.offset, run.length, run.crc32])
    for name, file in files.items():
        assert _covered(file), f"{name}: the runs written do not add up to the file"
    return {"format": "bigvision", "version": VERSION, "files": files}


def read(folder: Path) -> dict[str, list[Run]]:
    """Return the runs of each file of the checkpoint *folder*, after checking the manifest and the files' sizes.

    Raises:
        Damaged: the manifest or a file is missing, cut or not what the manifest says.
    """
    try:
        manifest = json.loads((folder / NAME).read_bytes())
        if manifest["format"] != "bigvision" or manifest["version"] != VERSION:
            raise Damaged(f"{NAME}: format {manifest['format']} version {manifest['version']}, this is bigvision {VERSION}")
        files = manifest["files"]
        runs = {name: [Run(name, *(int(n) for n in run)) for run in file["runs"]] for name, file in files.items()}
        complete = all(_covered(file) for file in files.values())
    except FileNotFoundError:
        raise Damaged(f"{NAME} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{NAME} cannot be read: {error}") from None
    if not complete or not {"progress.json", "config.json"} <= set(files):
        raise Damaged(f"{NAME} does not describe whole files")
    for name, file in files.items():
        # A name is never a path: nothing outside the folder is ever opened.
        if name != os.path.basename(name) or name in ("", ".", ".."):
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
        if checksum(folder / run.file, run.offset, run.length) != run.crc32:
            raise Damaged(f"{run.file} differs from its checksum in the {run.length} bytes from {run.offset}")


def checksum(path: Path, offset: int, length: int) -> int:
    """CRC-32 of *length* bytes of a file from *offset*."""
    crc = 0
    with path.open("rb", buffering=0) as file:
        for begin, end in chunks(offset, length):
            crc = zlib.crc32(os.pread(file.fileno(), end - begin, begin), crc)
    return crc


def chunks(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut the bytes [offset, offset + length) into pieces of at most :data:`CHUNK`."""
    for begin in range(offset, offset + length, CHUNK):
        yield begin, min(begin + CHUNK, offset + length)


def _covered(file: dict[str, Any]) -> bool:
    position = 0
    for offset, length, _ in file["runs"]:
        if offset != position or length < 0:
            return False
        position += length
    return position == file["size"]
