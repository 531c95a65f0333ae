"""Where each tensor lies in the files: a function of the tensors' names, types and whole shapes alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bigvision.fragments import Fragment
from bigvision.tensorfile import DTYPES

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
