"""Bytes to fragments: each rank reads only what it holds and checks it; or one process reads tensors part by part."""

from __future__ import annotations

import os
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bigvision.checkpoint import manifest
from bigvision.checkpoint.manifest import ByteRange, Damaged, fill, read_range, retry_reading
from bigvision.checkpoint.writer import CHUNK, from_share
from bigvision.disk import open_existing, read_into
from bigvision.errors import UserError
from bigvision.fragments import DTYPES, TYPES, Fragment, Place, bytes_of, copy_into, parse_header

PART = 1 << 20
"""Bytes of a tensor handed out at a time; a multiple of every type's width."""
THREADS = 2
"""That read at a time on each rank: one sums while the disk works for the other."""
AHEAD = 6
"""Reads that are announced to the system before they begin."""


class Tensors:
    """The tensors of a checkpoint folder. Opening it reads the manifest, the files' sizes and the headers, and no tensor."""

    def __init__(self, folder: Path, groups: tuple[str, ...] | None = None) -> None:
        """*groups* are those whose files are looked into ("model", "optimizer", ...); None is all.

        `Damaged` where the manifest, a file's size or a header is wrong; `ReadError` where the system cannot read one of them.
        """
        self.folder = folder
        self.ranges = manifest.read(folder)
        self.places: dict[str, dict[str, Place]] = {}
        """Where each tensor lies, by group and name."""
        for name in sorted(self.ranges):
            group = name.removesuffix(".safetensors").split("-")[0]
            if name.endswith(".safetensors") and (groups is None or group in groups):
                self.places.setdefault(group, {}).update(self._header(name))
        self._last: tuple[ByteRange, bytearray] | None = None

    def parts(self, place: Place) -> Iterator[Tensor]:
        """Yield the values of a tensor, flat and in order, at most :data:`PART` bytes at a time; verified by `read_range`."""
        for offset in range(place.offset, place.offset + place.nbytes, PART):
            end = min(offset + PART, place.offset + place.nbytes)
            data = bytearray()
            for part in _overlapping(self.ranges[place.file], offset, end):
                # Several parts of tensors lie in one range.
                if self._last is None or self._last[0] is not part:
                    self._last = part, read_range(self.folder, part)
                data += memoryview(self._last[1])[max(offset - part.offset, 0) : end - part.offset]
            yield torch.frombuffer(data, dtype=TYPES[place.dtype])

    def restore(self, fragments: list[Fragment], full: bool) -> None:
        """Fill *fragments*, each rank its own; *full* compares the checksums of all byte ranges of which something is read.

        `Damaged` names the file, and the bytes that differ from their checksum; `ReadError` a file that cannot be read.
        """
        wanted: dict[str, list[_Target]] = {}
        for fragment in fragments:
            if fragment.values.numel():
                place = self.places[fragment.group][fragment.name]
                offset = place.offset + fragment.start * fragment.values.element_size()
                target = fragment.values.detach().view(torch.uint8)
                wanted.setdefault(place.file, []).append(_Target(offset, offset + target.numel(), target))
        local = threading.local()
        descriptors: dict[str, int] = {}
        reads: list[tuple[ByteRange, list[_Target]]] = []

        def read(number: int) -> None:
            if number + AHEAD < len(reads):
                coming, _ = reads[number + AHEAD]
                with suppress(OSError):  # the read itself will report it
                    os.posix_fadvise(descriptors[coming.file], coming.offset, coming.length, os.POSIX_FADV_WILLNEED)
            source, targets = reads[number]
            if not hasattr(local, "buffer") or local.buffer.numel() < source.length:
                local.buffer = torch.empty(source.length, dtype=torch.uint8)
            _read(source, targets, descriptors[source.file], self.folder / source.file, local.buffer, full)

        with ExitStack() as stack:
            for file, targets in wanted.items():
                path = self.folder / file
                descriptors[file] = retry_reading(path, lambda path=path: open_existing(path, os.O_RDONLY))
                stack.callback(os.close, descriptors[file])
                targets.sort(key=lambda one: one.offset)
                # A range can only be checked as a whole.
                sources = self.ranges[file] if full else _unchecked(file, targets)
                found = ((source, _overlapping(targets, source.offset, source.end)) for source in sources)
                reads += [(source, wanting) for source, wanting in found if wanting]
            # Each rank begins elsewhere, so that the ranks do not wait for the same part of a file.
            reads = from_share(reads, dist.get_rank() / dist.get_world_size())
            threads = stack.enter_context(ThreadPoolExecutor(THREADS, "checkpoint"))
            # After an error nothing more is begun.
            stack.callback(threads.shutdown, cancel_futures=True)
            list(threads.map(read, range(len(reads))))

    def _header(self, name: str) -> dict[str, Place]:
        if not self.ranges[name]:
            raise Damaged(f"{name} is empty")
        # The first range is the header and nothing else, whoever wrote the rest.
        header = bytes(read_range(self.folder, self.ranges[name][0]))
        try:
            places = parse_header(name, header, self.ranges[name][-1].end)
        except ValueError as error:
            raise Damaged(f"{name}: its header cannot be read: {error}") from None
        for tensor, place in places.items():
            if place.dtype not in TYPES:
                raise Damaged(f"{name}: {tensor} has the unknown type {place.dtype!r}")
        return places


