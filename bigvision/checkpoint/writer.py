"""Fragments to bytes: which rank writes which bytes of which file, the copy of these bytes, and the writing.

Every rank computes the same grid from the tensors' names, types and whole shapes, without communication. Here are two files,
their header (h) and three tensors, of which each rank holds half the rows (sharded) or everything (replicated)::

    shards       model-00001-of-00002.safetensors           model-00002-of-00002.safetensors
    byte range   0               8 MiB           16 MiB     0            6 MiB
    cells        |       0       |       1       |   2   |  |     0     |
    tensors      |h|   blocks.0.weight   |blocks.1.weight|  |h|   head  |
    sharded      |0|    0    | 1 |   1   |   0   |   1   |  |0| 0 |  1  |   the rank that writes this chunk
    replicated   |0|      0      |       1       |   0   |  |0|    1    |   the ranks take turns over the cells

A tensor's *byte range* in its file follows from the layout, a fragment's from where it begins in the tensor. The borders of
the cells, every 8 MiB of a file, cut it into *chunks*: what is copied, summed and written at once. What follows each other in
a cell (small tensors of one rank) is one chunk. Rank 0 writes the headers. The sections of this file are in the order of the
data: layout, chunks, copy, writing by all ranks into all files, writing by one rank per file.
"""

from __future__ import annotations

import errno
import itertools
import json
import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bigvision.checkpoint.manifest import ByteRange, checksum
from bigvision.disk import open_existing, write_at
from bigvision.errors import lacks_memory
from bigvision.fragments import DTYPES, Fragment, bytes_of, copy_into
from bigvision.runtime import gather_json

T = TypeVar("T")

CHUNK = 8 << 20
"""Bytes of a cell of the grid: the most that is copied, written, summed or read at once."""
BLOCK = 4096
"""Bytes that disks and memory are divided into. What begins and ends with whole blocks goes straight to the disk."""
ALIGN = max(BLOCK, mmap.PAGESIZE)
"""Direct I/O wants addresses, offsets and lengths that are multiples of the disk's blocks; no disk has larger ones."""
LEAST_ALIGNED = 64 << 10
"""Smaller chunks are not worth their padding, and go through the page cache."""
SLAB = 64 << 20
"""Bytes of a slab: a power of two, because torch rounds each pinned allocation up to one, and several times a chunk."""
MOST_PINNED = 128
"""Pinned slabs of a rank (8 GiB): pinned memory cannot be swapped or reclaimed, and the ranks of a host share it."""
THREADS = 3
"""That write at a time on each rank: one sums or copies while the disk works for the others."""


# Layout: the byte range of each tensor.


@dataclass(frozen=True)
class FileLayout:
    """One safetensors file."""

    name: str
    header: bytes
    """The length prefix and the JSON header, as the file begins."""
    offsets: Mapping[str, int]
    """Each tensor's first byte in the file."""
    size: int


def lay_out(group: str, tensors: Mapping[str, Tensor], shard_size: int) -> list[FileLayout]:
    """Spread *tensors*, by name and without values (on the meta device), over files of at most *shard_size* bytes of data.

    A larger tensor gets a file of its own.
    """

    def order(name: str) -> tuple[bool, int, str]:
        # Those of whole blocks first keeps them all at the beginnings of blocks, and what is left close together; wider types
        # first keeps every tensor aligned to its own width, so that readers can map the file.
        return tensors[name].nbytes % BLOCK != 0, -tensors[name].itemsize, name

    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name in sorted(tensors, key=order):
        if shards[-1] and filled + tensors[name].nbytes > shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = tensors[name]
        filled += tensors[name].nbytes
    if len(shards) == 1:
        return [_file(f"{group}.safetensors", shards[0])]
    return [_file(f"{group}-{n:05}-of-{len(shards):05}.safetensors", shard) for n, shard in enumerate(shards, start=1)]


def _file(name: str, tensors: dict[str, Tensor]) -> FileLayout:
    # Hugging Face's readers insist on the format's name.
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for tensor, spec in tensors.items():
        begins[tensor], end = end, end + spec.nbytes
        entries[tensor] = {"dtype": DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begins[tensor], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-(8 + len(text)) % BLOCK)
    header = len(text).to_bytes(8, "little") + text
    return FileLayout(name, header, {tensor: len(header) + begin for tensor, begin in begins.items()}, len(header) + end)


