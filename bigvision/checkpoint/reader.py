"""Bytes to fragments: each rank reads only what it holds and checks it; or one process reads tensors chunk by chunk."""

from __future__ import annotations

import bisect
import json
import math
import os
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from bigvision.checkpoint import manifest
from bigvision.checkpoint.disk import open_existing
from bigvision.checkpoint.layout import from_share
from bigvision.checkpoint.manifest import Damaged, Run, checksum, chunks, differs, read_run, retry_reading
from bigvision.errors import UserError
from bigvision.fragments import DTYPES, TYPES, Fragment, Place, read_into

PIECE = 1 << 20
"""Bytes handed out at a time; a multiple of every type's width."""
THREADS = 2
"""That read at a time on each rank: one sums while the disk works for the other."""
AHEAD = 6
"""Reads that the system is told of beforehand."""


def read_places(folder: Path, runs: dict[str, list[Run]]) -> dict[str, dict[str, Place]]:
    """Return the places of the tensors of each group ("model", "optimizer", ...) in the safetensors files among *runs*.

    Raises:
        Damaged: a header is not what was written, or not one that safetensors allows.
    """
    groups: dict[str, dict[str, Place]] = {}
    for name in sorted(runs):
        if name.endswith(".safetensors"):
            group = name.removesuffix(".safetensors").split("-")[0]
            groups.setdefault(group, {}).update(_read_header(folder, name, runs[name]))
    return groups


def read_fragments(
    folder: Path, runs: dict[str, list[Run]], places: dict[str, dict[str, Place]], fragments: list[Fragment], full: bool
) -> None:
    """Fill *fragments* from the files of the checkpoint *folder*.

    Args:
        full: compare the checksums of all runs of which something is read.

    Raises:
        Damaged: names the file, and the bytes that differ from their checksum.
        ReadError: the system cannot read a file.
    """
    wanted: dict[str, list[_Range]] = {}
    for fragment in fragments:
        if fragment.values.numel():
            place = places[fragment.group][fragment.name]
            offset = place.offset + fragment.start * fragment.values.element_size()
            target = fragment.values.detach().view(torch.uint8)
            wanted.setdefault(place.file, []).append(_Range(offset, offset + target.numel(), target))
    local = threading.local()
    descriptors: dict[str, int] = {}

    def read(number: int) -> None:
        if number + AHEAD < len(jobs):
            coming = jobs[number + AHEAD]
            with suppress(OSError):  # the read itself will report it
                os.posix_fadvise(descriptors[coming.file], coming.offset, coming.length, os.POSIX_FADV_WILLNEED)
        job = jobs[number]
        if not hasattr(local, "buffer"):
            local.buffer = torch.empty(0, dtype=torch.uint8)
        if local.buffer.numel() < job.length:
            local.buffer = torch.empty(job.length, dtype=torch.uint8)
        job.read(folder, descriptors[job.file], local.buffer)

    jobs: list[_Job] = []
    with ExitStack() as stack:
        for file, ranges in wanted.items():
            path = folder / file
            descriptors[file] = retry_reading(path, lambda path=path: open_existing(path, os.O_RDONLY))
            stack.callback(os.close, descriptors[file])
            ranges.sort(key=lambda one: one.begin)
            jobs += list(_verified(file, ranges, runs[file]) if full else _plain(file, ranges))
        # Each rank begins elsewhere, so that the ranks do not wait for the same part of a file.
        jobs = from_share(jobs, dist.get_rank() / dist.get_world_size())
        threads = stack.enter_context(ThreadPoolExecutor(THREADS, "checkpoint"))
        # What an error leaves unread is not begun any more.
        stack.callback(threads.shutdown, cancel_futures=True)
        list(threads.map(read, range(len(jobs))))


@dataclass(frozen=True)
class _Range:
    """Bytes [begin, end) of a file, and where they belong."""

    begin: int
    end: int
    target: Tensor


@dataclass(frozen=True)
class _Job:
    """Bytes of a file that are read at once, and the ranges that want some of them."""

    file: str
    offset: int
    length: int
    ranges: list[_Range]
    checksum: int | None

    def read(self, folder: Path, descriptor: int, buffer: Tensor) -> None:
        end = self.offset + self.length
        first = self.ranges[0]
        whole = len(self.ranges) == 1 and first.begin <= self.offset and end <= first.end and first.target.device.type == "cpu"
        data = first.target[self.offset - first.begin : end - first.begin] if whole else buffer[: self.length]
        view = memoryview(data.numpy())  # pyright: ignore[reportArgumentType]
        try:
            try:
                read_into(descriptor, view, self.offset)
            except OSError:
                retry_reading(folder / self.file, lambda: self._read_anew(folder, view))
        except EOFError:
            raise Damaged(f"{self.file} ends early") from None
        if self.checksum is not None and checksum(view) != self.checksum:
            run = Run(self.file, self.offset, self.length, self.checksum)
            raise Damaged(differs(run), run)
        if whole:
            return
        for one in self.ranges:
            begin, stop = max(one.begin, self.offset), min(one.end, end)
            source, target = data[begin - self.offset : stop - self.offset], one.target[begin - one.begin : stop - one.begin]
            if target.device.type == "cpu":
                numpy.copyto(target.numpy(), source.numpy())
            else:
                target.copy_(source)

    def _read_anew(self, folder: Path, view: memoryview) -> None:
        descriptor = open_existing(folder / self.file, os.O_RDONLY)
        try:
            read_into(descriptor, view, self.offset)
        finally:
            os.close(descriptor)