@dataclass(frozen=True)
class _Target:
    """Bytes [offset, end) of a file, and the memory that they are read into."""

    offset: int
    end: int
    memory: Tensor


def _read(source: ByteRange, targets: list[_Target], descriptor: int, path: Path, buffer: Tensor, check: bool) -> None:
    """Read *source* at once and give each of *targets*, which all want some of it, its bytes."""
    # Straight into the memory of the one target that takes all of it.
    first = targets[0]
    direct = len(targets) == 1 and first.offset <= source.offset and source.end <= first.end
    direct = direct and first.memory.device.type == "cpu"
    data = first.memory[source.offset - first.offset : source.end - first.offset] if direct else buffer[: source.length]
    view = bytes_of(data)
    try:
        read_into(descriptor, view, source.offset)
    except (OSError, EOFError):
        fill(path, view, source.offset)
    if check:
        source.check(view)
    if direct:
        return
    for one in targets:
        begin, end = max(one.offset, source.offset), min(one.end, source.end)
        copy_into(one.memory[begin - one.offset : end - one.offset], data[begin - source.offset : end - source.offset])


R = TypeVar("R", ByteRange, _Target)


def _overlapping(ranges: list[R], begin: int, end: int) -> list[R]:
    """Those of *ranges*, which follow each other, that hold some of the bytes [begin, end)."""
    first, last = bisect_right(ranges, begin, key=lambda one: one.end), bisect_left(ranges, end, key=lambda one: one.offset)
    return ranges[first:last]


def _unchecked(file: str, targets: list[_Target]) -> Iterator[ByteRange]:
    for one in targets:
        for begin in range(one.offset, one.end, CHUNK):
            yield ByteRange(file, begin, min(CHUNK, one.end - begin), 0)


def check_same_tensors(
    folder: Path, places: dict[str, dict[str, Place]], fragments: Iterable[Fragment], what: str, why: Callable[[], str]
) -> None:  # fmt: skip
    """Compare the names, shapes and types of the checkpoint *folder* with those of *fragments*.

    A checkpoint of another model or optimizer is a `UserError` of the key *what*, which names the first tensor that differs,
    and the reason and the fix that *why* returns, where it knows them.
    """
    wanted: dict[str, dict[str, Fragment]] = {}
    for fragment in fragments:
        wanted.setdefault(fragment.group, {})[fragment.name] = fragment
    for group in sorted(wanted.keys() | places.keys()):
        tensors, held = wanted.get(group, {}), places.get(group, {})
        start = f"{what}: {folder} is the checkpoint of another {group}: "
        differs = ""
        for name, fragment in tensors.items():
            ours = f"{DTYPES[fragment.values.dtype]}{list(fragment.shape)}"
            if name not in held:
                differs = f"it has no {name}"
            elif held[name].kind != ours:
                differs = f"{name} is {held[name].kind} there and {ours} here"
            if differs:
                break
        else:
            if extra := next((name for name in held if name not in tensors), None):
                differs = f"it has {extra}, which this one lacks"
        if differs:
            fix = why() or "use the configuration that it was trained with, or another out folder"
            raise UserError(f"{start}{differs}: {fix}")