def index(files: list[FileLayout]) -> dict[str, Any]:
    """The content of ``model.safetensors.index.json``, by which readers find a tensor's file among several."""
    total = sum(file.size - len(file.header) for file in files)
    return {"metadata": {"total_size": total}, "weight_map": {name: file.name for file in files for name in file.offsets}}


# Chunks: who writes which bytes.


@dataclass(frozen=True)
class Chunk:
    """Consecutive bytes of one cell of the grid that one rank writes."""

    file: str
    offset: int
    parts: tuple[Tensor, ...]
    """The bytes in their order, uint8 and 1-D: views of what the fragments hold."""

    @property
    def length(self) -> int:
        return sum(part.numel() for part in self.parts)


@dataclass(frozen=True)
class Plan:
    """What a save consists of."""

    layouts: dict[str, list[FileLayout]]
    """The files of each group; the same on every rank."""
    chunks: list[Chunk]
    """What this rank writes, in the order of the files and of their bytes."""

    @property
    def files(self) -> list[FileLayout]:
        return [file for files in self.layouts.values() for file in files]


def plan(fragments: list[Fragment], shard_size: int) -> Plan:
    """Lay *fragments* out in files of at most *shard_size* bytes of data, and choose the chunks that this rank writes."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for fragment in fragments:
        whole = torch.empty(fragment.shape, dtype=fragment.values.dtype, device="meta")
        tensors.setdefault(fragment.group, {})[fragment.name] = whole
    layouts = {group: lay_out(group, tensors[group], shard_size) for group in sorted(tensors)}
    places = {
        (group, name): (number, file.name, offset)
        for group, files in layouts.items()
        for number, file in enumerate(files)
        for name, offset in file.offsets.items()
    }
    chunks: list[Chunk] = []
    for fragment in fragments:
        if fragment.values.numel():
            chunks += _cut(fragment, *places[fragment.group, fragment.name])
    chunks.sort(key=lambda chunk: (chunk.file, chunk.offset))
    return Plan(layouts, list(_joined(chunks)))


def _cut(fragment: Fragment, number: int, file: str, tensor: int) -> Iterator[Chunk]:
    """This rank's chunks of a fragment, whose *tensor* begins at that offset in the group's file *number*.

    Of what several ranks hold each cell is written by one of them: they take turns, so that all write as much.
    """
    data = fragment.values.detach().view(torch.uint8)
    this, copies = fragment.copy
    offset = tensor + fragment.start * fragment.values.element_size()
    end = offset + data.numel()
    for cell in range(offset // CHUNK, -(-end // CHUNK)):
        if (number + cell) % copies == this:
            first, last = max(offset, cell * CHUNK), min(end, (cell + 1) * CHUNK)
            yield Chunk(file, first, (data[first - offset : last - offset],))


def _joined(chunks: list[Chunk]) -> Iterator[Chunk]:
    """*chunks*, those that follow each other in a cell as one."""
    parts: list[Tensor] = []
    begin, end = 0, 0
    for number, chunk in enumerate(chunks):
        begin = begin if parts else chunk.offset
        parts += chunk.parts
        end = chunk.offset + chunk.length
        following = chunks[number + 1] if number + 1 < len(chunks) else None
        if following is None or (following.file, following.offset) != (chunk.file, end) or end % CHUNK == 0:
            yield Chunk(chunk.file, begin, tuple(parts))
            parts = []


def from_share(items: list[T], share: float) -> list[T]:
    """*items* in their order from that *share* of them on, and then those before."""
    begin = int(len(items) * share)
    return items[begin:] + items[:begin]


# The copy of a rank's chunks, while training goes on.


class Arena:
    """Host memory that holds a copy of chunks, each as aligned as its offset in the file.

    The memory consists of slabs of one size, which are reused by later copies. For tensors on CUDA the first
    :data:`MOST_PINNED` slabs are pinned; a copy that is larger continues in ordinary memory, into which the device copies
    more slowly.
    """

    def __init__(self) -> None:
        self.slabs: list[Tensor] = []
        self.most_pinned = MOST_PINNED

    def copy(self, chunks: list[Chunk]) -> list[Chunk]:
        """Copy *chunks* and return them as they are in the copy. Waits for the device.

        MemoryError or RuntimeError where the host has no memory for it (`bigvision.errors.lacks_memory`), or the device failed.
        """
        cuda = on_cuda(chunks)
        copies = []
        for chunk, slot in zip(chunks, list(self._slots(chunks, cuda))):
            # numpy starts sooner than torch, but torch uses several threads where it may.
            if cuda or torch.get_num_threads() > 1:
                for part, target in zip(chunk.parts, slot.split([part.numel() for part in chunk.parts])):
                    target.copy_(part, non_blocking=True)
            else:
                gather(chunk, slot)
            copies.append(Chunk(chunk.file, chunk.offset, (slot,)))
        if cuda:
            torch.cuda.synchronize()
        return copies

    def _slots(self, chunks: list[Chunk], cuda: bool) -> Iterator[Tensor]:
        """Memory for each chunk; none crosses the end of a slab, so each chunk is contiguous."""
        number, end = 0, 0
        for chunk in chunks:
            begin = self._begin(chunk, number, end, cuda)
            if begin + chunk.length > len(self.slabs[number]):
                number += 1
                begin = self._begin(chunk, number, 0, cuda)
            end = begin + chunk.length
            yield self.slabs[number][begin:end]

    def _begin(self, chunk: Chunk, number: int, end: int, cuda: bool) -> int:
        """The first byte of slab *number* from *end* on that suits *chunk*. Allocates the slab if it is the next one."""
        if number == len(self.slabs):
            self.slabs.append(self._allocate(cuda))
        aligns = chunk.length >= LEAST_ALIGNED
        return end + (chunk.offset - self.slabs[number].data_ptr() - end) % ALIGN if aligns else end

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


def on_cuda(chunks: list[Chunk]) -> bool:
    """Whether any byte of *chunks* is on a CUDA device."""
    return any(part.is_cuda for chunk in chunks for part in chunk.parts)


def gather(chunk: Chunk, target: Tensor) -> None:
    """Copy the bytes of *chunk* to *target*, by the calling thread alone. Waits for the device."""
    for part, slot in zip(chunk.parts, target.split([part.numel() for part in chunk.parts])):
        copy_into(slot, part)


# Writing: every rank its chunks into every file.


def write_chunks(folder: Path, chunks: list[Chunk]) -> list[ByteRange]:
    """Write this rank's chunks into the files of *folder*, to the disk, and return what was written.

    Each rank begins elsewhere: a file system lets one at a time into the part of a file that it has not placed yet.
    """
    chunks = from_share(chunks, dist.get_rank() / dist.get_world_size())
    # Those that go through the page cache have a file to themselves for a moment, and would keep the others waiting.
    chunks.sort(key=lambda chunk: chunk.length < LEAST_ALIGNED)
    local = threading.local()

    def write(chunk: Chunk) -> ByteRange:
        if not hasattr(local, "buffer"):
            local.buffer = aligned(CHUNK + ALIGN)
        return files[chunk.file].write(chunk, local.buffer)

    with ExitStack() as stack:
        files: dict[str, OpenFile] = {}
        for name in dict.fromkeys(chunk.file for chunk in chunks):
            files[name] = OpenFile(folder / name)
            stack.callback(files[name].close)
        threads = stack.enter_context(ThreadPoolExecutor(THREADS, "checkpoint"))
        # After an error nothing more is begun.
        stack.callback(threads.shutdown, cancel_futures=True)
        written = list(threads.map(write, chunks))
        list(threads.map(OpenFile.sync, files.values()))
        return written


def aligned(size: int) -> Tensor:
    """*size* bytes of ordinary memory that begin at a multiple of :data:`ALIGN`, without values."""
    memory = torch.empty(size + ALIGN, dtype=torch.uint8)
    return memory[-memory.data_ptr() % ALIGN :][:size]


class OpenFile:
    """A file that chunks are written into: past the page cache where the file system can, which is several times as fast."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.descriptors = [open_existing(path, os.O_WRONLY)]
        try:
            self.direct: int | None = open_existing(path, os.O_WRONLY | os.O_DIRECT)
            self.descriptors.append(self.direct)
        except OSError:  # a file system that has no direct I/O
            self.direct = None

    def write(self, chunk: Chunk, buffer: Tensor) -> ByteRange:
        """Write *chunk* and return its byte range; *buffer* is from :func:`aligned` and as large as any chunk."""
        offset, length, data = chunk.offset, chunk.length, chunk.parts[0]
        direct = self.direct is not None and length >= LEAST_ALIGNED
        fits = not direct or (data.data_ptr() - offset) % ALIGN == 0
        if len(chunk.parts) > 1 or data.device.type != "cpu" or not fits:
            # Where direct I/O needs it, as far from a block's beginning in memory as in the file.
            begin = offset % ALIGN
            data = buffer[begin : begin + length]
            gather(chunk, data)
        view = bytes_of(data)
        written = ByteRange(self.name, offset, length, checksum(view))
        # Whole blocks go straight to the disk; the ends of the chunk, and what direct I/O leaves, through the page cache.
        head = tail = 0
        if direct:
            head, end = -offset % ALIGN, length - (offset + length) % ALIGN
            tail = head + self._write_direct(view[head:end], offset + head)
        write_at(self.descriptors[0], view[:head], offset)
        write_at(self.descriptors[0], view[tail:], offset + tail)
        return written

    def sync(self) -> None:
        """Bring the file's bytes to the disk, whichever way they were written."""
        os.fsync(self.descriptors[0])

    def close(self) -> None:
        # Each, also after an error of another.
        with ExitStack() as stack:
            for descriptor in self.descriptors:
                stack.callback(os.close, descriptor)

    def _write_direct(self, data: memoryview, offset: int) -> int:
        """Write *data* past the page cache as far as that goes; returns how far."""
        # Taken once: another thread may find in the meantime that this file takes no direct I/O. It stays open until `close`.
        descriptor, position = self.direct, 0
        while position < len(data) and descriptor is not None:
            try:
                written = os.pwrite(descriptor, data[position:], offset + position)
            except OSError as error:
                if error.errno != errno.EINVAL:  # larger blocks, or O_DIRECT that only opening accepts
                    raise
                self.direct = None
                break
            position += written
            if written % ALIGN:  # the rest is no longer aligned
                break
        return position


