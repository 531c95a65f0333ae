"""Memory that suits direct I/O, and the copy of a rank's state that is written while training goes on."""

from __future__ import annotations

import mmap

import numpy
import torch
from torch import Tensor

from bigvision.checkpoint.manifest import CHUNK
from bigvision.checkpoint.pieces import Piece
from bigvision.errors import lacks_memory

ALIGN = max(4096, mmap.PAGESIZE)
"""Direct I/O wants addresses, offsets and lengths that are multiples of the disk's blocks; no disk has larger ones."""
LEAST_ALIGNED = 64 << 10
"""Smaller pieces are not worth their padding, and go through the page cache."""
SLAB = 64 << 20
"""Bytes of a slab: a power of two, because torch rounds each pinned allocation up to one, and several times a piece."""
MOST_PINNED = 128
"""Pinned slabs of a rank (8 GiB): pinned memory cannot be swapped or reclaimed, and the ranks of a host share it."""
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
