"""The tensors of a checkpoint, read by one process and a piece at a time."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bigvision.checkpoint import manifest
from bigvision.checkpoint.manifest import Damaged, Run, read_run
from bigvision.checkpoint.reader import read_places
from bigvision.tensorfile import TYPES, Place

PIECE = 1 << 20
"""Bytes handed out at a time; a multiple of every type's width."""


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
