"""Tar shards in the layout of WebDataset, read in place and in any order."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bigvision.data.decode import EXTENSIONS
from bigvision.data.labels import OTHER_TASKS, Target, is_missing, label_by, whole
from bigvision.data.sources.base import Column, PassedOver, Sample, Source, Split, Texts, UnreadableSample, size_in_header
from bigvision.data.sources.files import choose_files, location_of, stamp
from bigvision.data.sources.parquet import LABELS
from bigvision.data.splits import Subset, part
from bigvision.data.workers import each
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


class Shards(Source):
    """The images of tar files; files in the order given, samples in the order of the file."""

    def __init__(
        self, name: str, classes: Sequence[str], files: Sequence[Path], indexes: Sequence[Index], labels: Tensor
    ) -> None:
        """Args: *labels* int64 (N,), of all samples."""
        self.name, self.classes = name, list(classes)
        self.files = [str(file) for file in files]
        self.location, self.linked = location_of(self.files)
        self._stamps = torch.tensor([index.stamp for index in indexes])
        shard = torch.arange(len(files)).repeat_interleave(torch.tensor([len(index.offsets) for index in indexes]))
        self._files = Column(shard)
        self._offsets = Column(torch.cat([index.offsets for index in indexes]))
        self._sizes = Column(torch.cat([index.sizes for index in indexes]))
        begin = torch.tensor([0] + [len(index.keys) for index in indexes[:-1]]).cumsum(0)
        ends = torch.cat([index.key_ends for index in indexes]) + begin[shard]
        self._keys = Texts(torch.cat([index.keys for index in indexes]), ends)
        self._labels = Column(labels)
        self._opened: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> int:
        return self._labels[index]

    def where(self, index: int) -> str:
        return f"{self.files[self._files[index]]}: {os.fsdecode(self.key(index))}"

    def key(self, index: int) -> bytes:
        return self._keys[index]

    def image_size(self, index: int) -> tuple[int, int] | None:
        return size_in_header(self.files[self._files[index]], self._offsets[index])

    def origins(self) -> Iterable[str]:
        return self.files

    def size(self, index: int) -> int:
        return self._sizes[index]

    def read(self, index: int) -> Sample:
        offset = self._offsets[index]
        end = offset + self._sizes[index]
        pieces = []
        try:
            descriptor = self._descriptor(self._files[index])
            while offset < end:
                # The system may give less at a time.
                pieces.append(os.pread(descriptor, end - offset, offset))
                offset += len(pieces[-1])
                if not pieces[-1]:
                    raise UnreadableSample("its shard ends early")
        except OSError as error:
            raise UnreadableSample(error.strerror or type(error).__name__) from error
        return Sample(pieces[0] if len(pieces) == 1 else b"".join(pieces), self._labels[index])

    def _descriptor(self, number: int) -> int:
        if number in self._opened:
            self._opened.move_to_end(number)
            return self._opened[number]
        descriptor = os.open(self.files[number], os.O_RDONLY | os.O_CLOEXEC)
        if list(stamp(os.fstat(descriptor))) != self._stamps[number].tolist():
            os.close(descriptor)
            raise UnreadableSample("its shard has changed since the run began")
        self._opened[number] = descriptor
        if len(self._opened) > OPEN_FILES:
            os.close(self._opened.popitem(last=False)[1])
        return descriptor

    def __getstate__(self) -> dict[str, object]:
        # Descriptors are this process's own.
        return self.__dict__ | {"_opened": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_opened", {}).values():
            os.close(descriptor)


def open_shards(
    argument: str, split: Split, *, key: str, shared: bool, classes: Sequence[str] | None = None, first: bool = True
) -> Source:
    """Open the tar files *argument* (see :func:`~bigvision.data.sources.files.choose_files`) for *split*.

    A sample is an image and its label, a ``.cls`` or ``.json`` of the same name, one after the other. Where the samples lie is
    found once and kept beside each shard, in ``NAME.tar.index``; a shard of another size or time is gone through anew.

    Args:
        shared: by training and validation; without a validation part a tenth of each class is held out by its key.
        classes: label by these classes instead of by the files' own.
        first: write the indexes that are missing, where the folder allows it, and tell how far that is.

    Raises:
        UserError: files are missing or damaged, or labels are not as described; the message names *key*.
    """
    chosen = choose_files(argument, split, ".tar", key=key, shared=shared)
    what = f"{key}: shards indexed"
    indexes = each(lambda file: _indexed(file, key, write=first), chosen.files, what, tell=first)
    names = list(dict.fromkeys(name for index in indexes for name in index.names))
    known, values, notes = label_by(names, classes, chosen.folders, key=key, where=repr(argument))
    label = dict(zip(names, values.tolist()))
    labels = torch.cat([torch.tensor([label[name] for name in index.names])[index.labels] for index in indexes])
    source = Shards(f"webdataset:{argument}", known, chosen.files, indexes, labels)
    for index in indexes:
        chosen.passed_over.include(index.passed_over)
    source.passed_over = chosen.passed_over
    source.notes = notes
    if chosen.hold_out:
        hashes = np.array([xxhash.xxh3_64_intdigest(source.key(row)) for row in range(len(source))], dtype=np.uint64)
        kept = part(hashes, labels.numpy(), split)
        if not len(kept):
            raise UserError(f"{key}: {argument!r} has one image per class, none can be held out; add images or val shards")
        return Subset(source, kept)
    return source


class Index(NamedTuple):
    """Where the N samples of a shard lie, and what they are called."""

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
    size: int
    """Of the tar file when it was gone through, and its time of change in nanoseconds."""
    mtime_ns: int
    passed_over: PassedOver
    """Members of the tar file that are in no sample."""

    @property
    def stamp(self) -> tuple[int, int]:
        return self.size, self.mtime_ns

    @property
    def names(self) -> list[str]:
        data, ends = self.name_bytes.numpy().tobytes(), self.name_ends.tolist()
        return [data[begin:end].decode() for begin, end in zip([0, *ends], ends)]

    def is_sound(self) -> bool:
        """Whether it can be an index of such a file: it lay on a disk that others write to."""
        count = len(self.offsets)
        return (
            all(table.ndim == 1 and table.dtype == (torch.uint8 if "byte" in name or name == "keys" else torch.int64)
                for name, table in zip(self._fields[:7], self[:7]))
            and count == len(self.sizes) == len(self.key_ends) == len(self.labels) > 0
            and bool((self.offsets >= 0).all() and (self.sizes >= 0).all() and (self.offsets <= self.size - self.sizes).all())
            and all(bool((ends.diff() >= 0).all()) and len(ends) > 0 and ends[0] >= 0 and ends[-1] == len(data)
                    for data, ends in ((self.keys, self.key_ends), (self.name_bytes, self.name_ends)))
            and bool((self.labels >= 0).all() and (self.labels < len(self.name_ends)).all())
        )  # fmt: skip


def _indexed(file: Path, key: str, *, write: bool) -> Index:
    """The index of *file*, read, or made and written where that can be."""
    beside = file.with_name(file.name + ".index")
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
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
    keys, names = _strung([sample.key for sample in found]), _strung([name.encode() for name in numbers])
    return Index(places[0], places[1], *keys, torch.tensor(labels), *names, *now, passed_over)


def _strung(texts: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    data = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)
    return data, torch.tensor([len(text) for text in texts]).cumsum(0)


def _read_index(beside: Path, now: tuple[int, int]) -> Index | None:
    wanted = {"version": VERSION, "size": str(now[0]), "mtime_ns": str(now[1])}
    try:
        with safe_open(beside, "pt") as file:
            metadata = file.metadata() or {}
            # Indexes of earlier versions do not have what was passed over: it is not worth to go through all shards again.
            passed_over = _read_counts(metadata.pop("passed_over", "{}"))
            if metadata != wanted or passed_over is None or set(file.keys()) != set(Index._fields[:7]):
                return None
            index = Index._make([*(file.get_tensor(name) for name in Index._fields[:7]), *now, passed_over])
            return index if index.is_sound() else None
    except (SafetensorError, OSError):
        return None


def _read_counts(text: str) -> PassedOver | None:
    """What `_write_index` wrote of the members that were passed over; None where it is something else."""
    try:
        found = {reason: (count, example) for reason, (count, example) in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    sound = all(type(count) is int and count > 0 and isinstance(example, str) for count, example in found.values())
    return PassedOver(found) if sound else None


def _write_index(beside: Path, index: Index) -> None:
    temporary = beside.with_name(f".{beside.name}.{secrets.token_hex(4)}")
    metadata = {"version": VERSION, "size": str(index.size), "mtime_ns": str(index.mtime_ns)}
    if index.passed_over:
        metadata["passed_over"] = json.dumps(index.passed_over)
    try:
        save_file({name: getattr(index, name) for name in Index._fields[:7]}, temporary, metadata)
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
