"""What a power loss may leave of what was written to a disk.

The model of a disk is harder than any file system that is in use:

- What a file holds is safe once ``fsync`` of this file has returned, and not before, also when it was written with O_DIRECT.
  Of what was written since, any set of sectors (512 B or 4 KiB) may be there in any of their states, zeros among them; the
  size is any that the file had since.
- A folder's names are safe once ``fsync`` of this folder has returned; ``fsync`` of a file secures no name, not even its own.
  Changes of names since then may be there or not, each by itself and in any order. A rename is one change.
- Or the file system has a journal: of all changes of names there is a first part, in their order, which ends no earlier than
  any change that was made safe.

Nothing is assumed of ext4's habits (a file renamed over another is written out first; ``fsync`` of anything commits the whole
journal), nor is it assumed that a rename waits for its ``mkdir``.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.checkpoint.recording import Event
from tests.checkpoint.system_calls import Call

Tree = dict[str, Any]
"""Names to bytes, or to the tree of a folder."""


@dataclass(eq=False)
class File:
    safe: bytes = b""
    since: list[bytes] = field(default_factory=list)
    """The content after each change since it was last safe."""

    @property
    def now(self) -> bytes:
        return self.since[-1] if self.since else self.safe


@dataclass(eq=False)
class Folder:
    names: dict[str, File | Folder] = field(default_factory=dict)


@dataclass(eq=False)
class Change:
    """Of names; None takes a name away."""

    slots: list[tuple[Folder, str, File | Folder | None]]
    safe: bool = False


class Disk:
    """The file system under one folder, as the running system sees it, and what of it is safe."""

    def __init__(self, root: Path, tree: Tree) -> None:
        self.root = os.path.abspath(root)
        self.top = Folder()
        self.changes: list[Change] = []
        self.open: dict[tuple[int, int], File | Folder] = {}
        self._fill(self.top, tree)

    def _fill(self, folder: Folder, tree: Tree) -> None:
        for name, content in tree.items():
            node: File | Folder = Folder() if isinstance(content, dict) else File(content)
            if isinstance(node, Folder):
                self._fill(node, content)
            self._change((folder, name, node))
            self.changes[-1].safe = True

    def apply(self, event: Event) -> None:
        """Do what the ranks did."""
        call = event.call
        if call is None:
            return
        handle = (event.rank, call.descriptor)
        if call.name == "open":
            self._open(call, (event.rank, event.result))
        elif call.name == "write":
            file = self._file(handle)
            content = bytearray(file.now.ljust(call.offset, b"\0"))
            content[call.offset : call.offset + event.result] = call.data[: event.result]
            file.since.append(bytes(content))
        elif call.name == "truncate":
            file = self._file(handle) if call.descriptor >= 0 else self._find(call.path)
            assert isinstance(file, File)
            file.since.append(file.now[: call.offset].ljust(call.offset, b"\0"))
        elif call.name == "fsync":
            node = self.open[handle]
            if isinstance(node, File):
                node.safe, node.since = node.now, []
            else:
                for change in self.changes:
                    change.safe = change.safe or any(folder is node for folder, _, _ in change.slots)
        elif call.name == "mkdir":
            self._change((*self._slot(call.path), Folder()))
        elif call.name in ("unlink", "rmdir"):
            self._change((*self._slot(call.path), None))
        elif call.name == "rename":
            source, target = self._slot(call.path), self._slot(call.target)
            self._change((*source, None), (*target, source[0].names[source[1]]))
        else:
            assert call.name == "close", call

    def now(self) -> Tree:
        """The tree as the running system sees it."""
        return _tree(self.top, _entries(self.changes), lambda file: file.now)

    def losses(self, rng: random.Random, rounds: int) -> Iterator[Tree]:
        """Trees that a power loss at this moment may leave: the extreme ones, and *rounds* random ones of each kind."""
        safe = [change for change in self.changes if change.safe]
        pending = [change for change in self.changes if not change.safe]
        last = max((n for n, change in enumerate(self.changes) if change.safe), default=-1)
        contents = (lambda file: file.safe, lambda file: file.now, _zeros)
        orders = [safe, self.changes]
        # Alone, and without it: where one change relies on another, this is what shows.
        orders += [[*safe, change] for change in pending[1:]]
        orders += [[other for other in self.changes if other is not change] for change in pending[:-1]]
        for order in orders:
            for content in contents[: 2 if len(orders) > 2 else 3]:
                yield _tree(self.top, _entries(order), content)
        for _ in range(rounds):
            some = rng.sample(pending, rng.randint(0, len(pending)))
            yield _tree(self.top, _entries([*safe, *some]), _torn(rng))
            journal = self.changes[: rng.randint(last + 1, len(self.changes))]
            yield _tree(self.top, _entries(journal), _torn(rng))

    def _open(self, call: Call, handle: tuple[int, int]) -> None:
        if call.path == self.root:
            self.open[handle] = self.top
            return
        folder, name = self._slot(call.path)
        if name not in folder.names:
            assert call.flags & os.O_CREAT, f"{call.path} is opened and was never made"
            self._change((folder, name, File()))
        node = self.open[handle] = folder.names[name]
        if call.flags & os.O_TRUNC and isinstance(node, File):
            node.since.append(b"")

    def _change(self, *slots: tuple[Folder, str, File | Folder | None]) -> None:
        self.changes.append(Change(list(slots)))
        _put(slots, lambda folder: folder.names)

    def _file(self, handle: tuple[int, int]) -> File:
        node = self.open[handle]
        assert isinstance(node, File)
        return node

    def _slot(self, path: str) -> tuple[Folder, str]:
        parent = self._find(os.path.dirname(path))
        assert isinstance(parent, Folder)
        return parent, os.path.basename(path)

    def _find(self, path: str) -> File | Folder:
        node: File | Folder = self.top
        for part in Path(path).relative_to(self.root).parts:
            assert isinstance(node, Folder)
            node = node.names[part]
        return node


Entries = dict[Folder, dict[str, File | Folder]]


def _put(slots: Any, names_of: Callable[[Folder], dict[str, File | Folder]]) -> None:
    for folder, name, node in slots:
        names = names_of(folder)
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def _entries(changes: list[Change]) -> Entries:
    entries: Entries = {}
    for change in changes:
        _put(change.slots, lambda folder: entries.setdefault(folder, {}))
    return entries


def _tree(folder: Folder, entries: Entries, content: Callable[[File], bytes]) -> Tree:
    names = entries.get(folder, {})
    return {n: _tree(node, entries, content) if isinstance(node, Folder) else content(node) for n, node in names.items()}


def _zeros(file: File) -> bytes:
    """The size arrived and the data did not."""
    return file.safe[: len(file.now)].ljust(len(file.now), b"\0")


def _torn(rng: random.Random) -> Callable[[File], bytes]:
    """Each sector from any of the moments since the file was safe."""
    chosen: dict[int, bytes] = {}
    sector = rng.choice((512, 4096))

    def content(file: File) -> bytes:
        if not file.since:
            return file.safe
        if id(file) not in chosen:
            states = [file.safe, *file.since]
            size = len(rng.choice(states))
            pieces = []
            for begin in range(0, size, sector):
                length = min(sector, size - begin)
                state = rng.choice([*states, b""])
                pieces.append(state[begin : begin + length].ljust(length, b"\0"))
            chosen[id(file)] = b"".join(pieces)
        return chosen[id(file)]

    return content


def fingerprint(tree: Tree) -> int:
    """Trees that are alike have the same."""
    return hash(frozenset((name, fingerprint(c) if isinstance(c, dict) else c) for name, c in tree.items()))


def read_tree(folder: Path) -> Tree:
    """What is on the disk."""
    return {p.name: read_tree(p) if p.is_dir() else p.read_bytes() for p in folder.iterdir()}


def write_tree(folder: Path, tree: Tree) -> None:
    """Make *folder*, with what is in *tree*."""
    folder.mkdir()
    for name, content in tree.items():
        if isinstance(content, dict):
            write_tree(folder / name, content)
        else:
            (folder / name).write_bytes(content)
