"""Fragments to bytes: memory that suits direct I/O, and every rank's part written to its place."""

from __future__ import annotations

import errno
import itertools
import json
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from bigvision.checkpoint.disk import open_existing, open_new, reserve, write_at, write_new
from bigvision.checkpoint.layout import FileLayout, Piece, Plan, from_share
from bigvision.checkpoint.manifest import CHUNK, Run, checksum
from bigvision.errors import lacks_memory
from bigvision.runtime import gather_json

ALIGN = max(4096, mmap.PAGESIZE)
"""Direct I/O wants addresses, offsets and lengths that are multiples of the disk's blocks; no disk has larger ones."""
LEAST_ALIGNED = 64 << 10
"""Smaller pieces are not worth their padding, and go through the page cache."""
SLAB = 64 << 20
"""Bytes of a slab: a power of two, because torch rounds each pinned allocation up to one, and several times a piece."""
MOST_PINNED = 128
"""Pinned slabs of a rank (8 GiB): pinned memory cannot be swapped or reclaimed, and the ranks of a host share it."""
THREADS = 3
"""That write at a time on each rank: one sums or copies while the disk works for the others."""


assert SLAB & (SLAB - 1) == 0 and SLAB >= CHUNK + ALIGN


class Arena:
    """Host memory that holds a copy of pieces, each as aligned as its offset in the file.

    The memory consists of slabs of one size, which are reused by later copies. For tensors on CUDA the first
    :data:`MOST_PINNED` slabs are pinned; a copy that is larger continues in ordinary memory, into which the device copies
    more slowly.
    """

    def __init__(self) -> None:
        self.slabs: list[Tensor] = []
        self.most_pinned = MOST_PINNED

    def copy(self, pieces: list[Piece]) -> list[Piece]:
        """Copy *pieces* and return them as they are in the copy. Waits for the device.

        Raises:
            MemoryError, RuntimeError: the host has no memory for the copy (see `bigvision.errors.lacks_memory`), or the
                device has failed.
        """
        cuda = on_cuda(pieces)
        copies = []
        for piece, slot in zip(pieces, self._slots(pieces, cuda)):
            # numpy starts sooner than torch, but torch uses several threads where it may.
            if cuda or torch.get_num_threads() > 1:
                for part, target in zip(piece.parts, slot.split([part.numel() for part in piece.parts])):
                    target.copy_(part, non_blocking=True)
            else:
                gather(piece, slot)
            copies.append(Piece(piece.file, piece.offset, piece.length, (slot,)))
        if cuda:
            torch.cuda.synchronize()
        return copies

    def _slots(self, pieces: list[Piece], cuda: bool) -> list[Tensor]:
        """A slot of memory for each piece; no slot crosses the end of a slab, so each piece is in one place."""
        slots, number, end = [], 0, 0
        for piece in pieces:
            begin = self._begin(piece, number, end, cuda)
            if begin + piece.length > len(self.slabs[number]):
                number += 1
                begin = self._begin(piece, number, 0, cuda)
            end = begin + piece.length
            slots.append(self.slabs[number][begin:end])
        return slots

    def _begin(self, piece: Piece, number: int, end: int, cuda: bool) -> int:
        """The first place in slab *number* from *end* on that suits *piece*. Allocates the slab if it is the next one."""
        if number == len(self.slabs):
            self.slabs.append(self._allocate(cuda))
        aligns = piece.length >= LEAST_ALIGNED
        return end + (piece.offset - self.slabs[number].data_ptr() - end) % ALIGN if aligns else end

    def _allocate(self, cuda: bool) -> Tensor:
        if cuda and len(self.slabs) < self.most_pinned:
            try:
                return slab(pinned=True)
            except RuntimeError as error:
                if not lacks_memory(error):
                    raise
                self.most_pinned = len(self.slabs)  # the system lets this process pin no more
        return slab(pinned=False)


