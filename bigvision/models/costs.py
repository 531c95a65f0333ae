"""What each node of a traced model costs, counted on the meta device: nothing is computed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bigvision.models.cutting import Runner

FLOPS_PER_BYTE = {"cpu": 8.0, "cuda": 100.0}
"""Products that a device computes in the time in which it moves one byte of an operation's inputs and outputs; rounded."""


@dataclass(frozen=True)
class Cost:
    """Of one node or of several together, per image."""

    flops: float = 0.0
    """Of the forward pass; a multiplication with an addition counts as two."""
    work: float = 0.0
    """FLOPs, or for operations that move more than they compute, what could be computed meanwhile."""
    activations: float = 0.0
    """Bytes that the backward pass needs."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.work + other.work, self.activations + other.activations)


class _Counter(TorchDispatchMode):
    """Adds up the operations performed on meta tensors (the roofline of Williams et al. 2009, one operation at a time)."""

    def __init__(self, flops_per_byte: float) -> None:
        super().__init__()
        self.flops_per_byte = flops_per_byte
        self.flops = self.work = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        flops = float(formula(*args, **(kwargs or {}), out_val=result)) if formula is not None else 0.0
        moved = 0.0
        if formula is not None or not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            moved = float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        self.flops += flops
        self.work += max(flops, moved * self.flops_per_byte)
        return result


class _Priced(Runner):
    def __init__(self, graph: fx.GraphModule, flops_per_byte: float) -> None:
        super().__init__(copy.deepcopy(graph))
        self.flops_per_byte = flops_per_byte
        self.costs: dict[str, Cost] = {}

    def run_node(self, n: fx.Node) -> Any:
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
                storage = tensor.untyped_storage()
                saved[storage._cdata] = storage.nbytes()
            return tensor

        counter = _Counter(self.flops_per_byte)
        with counter, saved_tensors_hooks(pack, lambda tensor: tensor):
            value = super().run_node(n)
        self.costs[n.name] = Cost(counter.flops, counter.work, float(sum(saved.values())))
        return value


def node_costs(graph: fx.GraphModule, image_shape: tuple[int, int, int], device: torch.device) -> dict[str, Cost]:
    """The cost of each node of *graph* for one image of (channels, height, width), by the node's name.

    Args:
        device: where it will run; decides what an operation that only moves memory costs.
    """
    count = 2  # BatchNorm refuses single values
    priced = _Priced(graph, FLOPS_PER_BYTE[device.type])
    with torch.random.fork_rng(devices=[]):
        priced.run(torch.empty(count, *image_shape, device="meta"))
    scale = 1.0 / count
    return {name: Cost(cost.flops * scale, cost.work * scale, cost.activations * scale) for name, cost in priced.costs.items()}
