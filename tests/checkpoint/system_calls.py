"""Stands between bigvision and the file system: sees every call that changes a folder, and may fail it."""

from __future__ import annotations

import fcntl
import io
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Call:
    """One system call on something inside the folder that is watched."""

    name: str
    """open, write, truncate, fsync, close, mkdir, rename, unlink or rmdir."""
    path: str
    descriptor: int = -1
    flags: int = 0
    offset: int = 0
    """Of the first byte written; the size, when truncated."""
    data: bytes = b""
    target: str = ""
    """What a rename makes of the path."""

    @property
    def reads(self) -> bool:
        """Whether it opens or closes something that is not written."""
        return self.name in ("open", "close") and not self.flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)

    def __str__(self) -> str:
        what = {"write": f" {len(self.data)} B at {self.offset}", "truncate": f" to {self.offset} B"}.get(self.name, "")
        what += f" to {Path(self.target).name}" if self.target else ""
        return f"{self.name} {Path(self.path).name}{what}"


Handler = Callable[[Call, Callable[[], Any]], Any]
"""Gets the call and what performs it; returns what the caller of the system call is to get, or raises."""

_UNKNOWN = ("link", "symlink", "sync", "sendfile", "copy_file_range", "splice", "mkfifo", "mknod", "dup", "dup2")
_open_file = io.open


@contextmanager
def intercept(root: Path, handle: Handler) -> Iterator[None]:
    """Let *handle* perform every changing call of this process inside *root*, from any thread, and all opens and closes.

    Python's own file objects opened for writing are replaced by ones that write through ``os.write``, so that they are seen.
    """
    watch = _Watch(os.path.abspath(root), handle)
    with ExitStack() as stack:
        for name in _Watch.NAMES:
            stack.enter_context(mock.patch.object(os, name, getattr(watch, name)))
        stack.enter_context(mock.patch.object(os, "remove", watch.unlink))
        stack.enter_context(mock.patch.object(os, "replace", watch.rename))
        stack.enter_context(mock.patch.object(os, "fdatasync", watch.fsync))
        for name in _UNKNOWN:
            stack.enter_context(mock.patch.object(os, name, watch.unknown(getattr(os, name))))
        stack.enter_context(mock.patch.object(io, "open", watch.open_file))
        stack.enter_context(mock.patch("builtins.open", watch.open_file))
        yield


def write_part(call: Call, count: int) -> int:
    """Perform only the first *count* bytes of a write, or fewer where O_DIRECT takes whole blocks only."""
    if fcntl.fcntl(call.descriptor, fcntl.F_GETFL) & os.O_DIRECT:
        count = count // mmap.PAGESIZE * mmap.PAGESIZE
    if count == 0:
        return 0
    # Of its own pages, for O_DIRECT wants aligned memory too.
    with mmap.mmap(-1, count) as memory:
        memory.write(call.data[:count])
        return os.pwrite(call.descriptor, memory, call.offset)


