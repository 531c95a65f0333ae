"""Blocks: the units in which a backbone is sharded, recomputed, compiled and placed on pipeline stages."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import resolve_model_data_config
from timm.layers import DropPath
from torch import Tensor, fx, nn

from bigvision.models.alike import RATES
from bigvision.models.tracing import CONTAINERS, TraceFailed, holders, is_piece, shares_nothing, size, tensors_of, trace


@dataclass(frozen=True)
class Block:
    """One piece of the model, called exactly once in a forward."""

    path: str
    module: nn.Module
    parameters: int  # number of parameters


class Blocks(list[Block]):
    """The blocks of a model in execution order; none is inside another and no parameter is in two.

    *graph* is the trace that they were found in, from which pipeline stages are cut. Where there is none for some *reason*, the
    blocks are the members of the model's containers. *max_share* is what `find_blocks` was given.
    """

    def __init__(self, blocks: Iterable[Block], graph: fx.GraphModule | None, reason: str | None, max_share: float) -> None:
        super().__init__(blocks)
        self.graph, self.reason, self.max_share = graph, reason, max_share


def find_blocks(module: nn.Module, image_size: int | tuple[int, int] | None = None, max_share: float = 0.25) -> Blocks:
    """Find the blocks of a timm model on meta. Nothing is computed and the module is left as it is.

    A block has at most `max_share` of the parameters, as far as modules can be opened. A lone layer is a block only where
    the layers outside of blocks would else be larger together than a block may be. A model that cannot be traced is
    watched with one image of `image_size`: the side of a square, or height and width (its own size by default).
    """
    try:
        graph, reason = trace(module, max_share), None
        nodes = list(graph.graph.nodes)
        calls = Counter(str(node.target) for node in nodes if node.op == "call_module")
        once = [path for path, count in calls.items() if count == 1]
        direct = {id(tensor) for node in nodes if node.op == "get_attr" for tensor in tensors_of(node, module)}
    except TraceFailed as failure:
        graph, once, direct, reason = None, _watched(module, image_size, _members(module, max_share)), set(), str(failure)
    owners = holders(module)
    candidates = [
        Block(path, part, size(part))
        for path, part in ((path, module.get_submodule(path)) for path in once)
        # Nothing outside of a block uses its parameters: none is tied to another module or read directly.
        if size(part) and shares_nothing(part, owners) and direct.isdisjoint(map(id, part.parameters()))
    ]
    chosen = {block.path for block in candidates if is_piece(block.module)}
    lone = sorted((block for block in candidates if block.path not in chosen), key=lambda block: block.parameters)
    largest = max((block.parameters for block in candidates if block.path in chosen), default=size(module))
    limit = min(largest, max_share * size(module))
    rest = size(module) - sum(block.parameters for block in candidates if block.path in chosen)
    while rest > limit and lone and 10 * lone[-1].parameters > limit:  # smaller ones are not worth a block
        block = lone.pop()
        chosen.add(block.path)
        rest -= block.parameters
    return Blocks((block for block in candidates if block.path in chosen), graph, reason, max_share)


def _members(module: nn.Module, max_share: float) -> list[str]:
    """The members of the model's containers, larger ones opened; for models that cannot be traced."""
    total, found = size(module), []

    def visit(path: str, child: nn.Module) -> None:
        holds = any(isinstance(grandchild, CONTAINERS) for grandchild in child.children())
        if path and not isinstance(child, CONTAINERS) and not (holds and size(child) > max_share * total):
            found.append(path)
            return
        for name, grandchild in child.named_children():
            visit(f"{path}.{name}" if path else name, grandchild)

    visit("", module)
    return found


def _watched(module: nn.Module, image_size: int | tuple[int, int] | None, paths: list[str]) -> list[str]:
    """Those of `paths` that a forward of one image calls exactly once, in that order; all, when meta cannot run it."""
    twin = copy.deepcopy(module).to("meta")
    called: Counter[str] = Counter()
    names = {twin.get_submodule(path): path for path in paths}
    for part in names:
        part.register_forward_pre_hook(lambda watched, _inputs: called.update([names[watched]]))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            channels, *size = resolve_model_data_config(twin)["input_size"]
            size = [image_size] * 2 if isinstance(image_size, int) else image_size or size
            twin(torch.empty(1, channels, *size, device="meta"))
    except Exception:
        return paths
    return [path for path, count in called.items() if count == 1]


def kinds(blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """*blocks* grouped by code and shapes, whatever their drop rates. timm builds the rate 0 as an `Identity`."""
    found: dict[Hashable, list[nn.Module]] = {}
    for block in blocks:
        key = []
        for path, module in block.named_modules():
            tensors = {**module._parameters, **module._buffers}.items()
            shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors if tensor is not None)
            dropping = type(module) in RATES or isinstance(module, DropPath)
            key.append((path, nn.Identity if dropping else type(module), shapes))
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
