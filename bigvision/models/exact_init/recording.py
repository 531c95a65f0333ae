"""A recording: the tensor operations of a constructor, kept so that they can be performed again one storage at a time.

Tensors are named by their storage: each argument of an operation is kept as (storage, dtype, size, stride, offset), so
views need no operation of their own, and it does not matter how many Python objects alias a storage. `record.py` writes
a recording while a constructor runs on meta, `replay.py` performs it on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

# Makes a storage without giving it values.
EMPTY = {aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.empty_permuted.default}
EMPTY |= {aten.new_empty.default, aten.new_empty_strided.default}


class NotRecordable(Exception):
    """The constructor did something that cannot be repeated exactly; the message says what."""


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as a window on storage number `storage`; `size`, `stride` and `offset` count elements of `dtype`."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conj: bool = False
    neg: bool = False

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        """This window on the real `storage`."""
        tensor = torch.empty(0, dtype=self.dtype, device="cpu").set_(storage, self.offset, self.size, self.stride)
        tensor = torch._conj(tensor) if self.conj else tensor
        return torch._neg_view(tensor) if self.neg else tensor

    def bytes_of(self, mask: Tensor) -> Tensor:
        """This window on `mask`, which has one element for each byte of the storage."""
        width = self.dtype.itemsize
        return mask.as_strided((*self.size, width), (*(width * step for step in self.stride), 1), width * self.offset)

    def covers(self, nbytes: int) -> bool:
        """Whether the window is a whole storage of `nbytes`, each element once."""
        if math.prod(self.size) * self.dtype.itemsize != nbytes:
            return False
        expected = 1
        for stride, size in sorted((st, si) for st, si in zip(self.stride, self.size) if si != 1):
            if stride != expected:
                return False
            expected *= size
        return True


@dataclass(slots=True)
class Op:
    """One operation. `func` is None for a constant, whose value is the only argument."""

    func: Any
    args: tuple
    kwargs: dict[str, Any]
    outputs: tuple[View | None, ...]
    """The flat results: a view where the result is a storage of its own, else None."""
    reads: frozenset[int]
    """Storages whose values are used."""
    writes: frozenset[int]
    """Storages made or changed."""
    replaces: frozenset[int]
    """Those of `writes` that are made, or whose whole content is replaced without being used."""
    random: bool


@dataclass
class Recording:
    """Operations in order, and for each storage its size in bytes and the operations that write it."""

    ops: list[Op] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    writers: list[list[int]] = field(default_factory=list)
    unset: set[int] = field(default_factory=set)
    """Storages used before all of them was given a value: a normal build has whatever the memory held."""

    def new_storage(self, nbytes: int) -> int:
        self.nbytes.append(nbytes)
        self.writers.append([])
        return len(self.nbytes) - 1

    def append(self, op: Op) -> None:
        for storage in op.writes:
            self.writers[storage].append(len(self.ops))
        self.ops.append(op)

    def slice(self, storage: int, before: int | None = None) -> list[int]:
        """The operations, in order, that alone give `storage` the value it has before operation number `before`.

        What is overwritten later is left out, so an initialisation done twice is done once.
        """
        needed: set[int] = set()
        todo = [(storage, len(self.ops) if before is None else before)]
        seen: set[tuple[int, int]] = set()
        while todo:
            want = todo.pop()
            if want in seen:
                continue
            seen.add(want)
            name, end = want
            for index in reversed(self.writers[name]):
                if index >= end:
                    continue
                op = self.ops[index]
                if index not in needed:
                    needed.add(index)
                    todo.extend((other, index) for other in op.reads | (op.writes - op.replaces) if other != name)
                    if name in op.reads:
                        todo.append((name, index))
                if name in op.replaces and name not in op.reads:
                    break
        return sorted(needed)