# Writing where ranks must not write one file together (NFS, mounted object stores): each file has one rank that does.


def write_by_owners(folder: Path, content: Plan, group: dist.ProcessGroup | None) -> list[ByteRange]:
    """Send this rank's chunks to the ranks that own their files, write those of the files that this rank owns, to the disk.

    Returns the byte ranges of the files that this rank owns. The bytes on the disk are those of :func:`write_chunks`. An error
    is raised at the end: until then this rank goes on to send and receive as if there were none.
    """
    this, ranks = dist.get_rank(), dist.get_world_size()
    if ranks == 1:
        return write_chunks(folder, content.chunks)
    mine = {name: list(chunks) for name, chunks in itertools.groupby(content.chunks, key=lambda chunk: chunk.file)}
    listed = gather_json({name: [[c.offset, c.length] for c in chunks] for name, chunks in mine.items()}, group)
    buffer, received = aligned(CHUNK + ALIGN), torch.empty(CHUNK, dtype=torch.uint8)
    written: list[ByteRange] = []
    failures: list[OSError] = []
    for number, layout in enumerate(content.files):
        owner = number % ranks
        own = {chunk.offset: chunk for chunk in mine.get(layout.name, [])}
        if this != owner:
            for chunk in own.values():
                gather(chunk, buffer[: chunk.length])
                dist.send(buffer[: chunk.length], owner, group)
            continue
        file: OpenFile | None = None
        with _noting(failures):
            file = OpenFile(folder / layout.name)
        sent = sorted((*part, rank) for rank, files in enumerate(listed) for part in files.get(layout.name, []))
        for offset, length, rank in sent:
            if rank != this:
                dist.recv(received[:length], rank, group)
            if file is not None and not failures:
                chunk = own[offset] if rank == this else Chunk(layout.name, offset, (received[:length],))
                with _noting(failures):
                    written.append(file.write(chunk, buffer))
        for last in (file.sync, file.close) if file is not None else ():
            with _noting(failures):
                last()
    if failures:
        raise failures[0]
    return written


@contextmanager
def _noting(failures: list[OSError]) -> Iterator[None]:
    """Keep what the system refuses for later."""
    try:
        yield
    except OSError as error:
        failures.append(error)
