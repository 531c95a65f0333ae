"""The init trace of a constructor, how it is recorded on the meta device, and its replay on the CPU, storage by storage.

An *init trace* (`InitTrace`) is the list of tensor operations that a constructor performed, in order. A *replay* performs again
those of them on which a wanted value depends. docs/exact_init.md explains both, with a picture.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten

# Makes a storage without giving it values.
EMPTY = {aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.empty_permuted.default}
EMPTY |= {aten.new_empty.default, aten.new_empty_strided.default}

# Look at a tensor's shape, dtype and strides, never at its values.
SHAPE_ONLY = {aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.zeros_like, aten.ones_like, aten.full_like}
SHAPE_ONLY |= {aten.new_zeros, aten.new_ones, aten.new_full, aten.rand_like, aten.randn_like, aten.randint_like}

# Change their first argument without looking at what it held.
OVERWRITE = {aten.fill_, aten.zero_, aten.copy_, aten.uniform_, aten.normal_, aten.random_, aten.exponential_}
OVERWRITE |= {aten.log_normal_, aten.cauchy_, aten.geometric_, aten.bernoulli_}

# Change floating-point numbers where they lie, whatever the shape. On meta some of them would run through Python code of torch.
BY_NUMBERS = {aten.uniform_, aten.normal_, aten.fill_, aten.zero_, aten.add_, aten.sub_, aten.mul_, aten.div_, aten.clamp_}
BY_NUMBERS |= {aten.erfinv_, aten.clamp_min_, aten.clamp_max_}

# torch's truncated normal draws until every value fits, so how much it draws depends on what it drew: one operation.
WHOLE_SAMPLER = "_no_grad_trunc_normal_"


class NotRecordable(Exception):
    """The constructor did something that cannot be repeated exactly; the message says what."""


class ReplayDiffers(Exception):
    """An operation gave another layout on the CPU than when it was recorded."""


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as a window on storage number `storage`; `size`, `stride` and `offset` count elements of `dtype`."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conj: bool
    neg: bool

    @classmethod
    def of(cls, tensor: Tensor, storage: int) -> View:
        size, stride, offset = tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())
        return cls(storage, tensor.dtype, size, stride, offset, tensor.is_conj(), tensor.is_neg())

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
    """One operation."""

    func: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    outputs: tuple[View | None, ...]  # the flat results: a view where the result is a storage of its own, else None
    reads: frozenset[int]  # storages whose values are used
    writes: frozenset[int]  # storages made or changed
    replaces: frozenset[int]  # those of `writes` that are made, or whose whole content is replaced without being used
    random: bool = False


@dataclass
class InitTrace:
    """Operations in order, and for each storage its size in bytes and the operations that write it."""

    ops: list[Op] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    writers: list[list[int]] = field(default_factory=list)
    unset: set[int] = field(default_factory=set)  # used before all was given a value: normally what the memory held

    def append(self, op: Op) -> None:
        for storage in op.writes:
            self.writers[storage].append(len(self.ops))
        self.ops.append(op)

    def slice(self, storage: int) -> list[int]:
        """The operations, in order, that alone give `storage` its value: of an initialisation done twice, the second."""
        needed: set[int] = set()
        todo = [(storage, len(self.ops))]
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

    def draws(self, steps: list[int]) -> list[int]:
        """Those of the operations *steps* that draw random numbers."""
        return [step for step in steps if self.ops[step].random]

    def value_now(self, view: View) -> Tensor:
        """The value that `view` has after all operations recorded so far.

        Raises `NotRecordable` when it depends on random numbers.
        """
        steps = self.slice(view.storage)
        if self.draws(steps):
            raise NotRecordable("Python code depends on a random value")
        if view.storage in self.unset:
            raise NotRecordable("Python code depends on memory that was never given a value")
        return view.on(_perform(self, steps, view.storage))


# Recording.


class _PassForCpu(TorchFunctionMode):
    """Answers that recorded tensors are on the CPU, so that code that treats the meta device apart does the normal thing."""

    answers: ClassVar = {
        vars(torch._C.TensorBase)[name].__get__: answer
        for name, answer in (("is_meta", False), ("is_cpu", True), ("device", torch.device("cpu")))
    }

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) else None
        recorded = first is not None and self.recorder.view(first) is not None
        if func in self.answers and recorded:
            return self.answers[func]
        # Known here alone: below, torch's own code makes tensors on the device of recorded ones, which is meta too.
        with torch._C.DisableTorchFunction():
            unrecorded = first is not None and not recorded and first.is_meta
        self.recorder.meta_asked = unrecorded or str(kwargs.get("device")) == "meta"
        try:
            return func(*args, **kwargs)
        finally:
            self.recorder.meta_asked = False


@contextmanager
def record() -> Iterator[Recorder]:
    """Record what the body does to tensors. Whatever the body raises, no mode or patch is left behind."""
    recorder = Recorder()
    plain: Any = getattr(nn.init, WHOLE_SAMPLER, None)

    def sampler(tensor: Tensor, *args, generator: torch.Generator | None = None, **kwargs) -> Tensor:
        if generator is None and (view := recorder.view(tensor)) is not None:
            recorder.sampled(partial(plain, **kwargs), view, args)
            return tensor
        return plain(tensor, *args, generator=generator, **kwargs)

    whole = patch.object(nn.init, WHOLE_SAMPLER, sampler) if plain is not None else nullcontext()
    with whole, torch.device("cpu"), recorder, _PassForCpu(recorder):
        yield recorder


def memory_id(tensor: Tensor) -> int:
    """What identifies a tensor's storage as long as that storage lives."""
    return tensor.untyped_storage()._cdata


