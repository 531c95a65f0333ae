"""Pieces to bytes: every rank writes its own straight to their places in the files, or each file has one rank that does."""

from __future__ import annotations

import errno
import itertools
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bigvision.checkpoint.disk import open_existing, open_new, reserve, write_at, write_new
from bigvision.checkpoint.layout import FileLayout
from bigvision.checkpoint.manifest import CHUNK, Run, checksum
from bigvision.checkpoint.memory import ALIGN, LEAST_ALIGNED, aligned, gather
from bigvision.checkpoint.pieces import Piece, Plan, from_share
from bigvision.runtime import gather_json

THREADS = 3
"""That write at a time on each rank: one sums or copies while the disk works for the others."""


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
