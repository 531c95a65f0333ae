"""Blocks that differ only in how much they drop: which are of one kind, and their rates as tensors of one graph."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

RATES: dict[type[nn.Module], str] = {DropPath: "drop_prob", StochasticDepth: "p", nn.Dropout: "p"}
"""Modules that zero parts of their input at random, and the attribute with their probability."""


def kinds(blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """*blocks* grouped by code and shapes, whatever their drop rates. timm builds the rate 0 as an `Identity`."""
    found: dict[Hashable, list[nn.Module]] = {}
    for block in blocks:
        key = []
        for path, module in block.named_modules():
            tensors = {**module._parameters, **module._buffers}.items()
            shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors if tensor is not None)
            key.append((path, nn.Identity if type(module) in RATES else type(module), shapes))
        found.setdefault(tuple(key), []).append(block)
    return list(found.values())


def share_rates(group: Sequence[nn.Module], device: torch.device) -> None:
    """Turn the rates that differ between the blocks of a *group* of one kind from constants into inputs of their graph.

    dynamo makes every Python number of a module a constant, so each block would get a graph of its own.
    """
    for peers in zip(*(block.modules() for block in group), strict=True):
        classes = {type(module) for module in peers}
        base, *others = sorted(classes - {nn.Identity}, key=str) or [nn.Identity]
        if base not in RATES or others or any(getattr(module, "inplace", False) for module in peers):
            continue
        rates = [getattr(module, RATES[base], 0.0) for module in peers]
        if len(classes) == len(set(rates)) == 1:
            continue
        example = next(module for module in peers if type(module) is base)
        for module, rate in zip(peers, rates):
            # An Identity takes over the options of its peers.
            vars(module).update({name: value for name, value in vars(example).items() if name not in vars(module)})
            del vars(module)[RATES[base]]
            module.__class__ = WITH_TENSORS[base]
            module.keep, module.divisor = torch.empty((), device=device), torch.empty((), device=device)
            setattr(module, RATES[base], rate)


def _with_tensors(base: type[nn.Module], name: str) -> type[nn.Module]:
    """A subclass of *base* whose compiled code reads the rate from tensors. Eager code and its numbers are those of *base*."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return base.forward(self, x)
        if not self.training:
            return x
        samples = 1 if getattr(self, "mode", "row") == "batch" else x.shape[0]
        shape = x.shape if base is nn.Dropout else (samples, *[1] * (x.ndim - 1))
        mask = torch.rand(shape, device=x.device) < self.keep
        return x * (mask / self.divisor).to(x.dtype)

    def set_rate(self: Any, value: float) -> None:
        self.rate, keep = value, 1.0 - value
        self.keep.fill_(keep)
        self.divisor.fill_(keep if keep > 0 and getattr(self, "scale_by_keep", True) else 1.0)

    rate = property(lambda self: self.rate, set_rate)
    return type(f"{base.__name__}WithTensors", (base,), {"forward": forward, name: rate})


WITH_TENSORS = {base: _with_tensors(base, name) for base, name in RATES.items()}