class Recorder(TorchDispatchMode):
    """Puts every new tensor on the meta device and records what is done to it.

    Python that looks at values (``.item()``, ``bool``, ``tolist``, ``torch.unique``) gets the real ones as long as no
    random number went into them. Raises `NotRecordable` where a replay would not be exact.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trace = InitTrace()
        self.meta_asked = False  # whether the constructor asks for a tensor on the meta device
        self._numbers: dict[int, int] = {}
        self._alive: list[torch.UntypedStorage] = []  # an address names a storage only while the storage lives
        self._blank: dict[int, Tensor | None] = {}  # storages not filled yet: which elements are (None: none)

    def view(self, tensor: Tensor) -> View | None:
        """`tensor` in terms of the trace, None for a storage that is not in it."""
        number = self._numbers.get(memory_id(tensor))
        return None if number is None else View.of(tensor, number)

    def used(self, view: View) -> View:
        """*view*, whose value is used: it is remembered when nothing has given some of its elements a value."""
        if view.storage in self._blank:
            filled = self._blank[view.storage]
            if filled is None or not view.bytes_of(filled).all():
                self.trace.unset.add(view.storage)
        return view

    def constant(self, value: Tensor) -> Tensor:
        """A meta tensor that stands for the real `value` as it is now."""
        meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        self.source(meta, partial(_copy, _copy(value)))
        return meta

    def source(self, meta: Tensor, read: Callable[[], Tensor]) -> View:
        """Let the new *meta* stand for what *read* returns each time that its value is wanted, laid out as *meta* is."""
        view = self._adopt(meta)
        made = frozenset([view.storage])
        self.trace.append(Op(read, (), {}, (view,), frozenset(), made, made))
        return view

    def sampled(self, sampler: Callable[..., Tensor], view: View, args: tuple) -> None:
        """Record a call that fills `view` from random numbers and looks at nothing else."""
        written = frozenset([view.storage])
        replaced = written if view.covers(self.trace.nbytes[view.storage]) else frozenset()
        self.trace.append(Op(sampler, (view, *args), {}, (None,), frozenset(), written, replaced, True))
        self._fill(view)

    def _adopt(self, tensor: Tensor) -> View:
        """Give the storage of a new *tensor* a number."""
        storage, number = tensor.untyped_storage(), len(self._alive)
        self._numbers[storage._cdata] = number
        self._alive.append(storage)
        self.trace.nbytes.append(storage.nbytes())
        self.trace.writers.append([])
        return View.of(tensor, number)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        foreign = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        random = torch.Tag.nondeterministic_seeded in func.tags
        if any(isinstance(leaf, torch.Generator) for leaf in leaves):
            raise NotRecordable(f"{func} draws from a generator of its own")
        if func is aten.lift_fresh.default and foreign:
            return self.constant(tensors[0])  # torch.tensor, torch.as_tensor, torch.from_numpy
        if tensors and len(foreign) == len(tensors):
            if random:
                raise NotRecordable(f"{func} draws into a tensor made outside the constructor")
            return func(*args, **kwargs)
        if any(isinstance(leaf, torch.UntypedStorage) for leaf in leaves):
            raise NotRecordable(f"{func} handles storages")

        # What a constructor itself builds on the meta device, to look at shapes, has no values and draws nothing.
        shapes = [tensor for tensor in tensors if tensor.device.type == "meta" and self.view(tensor) is None]
        if (shapes and len(shapes) + len(foreign) == len(tensors)) or (self.meta_asked and not tensors):
            return func(*args, **kwargs)
        changed = _changed(func, args, kwargs)
        if any(one is tensor for one in foreign for tensor in changed):
            return func(*self._real(args), **self._real(kwargs))
        if foreign:
            # 0-d CPU tensors take part in type promotion like the others, so they must be recorded as what they are.
            args, kwargs = tree_map_only(Tensor, lambda t: self.constant(t) if t.device.type == "cpu" else t, (args, kwargs))
        # Recorded tensors are taken to be on the CPU already, so a copy to there is made to see the values (``tolist``).
        looks = func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu")
        if looks or not all("Tensor" in str(result.type) for result in func._schema.returns):
            return func(*self._real(args), **self._real(kwargs))
        if torch.device("cpu") == kwargs.get("device") or not tensors:
            kwargs["device"] = torch.device("meta")
        numbers = func.overloadpacket in BY_NUMBERS and len(tensors) == 1 and tensors[0].is_floating_point()
        try:
            result = args[0] if numbers else func(*args, **kwargs)
        except NotImplementedError:
            # No shape without values (torch.unique): work on the real values and keep the results as constants.
            if changed or random:
                raise NotRecordable(f"{func} has no meta kernel") from None
            if kwargs.get("device") == torch.device("meta"):
                kwargs["device"] = torch.device("cpu")
            return tree_map_only(Tensor, self.constant, func(*self._real(args), **self._real(kwargs)))
        self._record(func, args, kwargs, changed, result, random)
        return result

    def _known(self, tensor: Tensor) -> View:
        view = self.view(tensor)
        if view is None:
            raise NotRecordable("a meta tensor of unknown origin")
        return view

    def _real(self, tree: Any) -> Any:
        """`tree` with recorded tensors replaced by their values now."""

        def real(tensor: Tensor) -> Tensor:
            return tensor if tensor.device.type == "cpu" else self.trace.value_now(self.used(self._known(tensor)))

        return tree_map_only(Tensor, real, tree)

    def _record(self, func, args, kwargs, changed: list[Tensor], result, random: bool) -> None:
        overwrites = func.overloadpacket in OVERWRITE or any(a.kwarg_only and a.is_write for a in func._schema.arguments)
        shape_only = func.overloadpacket in SHAPE_ONLY
        looked_at: list[View] = []
        for tensor in (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)):
            view = self._known(tensor)
            if not shape_only and not (overwrites and any(tensor is one for one in changed)):
                looked_at.append(view)
        targets = [self._known(tensor) for tensor in changed]
        for tensor, view in zip(changed, targets):
            if tensor.untyped_storage().nbytes() != self.trace.nbytes[view.storage]:
                raise NotRecordable(f"{func} resizes a tensor")
        outputs = tuple(
            self._adopt(leaf) if isinstance(leaf, Tensor) and memory_id(leaf) not in self._numbers else None
            for leaf in tree_leaves(result)
        )
        made = {view.storage for view in outputs if view is not None}
        if not made and not targets:
            return  # a view
        reads = {view.storage for view in looked_at}
        if random and reads:
            raise NotRecordable(f"{func} draws numbers from the values of a tensor")
        for view in looked_at:
            self.used(view)
        whole = {view.storage for view in targets if overwrites and view.covers(self.trace.nbytes[view.storage])}
        args, kwargs = tree_map_only(Tensor, self.view, (args, kwargs))
        writes = frozenset(made | {view.storage for view in targets})
        self.trace.append(Op(func, args, kwargs, outputs, frozenset(reads), writes, frozenset(made | (whole - reads)), random))
        if func in EMPTY:
            self._blank.update(dict.fromkeys(made))
        for view in targets if overwrites else ():
            self._fill(view)

    def _fill(self, view: View) -> None:
        """Remember which elements of a storage made empty have values by now."""
        name, nbytes = view.storage, self.trace.nbytes[view.storage]
        if name not in self._blank:
            return
        filled = self._blank[name]
        if not view.covers(nbytes):
            if filled is None:
                filled = self._blank[name] = torch.zeros(nbytes, dtype=torch.uint8, device="cpu")
            view.bytes_of(filled).fill_(1)
            if not filled.all():
                return
        del self._blank[name]


def _changed(func, args, kwargs) -> list[Tensor]:
    """The tensors that `func` changes in place."""
    values = [
        args[position] if position < len(args) else kwargs.get(argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.is_write
    ]
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _copy(value: Tensor) -> Tensor:
    """A copy of *value* on the CPU with the same strides."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu").copy_(value)


