"""Tar shards in the layout of WebDataset, read in place and in any order."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bigvision.data.decode import EXTENSIONS
from bigvision.data.labels import Coded, is_missing, joined, label_by, not_a_label, whole
from bigvision.data.sources.arrow import LABELS
from bigvision.data.sources.base import (
    Column,
    Opening,
    Packed,
    PassedOver,
    Sample,
    Source,
    Subset,
    Texts,
    UnreadableSample,
    size_in_header,
    stamp,
    strung,
)
from bigvision.data.splits import choose_files, part, xxh3_hashes
from bigvision.data.workers import each
from bigvision.disk import open_to_read, read_at
from bigvision.errors import UserError

BLOCK = 512
WINDOW = 1 << 14
"""Bytes read at a time: small files and the headers after them come with the header before."""
LARGEST_TEXT = 1 << 24
"""Of a label's file, or of a name."""
IMAGES = tuple(extension[1:].encode() for extension in EXTENSIONS)
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
REGULAR, NO_CONTENT, LINKS = b"07\0", b"123456", b"12"
VERSION = "1"
OPEN_FILES = 128
"""In each process; 1024 is a common limit of all that it opens."""


class Shards(Packed):
    """The images of tar files; files in the order given, samples in the order of the file."""

    def __init__(
        self, name: str, classes: Sequence[str], files: Sequence[Path], indexes: Sequence[Index], labels: Tensor
    ) -> None:
        """Args: *labels* int64 (N,), of all samples."""
        super().__init__(files, [index.stamp for index in indexes], OPEN_FILES, open_to_read, os.close)
        self.name, self.classes = name, list(classes)
        shard = torch.arange(len(files)).repeat_interleave(torch.tensor([len(index.offsets) for index in indexes]))
        self._files = Column(shard)
        self._offsets = Column(torch.cat([index.offsets for index in indexes]))
        self._sizes = Column(torch.cat([index.sizes for index in indexes]))
        begin = torch.tensor([0] + [len(index.keys) for index in indexes[:-1]]).cumsum(0)
        ends = torch.cat([index.key_ends for index in indexes]) + begin[shard]
        self._keys = Texts(torch.cat([index.keys for index in indexes]), ends)
        self._labels = Column(labels)

    def where(self, index: int) -> str:
        return f"{self.files[self._files[index]]}: {os.fsdecode(self.key(index))}"

    def key(self, index: int) -> bytes:
        return self._keys[index]

    def image_size(self, index: int) -> tuple[int, int] | None:
        return size_in_header(self.files[self._files[index]], self._offsets[index])

    def size(self, index: int) -> int:
        return self._sizes[index]

    def read(self, index: int) -> Sample:
        size = self._sizes[index]
        try:
            content = read_at(self.opened(self._files[index]), self._offsets[index], size)
        except OSError as error:
            raise UnreadableSample(error.strerror or type(error).__name__) from error
        if len(content) < size:
            raise UnreadableSample("its shard ends early")
        return Sample(content, self._labels[index])


def open_shards(argument: str, opening: Opening) -> Source:
    """Open the tar files *argument* (see :func:`~bigvision.data.splits.choose_files`).

    A sample is an image and its label, a ``.cls`` or ``.json`` of the same name, one after the other. Where the samples lie is
    found once and kept beside each shard, in ``NAME.tar.index``, where the folder allows it; a shard of another size or time is
    gone through anew. What is held out is so by a hash of its key.
    """
    key, first = opening.key, opening.first
    chosen = choose_files(argument, ".tar", opening)
    indexes = each(lambda file: _indexed(file, key, write=first), chosen.files, f"{key}: shards indexed", report=first)
    column = joined([Coded(index.names, index.labels.numpy()) for index in indexes])
    found = label_by(column.distinct, opening.classes, chosen.folders, key=key, where=repr(argument))
    labels = found.values[column.codes]
    source = Shards(f"webdataset:{argument}", found.classes, chosen.files, indexes, torch.from_numpy(labels))
    for index in indexes:
        chosen.passed_over.include(index.passed_over)
    source.passed_over, source.notes = chosen.passed_over, found.notes
    if not chosen.hold_out:
        return source
    hashes = xxh3_hashes(map(source.key, range(len(source))))
    otherwise = f"{key}: {argument!r} has one image per class, none can be held out; add images or val shards"
    return Subset(source, part(hashes, labels, opening.split, otherwise))


