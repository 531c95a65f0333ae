"""What the nodes of a traced model cost, counted on the meta device: nothing is computed."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bigvision.models.tracing import Runner, tensors_of

SAMPLES = 2
"""Images with which a graph is run; BatchNorm refuses single values."""
FLOPS_PER_BYTE = {"cpu": 8.0, "cuda": 100.0}
"""How many FLOPs a device computes while it moves one byte of an operation's inputs and outputs; rounded."""


@dataclass(frozen=True)
class Cost:
    """Of one node or of several together; all but the numbers of parameters are for one image."""

    flops: float = 0.0
    """Of the forward pass; a multiplication with an addition counts as two."""
    work: float = 0.0
    """FLOPs; for operations that move more than they compute, the FLOPs that would fit into that time."""
    activations: float = 0.0
    """Bytes that the forward pass keeps for the backward pass."""
    recomputed: float = 0.0
    """Bytes that the backward pass makes again for a recomputed block; of several the most."""
    parameters: int = 0
    trained: int = 0
    """How many of the parameters are trained."""
    received: float = 0.0
    """Bytes that arrive from the stage before."""
    sent: float = 0.0
    """Bytes that leave for the next stage."""

    def __add__(self, other: Cost) -> Cost:
        sums: dict[str, Any] = {one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)}
        sums["recomputed"] = max(self.recomputed, other.recomputed)
        return Cost(**sums)


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
            moved = float(sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)))
        self.flops += flops
        self.work += max(flops, moved * self.flops_per_byte)
        return result


class _FusedAttention(TorchFunctionMode):
    """Lets attention keep what the fused kernels of CPU and CUDA keep: on meta it would keep its matrix of probabilities."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with torch.no_grad():
            output = func(*args, **(kwargs or {}))
        heads_last = torch.empty_like(output.transpose(-2, -3), memory_format=torch.contiguous_format)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        return _KeepForBackward.apply(heads_last.transpose(-2, -3), *inputs)


class _KeepForBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(output, *inputs)
        return output.view_as(output)


class _CostRunner(Runner):
    def __init__(self, graph: fx.GraphModule, flops_per_byte: float, compute: torch.dtype, recomputed: Iterable[str]) -> None:
        super().__init__(copy.deepcopy(graph))
        self.flops_per_byte, self.compute, self.recomputed = flops_per_byte, compute, set(recomputed)
        self.costs: dict[str, Cost] = {}
        self.kept: dict[int, Tensor] = {}
        """What has been kept so far, by storage: a tensor that two nodes need is kept once."""
        self.counted: set[nn.Parameter] = set()

    def run_node(self, n: fx.Node) -> Any:
        saved: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
                saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        counter = _Counter(self.flops_per_byte)
        with counter, _FusedAttention(), saved_tensors_hooks(pack, lambda tensor: tensor):
            value = super().run_node(n)
        recomputed = 0.0
        if n.op == "call_module" and str(n.target) in self.recomputed:
            recomputed = sum(map(self._nbytes, saved.values()))
            inputs = tree_leaves(self.fetch_args_kwargs_from_env(n))
            saved = {leaf.untyped_storage()._cdata: leaf for leaf in inputs if isinstance(leaf, Tensor)}
        kept = sum(self._nbytes(tensor) for key, tensor in saved.items() if key not in self.kept)
        self.kept |= saved
        new = {tensor for tensor in tensors_of(n, self.module) if isinstance(tensor, nn.Parameter)} - self.counted
        self.counted |= new
        self.costs[n.name] = Cost(
            counter.flops / SAMPLES, counter.work / SAMPLES, kept / SAMPLES, recomputed / SAMPLES,
            sum(parameter.numel() for parameter in new), sum(parameter.numel() for parameter in new if parameter.requires_grad),
        )  # fmt: skip
        return value

    def _nbytes(self, tensor: Tensor) -> float:
        """The bytes of the storage of *tensor*, with floating-point values in the compute type."""
        nbytes = float(tensor.untyped_storage().nbytes())
        return nbytes * self.compute.itemsize / tensor.itemsize if tensor.is_floating_point() else nbytes


def node_costs(
    graph: fx.GraphModule, image_shape: tuple[int, int, int], device: torch.device, compute: torch.dtype = torch.float32,
    recomputed: Iterable[str] = (),
) -> dict[str, Cost]:  # fmt: skip
    """The cost of each node of *graph* for one image of (channels, height, width), by the node's name.

    A parameter counts where it is used first.

    Args:
        device: where it will run; decides what an operation that only moves memory costs.
        compute: the floating-point type of activations.
        recomputed: paths of the modules that keep only their inputs.
    """
    runner = _CostRunner(graph, FLOPS_PER_BYTE[device.type], compute, recomputed)
    with torch.random.fork_rng(devices=[]):
        runner.run(torch.empty(SAMPLES, *image_shape, device="meta"))
    return runner.costs
