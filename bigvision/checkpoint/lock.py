"""One run at a time in an output folder.

Two signs show whether a run holds a folder. A POSIX record lock on ``OUT/.lock``, which the system drops with its owner; a file
server may keep the lock of a host that has died, and some file systems have locks that other hosts do not see. And a heartbeat:
while the owner lives, a thread sets the file's time every few seconds. Times are compared by the file system's own clock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bigvision.checkpoint.retention import is_step_folder
from bigvision.disk import FILE_MODE, make_folder, open_existing, open_new
from bigvision.errors import InUse, UserError

NAME = ".lock"
BEAT = 5.0
"""Seconds between heartbeats."""
SILENT = 20.0
"""Seconds without a heartbeat after which the owner on another host is dead, where the system has given us its lock."""
EXPIRES = 120.0
"""The same, where the system still refuses its lock: a living process may be kept from its heartbeats for a while."""

_held: dict[tuple[int, int], Lock] = {}


@dataclass(frozen=True)
class _Owner:
    """The process that ``.lock`` names. Earlier versions had no token and no heartbeat."""

    process: int | None = None
    host: str = ""
    since: str = ""
    token: str = ""
    boot: str = ""
    """The host's boot: hosts may have one name, and containers of one host several."""
    numbers: str = ""
    """The process's PID namespace: another may have the same number in another namespace."""

    @property
    def is_here(self) -> bool:
        """Whether it was on this host since its last boot: then the system's lock decides, on every file system."""
        return self.boot == _boot() if self.boot else self.host == socket.gethostname()

    @property
    def is_dead(self) -> bool:
        """Whether it was a process of this host that has ended."""
        if self.process is None or not self.boot or (self.boot, self.numbers) != (_boot(), _numbers()):
            return False
        try:
            os.kill(self.process, 0)
        except OSError as error:
            return isinstance(error, ProcessLookupError)
        return False

    def __str__(self) -> str:
        since = f" since {self.since}" if self.since else ""
        return "another process" if self.process is None else f"process {self.process} on {self.host}{since}"


