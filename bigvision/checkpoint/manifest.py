"""The manifest: what a checkpoint consists of, and the checksum of every byte of it (XXH3 with 64 bits, Collet 2019).

Every file is listed as consecutive byte ranges ("runs" in the JSON), each of which one rank has written and summed.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from xxhash import xxh3_64_intdigest as checksum

from bigvision.disk import open_existing, read_into

T = TypeVar("T")

VERSION = 2
NAME = "manifest.json"
LARGEST = 1 << 30
"""Bytes of the largest JSON file that is read."""
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
"""The names of files that a checkpoint may have."""
PAUSES = (0.2, 1.0, 3.0)
"""Seconds between tries where the system cannot read: file servers restart, and mounts come back."""
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.ENXIO)
"""What the system reports where there is no file, or a link, a folder or a socket in its place."""


class Damaged(Exception):
    """A checkpoint that does not verify; names the file and what is wrong with it.

    Only a missing file, a wrong size and a wrong checksum are damage. What the system cannot read is a `ReadError`.
    """

    def __init__(self, text: str, part: ByteRange | None = None) -> None:
        """Args: *part* has another checksum than was written."""
        super().__init__(text)
        self.part = part


class ReadError(OSError):
    """The system could not read a file in several tries (EIO, ESTALE, ...): whether its bytes are right is not known."""

    def __str__(self) -> str:
        name = errno.errorcode.get(self.errno or 0, "no name")
        return f"{self.filename} cannot be read ({name}, errno {self.errno}: {self.strerror}; {1 + len(PAUSES)} tries)"


@dataclass(frozen=True)
class ByteRange:
    """Bytes of a file that were written at once, with their checksum."""

    file: str
    offset: int
    length: int
    checksum: int

    @property
    def end(self) -> int:
        return self.offset + self.length

    def check(self, data: bytearray | memoryview) -> None:
        """Raises: Damaged: *data*, which was read from here, is not what was written."""
        if checksum(data) != self.checksum:
            raise Damaged(f"{self.file} differs from its checksum in the {self.length} bytes from {self.offset}", self)


def build(sizes: dict[str, int], ranges: list[ByteRange]) -> bytes:
    """The manifest of files of these *sizes*, made of *ranges*."""
    files: dict[str, Any] = {name: {"size": size, "runs": []} for name, size in sizes.items()}
    for part in sorted(ranges, key=lambda part: (part.file, part.offset)):
        files[part.file]["runs"].append([part.offset, part.length, part.checksum])
    for name, file in files.items():
        if not _covered(file):
            raise ValueError(f"{name}: the byte ranges written do not add up to the file")
    content = {"format": "bigvision", "version": VERSION, "files": files}
    # Last, so that the rest can be summed as it is: a manifest that was changed anywhere is noticed.
    return _text(content | {"checksum": checksum(_text(content))})


def read(folder: Path) -> dict[str, list[ByteRange]]:
    """Return the byte ranges of each file of the checkpoint *folder*, after checking the manifest and the files' sizes.

    `Damaged` where one is missing, cut or not as the manifest lists it; `ReadError` where the system cannot read one.
    """
    if (size := _size(folder / NAME)) > LARGEST:
        raise Damaged(f"{NAME} is larger than {LARGEST} bytes")
    fill(folder / NAME, memoryview(text := bytearray(size)), 0)
    try:
        manifest = json.loads(text)
        if manifest["format"] != "bigvision" or manifest["version"] != VERSION:
            raise Damaged(f"{NAME}: format {manifest['format']!r} version {manifest['version']!r}, this is bigvision {VERSION}")
        found = manifest.pop("checksum")
        if text != _text(manifest | {"checksum": found}) or found != checksum(_text(manifest)):
            raise Damaged(f"{NAME} differs from its checksum")
        files = manifest["files"]
        ranges = {name: [ByteRange(name, *(int(n) for n in run)) for run in file["runs"]] for name, file in files.items()}
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
    return ranges


def verify(folder: Path, ranges: list[ByteRange]) -> None:
    """Read the bytes of *ranges* and compare their checksums; raises as :func:`read_range`."""
    for part in ranges:
        read_range(folder, part)


def read_range(folder: Path, part: ByteRange) -> bytearray:
    """Return the bytes of *part*; `Damaged` where they are not what was written, `ReadError` where the system cannot read."""
    fill(folder / part.file, memoryview(data := bytearray(part.length)), part.offset)
    part.check(data)
    return data


def retry_reading(path: Path, read: Callable[[], T]) -> T:
    """Return what *read* reads of the file *path*. Where the system cannot read, it is tried again, after :data:`PAUSES`.

    *read* opens the file by itself: the handle of a file that a server has moved stays stale. `Damaged` where there is no file,
    or it ends early; `ReadError` where no try has succeeded.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except EOFError:
            raise Damaged(f"{path.name} ends early") from None
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise Damaged(f"{path.name} is missing") from None
            if error.errno in NO_FILE:
                raise Damaged(f"{path.name} cannot be read: {error.strerror}") from None
            if pause is None:
                raise ReadError(error.errno, error.strerror, str(path)) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def fill(path: Path, data: memoryview, offset: int) -> None:
    """Fill *data* with the bytes of a file from *offset* on; raises as :func:`retry_reading`."""

    def read() -> None:
        with os.fdopen(open_existing(path, os.O_RDONLY), "rb") as file:
            read_into(file.fileno(), data, offset)

    retry_reading(path, read)


def read_file(folder: Path, ranges: dict[str, list[ByteRange]], name: str) -> bytes:
    """Return the bytes of a small file of the checkpoint, verified; raises as :func:`read_range`."""
    return b"".join(read_range(folder, part) for part in ranges[name])


def read_document(folder: Path, ranges: dict[str, list[ByteRange]], name: str) -> dict[str, Any]:
    """Return the JSON object in a file of the checkpoint; raises as :func:`read_range`, and `Damaged` where it holds none."""
    try:
        content = json.loads(read_file(folder, ranges, name))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise Damaged(f"{name} holds no JSON object")
    return content


def _size(path: Path) -> int:
    status = retry_reading(path, lambda: os.lstat(path))
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"{path.name} is missing")
    return status.st_size


def _text(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def _covered(file: dict[str, Any]) -> bool:
    position = 0
    for offset, length, _ in file["runs"]:
        if offset != position or length < 0:
            return False
        position += length
    return position == file["size"]
