"""Where each tensor lies in the files, and which bytes of them this rank writes."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from bigvision.checkpoint.manifest import CHUNK
from bigvision.fragments import DTYPES, Fragment

BLOCK = 4096
"""Bytes that disks and memory are divided into. What begins and ends with whole blocks goes straight to the disk."""


@dataclass(frozen=True)
class TensorSpec:
    """A whole tensor, without its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FileLayout:
    """One safetensors file."""

    name: str
    header: bytes
    """The length prefix and the JSON header, as the file begins."""
    offsets: Mapping[str, int]
    """Each tensor's first byte in the file."""
    size: int


def specs(fragments: Iterable[Fragment], group: str) -> list[TensorSpec]:
    """The whole tensors of one group."""
    return list({f.name: TensorSpec(f.name, f.values.dtype, f.shape) for f in fragments if f.group == group}.values())


def lay_out(group: str, tensors: list[TensorSpec], shard_size: int) -> list[FileLayout]:
    """Spread *tensors* over files of at most *shard_size* bytes of data; a larger tensor gets a file of its own."""
    # Those of whole blocks first keeps them all at the beginnings of blocks, and what is left close together; wider types
    # first keeps every tensor aligned to its own width, so that readers can map the file.
    tensors = sorted(tensors, key=lambda spec: (spec.nbytes % BLOCK != 0, -spec.dtype.itemsize, spec.name))
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    if len(shards) == 1:
        return [_file(f"{group}.safetensors", shards[0])]
    return [_file(f"{group}-{n:05}-of-{len(shards):05}.safetensors", shard) for n, shard in enumerate(shards, start=1)]


def index(files: list[FileLayout]) -> dict[str, Any]:
    """The content of ``model.safetensors.index.json``, by which readers find a tensor's file among several."""
    total = sum(file.size - len(file.header) for file in files)
    return {"metadata": {"total_size": total}, "weight_map": {name: file.name for file in files for name in file.offsets}}


def _file(name: str, tensors: list[TensorSpec]) -> FileLayout:
    # Hugging Face's readers insist on the format's name.
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        entries[tensor.name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        begins[tensor.name] = position
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-(8 + len(text)) % BLOCK)
    header = len(text).to_bytes(8, "little") + text
    offsets = {tensor: len(header) + begin for tensor, begin in begins.items()}
    return FileLayout(name, header, offsets, len(header) + position)


T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """Consecutive bytes of one file, at most :data:`CHUNK` and within one cell of a grid of such cells over the file."""

    file: str
    offset: int
    length: int
    parts: tuple[Tensor, ...]
    """The bytes in their order, uint8 and 1-D: views of what the fragments hold."""


@dataclass(frozen=True)
class Plan:
    """What a save consists of."""

    layouts: dict[str, list[FileLayout]]
    """The files of each group; the same on every rank."""
    pieces: list[Piece]
    """What this rank writes, in the order of the files and of their bytes."""

    @property
    def files(self) -> list[FileLayout]:
        return [file for files in self.layouts.values() for file in files]


def plan(fragments: list[Fragment], shard_size: int) -> Plan:
    """Lay *fragments* out in files of at most *shard_size* bytes of data.

    What several ranks hold is written by one of them: they take turns over the cells of the grid, so that each writes as
    much as the others.
    """
    groups = sorted({fragment.group for fragment in fragments})
    layouts = {group: lay_out(group, specs(fragments, group), shard_size) for group in groups}
    places = {
        (group, name): (number, file.name, offset)
        for group, files in layouts.items()
        for number, file in enumerate(files)
        for name, offset in file.offsets.items()
    }
    cut = []
    for fragment in fragments:
        if fragment.values.numel():
            number, file, offset = places[fragment.group, fragment.name]
            cut += _cut(fragment, number, file, offset + fragment.start * fragment.values.element_size())
    cut.sort(key=lambda piece: (piece.file, piece.offset))
    return Plan(layouts, list(_joined(cut)))


def from_share(items: list[T], share: float) -> list[T]:
    """*items* in their order from that *share* of them on, and then those before."""
    begin = int(len(items) * share)
    return items[begin:] + items[:begin]


def _cut(fragment: Fragment, number: int, file: str, offset: int) -> Iterator[Piece]:
    """The fragment's bytes, which lie at *offset*, along the lines of the grid; only those that this rank writes."""
    data = fragment.values.detach().view(torch.uint8)
    this, copies = fragment.copy
    end = offset + data.numel()
    for cell in range(offset // CHUNK, -(-end // CHUNK)):
        if (number + cell) % copies == this:
            first, last = max(offset, cell * CHUNK), min(end, (cell + 1) * CHUNK)
            yield Piece(file, first, last - first, (data[first - offset : last - offset],))


def _joined(pieces: list[Piece]) -> Iterator[Piece]:
    """*pieces*, those that follow each other in a cell as one."""
    run: list[Piece] = []
    for piece in pieces:
        before = run[-1] if run else None
        follows = before is not None and (before.file, before.offset + before.length) == (piece.file, piece.offset)
        if run and not (follows and piece.offset % CHUNK):
            yield _join(run)
            run = []
        run.append(piece)
    if run:
        yield _join(run)


def _join(run: list[Piece]) -> Piece:
    parts = functools.reduce(lambda parts, piece: parts + piece.parts, run, ())
    return Piece(run[0].file, run[0].offset, sum(piece.length for piece in run), parts)