@dataclass
class Lock(contextlib.AbstractContextManager["Lock"]):
    """Holds the output folder *out* until it is released or this process ends; child processes do not inherit it."""

    out: Path
    say: Callable[[str], None] = lambda text: None
    """Called with a line where the file system has no locks, or the lock of a dead run is taken over."""
    token: str = field(init=False, default_factory=lambda: secrets.token_hex(8))
    lost: bool = field(init=False, default=False)
    """Whether another run has taken the folder over, because this one was held up for too long."""

    def __post_init__(self) -> None:
        """Take the lock, and make the folder where it is missing.

        `UserError` where another run of this host holds it, it cannot be written, or it is a checkpoint, which would be pruned.
        `InUse` where a run on another host holds it: that may have died a moment ago, so a later start may succeed.
        """
        if is_step_folder(self.out):
            raise UserError(f"out: {self.out} is a step folder: name the folder of a run, with --out")
        self.path = self.out / NAME
        try:
            make_folder(self.out)
            self._take()
        except OSError as error:
            raise UserError(f"out: {self.out} cannot be written ({error.strerror}): choose another with --out") from None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let others have the folder. Releasing twice is allowed."""
        if self.identity in _held:
            self._stop.set()
            self._thread.join()
            del _held[self.identity]
            if not self.lost:
                with contextlib.suppress(OSError):
                    os.ftruncate(self.descriptor, 0)  # nobody has to wait for a heartbeat
            os.close(self.descriptor)

    def __exit__(self, *error: object) -> None:
        self.release()

    def _take(self) -> None:
        # To the system one process may lock a file twice, and loses both locks with the first descriptor that is closed.
        if self.path.exists() and _identity(os.stat(self.path)) in _held:
            raise UserError(self._in_use(_Owner(os.getpid(), socket.gethostname())))
        while True:
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
            try:
                owner = _owner(self.descriptor)
                granted = self._granted()
                # One without heartbeats, of an earlier version, is known by the system's lock alone.
                free = granted and (not owner.token or owner.is_here)
                if not free and not owner.is_dead:
                    self._wait_until_dead(owner, granted)
                if granted:
                    break
            except BaseException:
                os.close(self.descriptor)
                raise
            # The server keeps the lock of a dead owner: the file gives way to a new one.
            os.close(self.descriptor)
            self._remove(owner)
            self.say(f"{self.path}: {owner} is dead: its lock is taken over")
        self.identity = _identity(os.fstat(self.descriptor))
        _held[self.identity] = self
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        mine = _Owner(os.getpid(), socket.gethostname(), since, self.token, _boot(), _numbers())
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps(asdict(mine)).encode(), 0)

    def _granted(self) -> bool:
        """Whether the system gives us the lock, or has none to give."""
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            self.say(f"{self.out}: its file system has no locks ({error.strerror}); heartbeats alone keep a second run out")
        return True

    def _wait_until_dead(self, owner: _Owner, granted: bool) -> None:
        """Return when *owner* has given no heartbeat for long enough; an error where it lives or that cannot be known."""
        if owner.is_here or owner.process is None:
            raise UserError(self._in_use(owner))
        if not owner.token:
            raise InUse(self._in_use(owner))
        limit, first = SILENT if granted else EXPIRES, os.fstat(self.descriptor).st_mtime
        age = self._now() - first
        if age < limit:
            self.say(f"{self.path} is held by {owner}, last heard of {max(age, 0):.0f} s ago: waiting whether it lives")
        while age < limit:
            time.sleep(min(BEAT, limit - age))
            if _owner(self.descriptor).token != owner.token or os.stat(self.path).st_mtime > first:
                raise InUse(self._in_use(owner))
            age = self._now() - first

    def _now(self) -> float:
        """The present by the clock of the file system: hosts' clocks differ."""
        probe = self.out / f".probe.{secrets.token_hex(4)}"
        descriptor = open_new(probe)
        try:
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
            probe.unlink()

    def _remove(self, owner: _Owner) -> None:
        """Take the file of a dead *owner* away, unless another start was faster and has put its own in the place."""
        gone = self.out / f".probe.{secrets.token_hex(4)}"
        try:
            os.rename(self.path, gone)
        except FileNotFoundError:
            return
        descriptor = open_existing(gone, os.O_RDONLY)
        try:
            if _owner(descriptor).token != owner.token:
                with contextlib.suppress(FileExistsError):
                    os.link(gone, self.path)
        finally:
            os.close(descriptor)
            gone.unlink()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                os.utime(self.descriptor)
                self.lost = _identity(os.stat(self.path)) != self.identity
            except FileNotFoundError:
                self.lost = True
            except OSError:
                continue  # the file system is away; whoever writes will report it
            if self.lost:
                return

    def _in_use(self, owner: _Owner) -> str:
        text = f"out: {self.out} is in use by {owner}: wait for it, stop it, or choose another --out"
        if owner.is_here or owner.process is None:
            return text
        return (
            f"{text}; where that host is dead, its lock expires {EXPIRES:.0f} s after its last heartbeat, or remove {self.path}"
        )


def check_held(out: Path) -> None:
    """Raises: RuntimeError: this process has locked *out*, and another run has taken it over since."""
    for lock in list(_held.values()):
        if lock.lost and lock.out == out:
            raise RuntimeError(
                f"out: another run has taken {out} over, because this one had no heartbeat for {SILENT:.0f} s or more: "
                "this one ends, and nothing of it is saved any more"
            )


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _numbers() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _owner(descriptor: int) -> _Owner:
    try:
        found: Any = json.loads(os.pread(descriptor, 4096, 0))
        more = (str(found.get(name, "")) for name in ("since", "token", "boot", "numbers"))
        return _Owner(int(found["process"]), str(found["host"]), *more)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return _Owner()