def _verified(file: str, ranges: list[_Range], runs: list[Run]) -> Iterator[_Job]:
    """The runs of which something is wanted, each whole: only so can it be checked."""
    begins, ends = [one.begin for one in ranges], [one.end for one in ranges]
    for run in runs:
        over = ranges[bisect.bisect_right(ends, run.offset) : bisect.bisect_left(begins, run.offset + run.length)]
        if over:
            yield _Job(file, run.offset, run.length, over, run.checksum)


def _plain(file: str, ranges: list[_Range]) -> Iterator[_Job]:
    for one in ranges:
        for begin, end in chunks(one.begin, one.end - one.begin):
            yield _Job(file, begin, end - begin, [one], None)


def _read_header(folder: Path, name: str, runs: list[Run]) -> dict[str, Place]:
    if not runs:
        raise Damaged(f"{name} is empty")
    # What was written first is the header and nothing else, whoever wrote the rest.
    head, size = runs[0], sum(run.length for run in runs)
    places = {}
    try:
        data = read_run(folder, head)
        length = int.from_bytes(data[:8], "little")
        if length != head.length - 8:
            raise Damaged(f"{name}: its header is said to be {length} bytes long and is {head.length - 8}")
        header = json.loads(data[8:])
        header.pop("__metadata__", None)
        for tensor, entry in header.items():
            begin, end = (int(n) for n in entry["data_offsets"])
            shape = tuple(int(n) for n in entry["shape"])
            if not 0 <= begin <= end <= size - head.length:
                raise Damaged(f"{name}: {tensor} lies outside the file")
            places[tensor] = Place(name, entry["dtype"], shape, head.length + begin, end - begin)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Damaged(f"{name}: its header cannot be read: {error}") from None
    return places


def check_same_tensors(folder: Path, places: dict[str, dict[str, Place]], fragments: Iterable[Fragment], what: str) -> None:
    """Compare the names, shapes and types of the checkpoint *folder* with those of *fragments*.

    Args:
        what: the key that errors name.

    Raises:
        UserError: the checkpoint is of another model or optimizer; names the first tensor that differs.
    """
    wanted: dict[str, dict[str, Fragment]] = {}
    for fragment in fragments:
        wanted.setdefault(fragment.group, {})[fragment.name] = fragment
    for group in sorted(wanted.keys() | places.keys()):
        tensors, held = wanted.get(group, {}), places.get(group, {})
        start = f"{what}: {folder} is the checkpoint of another {group}: "
        fix = "use the configuration that it was trained with, or another out folder"
        for name, fragment in tensors.items():
            if name not in held:
                raise UserError(f"{start}it has no {name}: {fix}")
            place = held[name]
            dtype = DTYPES[fragment.values.dtype]
            if (place.shape, place.dtype) != (fragment.shape, dtype):
                theirs, ours = (f"{kind}{list(shape)}" for kind, shape in ((place.dtype, place.shape), (dtype, fragment.shape)))
                raise UserError(f"{start}{name} is {theirs} there and {ours} here: {fix}")
            if place.nbytes != fragment.numel * fragment.values.element_size():
                raise UserError(f"{start}{name} has {place.nbytes} bytes there: {fix}")
        if extra := next((name for name in held if name not in tensors), None):
            raise UserError(f"{start}it has {extra}, which this one lacks: {fix}")


class Tensors:
    """The tensors of some *groups* of the checkpoint *folder*, by group and name in :attr:`places`.

    No byte is handed out that was not compared with its checksum. The files of other groups are not looked into.

    Raises:
        Damaged: the manifest, a file's size or a header is wrong.
    """

    def __init__(self, folder: Path, groups: tuple[str, ...]) -> None:
        self.folder = folder
        self.runs = manifest.read(folder)
        wanted = {name: runs for name, runs in self.runs.items() if name.split(".")[0].split("-")[0] in groups}
        self.places = read_places(folder, wanted)
        for name, place in (item for tensors in self.places.values() for item in tensors.items()):
            dtype = TYPES.get(place.dtype)
            if dtype is None or math.prod(place.shape) * dtype.itemsize != place.nbytes:
                raise Damaged(f"{place.file}: {name} is {place.dtype}{list(place.shape)} in {place.nbytes} bytes")
        self._last: tuple[Run, bytes] | None = None

    def document(self, name: str) -> bytes:
        """The content of a JSON file of the checkpoint.

        Raises:
            Damaged: it cannot be read or is not what was written.
        """
        return b"".join(read_run(self.folder, run) for run in self.runs[name])

    def pieces(self, place: Place) -> Iterator[Tensor]:
        """Yield the values of a tensor, flat and in order, at most :data:`PIECE` bytes at a time.

        Raises:
            Damaged: the bytes cannot be read, or are not those that were written.
        """
        for begin in range(0, place.nbytes, PIECE):
            data = self._read(place.file, place.offset + begin, min(PIECE, place.nbytes - begin))
            yield torch.frombuffer(data, dtype=TYPES[place.dtype])

    def _read(self, file: str, offset: int, length: int) -> bytearray:
        runs, end = self.runs[file], offset + length
        first, last = bisect_right(runs, offset, key=_offset) - 1, bisect_left(runs, end, key=_offset)
        data = bytearray()
        for run in runs[first:last]:
            data += self._verified(run)[max(offset - run.offset, 0) : end - run.offset]
        return data

    def _verified(self, run: Run) -> memoryview:
        """The bytes of a run, which several pieces may share."""
        if self._last is None or self._last[0] is not run:
            self._last = run, read_run(self.folder, run)
        return memoryview(self._last[1])


def _offset(run: Run) -> int:
    return run.offset
