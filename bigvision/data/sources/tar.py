"""Where the samples lie in an uncompressed tar file: its headers are read, its images are not.

Python's tarfile makes an object of each header, which takes ten times as long.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from bigvision.data.decode import EXTENSIONS
from bigvision.data.labels import OTHER_TASKS, Target, is_missing, whole
from bigvision.data.sources.base import PassedOver
from bigvision.data.sources.tabular import LABELS

BLOCK = 512
WINDOW = 1 << 14
"""Bytes read at a time: small files and the headers after them come with the header before."""
LARGEST_TEXT = 1 << 24
"""Of a label's file, or of a name."""
IMAGES = tuple(extension[1:].encode() for extension in EXTENSIONS)
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
REGULAR, NO_CONTENT, LINKS = b"07\0", b"123456", b"12"


class Place(NamedTuple):
    """A sample: where its image lies, and its label as written."""

    key: bytes
    """the name up to the first dot, with the folder"""
    offset: int
    size: int
    label: str


def samples(descriptor: int, passed_over: PassedOver) -> Iterator[Place]:
    """Find the samples, in order: consecutive files whose names agree up to the first dot, one of which is an image.

    Args:
        passed_over: counts what is no part of a sample: hidden files, links, files without an image, and of other kinds.

    Raises:
        ValueError: the file is no tar, damaged or cut, or a sample has no label or several images; one line.
        OSError: it cannot be read.
    """
    file = _Window(descriptor)
    sample: _Sample | None = None
    for name, offset, size in _members(file, passed_over):
        folder, slash, base = name.removeprefix(b"./").rpartition(b"/")
        stem, _, extension = base.partition(b".")
        if not stem or name.startswith(b"/"):
            passed_over.add("with absolute names" if stem else "hidden", os.fsdecode(name))
            continue
        key, extension = folder + slash + stem, extension.lower()
        if sample is None or sample.key != key:
            if sample is not None and sample.is_one(passed_over):
                yield sample.place()
            sample = _Sample(key)
        if extension.endswith(IMAGES) and extension.rpartition(b".")[2] in IMAGES:
            sample.images.append((extension not in IMAGES, extension, offset, size))
        elif extension in (b"cls", b"json"):
            sample.texts[extension] = file.text(offset, size)
        else:
            sample.others.append(extension)
    if sample is not None and sample.is_one(passed_over):
        yield sample.place()


class _Sample:
    """The files of one sample so far."""

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.images: list[tuple[bool, bytes, int, int]] = []
        """For each whether its extension has a dot, its extension, its first byte and its size."""
        self.texts: dict[bytes, bytes] = {}
        self.others: list[bytes] = []
        """Extensions of further files."""

    def is_one(self, passed_over: PassedOver) -> bool:
        """Whether there is an image; what is not part of the sample is counted."""
        if not self.images:
            for extension in (*self.texts, *self.others):
                passed_over.add("without an image", os.fsdecode(self.key + b"." + extension))
            return False
        self.images.sort()
        for extension in (*self.others, *(extension for _, extension, _, _ in self.images[1:])):
            reason = f".{os.fsdecode(extension)}" if extension else "without an extension"
            passed_over.add(reason, f"{self}{reason if extension else ''}")
        return True

    def place(self) -> Place:
        # KEY.jpg is the image, whatever KEY.mask.png there may be beside it.
        images = self.images
        if len(images) > 1 and images[0][0] == images[1][0]:
            raise ValueError(f"sample {self} has more than one image; a key has no dot, and each sample its own")
        return Place(self.key, *images[0][2:], self._label())

    def _label(self) -> str:
        file = "cls" if b"cls" in self.texts else "json"
        try:
            text = self.texts.get(file.encode(), b"").decode("utf-8-sig").strip()
            value = json.loads(text) if file == "json" and text else text
        except (ValueError, RecursionError) as error:
            what = "text in UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
            raise ValueError(f"sample {self} has no label: its .{file} is no {what}; write it again") from None
        if file == "json":
            value = self._of_record(value)
        # A list of one label is that label.
        while isinstance(value, list) and len(value) == 1:
            value = value[0]
        value = whole(value)
        if is_missing(value) or value in ([], {}):
            raise ValueError(
                f"sample {self} has no label: after or before its image put {self}.cls with a number or a class's name, "
                'or .json with {"label": ..}'
            )
        if isinstance(value, list):
            raise self._other("labels", ", ".join(map(str, value[:5])))
        if isinstance(value, float):
            raise self._other("numbers", str(value))
        if isinstance(value, dict):
            raise ValueError(f"sample {self}: the label in its .json is an object; write a number or a class's name")
        return str(value)

    def _of_record(self, record: Any) -> Any:
        """The label in what .json holds: a number or a text by itself, or a record of several things."""
        if not isinstance(record, dict):
            return record
        names = [name for name in ("label", "cls", "class") if name in record][:1]
        names = names or [name for name in record if name.casefold() in LABELS]
        if len(names) > 1:
            raise ValueError(f"sample {self}: {' or '.join(names)} in its .json may be the label; call it 'label'")
        return record[names[0]] if names else None

    def _other(self, target: Target, example: str) -> ValueError:
        what, task, instead = OTHER_TASKS[target]
        return ValueError(
            f"sample {self} has {what} ({example}); that is for a task {task!r}, which is not supported yet; {instead}"
        )

    def __str__(self) -> str:
        return os.fsdecode(self.key)


