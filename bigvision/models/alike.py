"""Equal calls: what one module does with tensors without values, an equal one does with inputs of the same shapes.

Most blocks of a backbone repeat. Where a graph is run only to see shapes and costs, one of them runs and stands for the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves
from torchvision.ops import StochasticDepth

RATES: dict[type[nn.Module], str] = {DropPath: "drop_prob", StochasticDepth: "p", nn.Dropout: "p"}
"""Modules that zero parts of their input at random, and the attribute with their probability."""
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size, torch.memory_format)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in *value*, in their order. Those of plain tuples, lists and dicts are found without torch's slower tree."""
    kind = type(value)
    if isinstance(value, Tensor):
        return [value]
    if kind in PLAIN:
        return []
    if kind is tuple or kind is list:
        return [tensor for item in value if type(item) not in PLAIN for tensor in tensors_in(item)]
    if kind is dict:
        return [tensor for item in value.values() if type(item) not in PLAIN for tensor in tensors_in(item)]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Result:
    """A tensor that a module returned: new memory, without gaps."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, value: Any, inputs: Sequence[Tensor], module: nn.Module) -> Result | None:
        """None where *value* is no single tensor, or shares its memory with the *inputs* or the tensors of *module*."""
        if not isinstance(value, Tensor) or value.layout != torch.strided or (value.requires_grad and value.is_leaf):
            return None
        storage = value.untyped_storage()
        others = {tensor.untyped_storage()._cdata for tensor in (*inputs, *module.parameters(), *module.buffers())}
        if storage._cdata in others or storage.nbytes() != value.nbytes:
            return None
        found = cls(value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
        return found if found.made().stride() == found.stride else None

    def made(self) -> Tensor:
        """Another such tensor. It is no leaf of autograd's, since those cannot be changed in place."""
        like = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return like.requires_grad_().clone() if self.requires_grad and torch.is_grad_enabled() else like


class EqualCalls:
    """Tells by a key which calls of modules are equal."""

    def __init__(self) -> None:
        self._modules: dict[nn.Module, int] = {}
        self._numbers: dict[Hashable, int] = {}
        self.results: dict[Hashable, Any] = {}
        """What is known of calls so far, by their keys."""

    def key(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable | None:
        """Equal for equal calls; None where that cannot be told."""
        leaves, structure = tree_flatten((tuple(args), dict(kwargs)))
        found: list[Hashable] = []
        storages: dict[int, int] = {}
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                shared = storages.setdefault(leaf.untyped_storage()._cdata, len(storages))
                found.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad, leaf.is_leaf, shared))
            elif isinstance(leaf, PLAIN):
                found.append((type(leaf), leaf))
            else:
                return None
        return self.number(module), tuple(found), str(structure)

    def run(
        self, module: nn.Module, call: Callable[[], Any], args: Sequence[Any], kwargs: Mapping[str, Any],
        twin: Callable[[], nn.Module] | None = None,
    ) -> Any:  # fmt: skip
        """What *call*, a call of *module* with these arguments, returns; an equal one is not made again. *twin* is the module
        that runs in its place, where another one does."""
        key = self.key(module, args, kwargs)
        if key is not None and key in self.results:
            return self.results[key].made()
        value = call()
        ran = module if twin is None else twin()
        if key is not None and (result := Result.of(value, tensors_in((args, kwargs)), ran)) is not None:
            self.results[key] = result
        return value

    def number(self, module: nn.Module) -> int:
        """The number of those that are equal to *module*, as it is when it is first asked for."""
        if module not in self._modules:
            key = tuple((path, *_described(part)) for path, part in module.named_modules())
            self._modules[module] = self._numbers.setdefault(key, len(self._numbers))
        return self._modules[module]


@contextmanager
def equal_run_once(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Of equal calls of *modules*, none of which lies in another, one is made; the others return what it did."""
    calls = EqualCalls()
    for module in modules:
        calls.number(module)  # now, since equal ones get a forward of their own each
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = functools.partial(_once, calls, module, module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, before):
            del module.forward
            if forward is not None:
                module.forward = forward


def _once(calls: EqualCalls, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return calls.run(module, lambda: forward(*args, **kwargs), args, kwargs)


def _described(module: nn.Module) -> tuple[Hashable, ...]:
    """What equal modules have alike, beside their children. A rate of what is dropped only matters where it is 0."""
    tensors = tuple(
        (name, None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad))
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    )
    rate = RATES.get(type(module))
    attributes = tuple(
        (name, bool(value) if name == rate else _value(value))
        for name, value in vars(module).items()
        if name not in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    )
    return type(module), tensors, attributes


def _value(value: Any) -> Hashable:
    """An attribute: itself where it is plain, and by its identity where it is not."""
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_value, value))
    if isinstance(value, dict):
        return type(value), tuple((_value(key), _value(one)) for key, one in value.items())
    return value if isinstance(value, type) or (callable(value) and hasattr(value, "__code__")) else id(value)
