"""Runs a constructor with every new tensor on the meta device and records what it does to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from bigvision.models.exact_init.recording import EMPTY, NotRecordable, Op, Recording, View, value_now

aten = torch.ops.aten

# Look at a tensor's shape, dtype and strides, never at its values.
SHAPE_ONLY = {aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.zeros_like, aten.ones_like, aten.full_like}
SHAPE_ONLY |= {aten.new_zeros, aten.new_ones, aten.new_full, aten.rand_like, aten.randn_like, aten.randint_like}

# Change their first argument without looking at what it held.
OVERWRITE = {aten.fill_, aten.zero_, aten.copy_, aten.uniform_, aten.normal_, aten.random_, aten.exponential_}
OVERWRITE |= {aten.log_normal_, aten.cauchy_, aten.geometric_, aten.bernoulli_}


# torch's truncated normal draws until every value fits, so how much it draws depends on what it drew: one operation.
WHOLE_SAMPLER = "_no_grad_trunc_normal_"


def storage_key(tensor: Tensor) -> int:
    """What identifies a tensor's storage as long as that storage lives."""
    return tensor.untyped_storage()._cdata


class _PassForCpu(TorchFunctionMode):
    """Answers that meta tensors are on the CPU, so that code that treats the meta device apart does the normal thing."""

    answers: ClassVar = {
        vars(torch._C.TensorBase)[name].__get__: answer
        for name, answer in (("is_meta", False), ("is_cpu", True), ("device", torch.device("cpu")))
    }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.answers[func] if func in self.answers else func(*args, **(kwargs or {}))


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

    if plain is not None:
        setattr(nn.init, WHOLE_SAMPLER, sampler)
    try:
        with torch.device("cpu"), recorder, _PassForCpu():
            yield recorder
    finally:
        if plain is not None:
            setattr(nn.init, WHOLE_SAMPLER, plain)