class _Window:
    """Reads a file forward, a window at a time."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.size = descriptor, os.fstat(descriptor).st_size
        self.begin, self.data = 0, b""

    def at(self, offset: int, size: int) -> bytes:
        """The bytes from *offset*, fewer where the file ends."""
        start = offset - self.begin
        if start < 0 or start + size > len(self.data):
            self.begin, self.data, start = offset, os.pread(self.descriptor, max(size, WINDOW), offset), 0
        return self.data[start : start + size]

    def text(self, offset: int, size: int) -> bytes:
        if size > LARGEST_TEXT:
            raise ValueError(f"the text at byte {offset} has {size:,} bytes")
        return self.at(offset, size)


def _members(file: _Window, passed_over: PassedOver) -> Iterator[tuple[bytes, int, int]]:
    """The name, first byte and size of each regular file, in order."""
    position, name, long_size = 0, None, None
    while True:
        block = file.at(position, BLOCK)
        if position == 0 and block.startswith(MAGIC):
            raise ValueError("it is compressed; decompress it")
        if len(block) < BLOCK:
            raise ValueError("it ends early; copy or write it again")
        if block.count(0) == BLOCK:
            return
        try:
            checksum, size = _number(block[148:156]), _number(block[124:136])
        except ValueError:
            checksum = size = -1
        if checksum != sum(block) - sum(block[148:156]) + 8 * 0x20 or size < 0:
            raise ValueError(f"it is damaged at byte {position}; copy or write it again")
        kind, data = block[156:157], position + BLOCK
        own = _name(block) if name is None else name
        if kind in NO_CONTENT or (kind == b"\0" and own.endswith(b"/")):
            size = 0
        elif long_size is not None:
            size = long_size
        position = data + -(-size // BLOCK) * BLOCK
        if position > file.size:
            raise ValueError("it ends early; copy or write it again")
        if kind == b"L":
            name = file.text(data, size).partition(b"\0")[0]
        elif kind == b"x":
            records = _records(file.text(data, size))
            name = records.get(b"path", name)
            long_size = int(records[b"size"]) if b"size" in records else long_size
            if any(record.startswith(b"GNU.sparse") for record in records):
                kind = b"S"
        elif kind not in b"Kg":
            name = long_size = None
            if kind in REGULAR and not own.endswith(b"/"):
                yield own, data, size
            elif kind in LINKS:
                passed_over.add("links", os.fsdecode(own))
        if kind == b"S":
            raise ValueError("it holds sparse files; write it without --sparse")


def _name(block: bytes) -> bytes:
    name = block[:100].partition(b"\0")[0]
    # GNU's own format has other things in place of the prefix.
    prefix = block[345:500].partition(b"\0")[0] if block[345] and block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _number(field: bytes) -> int:
    """Octal digits, or GNU's binary number after a first bit that is set."""
    return int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b" \0") or b"0", 8)


def _records(data: bytes) -> dict[bytes, bytes]:
    """A pax header's records, each ``LENGTH NAME=VALUE`` and a newline."""
    found = {}
    while data.strip(b"\0"):
        digits = data.partition(b" ")[0]
        length = int(digits) if digits.isdigit() and len(digits) < 10 else 0
        name, equals, value = data[len(digits) + 1 : length - 1].partition(b"=")
        if not equals or data[length - 1 : length] != b"\n" or (name == b"size" and not value.isdigit()):
            raise ValueError("a pax header is damaged; copy or write it again")
        found[name], data = value, data[length:]
    return found