# Replay.


def replay(trace: InitTrace, seed: int, wanted: Iterable[int]) -> Iterator[tuple[int, torch.UntypedStorage]]:
    """Yield ``(storage number, real storage)`` for each wanted storage once, as after ``torch.manual_seed(seed)``.

    The generator of the caller is left alone. Raises `ReplayDiffers` before yielding anything inexact.
    """
    slices = {storage: trace.slice(storage) for storage in wanted}
    draws = {storage: trace.draws(steps) for storage, steps in slices.items()}
    users = Counter(step for steps in draws.values() for step in steps)
    order = trace.draws(list(range(len(trace.ops))))
    place = {step: position for position, step in enumerate(order)}
    first: dict[int, int] = {}  # storages whose draws follow each other, by their first draw: performed as they come
    last: dict[int, list[int]] = {}  # the others, by their last draw: performed from saved generator states
    for storage, steps in draws.items():
        if not steps:
            yield storage, _perform(trace, slices[storage], storage)
        elif all(users[step] == 1 for step in steps) and place[steps[-1]] - place[steps[0]] == len(steps) - 1:
            first[steps[0]] = storage
        else:
            last.setdefault(steps[-1], []).append(storage)

    state = torch.Generator().manual_seed(seed).get_state()
    saved: dict[int, Tensor] = {}

    def drawn(steps: list[int], storage: int = -1) -> Any:
        """Perform *steps* where the constructor's stream of random numbers stands, or from the states that were saved."""
        nonlocal state
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            value = _perform(trace, steps, storage, saved)
            state = torch.get_rng_state()
        return value

    end = max((place[step] for step in users), default=-1) + 1
    position = 0
    while position < end:
        step = order[position]
        if (storage := first.get(step)) is not None:
            yield storage, drawn(slices[storage], storage)
            position += len(draws[storage])
            continue
        before = state
        drawn([step])  # what nobody wants moves the stream on all the same
        if users[step]:
            saved[step] = before
        after = state
        for storage in last.get(step, ()):
            yield storage, drawn(slices[storage], storage)
            state = after
            for draw in draws[storage]:
                users[draw] -= 1
                if not users[draw]:
                    del saved[draw]
        position += 1