class Index(NamedTuple):
    """Where the N samples of a shard lie, and what they are called. The tensors are in its file."""

    offsets: Tensor
    """int64 (N,), of the images, and their sizes in bytes"""
    sizes: Tensor
    keys: Tensor
    """uint8, one key after the other, and where each ends, int64 (N,)"""
    key_ends: Tensor
    labels: Tensor
    """int64 (N,), each the number of a name"""
    name_bytes: Tensor
    """uint8, the different labels as written, in the order in which they occur, and where each ends, int64"""
    name_ends: Tensor
    stamp: tuple[int, int]
    """of the tar file when it was gone through"""
    passed_over: PassedOver
    """Members of the tar file that are in no sample."""

    @property
    def names(self) -> list[str]:
        texts = Texts(self.name_bytes, self.name_ends)
        return [texts[number].decode() for number in range(len(texts))]

    @property
    def metadata(self) -> dict[str, str]:
        """What stands in its file besides the tensors; *passed_over* only where something was."""
        size, mtime_ns = self.stamp
        counts = {"passed_over": json.dumps(self.passed_over)} if self.passed_over else {}
        return {"version": VERSION, "size": str(size), "mtime_ns": str(mtime_ns)} | counts

    def is_sound(self) -> bool:
        """Whether it can be an index of such a file: it lay on a disk that others write to."""
        count = len(self.offsets)
        return (
            all(table.ndim == 1 and table.dtype == (torch.uint8 if "byte" in name or name == "keys" else torch.int64)
                for name, table in zip(self._fields[:7], self[:7]))
            and count == len(self.sizes) == len(self.key_ends) == len(self.labels) > 0
            and all(bool((bytes >= 0).all()) for bytes in (self.offsets, self.sizes, self.stamp[0] - self.sizes - self.offsets))
            and all(bool((ends.diff() >= 0).all()) and len(ends) > 0 and ends[0] >= 0 and ends[-1] == len(data)
                    for data, ends in ((self.keys, self.key_ends), (self.name_bytes, self.name_ends)))
            and bool((self.labels >= 0).all() and (self.labels < len(self.name_ends)).all())
            and all(type(more) is int and more > 0 and isinstance(example, str) for more, example in self.passed_over.values())
        )  # fmt: skip


def _indexed(file: Path, key: str, *, write: bool) -> Index:
    """The index of *file*, read, or made and written where that can be."""
    beside = file.with_name(file.name + ".index")
    try:
        descriptor = open_to_read(file)
    except OSError as error:
        raise UserError(f"{key}: {str(file)!r} cannot be read: {error.strerror}; make it readable") from error
    try:
        now = stamp(os.fstat(descriptor))
        index = _read_index(beside, now)
        if index is None:
            index = _made(descriptor, now)
            if write:
                _write_index(beside, index)
        return index
    except (ValueError, OSError) as error:
        raise UserError(f"{key}: {str(file)!r}: {error}") from error
    finally:
        os.close(descriptor)


def _made(descriptor: int, now: tuple[int, int]) -> Index:
    passed_over = PassedOver()
    found = list(samples(descriptor, passed_over))
    if not found:
        raise ValueError("it holds no image; a sample is KEY.jpg (or another kind of image) and KEY.cls")
    numbers: dict[str, int] = {}
    labels = [numbers.setdefault(sample.label, len(numbers)) for sample in found]
    places = torch.tensor([(sample.offset, sample.size) for sample in found]).T.contiguous()
    keys, names = strung([sample.key for sample in found]), strung([name.encode() for name in numbers])
    return Index(places[0], places[1], *keys, torch.tensor(labels), *names, now, passed_over)


def _read_index(beside: Path, now: tuple[int, int]) -> Index | None:
    try:
        with safe_open(beside, "pt") as file:
            metadata = file.metadata() or {}
            # Indexes of earlier versions do not have what was passed over: it is not worth to go through all shards again.
            counts = json.loads(metadata.get("passed_over", "{}"))
            passed_over = PassedOver({reason: (more, example) for reason, (more, example) in counts.items()})
            if set(file.keys()) != set(Index._fields[:7]):
                return None
            index = Index._make([*(file.get_tensor(name) for name in Index._fields[:7]), now, passed_over])
            return index if metadata == index.metadata and index.is_sound() else None
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None  # damaged, or of something else


def _write_index(beside: Path, index: Index) -> None:
    temporary = beside.with_name(f".{beside.name}.{secrets.token_hex(4)}")
    try:
        save_file({name: getattr(index, name) for name in Index._fields[:7]}, temporary, index.metadata)
        os.replace(temporary, beside)
    except (OSError, SafetensorError):
        # A folder that may only be read: the index is kept in memory.
        with contextlib.suppress(OSError):
            os.unlink(temporary)


