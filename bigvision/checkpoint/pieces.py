"""Which bytes of which file this rank writes, and where they are in memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from bigvision.checkpoint.layout import FileLayout, lay_out, specs
from bigvision.checkpoint.manifest import CHUNK
from bigvision.fragments import Fragment

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
