"""Writing where ranks must not write one file together (NFS, mounted object stores): each file has one rank that does."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from bigvision.checkpoint.manifest import CHUNK, Run
from bigvision.checkpoint.memory import ALIGN, aligned, gather
from bigvision.checkpoint.pieces import Piece, Plan
from bigvision.checkpoint.writer import OpenFile, write_pieces
from bigvision.runtime import gather_json


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
