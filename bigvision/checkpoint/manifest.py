"""The manifest: what a checkpoint consists of, and the checksum of every byte of it."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from xxhash import xxh3_64_intdigest

from bigvision.checkpoint.disk import open_existing, read_at

T = TypeVar("T")

VERSION = 2
NAME = "manifest.json"
LARGEST = 1 << 30
"""Bytes of the largest JSON file that is read."""
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
"""The names of files that a checkpoint may have."""
CHUNK = 8 << 20
"""Bytes read, written and summed at a time."""

PAUSES = (0.2, 1.0, 3.0)
"""Seconds between tries where the system cannot read: file servers restart, and mounts come back."""
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.ENXIO)
"""What the system reports where there is no file, or a link, a folder or a socket in its place."""


class Damaged(Exception):
    """A checkpoint that does not verify; says which file and what is wrong with it.

    Only a missing file, a wrong size and a wrong checksum are damage. What the system cannot read is a `ReadError`.
    """

    def __init__(self, text: str, run: Run | None = None) -> None:
        """Args: *run* has another checksum than was written."""
        super().__init__(text)
        self.run = run


class ReadError(OSError):
    """The system could not read a file in several tries (EIO, ESTALE, ...): whether its bytes are right is not known."""

    def __str__(self) -> str:
        name = errno.errorcode.get(self.errno or 0, "no name")
        return f"{self.filename} cannot be read ({name}, errno {self.errno}: {self.strerror}; {1 + len(PAUSES)} tries)"


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
        if not _covered(file):
            raise ValueError(f"{name}: the runs written do not add up to the file")
    content = {"format": "bigvision", "version": VERSION, "files": files}
    # Last, so that the rest can be summed as it is: a manifest that was changed anywhere is noticed.
    return _text(content | {"checksum": checksum(_text(content))})


def read(folder: Path) -> dict[str, list[Run]]:
    """Return the runs of each file of the checkpoint *folder*, after checking the manifest and the files' sizes.

    Raises:
        Damaged: the manifest or a file is missing, cut or not what the manifest says.
        ReadError: the system cannot tell.
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
        if (size := _size(folder / name)) != file["size"]:
            raise Damaged(f"{name} has {size} bytes, not {file['size']}")
    return runs


def verify(folder: Path, runs: list[Run]) -> None:
    """Read the bytes of *runs* and compare their checksums.

    Raises:
        Damaged: names the file and the first byte of the run that differs.
        ReadError: the system cannot read them.
    """
    for run in runs:
        read_run(folder, run)


def read_run(folder: Path, run: Run) -> bytes:
    """Return the bytes of *run*, verified.

    Raises:
        Damaged: they are not what was written.
        ReadError: the system cannot read them.
    """
    data = _read(folder / run.file, run.length, run.offset)
    if checksum(data) != run.checksum:
        raise Damaged(differs(run), run)
    return data


def retry_reading(path: Path, read: Callable[[], T]) -> T:
    """Return what *read* reads of the file *path*. Where the system cannot read, it is tried again, after :data:`PAUSES`.

    *read* opens the file by itself: the handle of a file that a server has moved stays stale.

    Raises:
        Damaged: there is no file.
        ReadError: no try has succeeded.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise Damaged(f"{path.name} is missing") from None
            if error.errno in NO_FILE:
                raise Damaged(f"{path.name} cannot be read: {error.strerror}") from None
            if pause is None:
                raise ReadError(error.errno, error.strerror, str(path)) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


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
    if (size := _size(folder / NAME)) > LARGEST:
        raise Damaged(f"{NAME} is larger than {LARGEST} bytes")
    return _read(folder / NAME, size + 1, 0)


def _size(path: Path) -> int:
    status = retry_reading(path, lambda: os.lstat(path))
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"{path.name} is missing")
    return status.st_size


def _read(path: Path, length: int, offset: int) -> bytes:
    def read() -> bytes:
        descriptor = open_existing(path, os.O_RDONLY)
        try:
            return read_at(descriptor, length, offset)
        finally:
            os.close(descriptor)

    return retry_reading(path, read)


def _text(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def _covered(file: dict[str, Any]) -> bool:
    position = 0
    for offset, length, _ in file["runs"]:
        if offset != position or length < 0:
            return False
        position += length
    return position == file["size"]
