"""Bytes to fragments: each rank reads only the ranges that it holds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigvision.checkpoint.layout import DTYPES
from bigvision.checkpoint.manifest import Damaged, chunks
from bigvision.errors import UserError
from bigvision.fragments import Fragment


@dataclass(frozen=True)
class Place:
    """Where a whole tensor lies."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_document(folder: Path, name: str) -> Any:
    """Return the JSON content of a file of the checkpoint.

    Raises:
        Damaged: not there or not JSON.
    """
    try:
        return json.loads((folder / name).read_bytes())
    except (OSError, ValueError) as error:
        raise Damaged(f"{name} cannot be read: {error}") from None


def read_places(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Place]]:
    """Return the places of the tensors of each group ("model", "optimizer", ...) in the safetensors files *names*.

    Raises:
        Damaged: a header is not one that safetensors allows.
    """
    groups: dict[str, dict[str, Place]] = {}
    for name in sorted(names):
        if name.endswith(".safetensors"):
            group = name.removesuffix(".safetensors").split("-")[0]
            groups.setdefault(group, {}).update(_read_header(folder, name))
    return groups


def read_fragments(folder: Path, places: dict[str, dict[str, Place]], fragments: list[Fragment], what: str) -> None:
    """Fill *fragments* from the files of the checkpoint *folder*; *what* is the key that errors name.

    Raises:
        UserError: the checkpoint is of another model or optimizer; names the first tensor that differs.
    """
    _check_same_tensors(folder, places, fragments, what)
    descriptors: dict[str, int] = {}
    try:
        for fragment in fragments:
            if fragment.values.numel() == 0:
                continue
            place = places[fragment.group][fragment.name]
            if place.file not in descriptors:
                descriptors[place.file] = os.open(folder / place.file, os.O_RDONLY | os.O_NOFOLLOW)
            values = fragment.values.detach()
            target = values if values.device.type == "cpu" else torch.empty_like(values, device="cpu")
            data = memoryview(target.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
            offset = place.offset + fragment.start * values.element_size()
            for begin, end in chunks(0, len(data)):
                _read_into(descriptors[place.file], data[begin:end], offset + begin, place.file)
            if target is not values:
                values.copy_(target)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _read_header(folder: Path, name: str) -> dict[str, Place]:
    path = folder / name
    size = path.stat().st_size
    places = {}
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise Damaged(f"{name}: its header would be longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for tensor, entry in header.items():
            begin, end = (int(n) for n in entry["data_offsets"])
            shape = tuple(int(n) for n in entry["shape"])
            if not 0 <= begin <= end <= size - 8 - length:
                raise Damaged(f"{name}: {tensor} lies outside the file")
            places[tensor] = Place(name, entry["dtype"], shape, 8 + length + begin, end - begin)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{name}: its header cannot be read: {error}") from None
    return places


def _check_same_tensors(folder: Path, places: dict[str, dict[str, Place]], fragments: list[Fragment], what: str) -> None:
    wanted: dict[str, dict[str, Fragment]] = {}
    for fragment in fragments:
        wanted.setdefault(fragment.group, {})[fragment.name] = fragment
    for group in sorted(wanted.keys() | places.keys()):
        tensors, held = wanted.get(group, {}), places.get(group, {})
        start = f"{what}: {folder} is the checkpoint of another {group}: "
        mend = "use the configuration that it was trained with, or another out folder"
        for name, fragment in tensors.items():
            if name not in held:
                raise UserError(f"{start}it has no {name}: {mend}")
            place = held[name]
            dtype = DTYPES[fragment.values.dtype]
            if (place.shape, place.dtype) != (fragment.shape, dtype):
                theirs, ours = (f"{kind}{list(shape)}" for kind, shape in ((place.dtype, place.shape), (dtype, fragment.shape)))
                raise UserError(f"{start}{name} is {theirs} there and {ours} here: {mend}")
            if place.nbytes != fragment.numel * fragment.values.element_size():
                raise UserError(f"{start}{name} has {place.nbytes} bytes there: {mend}")
        if extra := next((name for name in held if name not in tensors), None):
            raise UserError(f"{start}it has {extra}, which this one lacks: {mend}")


def _read_into(descriptor: int, data: memoryview, offset: int, name: str) -> None:
    while data:
        count = os.preadv(descriptor, [data], offset)
        if count == 0:
            raise Damaged(f"{name} ends early")
        data, offset = data[count:], offset + count
