"""A recording of a constructor's tensor operations, and its replay on the CPU, one storage at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

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


class ReplayDiffers(Exception):
    """An operation gave another layout on the CPU than when it was recorded."""


class _Stream:
    """torch's default CPU generator as the constructor would have it, put back to the caller's between uses."""

    def __init__(self, seed: int) -> None:
        self.state = torch.Generator().manual_seed(seed).get_state()

    def __enter__(self) -> None:
        self._callers = torch.get_rng_state()
        torch.set_rng_state(self.state)

    def __exit__(self, *exc: object) -> None:
        self.state = torch.get_rng_state()
        torch.set_rng_state(self._callers)


def value_now(recording: Recording, view: View) -> Tensor:
    """The value that `view` has after all operations recorded so far.

    Raises `NotRecordable` when it depends on random numbers.
    """
    steps = recording.slice(view.storage)
    if any(recording.ops[step].random for step in steps):
        raise NotRecordable("Python code depends on a random value")
    if view.storage in recording.unset:
        raise NotRecordable("Python code depends on memory that was never given a value")
    return view.on(_perform(recording, steps, view.storage))


def replay(recording: Recording, seed: int, wanted: Iterable[int]) -> Iterator[tuple[int, torch.UntypedStorage]]:
    """Yield ``(storage number, real storage)`` for each wanted storage once, as after ``torch.manual_seed(seed)``.

    The generator of the caller is left alone. Raises `ReplayDiffers` before yielding anything inexact.
    """
    slices = {storage: recording.slice(storage) for storage in wanted}
    draws = {storage: [step for step in steps if recording.ops[step].random] for storage, steps in slices.items()}
    users = Counter(step for steps in draws.values() for step in steps)
    order = [index for index, op in enumerate(recording.ops) if op.random]
    place = {step: position for position, step in enumerate(order)}
    first: dict[int, int] = {}  # storages whose draws follow each other, by their first draw: performed as they come
    last: dict[int, list[int]] = {}  # the others, by their last draw: performed from saved generator states
    for storage, steps in draws.items():
        if not steps:
            yield storage, _perform(recording, slices[storage], storage)
        elif all(users[step] == 1 for step in steps) and place[steps[-1]] - place[steps[0]] == len(steps) - 1:
            first[steps[0]] = storage
        else:
            last.setdefault(steps[-1], []).append(storage)

    stream = _Stream(seed)
    saved: dict[int, Tensor] = {}
    end = max((place[step] for step in users), default=-1) + 1
    position = 0
    while position < end:
        step = order[position]
        if (storage := first.get(step)) is not None:
            with stream:
                value = _perform(recording, slices[storage], storage)
            yield storage, value
            del value
            position += len(draws[storage])
            continue
        if users[step]:
            saved[step] = stream.state
        with stream:
            _advance(recording, step)
        for storage in last.get(step, ()):
            after = stream.state
            with stream:
                value = _perform(recording, slices[storage], storage, saved)
            stream.state = after
            yield storage, value
            del value
            for draw in draws[storage]:
                users[draw] -= 1
                if not users[draw]:
                    del saved[draw]
        position += 1


def _perform(
    recording: Recording, steps: list[int], target: int, states: dict[int, Tensor] | None = None
) -> torch.UntypedStorage:
    """Perform `steps` and return the storage `target`; everything else is freed after its last use."""
    last_use = {storage: step for step in steps for storage in recording.ops[step].reads | recording.ops[step].writes}
    storages: dict[int, torch.UntypedStorage] = {}
    for step in steps:
        op = recording.ops[step]
        if states is not None and op.random:
            torch.set_rng_state(states[step])
        _execute(recording, op, storages)
        for storage in op.reads | op.writes:
            if storage != target and last_use[storage] == step:
                storages.pop(storage, None)
    return storages[target]


def _advance(recording: Recording, step: int) -> None:
    """Draw what operation `step` draws, and drop it."""
    _execute(recording, recording.ops[step], {})


def _execute(recording: Recording, op: Op, storages: dict[int, torch.UntypedStorage]) -> None:
    if op.func in EMPTY:
        (view,) = op.outputs
        assert view is not None
        storages[view.storage] = _allocate(recording, view.storage)
        return

    scratch: set[int] = set()

    def real(view: View) -> Tensor:
        if view.storage not in storages:
            if view.storage in op.reads:
                raise ReplayDiffers(f"{op.func} reads storage {view.storage} before it is made")
            # Only to be overwritten, or looked at for its shape and dropped.
            storages[view.storage] = _allocate(recording, view.storage)
            scratch.update({view.storage} - op.writes)
        return view.on(storages[view.storage])

    with torch.no_grad():
        if op.func is None:
            results = [torch.empty_strided(c.shape, c.stride(), dtype=c.dtype, device="cpu").copy_(c) for c in op.args]
        else:
            args, kwargs = tree_map_only(View, real, (op.args, op.kwargs))
            kwargs = {key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items()}
            results = tree_flatten(op.func(*args, **kwargs))[0]
    for storage in scratch:
        del storages[storage]
    for view, result in zip(op.outputs, results):
        if view is None:
            continue
        storage = result.untyped_storage()
        if (
            storage.nbytes() != recording.nbytes[view.storage]
            or (result.dtype, result.shape, result.stride()) != (view.dtype, view.size, view.stride)
            or (result.storage_offset(), result.is_conj(), result.is_neg()) != (view.offset, view.conj, view.neg)
        ):
            raise ReplayDiffers(f"{op.func} gives another layout on the CPU")
        storages[view.storage] = storage


def _allocate(recording: Recording, storage: int) -> torch.UntypedStorage:
    # What a normal build leaves to chance starts as zeros, so that all ranks have the same.
    make = torch.zeros if storage in recording.unset else torch.empty
    return make(recording.nbytes[storage], dtype=torch.uint8, device="cpu").untyped_storage()
