"""Runs of named tensors: in memory (`Fragment`) and in safetensors files (`Place`)."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' names of the types."""
TYPES = {name: dtype for dtype, name in DTYPES.items()}
"""The types by these names."""
PICKLE = "a pickled file, as torch.save writes it"
KINDS = {
    b"PK\x03\x04": PICKLE, b"\x80\x02": PICKLE, b"\x80\x03": PICKLE, b"\x80\x04": PICKLE, b"\x80\x05": PICKLE,
    b"version https://git-lfs": "a pointer of Git LFS, whose content was not fetched: git lfs pull",
    **dict.fromkeys((b"<!", b"<h"), "a web page, not the file: download it again"),
    b"GGUF": "a GGUF file", b"\x89HDF": "an HDF5 file",
}  # fmt: skip
"""What files are that are taken for others, by how they begin."""


@dataclass(frozen=True)
class Fragment:
    """A contiguous run of one named tensor that this rank holds.

    Every rank names every tensor: one that holds nothing of it yields a fragment without values, so that each rank can
    work out by itself how the whole state is laid out.
    """

    group: str
    """"model", "optimizer" or "ema"."""
    name: str
    """timm's parameter or buffer name; in the optimizer, that name and the state: "blocks.3.attn.qkv.weight/exp_avg"."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    """First element of this run in the whole tensor, flattened row-major."""
    values: Tensor
    """1-D, a view of live storage: writing to it restores."""
    copy: tuple[int, int]
    """(which copy this is, how many ranks hold the same run): decides who writes what."""

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Place:
    """Where a whole tensor lies."""

    file: str
    """The file's name in its folder."""
    dtype: str
    """safetensors' name of the type."""
    shape: tuple[int, ...]
    offset: int
    """The tensor's first byte in the file."""
    nbytes: int


def read_header(path: Path) -> dict[str, Place]:
    """Return the places of the tensors in a file, by name, in the order of its header.

    Raises:
        ValueError: the file is missing, cut, or not as safetensors allows; one line.
    """
    try:
        # The library checks that the tensors have their types' sizes and follow each other up to the end of the file.
        with safe_open(path, "pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length), object_pairs_hook=unique)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        places[name] = Place(path.name, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return places


def file_kind(path: Path) -> str:
    """What the file *path* is, one of :data:`KINDS`; "" where it is none of them or cannot be read."""
    try:
        with path.open("rb") as file:
            begin = file.read(32)
    except OSError:
        return ""
    if begin[3:8] == bytes(5):
        return ""  # the length of a header, as safetensors begins
    return next((kind for mark, kind in KINDS.items() if begin.startswith(mark)), "")


def read_into(descriptor: int, data: memoryview, offset: int) -> None:
    """Fill *data* with the file's bytes from *offset*: the system may give less at a time.

    Raises:
        EOFError: the file ends before.
        OSError: it cannot be read.
    """
    while data:
        count = os.preadv(descriptor, [data], offset)
        if count == 0:
            raise EOFError("the file ends early")
        data, offset = data[count:], offset + count


def bytes_of(values: torch.Tensor) -> memoryview:
    """The memory of a contiguous 1-D tensor on the CPU, for reading a file into it."""
    return memoryview(values.detach().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json's hook for those in which a name may occur only once.

    Raises:
        ValueError: a name is there twice.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is there twice")
        found[name] = value
    return found
