"""Named tensors: the part of one that a rank holds in memory (`Fragment`), and where one lies in a file (`Place`)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
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
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PIECE = 1 << 22
"""Words that are added up at a time, eight bytes each."""
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
"""What the names of an adapter's parameters end with, behind the path of their layer: peft's names."""
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

    @property
    def kind(self) -> str:
        """Its type and shape, for people."""
        return f"{self.dtype}{list(self.shape)}"


def read_header(path: Path) -> dict[str, Place]:
    """Return the places of the tensors in a file, by name, in the order of its header.

    A file that is missing, cut, or not as safetensors allows is a `ValueError` of one line.
    """
    try:
        # The library checks that the tensors follow each other up to the end of the file.
        with safe_open(path, "pt"):
            pass
        with path.open("rb") as file:
            begin = file.read(8)
            return parse_header(path.name, begin + file.read(int.from_bytes(begin, "little")), path.stat().st_size)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def parse_header(file: str, header: bytes, size: int) -> dict[str, Place]:
    """Return the places of the tensors in a safetensors file of *size* bytes that begins with *header* and goes on with data.

    `ValueError` where it is no such header, or a tensor lies outside the file or has another size than its type and shape.
    """
    places = {}
    try:
        if (length := int.from_bytes(header[:8], "little")) != len(header) - 8:
            raise ValueError(f"its length is given as {length} bytes and is {len(header) - 8}")
        entries = json.loads(header[8:], object_pairs_hook=unique)
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            begin, end = (len(header) + int(n) for n in entry["data_offsets"])
            shape = tuple(int(n) for n in entry["shape"])
            if not len(header) <= begin <= end <= size:
                raise ValueError(f"{name} lies outside the file")
            places[name] = place = Place(file, entry["dtype"], shape, begin, end - begin)
            dtype = TYPES.get(place.dtype)
            if dtype is not None and math.prod(shape) * dtype.itemsize != place.nbytes:
                raise ValueError(f"{name} is {place.kind} in {place.nbytes} bytes")
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
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


def bytes_of(values: torch.Tensor) -> memoryview:
    """The memory of a contiguous 1-D tensor on the CPU."""
    return memoryview(values.detach().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def copy_into(target: Tensor, source: Tensor) -> None:
    """Copy between bytes (1-D, uint8) of any device, on the CPU by the calling thread alone. Waits for the device."""
    if target.device.type == source.device.type == "cpu":
        numpy.copyto(target.numpy(), source.numpy())  # torch would start threads of its own in each of a pool's
    else:
        target.copy_(source)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json's hook for those in which a name may occur only once: twice is a `ValueError`."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is there twice")
        found[name] = value
    return found


def checksum(tensor: Tensor, start: int = 0) -> Tensor:
    """The sum modulo 2**64 of all words, each times an odd number that depends on its place: int64, 0-D, on the device.

    A change of one word always changes it, whatever the change; several have to meet by chance. *tensor* is 1-D, and begins at
    the place *start* of a whole one, whose checksum is the sum of its parts'.
    """
    words = tensor.contiguous().view(WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for begin in range(0, len(words), PIECE):
        part = words[begin : begin + PIECE]
        factor = torch.arange(start + begin, start + begin + len(part), device=tensor.device)
        # SplitMix64's constants (Steele et al. 2014), as signed numbers.
        factor = factor.add_(1).mul_(-0x61C8864680B583EB)
        factor = factor.bitwise_xor_(factor >> 30).mul_(-0x40A7B892E31B1A47).bitwise_or_(1)
        total += factor.mul_(part).sum()
    return total
