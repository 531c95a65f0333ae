"""An output folder whose newest checkpoint is damaged again and again, and what a start makes of it."""

from __future__ import annotations

import codecs
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_intdigest

from bigvision import checkpoint
from bigvision.errors import UserError
from tests.checkpoint.states import Save, find_version, save_version

OLDER, NEWEST = Save(1, 1), Save(2, 2)
PATIENCE = 60
"""Seconds after which a start hangs."""
RUNNING = {"compile", "exec", "import", "marshal.loads", "pickle.find_class", "socket.connect", "subprocess.Popen"}
RUNNING |= {"ctypes.dlopen", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system"}
TOUCHING = {
    "open",
    "os.listdir",
    "os.scandir",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
}

_watched: list[tuple[str, list[str]]] = []


class Hung(BaseException):
    """A start that does not end. No `Exception`, so that nobody takes it for a fault of the disk."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    root, seen = _watched[-1]
    if event in RUNNING:
        seen.append(f"{event} {arguments[:1]}")
    elif event in TOUCHING and not isinstance(arguments[0], int):
        path = os.fsdecode(arguments[0])
        follows = not (event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_NOFOLLOW)
        there = os.path.realpath(path) if follows else os.path.join(os.path.realpath(os.path.dirname(path)), path)
        if there != root and not there.startswith(root + os.sep):
            seen.append(f"{event} {path}")


for coding in ("utf_8_sig", "utf_16", "utf_16_be", "utf_16_le", "utf_32", "utf_32_be", "utf_32_le"):
    codecs.lookup(coding)  # as which json may read what is damaged; imported before imports are watched
sys.addaudithook(_audit)


@contextmanager
def watched(root: Path) -> Iterator[list[str]]:
    """Collects everything this process runs, and every file outside *root* that it touches; raises where it hangs."""
    seen: list[str] = []

    def hung(number: int, frame: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, hung)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE, 5)
    _watched.append((os.path.realpath(root), seen))
    try:
        yield seen
    finally:
        _watched.pop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Victim:
    """Two checkpoints, of which the newest is damaged and repaired."""

    def __init__(self, out: Path, shard_size: int = 10**9, made: bool = False) -> None:
        self.out = out
        if not made:
            checkpoint.prepare_folder(out)
            for save in (OLDER, NEWEST):
                save_version(out, save, how="whole", shard_size=shard_size)
        self.older, self.newest = (out / checkpoint.folder_name(save.step) for save in (OLDER, NEWEST))
        self.content = {path.name: path.read_bytes() for path in sorted(self.newest.iterdir())}
        self.wrong: list[str] = []
        self.said: list[str] = []
        self.tried = 0
        assert self.found() == 2  # and whatever is imported late is there now

    @property
    def tensors(self) -> list[str]:
        return [name for name in self.content if name.endswith(".safetensors")]

    def repair(self) -> None:
        """Make the newest checkpoint what it was."""
        for path in self.newest.iterdir():
            if path.is_symlink() or not path.is_file() or path.name not in self.content:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name, data in self.content.items():
            if not (self.newest / name).is_file() or (self.newest / name).read_bytes() != data:
                self.write(name, data)

    def flip(self, name: str, position: int, bit: int) -> None:
        data = bytearray(self.content[name])
        data[position] ^= 1 << bit
        self.write(name, bytes(data))

    def write(self, name: str, data: bytes) -> None:
        # In place where it can be: ext4 waits for the disk when a file is emptied first and written again.
        path = self.newest / name
        with path.open("r+b" if path.exists() and path.stat().st_size == len(data) else "wb") as file:
            file.write(data)

    def found(self, full: bool = True) -> int | None:
        return find_version(self.out, self.said.append, full=full)

    def expect_passed_over(self, what: str, *names: str, full: bool = True) -> None:
        """The newest checkpoint is damaged: it is said, with one of *names*, and the older one is taken."""
        self.said = []
        self.tried += 1
        with watched(self.out) as seen:
            try:
                version = self.found(full)
            except (Exception, Hung) as error:
                self.wrong.append(f"{what}: {type(error).__name__}: {error}")
                version = 1
        if version != 1:
            self.wrong.append(f"{what}: version {version} was taken")
        elif self.said and not any(name in text for text in self.said for name in names):
            self.wrong.append(f"{what}: none of {names} in {self.said}")
        self._check_said(what, seen)

    def expect_no_harm(self, what: str, full: bool = True) -> None:
        """The newest checkpoint is made to look whole by somebody who knows how: any end but a crash will do."""
        self.said = []
        self.tried += 1
        with watched(self.out) as seen:
            try:
                self.found(full)
            except (UserError, AssertionError):  # another model's, or wrong values, which were signed too
                pass
            except (Exception, Hung) as error:
                self.wrong.append(f"{what}: {type(error).__name__}: {error}")
        self._check_said(what, seen)

    def _check_said(self, what: str, seen: list[str]) -> None:
        if seen:
            self.wrong.append(f"{what}: {seen}")
        if len(self.said) > 1 or not all(text.isprintable() and self.newest.name in text for text in self.said):
            self.wrong.append(f"{what}: {self.said}")

    def sign(self, manifest: dict[str, Any]) -> bytes:
        """The text of a manifest with the right checksum of its own, as the documentation of the format has it."""
        content = {key: value for key, value in manifest.items() if key != "checksum"}
        plain = json.dumps(content, separators=(",", ":")).encode() + b"\n"
        return json.dumps(content | {"checksum": xxh3_64_intdigest(plain)}, separators=(",", ":")).encode() + b"\n"

    def replace_signed(self, name: str, data: bytes, header: int | None = None) -> None:
        """Write *data* into a file and into the manifest; a run of its own for the first *header* bytes."""
        manifest = json.loads(self.content["manifest.json"])
        ends = sorted({0, min(header or len(data), len(data)), len(data)})
        runs = [[a, b - a, xxh3_64_intdigest(data[a:b])] for a, b in itertools.pairwise(ends)]
        manifest["files"][name] = {"size": len(data), "runs": runs}
        self.write(name, data)
        self.write("manifest.json", self.sign(manifest))

    def assert_nothing_wrong(self, tried: int) -> None:
        assert self.tried >= tried
        wrong, self.wrong, self.tried = self.wrong, [], 0
        assert not wrong, f"{len(wrong)}:\n" + "\n".join(text[:400] for text in wrong[:20])