def _perform(trace: InitTrace, steps: list[int], target: int, states: dict[int, Tensor] | None = None) -> Any:
    """Perform `steps` and return the storage `target`, if they make it; everything else is freed after its last use.

    *states* are the generator's before random operations; those that it lacks draw where the generator stands.
    """
    last_use = {storage: step for step in steps for storage in trace.ops[step].reads | trace.ops[step].writes}
    storages: dict[int, torch.UntypedStorage] = {}
    for step in steps:
        op = trace.ops[step]
        if states and step in states:
            torch.set_rng_state(states[step])
        _execute(trace, op, storages)
        for storage in op.reads | op.writes:
            if storage != target and last_use[storage] == step:
                storages.pop(storage, None)
    return storages.get(target)


def _execute(trace: InitTrace, op: Op, storages: dict[int, torch.UntypedStorage]) -> None:
    if op.func in EMPTY:
        (view,) = op.outputs
        assert view is not None
        storages[view.storage] = _allocate(trace, view.storage)
        return

    scratch: set[int] = set()

    def real(view: View) -> Tensor:
        if view.storage not in storages:
            if view.storage in op.reads:
                raise ReplayDiffers(f"{op.func} reads storage {view.storage} before it is made")
            # Only to be overwritten, or looked at for its shape and dropped.
            storages[view.storage] = _allocate(trace, view.storage)
            scratch.update({view.storage} - op.writes)
        return view.on(storages[view.storage])

    with torch.no_grad():
        args, kwargs = tree_map_only(View, real, (op.args, op.kwargs))
        kwargs = {key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items()}
        results = tree_leaves(op.func(*args, **kwargs))
    for storage in scratch:
        del storages[storage]
    for view, result in zip(op.outputs, results):
        if view is None:
            continue
        storage = result.untyped_storage()
        if storage.nbytes() != trace.nbytes[view.storage] or View.of(result, view.storage) != view:
            raise ReplayDiffers(f"{op.func} gives another layout on the CPU")
        storages[view.storage] = storage


def _allocate(trace: InitTrace, storage: int) -> torch.UntypedStorage:
    # What a normal build leaves to chance starts as zeros, so that all ranks have the same.
    make = torch.zeros if storage in trace.unset else torch.empty
    return make(trace.nbytes[storage], dtype=torch.uint8, device="cpu").untyped_storage()