def slab(pinned: bool) -> Tensor:
    """:data:`SLAB` bytes without values."""
    return torch.empty(SLAB, dtype=torch.uint8, pin_memory=pinned)


def on_cuda(pieces: list[Piece]) -> bool:
    """Whether any byte of *pieces* is on a CUDA device."""
    return any(part.is_cuda for piece in pieces for part in piece.parts)


def aligned(size: int) -> Tensor:
    """*size* bytes of ordinary memory that begin at a multiple of :data:`ALIGN`, without values."""
    memory = torch.empty(size + ALIGN, dtype=torch.uint8)
    return memory[-memory.data_ptr() % ALIGN :][:size]


def gather(piece: Piece, target: Tensor) -> None:
    """Copy the bytes of *piece* to *target*, by the calling thread alone. Waits for the device."""
    position = 0
    for part in piece.parts:
        slot = target[position : position + part.numel()]
        if part.device.type == "cpu":
            numpy.copyto(slot.numpy(), part.numpy())  # torch would start threads of its own in each of ours
        else:
            slot.copy_(part)
        position += part.numel()


def create(folder: Path, layout: FileLayout) -> Run:
    """Make the file at its whole size, with its header. Only rank 0 does."""
    descriptor = open_new(folder / layout.name)
    try:
        os.ftruncate(descriptor, layout.size)
        reserve(descriptor, layout.size)
        write_at(descriptor, memoryview(layout.header), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Run(layout.name, 0, len(layout.header), checksum(layout.header))


def write_document(folder: Path, name: str, content: Any) -> Run:
    """Write *content* as JSON, to the disk."""
    text = (json.dumps(content, indent=2) + "\n").encode()
    write_new(folder / name, text)
    return Run(name, 0, len(text), checksum(text))


def write_pieces(folder: Path, pieces: list[Piece]) -> list[Run]:
    """Write this rank's pieces into the files of *folder*, to the disk, and return what was written.

    Each rank begins elsewhere: a file system lets one at a time into the part of a file that it has not placed yet.
    """
    pieces = from_share(pieces, dist.get_rank() / dist.get_world_size())
    # Those that go through the page cache have a file to themselves for a moment, and would keep the others waiting.
    pieces.sort(key=lambda piece: piece.length < LEAST_ALIGNED)
    local = threading.local()

    def write(piece: Piece) -> Run:
        if not hasattr(local, "buffer"):
            local.buffer = aligned(CHUNK + ALIGN)
        return files[piece.file].write(piece, local.buffer)

    with ExitStack() as stack:
        files: dict[str, OpenFile] = {}
        for name in dict.fromkeys(piece.file for piece in pieces):
            files[name] = OpenFile(folder / name)
            stack.callback(files[name].close)
        threads = stack.enter_context(ThreadPoolExecutor(THREADS, "checkpoint"))
        # What an error leaves undone is not begun any more.
        stack.callback(threads.shutdown, cancel_futures=True)
        runs = list(threads.map(write, pieces))
        list(threads.map(OpenFile.sync, files.values()))
        return runs


class OpenFile:
    """A file that pieces are written into: past the page cache where the file system can, which is several times as fast."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.descriptors = [open_existing(path, os.O_WRONLY)]
        try:
            self.direct: int | None = open_existing(path, os.O_WRONLY | os.O_DIRECT)
            self.descriptors.append(self.direct)
        except OSError:  # a file system that has no direct I/O
            self.direct = None

    def write(self, piece: Piece, buffer: Tensor) -> Run:
        """Write *piece*, through *buffer* where its bytes are not in one place of the host that suits the disk."""
        data = self._in_place(piece, buffer)
        view = memoryview(data.numpy())  # pyright: ignore[reportArgumentType]
        run = Run(self.name, piece.offset, piece.length, checksum(view))
        begin, end = 0, 0
        if self.direct is not None and (data.data_ptr() - piece.offset) % ALIGN == 0:
            begin, end = min(-piece.offset % ALIGN, piece.length), piece.length - (piece.offset + piece.length) % ALIGN
            end = self._write_direct(view[begin:end], piece.offset + begin) + begin if begin < end else begin
        write_at(self.descriptors[0], view[:begin], piece.offset)
        write_at(self.descriptors[0], view[end:], piece.offset + end)
        return run

    def sync(self) -> None:
        """Bring the file's bytes to the disk, whichever way they were written."""
        os.fsync(self.descriptors[0])

    def close(self) -> None:
        # Each, also after an error of another.
        with ExitStack() as stack:
            for descriptor in self.descriptors:
                stack.callback(os.close, descriptor)

    def _in_place(self, piece: Piece, buffer: Tensor) -> Tensor:
        whole = piece.parts[0] if len(piece.parts) == 1 and piece.parts[0].device.type == "cpu" else None
        suits = self.direct is None or piece.length < LEAST_ALIGNED
        if whole is not None and (suits or (whole.data_ptr() - piece.offset) % ALIGN == 0):
            return whole
        begin = 0 if suits else piece.offset % ALIGN
        data = buffer[begin : begin + piece.length]
        gather(piece, data)
        return data

    def _write_direct(self, data: memoryview, offset: int) -> int:
        """Write *data* past the page cache as far as that goes; returns how far."""
        # Taken once: another thread may find in the meantime that this file takes no direct I/O. It stays open until `close`.
        descriptor, position = self.direct, 0
        while position < len(data) and descriptor is not None:
            try:
                written = os.pwrite(descriptor, data[position:], offset + position)
            except OSError as error:
                if error.errno != errno.EINVAL:  # this file system's blocks are larger, or it only said that it could
                    raise
                self.direct = None
                break
            position += written
            if written % ALIGN:  # the rest is no longer aligned
                break
        return position


# Where ranks must not write one file together (NFS, mounted object stores): each file has one rank that does.


def write_by_owners(folder: Path, plan: Plan, group: dist.ProcessGroup | None) -> list[Run]:
    """Give this rank's pieces to the ranks that own their files, write those of the files that this rank owns, to the disk.

    Returns the runs of the files that this rank owns. The bytes on the disk are those of :func:`write_pieces`. An error is
    raised at the end: until then the others go on to send and receive as if there were none.
    """
    if dist.get_world_size() == 1:
        return write_pieces(folder, plan.pieces)
    mine = {name: list(pieces) for name, pieces in itertools.groupby(plan.pieces, key=lambda piece: piece.file)}
    listed = gather_json({name: [[p.offset, p.length] for p in pieces] for name, pieces in mine.items()}, group)
    buffer = aligned(CHUNK + ALIGN)
    runs: list[Run] = []
    failure: Exception | None = None
    for number, layout in enumerate(plan.files):
        owner = number % dist.get_world_size()
        own = {piece.offset: piece for piece in mine.get(layout.name, [])}
        if owner != dist.get_rank():
            for piece in own.values():
                # Its alignment is the owner's matter.
                gather(piece, buffer[: piece.length])
                dist.send(buffer[: piece.length], owner, group)
            continue
        sent = sorted((*place, rank) for rank, files in enumerate(listed) for place in files.get(layout.name, []))
        file: OpenFile | None = None
        try:
            file = OpenFile(folder / layout.name)
        except OSError as error:
            failure = failure or error
        for offset, length, rank in sent:
            piece = own[offset] if rank == owner else _received(layout.name, offset, length, rank, group)
            try:
                if file is not None and failure is None:
                    runs.append(file.write(piece, buffer))
            except OSError as error:
                failure = error
        for last in (file.sync, file.close) if file is not None else ():
            try:
                last()
            except OSError as error:
                failure = failure or error
    if failure is not None:
        raise failure
    return runs


def _received(file: str, offset: int, length: int, rank: int, group: dist.ProcessGroup | None) -> Piece:
    data: Tensor = torch.empty(length, dtype=torch.uint8)
    dist.recv(data, rank, group)
    return Piece(file, offset, length, (data,))
