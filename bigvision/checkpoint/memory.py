"""Memory that suits direct I/O, and the copy of a rank's state that is written while training goes on."""

from __future__ import annotations

import mmap

import numpy
import torch
from torch import Tensor

from bigvision.checkpoint.pieces import Piece

ALIGN = max(4096, mmap.PAGESIZE)
"""Direct I/O wants addresses, offsets and lengths that are multiples of the disk's blocks; no disk has larger ones."""
LEAST_ALIGNED = 64 << 10
"""Smaller pieces are not worth their padding, and go through the page cache."""


class Arena:
    """Host memory that holds a copy of pieces, each as aligned as its place in the file. Kept from one save to the next."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def copy(self, pieces: list[Piece]) -> list[Piece]:
        """Copy *pieces* and return them as they are in the copy. Waits for the device."""
        places, size = [], 0
        for piece in pieces:
            if piece.length >= LEAST_ALIGNED:
                size += (piece.offset - size) % ALIGN
            places.append(size)
            size += piece.length
        cuda = any(part.is_cuda for piece in pieces for part in piece.parts)
        if self.memory.numel() < size:
            self.memory = torch.empty(0, dtype=torch.uint8)  # before the larger one is asked for
            self.memory = aligned(size, pinned=cuda)
        copies = []
        for piece, place in zip(pieces, places):
            mine = self.memory[place : place + piece.length]
            # numpy starts sooner, and torch has more threads where it may.
            if cuda or torch.get_num_threads() > 1:
                for part, there in zip(piece.parts, mine.split([part.numel() for part in piece.parts])):
                    there.copy_(part, non_blocking=True)
            else:
                gather(piece, mine)
            copies.append(Piece(piece.file, piece.offset, piece.length, (mine,)))
        if cuda:
            torch.cuda.synchronize()
        return copies


def aligned(size: int, pinned: bool = False) -> Tensor:
    """*size* bytes that begin at a multiple of :data:`ALIGN`, without values."""
    memory = torch.empty(size + ALIGN, dtype=torch.uint8, pin_memory=pinned)
    return memory[-memory.data_ptr() % ALIGN :][:size]


def gather(piece: Piece, target: Tensor) -> None:
    """Copy the bytes of *piece* to *target*, by the calling thread alone. Waits for the device."""
    position = 0
    for part in piece.parts:
        there = target[position : position + part.numel()]
        if part.device.type == "cpu":
            numpy.copyto(there.numpy(), part.numpy())  # torch would start threads of its own in each of ours
        else:
            there.copy_(part)
        position += part.numel()
