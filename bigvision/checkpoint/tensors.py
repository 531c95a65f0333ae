"""The tensors of a checkpoint, read by one process and a piece at a time."""

from __future__ import annotations

import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from bigvision.checkpoint import manifest
from bigvision.checkpoint.layout import DTYPES
from bigvision.checkpoint.manifest import Damaged, Run
from bigvision.checkpoint.reader import Place, read_places

PIECE = 1 << 20
"""Bytes in memory at a time; a multiple of every type's width."""
TYPES = {name: dtype for dtype, name in DTYPES.items()}


class Tensors:
    """The tensors of some *groups* of the checkpoint *folder*, by group and name in :attr:`places`.

    With *verify* no byte is handed out that was not compared with its checksum. Other groups' files are not looked into.

    Raises:
        Damaged: the manifest, a file's size or a header is wrong.
    """

    def __init__(self, folder: Path, groups: tuple[str, ...], verify: bool) -> None:
        self.folder = folder
        self.verify = verify
        runs = manifest.read(folder)
        self.runs = {name: sorted(part, key=_offset) for name, part in runs.items()}
        self._verified: set[Run] = set()
        self.places = read_places(folder, [name for name in runs if name.split(".")[0].split("-")[0] in groups])
        begins: dict[str, int] = {}
        for name, place in (item for tensors in self.places.values() for item in tensors.items()):
            dtype = TYPES.get(place.dtype)
            if dtype is None or math.prod(place.shape) * dtype.itemsize != place.nbytes:
                raise Damaged(f"{place.file}: {name} is {place.dtype}{list(place.shape)} in {place.nbytes} bytes")
            begins[place.file] = min(place.offset, begins.get(place.file, place.offset))
        for file, begin in begins.items():
            self._check(file, 0, begin)

    def document(self, name: str) -> bytes:
        """The content of a JSON file of the checkpoint.

        Raises:
            Damaged: it cannot be read or is not what was written.
        """
        with _reading(name):
            content = (self.folder / name).read_bytes()
        self._check(name, 0, len(content))
        return content

    def pieces(self, place: Place) -> Iterator[Tensor]:
        """Yield the values of a tensor, flat and in order; each piece overwrites the one before.

        Raises:
            Damaged: the bytes cannot be read, or are not those that were written.
        """
        buffer = memoryview(bytearray(min(PIECE, place.nbytes)))
        with _reading(place.file), open(self.folder / place.file, "rb", opener=_opener) as file:
            file.seek(place.offset)
            for begin in range(0, place.nbytes, PIECE):
                data = buffer[: min(PIECE, place.nbytes - begin)]
                self._check(place.file, place.offset + begin, len(data))
                if file.readinto(data) < len(data):
                    raise Damaged(f"{place.file} ends early")
                yield torch.frombuffer(data, dtype=TYPES[place.dtype])

    def _check(self, file: str, offset: int, length: int) -> None:
        """Verify the runs that have a part in these bytes, each once."""
        if not self.verify:
            return
        runs = self.runs[file]
        first, last = bisect_right(runs, offset, key=_offset) - 1, bisect_left(runs, offset + length, key=_offset)
        within = [run for run in runs[max(first, 0) : last] if run not in self._verified]
        with _reading(file):
            manifest.verify(self.folder, within)
        self._verified.update(within)


@contextmanager
def _reading(file: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Damaged(f"{file} cannot be read: {error.strerror}") from None


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


def _offset(run: Run) -> int:
    return run.offset