class _Watch:
    NAMES = ("open", "write", "writev", "pwrite", "pwritev", "ftruncate", "truncate", "fsync", "close")
    NAMES += ("mkdir", "rename", "unlink", "rmdir", "posix_fallocate")

    def __init__(self, root: str, handle: Handler) -> None:
        self.root = root
        self.handle = handle
        self.real = {name: getattr(os, name) for name in self.NAMES}
        self.descriptors: dict[int, int] = {}
        """Flags of the open files inside the root."""
        self.inside = threading.local()

    def where(self, path: Any, directory: int | None = None) -> str:
        """The absolute path, or "" outside the root."""
        if isinstance(path, int):
            return ""
        text = os.fsdecode(path)
        if directory is not None and not os.path.isabs(text):
            text = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), text)
        text = os.path.abspath(text)
        return text if text == self.root or text.startswith(self.root + os.sep) else ""

    def path_of(self, descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")

    def ask(self, call: Call, perform: Callable[[], Any]) -> Any:
        if getattr(self.inside, "handler", False):
            return perform()
        self.inside.handler = True
        try:
            return self.handle(call, perform)
        finally:
            self.inside.handler = False

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        where = self.where(path, dir_fd)
        if not where:
            return self.real["open"](path, flags, mode, dir_fd=dir_fd)
        assert flags & os.O_TMPFILE != os.O_TMPFILE, "files without a name are not modelled"

        def perform() -> int:
            descriptor = self.real["open"](path, flags, mode, dir_fd=dir_fd)
            self.descriptors[descriptor] = flags
            return descriptor

        return self.ask(Call("open", where, flags=flags), perform)

    def close(self, descriptor: int) -> None:
        if descriptor not in self.descriptors:
            return self.real["close"](descriptor)

        flags = self.descriptors[descriptor]

        def perform() -> None:
            del self.descriptors[descriptor]
            self.real["close"](descriptor)

        return self.ask(Call("close", self.path_of(descriptor), descriptor, flags), perform)

    def _write(self, descriptor: int, buffers: list[Any], offset: int | None, perform: Callable[[], int]) -> int:
        if offset is None:
            append = self.descriptors[descriptor] & os.O_APPEND
            offset = os.lseek(descriptor, 0, os.SEEK_END if append else os.SEEK_CUR)
        data = b"".join(bytes(memoryview(buffer).cast("B")) for buffer in buffers)
        return self.ask(Call("write", self.path_of(descriptor), descriptor, offset=offset, data=data), perform)

    def write(self, descriptor: int, data: Any) -> int:
        if descriptor not in self.descriptors:
            return self.real["write"](descriptor, data)
        return self._write(descriptor, [data], None, lambda: self.real["write"](descriptor, data))

    def writev(self, descriptor: int, buffers: Any) -> int:
        if descriptor not in self.descriptors:
            return self.real["writev"](descriptor, buffers)
        return self._write(descriptor, buffers, None, lambda: self.real["writev"](descriptor, buffers))

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        if descriptor not in self.descriptors:
            return self.real["pwrite"](descriptor, data, offset)
        return self._write(descriptor, [data], offset, lambda: self.real["pwrite"](descriptor, data, offset))

    def pwritev(self, descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if descriptor not in self.descriptors:
            return self.real["pwritev"](descriptor, buffers, offset, flags)
        return self._write(descriptor, buffers, offset, lambda: self.real["pwritev"](descriptor, buffers, offset, flags))

    def ftruncate(self, descriptor: int, length: int) -> None:
        if descriptor not in self.descriptors:
            return self.real["ftruncate"](descriptor, length)
        call = Call("truncate", self.path_of(descriptor), descriptor, offset=length)
        return self.ask(call, lambda: self.real["ftruncate"](descriptor, length))

    def posix_fallocate(self, descriptor: int, offset: int, length: int) -> None:
        if descriptor not in self.descriptors:
            return self.real["posix_fallocate"](descriptor, offset, length)
        size = max(os.fstat(descriptor).st_size, offset + length)
        call = Call("truncate", self.path_of(descriptor), descriptor, offset=size)
        return self.ask(call, lambda: self.real["posix_fallocate"](descriptor, offset, length))

    def truncate(self, path: Any, length: int) -> None:
        if isinstance(path, int):
            return self.ftruncate(path, length)
        if not (where := self.where(path)):
            return self.real["truncate"](path, length)
        return self.ask(Call("truncate", where, offset=length), lambda: self.real["truncate"](path, length))

    def fsync(self, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        if number not in self.descriptors:
            return self.real["fsync"](number)
        return self.ask(Call("fsync", self.path_of(number), number), lambda: self.real["fsync"](number))

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        if not (where := self.where(path, dir_fd)):
            return self.real["mkdir"](path, mode, dir_fd=dir_fd)
        return self.ask(Call("mkdir", where), lambda: self.real["mkdir"](path, mode, dir_fd=dir_fd))

    def rename(self, path: Any, target: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        def perform() -> None:
            self.real["rename"](path, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

        where, there = self.where(path, src_dir_fd), self.where(target, dst_dir_fd)
        if not where and not there:
            return perform()
        assert where and there, "a rename into or out of the folder is not modelled"
        return self.ask(Call("rename", where, target=there), perform)

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        if not (where := self.where(path, dir_fd)):
            return self.real["unlink"](path, dir_fd=dir_fd)
        return self.ask(Call("unlink", where), lambda: self.real["unlink"](path, dir_fd=dir_fd))

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        if not (where := self.where(path, dir_fd)):
            return self.real["rmdir"](path, dir_fd=dir_fd)
        return self.ask(Call("rmdir", where), lambda: self.real["rmdir"](path, dir_fd=dir_fd))

    def unknown(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A call that no test knows how to model: noticed when it concerns the folder, rather than overlooked."""

        def call(*args: Any, **kwargs: Any) -> Any:
            named = [a for a in args if isinstance(a, str | bytes | os.PathLike) and self.where(a)]
            opened = [a for a in args[:2] if isinstance(a, int) and not isinstance(a, bool) and a in self.descriptors]
            assert not named and not opened, f"os.{function.__name__} on {args} is not modelled"
            assert function is not os.sync, "os.sync is not modelled"
            return function(*args, **kwargs)

        return call

    def open_file(
        self, file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
        newline: str | None = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        """As the built-in ``open``."""
        known = file in self.descriptors if isinstance(file, int) else bool(self.where(file))
        if not known or not set(mode) & set("wax+"):
            if isinstance(file, int) and closefd:
                self.descriptors.pop(file, None)  # closed by the file object, unseen
            return _open_file(file, mode, buffering, encoding, errors, newline, closefd, opener)
        assert "+" not in mode, f"a file opened as {mode!r} is not modelled"
        kinds = {"w": os.O_TRUNC, "x": os.O_EXCL, "a": os.O_APPEND}
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | next(flag for kind, flag in kinds.items() if kind in mode)
        opener = opener or (lambda path, flags: os.open(path, flags, 0o666))
        raw = _Raw(file if isinstance(file, int) else opener(file, flags), closefd)
        if "b" in mode and buffering == 0:
            return raw
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)


class _Raw(io.RawIOBase):
    def __init__(self, descriptor: int, closes: bool) -> None:
        self.descriptor = descriptor
        self.closes = closes

    def fileno(self) -> int:
        return self.descriptor

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:  # type: ignore[override]
        return os.write(self.descriptor, bytes(data))

    def close(self) -> None:
        if not self.closed:
            super().close()
            if self.closes:
                os.close(self.descriptor)
