"""Fragments to bytes: every rank writes its own runs straight to their places in the files."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bigvision.checkpoint.layout import FileLayout
from bigvision.checkpoint.manifest import Run, chunks
from bigvision.fragments import Fragment

MODE = 0o644


def create(folder: Path, layout: FileLayout) -> Run:
    """Make the file at its whole size, with its header. Only rank 0 does."""
    descriptor = os.open(folder / layout.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, MODE)
    try:
        os.ftruncate(descriptor, layout.size)
        write_at(descriptor, memoryview(layout.header), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Run(layout.name, 0, len(layout.header), zlib.crc32(layout.header))


def write_document(folder: Path, name: str, content: Any) -> Run:
    """Write *content* as JSON, to the disk."""
    text = (json.dumps(content, indent=2) + "\n").encode()
    descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, MODE)
    try:
        write_at(descriptor, memoryview(text), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Run(name, 0, len(text), zlib.crc32(text))


def write_fragments(folder: Path, files: Iterable[FileLayout], fragments: Iterable[Fragment]) -> list[Run]:
    """Write those of this rank's fragments that are its to write, to the disk, and return what was written."""
    places = {name: (file.name, offset) for file in files for name, offset in file.offsets.items()}
    descriptors: dict[str, int] = {}
    runs = []
    try:
        for fragment in fragments:
            if fragment.values.numel() == 0 or not _is_writer(fragment):
                continue
            file, offset = places[fragment.name]
            offset += fragment.start * fragment.values.element_size()
            if file not in descriptors:
                descriptors[file] = os.open(folder / file, os.O_WRONLY | os.O_NOFOLLOW)
            data = memoryview(fragment.values.detach().cpu().view(torch.uint8).numpy())  # pyright: ignore
            crc = 0
            for begin, end in chunks(0, len(data)):
                # Summed while the bytes are in cache for the write.
                crc = zlib.crc32(data[begin:end], crc)
                write_at(descriptors[file], data[begin:end], offset + begin)
            runs.append(Run(file, offset, len(data), crc))
        for descriptor in descriptors.values():
            os.fsync(descriptor)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return runs


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of *data* at *offset*: the system may take less at a time."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def sync_folder(folder: Path) -> None:
    """Bring the folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_writer(fragment: Fragment) -> bool:
    """Spread the runs that several ranks hold over these ranks, by name, so that each is written once."""
    this, copies = fragment.copy
    return zlib.crc32(fragment.name.encode()) % copies == this
