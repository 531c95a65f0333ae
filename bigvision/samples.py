"""What every package knows of samples: the structure of their targets, and seeds from their positions."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_from(*parts: int | str) -> int:
    """Return a seed in 0..2**64-1 that is a hash of *parts*, the same in every process and on every machine."""
    # Sums or shifts of small integers collide and give Mersenne Twister correlated neighbours; a hash does neither.
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


Targets = Any
"""What samples are to be learned to give: a tensor (B, ...), a dict, list or tuple of such, or None where a task has none."""


def stack(targets: Sequence[Any]) -> Targets:
    """The targets of samples as those of a batch: numbers and tensors are stacked, None stays None."""
    first = targets[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {name: stack([target[name] for target in targets]) for name in first}
    if isinstance(first, (list, tuple)):
        return _like(first, [stack(part) for part in zip(*targets, strict=True)])
    if isinstance(first, (Tensor, np.ndarray)):
        return torch.stack([torch.as_tensor(target) for target in targets])
    return torch.tensor(targets)


def each_tensor(change: Callable[[Any], Any], targets: Targets) -> Targets:
    """*targets* with *change* done to every tensor or array in them."""
    if isinstance(targets, Mapping):
        return {name: each_tensor(change, part) for name, part in targets.items()}
    if isinstance(targets, (list, tuple)):
        return _like(targets, [each_tensor(change, part) for part in targets])
    return change(targets) if isinstance(targets, (Tensor, np.ndarray)) else targets


def concatenate(targets: Sequence[Targets]) -> Targets:
    """The targets of consecutive batches as those of one."""
    first = targets[0]
    if isinstance(first, dict):
        return {name: concatenate([target[name] for target in targets]) for name in first}
    if isinstance(first, (list, tuple)):
        return _like(first, [concatenate(part) for part in zip(*targets, strict=True)])
    return torch.cat(list(targets)) if isinstance(first, Tensor) else first


def to_bytes(targets: Targets) -> Tensor:
    """*targets* as uint8 (N,), from which `from_bytes` makes them again in another process, bit for bit; on the CPU.

    A part that is neither a tensor, a dict with texts as keys, a plain list or tuple, nor what JSON has is a `TypeError`.
    """
    contents: list[Tensor] = []

    def described(part: Any) -> dict[str, Any]:
        if isinstance(part, (Tensor, np.ndarray)):
            tensor = torch.as_tensor(part)
            contents.append(tensor.contiguous().reshape(-1).view(torch.uint8))
            return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        if isinstance(part, dict) and all(isinstance(name, str) for name in part):
            return {"dict": {name: described(inner) for name, inner in part.items()}}
        if type(part) in (list, tuple):
            return {type(part).__name__: [described(inner) for inner in part]}
        if part is None or isinstance(part, (bool, int, float, str)):
            return {"value": part}
        raise TypeError(f"targets of a pipeline are tensors in dicts, lists and tuples, not a {type(part).__name__}")

    text = json.dumps(described(targets)).encode()
    head = np.frombuffer(len(text).to_bytes(8, "little") + text, dtype=np.uint8)
    return torch.cat([torch.from_numpy(head.copy()), *contents])


def from_bytes(data: np.ndarray) -> Targets:
    """What `to_bytes` was given, from an array of what it returned."""
    begin = 8 + int.from_bytes(data[:8].tobytes(), "little")

    def made(part: dict[str, Any]) -> Any:
        nonlocal begin
        ((kind, inner), *_) = part.items()
        if kind == "shape":
            dtype: torch.dtype = getattr(torch, part["dtype"])
            start, begin = begin, begin + math.prod(inner) * dtype.itemsize
            # A copy, since a view has to begin at a multiple of its type's width.
            values = torch.from_numpy(data[start:begin].copy())
            return values.view(dtype).reshape(inner) if begin > start else torch.empty(inner, dtype=dtype)
        if kind == "dict":
            return {name: made(value) for name, value in inner.items()}
        return {"list": list, "tuple": tuple}[kind](map(made, inner)) if kind != "value" else inner

    return made(json.loads(data[8:begin].tobytes()))


def _like(first: Any, parts: list[Any]) -> Any:
    """*parts* in the kind of list or tuple, perhaps a named one, that *first* is."""
    return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