class Place(NamedTuple):
    """A sample: where its image lies, and its label as written."""

    key: bytes
    """the name up to the first dot, with the folder"""
    offset: int
    size: int
    label: str


def samples(descriptor: int, passed_over: PassedOver) -> Iterator[Place]:
    """Find the samples, in order: consecutive files whose names agree up to the first dot, one of which is an image.

    What is no part of a sample is *passed_over*: hidden files, links, files without an image, and of other kinds. Raises
    `ValueError` (the file is no tar, damaged or cut, or a sample has no label or several images; one line) or `OSError`.
    """
    file = _Window(descriptor)
    for key, members in groupby(_named(file, passed_over), itemgetter(0)):
        name, texts, others = os.fsdecode(key), dict[bytes, bytes](), list[bytes]()
        # For each whether its extension has a dot, its extension, its first byte and its size.
        images: list[tuple[bool, bytes, int, int]] = []
        for _, extension, offset, size in members:
            if extension.endswith(IMAGES) and extension.rpartition(b".")[2] in IMAGES:
                images.append((extension not in IMAGES, extension, offset, size))
            elif extension in (b"cls", b"json"):
                texts[extension] = file.text(offset, size)
            else:
                others.append(extension)
        if not images:
            for extension in (*texts, *others):
                passed_over.add("without an image", f"{name}.{os.fsdecode(extension)}")
            continue
        images.sort()
        for extension in (*others, *(extension for _, extension, _, _ in images[1:])):
            reason = f".{os.fsdecode(extension)}" if extension else "without an extension"
            passed_over.add(reason, f"{name}{reason if extension else ''}")
        # KEY.jpg is the image, whatever KEY.mask.png there may be beside it.
        if len(images) > 1 and images[0][0] == images[1][0]:
            raise ValueError(f"sample {name} has more than one image; a key has no dot, and each sample its own")
        yield Place(key, *images[0][2:], _label(name, texts))


def _named(file: _Window, passed_over: PassedOver) -> Iterator[tuple[bytes, bytes, int, int]]:
    """The key, the extension in lower case, the first byte and the size of each file."""
    for name, offset, size in _members(file, passed_over):
        folder, slash, base = name.removeprefix(b"./").rpartition(b"/")
        stem, _, extension = base.partition(b".")
        if stem and not name.startswith(b"/"):
            yield folder + slash + stem, extension.lower(), offset, size
        else:
            passed_over.add("with absolute names" if stem else "hidden", os.fsdecode(name))


def _label(name: str, texts: dict[bytes, bytes]) -> str:
    """The label of the sample *name* in its text files."""
    file = "cls" if b"cls" in texts else "json"
    try:
        text = texts.get(file.encode(), b"").decode("utf-8-sig").strip()
        value = json.loads(text) if file == "json" and text else text
    except (ValueError, RecursionError) as error:
        what = "text in UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
        raise ValueError(f"sample {name} has no label: its .{file} is no {what}; write it again") from None
    if file == "json" and isinstance(value, dict):
        names = [known for known in ("label", "cls", "class") if known in value][:1]
        names = names or [other for other in value if other.casefold() in LABELS]
        if len(names) > 1:
            raise ValueError(f"sample {name}: {' or '.join(names)} in its .json may be the label; call it 'label'")
        value = value[names[0]] if names else None
    # A list of one label is that label.
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    value = whole(value)
    if is_missing(value) or value in ([], {}):
        raise ValueError(
            f"sample {name} has no label: after or before its image put {name}.cls with a number or a class's name, "
            'or .json with {"label": ..}'
        )
    if isinstance(value, list):
        raise ValueError(not_a_label("labels", ", ".join(map(str, value[:5])), f"sample {name}"))
    if isinstance(value, float):
        raise ValueError(not_a_label("numbers", str(value), f"sample {name}"))
    if isinstance(value, dict):
        raise ValueError(f"sample {name}: the label in its .json is an object; write a number or a class's name")
    return str(value)


class _Window:
    """Reads a file forward, a window at a time."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.size = descriptor, os.fstat(descriptor).st_size
        self.begin, self.data = 0, b""

    def at(self, offset: int, size: int) -> bytes:
        """The bytes from *offset*, fewer where the file ends."""
        start = offset - self.begin
        if start < 0 or start + size > len(self.data):
            self.begin, self.data, start = offset, read_at(self.descriptor, offset, max(size, WINDOW)), 0
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