class Recorder(TorchDispatchMode):
    """Puts every new tensor on the meta device and records what is done to it.

    Python that looks at values (``.item()``, ``bool``, ``tolist``, ``torch.unique``) gets the real ones as long as no
    random number went into them. Raises `NotRecordable` where a replay would not be exact.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recording = Recording()
        self._names: dict[int, int] = {}
        self._alive: list[torch.UntypedStorage] = []  # an address names a storage only while the storage lives
        self._blank: dict[int, Tensor | None] = {}  # storages not filled yet: which elements are (None: none)

    def view(self, tensor: Tensor) -> View | None:
        """`tensor` in terms of the recording, None for a storage that is not in it."""
        name = self._names.get(storage_key(tensor))
        if name is None:
            return None
        size, stride = tuple(tensor.shape), tuple(tensor.stride())
        return View(name, tensor.dtype, size, stride, int(tensor.storage_offset()), tensor.is_conj(), tensor.is_neg())

    def check_filled(self, view: View) -> None:
        """Remember when `view` has elements that nothing has given a value."""
        if view.storage in self._blank:
            filled = self._blank[view.storage]
            if filled is None or not view.bytes_of(filled).all():
                self.recording.unset.add(view.storage)

    def constant(self, value: Tensor) -> Tensor:
        """A meta tensor that stands for the real `value`."""
        meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        view = self._adopt(meta)
        kept = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu").copy_(value)
        made = frozenset([view.storage])
        self.recording.append(Op(None, (kept,), {}, (view,), frozenset(), made, made, False))
        return meta

    def source(self, meta: Tensor, read: Callable[[], Tensor]) -> View:
        """Let the new *meta* stand for what *read* returns each time that its value is wanted, laid out as *meta* is."""
        view = self._adopt(meta)
        made = frozenset([view.storage])
        self.recording.append(Op(read, (), {}, (view,), frozenset(), made, made, False))
        return view

    def sampled(self, sampler: Callable[..., Tensor], view: View, args: tuple) -> None:
        """Record a call that fills `view` from random numbers and looks at nothing else."""
        written = frozenset([view.storage])
        replaced = written if view.covers(self.recording.nbytes[view.storage]) else frozenset()
        self.recording.append(Op(sampler, (view, *args), {}, (None,), frozenset(), written, replaced, True))
        self._fill(view, True)

    def _adopt(self, tensor: Tensor) -> View:
        storage = tensor.untyped_storage()
        self._names[storage._cdata] = self.recording.new_storage(storage.nbytes())
        self._alive.append(storage)
        view = self.view(tensor)
        assert view is not None
        return view

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        random = torch.Tag.nondeterministic_seeded in func.tags
        if any(isinstance(leaf, torch.Generator) for leaf in tree_flatten((args, kwargs))[0]):
            raise NotRecordable(f"{func} draws from a generator of its own")
        if func is aten.lift_fresh.default and tensors[0].device.type == "cpu":
            return self.constant(tensors[0])  # torch.tensor, torch.as_tensor, torch.from_numpy
        if tensors and all(tensor.device.type == "cpu" for tensor in tensors):
            if random:
                raise NotRecordable(f"{func} draws into a tensor made outside the constructor")
            return func(*args, **kwargs)
        if any(isinstance(leaf, torch.UntypedStorage) for leaf in tree_flatten((args, kwargs))[0]):
            raise NotRecordable(f"{func} handles storages")

        written = {id(leaf) for leaf in _written(func, args, kwargs)}
        foreign = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        if any(id(tensor) in written for tensor in foreign):
            return func(*self._real(args), **self._real(kwargs))
        if foreign:
            # 0-d CPU tensors take part in type promotion like the others, so they must be recorded as what they are.
            args, kwargs = tree_map_only(Tensor, lambda t: self.constant(t) if t.device.type == "cpu" else t, (args, kwargs))
        if not _returns_tensors(func) or _leaves_recording(func, kwargs):
            return func(*self._real(args), **self._real(kwargs))
        if torch.device("cpu") == kwargs.get("device") or not tensors:
            kwargs["device"] = torch.device("meta")
        try:
            result = func(*args, **kwargs)
        except NotImplementedError:
            # No shape without values (torch.unique): work on the real values and keep the results as constants.
            if written or random:
                raise NotRecordable(f"{func} has no meta kernel") from None
            return tree_map_only(Tensor, self.constant, func(*self._real(args), **_on_cpu(self._real(kwargs))))
        self._record(func, args, kwargs, result, random)
        return result

    def _real(self, tree: Any) -> Any:
        """`tree` with recorded tensors replaced by their values now."""
        return tree_map_only(Tensor, lambda t: t if t.device.type == "cpu" else value_now(self.recording, self._known(t)), tree)

    def _known(self, tensor: Tensor) -> View:
        view = self.view(tensor)
        if view is None:
            raise NotRecordable("a meta tensor of unknown origin")
        self.check_filled(view)
        return view

    def _record(self, func, args, kwargs, result, random: bool) -> None:
        blank_reads: list[View] = []
        changed = list(_written(func, args, kwargs))
        overwrites = func.overloadpacket in OVERWRITE or any(a.kwarg_only and a.is_write for a in func._schema.arguments)
        shape_only = func.overloadpacket in SHAPE_ONLY
        reads: set[int] = set()
        changed_ids = {id(tensor) for tensor in changed}
        for tensor in (leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)):
            view = self.view(tensor)
            if view is None:
                raise NotRecordable("a meta tensor of unknown origin")
            if shape_only or (overwrites and id(tensor) in changed_ids):
                continue
            reads.add(view.storage)
            blank_reads.append(view)
        targets = [view for tensor in changed if (view := self.view(tensor)) is not None]
        for tensor, view in zip(changed, targets):
            if tensor.untyped_storage().nbytes() != self.recording.nbytes[view.storage]:
                raise NotRecordable(f"{func} resizes a tensor")
        results = tree_flatten(result)[0]
        outputs = tuple(
            self._adopt(leaf) if isinstance(leaf, Tensor) and storage_key(leaf) not in self._names else None for leaf in results
        )
        made = {view.storage for view in outputs if view is not None}
        if not made and not targets:
            return  # a view
        if random and reads:
            raise NotRecordable(f"{func} draws numbers from the values of a tensor")
        for view in blank_reads:
            self.check_filled(view)
        whole = {view.storage for view in targets if overwrites and view.covers(self.recording.nbytes[view.storage])}
        views = lambda tree: tree_map_only(Tensor, self.view, tree)  # noqa: E731
        writes = frozenset(made | {view.storage for view in targets})
        op = Op(func, views(args), views(kwargs), outputs, frozenset(reads), writes, frozenset(made | (whole - reads)), random)
        self.recording.append(op)
        if func in EMPTY:
            self._blank.update(dict.fromkeys(made))
        for view in targets:
            self._fill(view, overwrites)

    def _fill(self, view: View, overwrites: bool) -> None:
        """Remember which elements of a storage made empty have values by now."""
        name, nbytes = view.storage, self.recording.nbytes[view.storage]
        if name not in self._blank or not overwrites:
            return
        if view.covers(nbytes):
            del self._blank[name]
            return
        filled = self._blank[name]
        if filled is None:
            filled = self._blank[name] = torch.zeros(nbytes, dtype=torch.uint8, device="cpu")
        view.bytes_of(filled).fill_(1)
        if filled.all():
            del self._blank[name]


def _written(func, args, kwargs) -> Iterator[Tensor]:
    """The tensors that `func` changes in place."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor))


def _returns_tensors(func) -> bool:
    kinds = [str(result.type) for result in func._schema.returns]
    return all("Tensor" in kind for kind in kinds)


def _leaves_recording(func, kwargs) -> bool:
    """A copy to the CPU: recorded tensors are taken to be there already, so Python wants to see the values (``tolist``)."""
    return func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu")


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") == torch.device("meta") else kwargs
