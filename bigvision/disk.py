"""Files and folders that are durable, have explicit modes and are never reached through a link."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import secrets
import shutil
import sys
from pathlib import Path
from typing import Any

FILE_MODE = 0o644
FOLDER_MODE = 0o755
FILE_SYSTEMS = {
    0x6969: "NFS", 0x0BD00BD0: "Lustre", 0x65735546: "FUSE", 0xFF534D42: "SMB", 0xFE534D42: "SMB", 0x01021997: "9P",
    0x00C36400: "CephFS", 0x47504653: "GPFS", 0x19830326: "BeeGFS",
}  # fmt: skip
"""File systems that several hosts may share, by the f_type of statfs(2)."""
ONE_WRITER = ("NFS", "FUSE", "SMB", "9P")
"""Those on which several processes must not write one file: nothing keeps the parts of a page that two clients write apart."""


def open_new(path: Path) -> int:
    """Create a file for writing; one that is there already, or a link, is an `OSError`."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)


def open_existing(path: Path, flags: int) -> int:
    """Open a file with *flags*; a link is an `OSError`."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)


def write_new(path: Path, data: bytes, size: int = 0) -> None:
    """Create a file that begins with *data*, on the disk; a larger *size* is reserved for what is written later.

    Its name is not on the disk yet: see :func:`sync_folder`.
    """
    with os.fdopen(open_new(path), "wb") as file:
        descriptor = file.fileno()
        if size > len(data):
            os.ftruncate(descriptor, size)
            _reserve(descriptor, size)
        write_at(descriptor, memoryview(data), 0)
        os.fsync(descriptor)


def replace(path: Path, data: bytes) -> None:
    """Give *path* the content *data*, durably: whoever reads it sees all of the old or all of the new."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write_new(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def publish(unfinished: Path, final: Path) -> None:
    """Rename *unfinished*, a file or folder, to *final*, durably; after an error *final* is what it was.

    A folder cannot be renamed over another: the old one is set aside first and removed at the end.
    """
    aside = None
    if unfinished.is_dir() and final.exists():
        aside = final.with_name(f"{final.name}.aside-{secrets.token_hex(4)}")
        final.rename(aside)
    try:
        unfinished.rename(final)
        sync_folder(final.parent)
    except OSError:
        if aside is not None:
            if final.exists():
                final.rename(unfinished)
            aside.rename(final)
        raise
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _reserve(descriptor: int, size: int) -> None:
    """Reserve space for a file of *size* bytes, where the file system can: writing is faster then, and a full disk is an
    `OSError` before anything is written."""
    # os.posix_fallocate would write to every block of a file system that cannot.
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:
        return
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    refused = fallocate(descriptor, 0, 0, size) and ctypes.get_errno()
    if refused in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        raise OSError(refused, os.strerror(refused))


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of *data* at *offset*: the system may take less at a time."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def read_into(descriptor: int, data: memoryview, offset: int) -> None:
    """Fill *data* with the file's bytes from *offset*: the system may give less at a time. `EOFError` where it ends before."""
    while data:
        count = os.preadv(descriptor, [data], offset)
        if count == 0:
            raise EOFError("the file ends early")
        data, offset = data[count:], offset + count


def open_to_read(path: str | os.PathLike[str]) -> int:
    """A descriptor of the file, which no program that is started inherits."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    """*size* bytes of a file from *offset* on, fewer where it ends."""
    content = os.pread(descriptor, size, offset)
    # The system may give less at a time.
    while len(content) < size and (more := os.pread(descriptor, size - len(content), offset + len(content))):
        content += more
    return content


def sync_folder(folder: Path) -> None:
    """Bring the folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make *folder* and those above it that are missing."""
    folder.mkdir(FOLDER_MODE, parents=True, exist_ok=True)


def file_system(folder: Path) -> str:
    """Which of :data:`FILE_SYSTEMS` *folder* is on; "" for all others, the local ones. The folder may be missing."""
    return FILE_SYSTEMS.get(next((kind for path in (folder, *folder.absolute().parents) if (kind := _kind(path))), 0), "")


def _kind(folder: Path) -> int:
    """f_type of statfs(2); 0 where the folder is missing or the system has another call. `os.statvfs` leaves it out."""
    if sys.platform != "linux":
        return 0
    found = ctypes.create_string_buffer(512)
    if ctypes.CDLL(None).statfs(os.fsencode(folder), found):
        return 0
    return int.from_bytes(found.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder) & 0xFFFFFFFF


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a file or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# Files with a JSON object on each line, such as metrics.jsonl.


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in *path*, without lines that are cut, damaged or no object; none where there is no file.

    An `OSError` where the file is there and cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    found: list[Any] = []
    for line in text.split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add *line* to *path*; behind what a kill has cut it stands on a line of its own."""
    with path.open("a+b") as file:
        cut = b""
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            cut = b"" if file.read(1) == b"\n" else b"\n"
        # In one piece: several ranks may add to one file.
        file.write(cut + json.dumps(line).encode() + b"\n")
