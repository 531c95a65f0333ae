"""Equal calls: what one module does with tensors without values, an equal one does with inputs of the same shapes.

Most blocks of a backbone repeat. Where a graph is run only to see shapes and costs, one of them runs and stands for the others.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
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
        return self._module(module), tuple(found), str(structure)

    def _module(self, module: nn.Module) -> int:
        """The number of those that are equal to *module*."""
        if module not in self._modules:
            key = tuple((path, *_described(part)) for path, part in module.named_modules())
            self._modules[module] = self._numbers.setdefault(key, len(self._numbers))
        return self._modules[module]


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
