"""Tar shards in the layout of WebDataset, read in place and in any order."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bigvision.data.labels import label_by
from bigvision.data.sources.base import PassedOver, Sample, Source, Split, UnreadableSample, size_in_header
from bigvision.data.sources.columns import Column, Texts
from bigvision.data.sources.files import choose_files, location_of, stamp
from bigvision.data.sources.tar import samples
from bigvision.data.splits import Subset, part
from bigvision.data.workers import each
from bigvision.errors import UserError

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
