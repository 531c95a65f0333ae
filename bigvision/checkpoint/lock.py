"""One run at a time in an output folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigvision.checkpoint.disk import FILE_MODE, make_folder
from bigvision.errors import UserError

NAME = ".lock"
_held: set[tuple[int, int]] = set()


class Lock:
    """Holds an output folder until it is released or this process ends, however it ends.

    It is a POSIX record lock on ``OUT/.lock``: the system drops it with its owner, also across hosts on NFS, and the processes
    that the owner starts do not inherit it.
    """

    def __init__(self, out: Path, say: Callable[[str], None] = lambda text: None) -> None:
        """Take the lock of *out*, and make the folder where it is missing.

        Args:
            say: told when the file system has no locks, and the folder is used without one.

        Raises:
            UserError: another run holds it (named: its process, its host and since when), or it cannot be written.
        """
        path = out / NAME
        try:
            make_folder(out)
            self._take(path, out, say)
        except OSError as error:
            raise UserError(f"out: {out} cannot be written ({error.strerror}): choose another with --out") from None

    def _take(self, path: Path, out: Path, say: Callable[[str], None]) -> None:
        # To the system one process may lock a file twice, and loses both locks with the first descriptor that is closed.
        if path.exists() and _identity(os.stat(path)) in _held:
            raise UserError(_in_use(out, {"process": os.getpid(), "host": socket.gethostname()}))
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                owner = _owner(self.descriptor)
                os.close(self.descriptor)
                raise UserError(_in_use(out, owner)) from None
            say(f"{out}: its file system has no locks ({error.strerror}), so nothing keeps a second run out")
        self.identity = _identity(os.fstat(self.descriptor))
        _held.add(self.identity)
        mine = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps(mine).encode(), 0)

    def release(self) -> None:
        """Let others have the folder. Again is nothing."""
        if self.identity in _held:
            _held.discard(self.identity)
            os.close(self.descriptor)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _owner(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _in_use(out: Path, owner: dict[str, Any]) -> str:
    since = f" since {owner['since']}" if "since" in owner else ""
    who = f"process {owner['process']} on {owner.get('host')}{since}" if "process" in owner else "another process"
    return f"out: {out} is in use by {who}: wait for it, stop it, or choose another --out"
