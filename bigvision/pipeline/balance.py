"""Where a model is cut: what each node of its trace costs, where a cut is allowed, and which allowed cuts are the best.

Costs are counted on the meta device, so nothing is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bigvision.errors import UserError
from bigvision.models.blocks import Block
from bigvision.models.tracing import model_name, size
from bigvision.pipeline.cutting import SAMPLES, Flow, Runner
from bigvision.pipeline.memory import Load, StageMemory

FLOPS_PER_BYTE = {"cpu": 8.0, "cuda": 100.0}
"""How many FLOPs a device computes while it moves one byte of an operation's inputs and outputs; rounded."""

SLACK = 1.01
"""How much more than the least possible the most expensive stage may cost, if less then crosses the cuts."""

# What a node costs.


@dataclass(frozen=True)
class Cost:
    """Of one node or of several together, per image."""

    flops: float = 0.0
    """Of the forward pass; a multiplication with an addition counts as two."""
    work: float = 0.0
    """FLOPs; for operations that move more than they compute, the FLOPs that would fit into that time."""
    activations: float = 0.0
    """Bytes that the forward pass keeps for the backward pass."""
    recomputed: float = 0.0
    """Bytes that the backward pass makes again; of several nodes the most."""

    def __add__(self, other: Cost) -> Cost:
        kept = self.activations + other.activations
        return Cost(self.flops + other.flops, self.work + other.work, kept, max(self.recomputed, other.recomputed))


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
    def __init__(self, graph: fx.GraphModule, flops_per_byte: float, compute: torch.dtype, recomputed: set[str]) -> None:
        super().__init__(copy.deepcopy(graph))
        self.flops_per_byte, self.compute, self.recomputed = flops_per_byte, compute, recomputed
        self.costs: dict[str, Cost] = {}
        self.kept: dict[int, Tensor] = {}
        """What has been kept so far, by storage: a tensor that two nodes need is kept once."""

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
        new = {key: tensor for key, tensor in saved.items() if key not in self.kept}
        self.kept |= new
        self.costs[n.name] = Cost(counter.flops, counter.work, sum(map(self._nbytes, new.values())), recomputed)
        return value

    def _nbytes(self, tensor: Tensor) -> float:
        """The bytes of the storage of *tensor*, with floating-point values in the compute type."""
        nbytes = float(tensor.untyped_storage().nbytes())
        return nbytes * self.compute.itemsize / tensor.itemsize if tensor.is_floating_point() else nbytes


def node_costs(
    graph: fx.GraphModule,
    image_shape: tuple[int, int, int],
    device: torch.device,
    compute: torch.dtype = torch.float32,
    recomputed: Iterable[str] = (),
) -> dict[str, Cost]:
    """The cost of each node of *graph* for one image of (channels, height, width), by the node's name.

    Args:
        device: where it will run; decides what an operation that only moves memory costs.
        compute: the floating-point type of activations.
        recomputed: paths of the modules that keep only their inputs.
    """
    samples = 2  # BatchNorm refuses single values
    runner = _CostRunner(graph, FLOPS_PER_BYTE[device.type], compute, set(recomputed))
    with torch.random.fork_rng(devices=[]):
        runner.run(torch.empty(samples, *image_shape, device="meta"))
    return {name: Cost(*(value / samples for value in astuple(cost))) for name, cost in runner.costs.items()}


# Where a cut is allowed.


class Prices:
    """What runs of a flow's nodes cost, and what memory they need; a node counts where its value is made."""

    def __init__(self, model: nn.Module, flow: Flow, costs: dict[str, Cost], compute: torch.dtype) -> None:
        self.flow, self.compute = flow, compute
        self.costs = [Cost()] * len(flow.nodes)
        self.parameters, self.trained = [0] * len(flow.nodes), [0] * len(flow.nodes)
        self._crossing = {0: 0.0, len(flow.nodes): 0.0}
        for node in flow.nodes:
            at = max(flow.position.get(node.name, 0), 0)
            self.costs[at] += costs[node.name]
            if node.op == "call_module":
                module = model.get_submodule(str(node.target))
                self.parameters[at] += size(module)
                self.trained[at] += sum(p.numel() for p in module.parameters() if p.requires_grad)

    def crossing(self, cut: int) -> float:
        """The bytes that cross *cut* for one image."""
        if cut not in self._crossing:
            leaves = self.flow.crossing([cut])[0]
            self._crossing[cut] = sum(self.flow.spec(leaf).nbytes(SAMPLES[0], self.compute) for leaf in leaves) / SAMPLES[0]
        return self._crossing[cut]

    def cost(self, start: int, end: int) -> Cost:
        """Of the nodes from *start* to *end*."""
        return sum(self.costs[start:end], Cost())

    def load(self, start: int, end: int) -> Load:
        """Of the stage between the cuts *start* and *end*."""
        cost = self.cost(start, end)
        sizes = sum(self.parameters[start:end]), sum(self.trained[start:end])
        return Load(*sizes, cost.activations, cost.recomputed, self.crossing(start), self.crossing(end))

    def even_load(self, stages: int, crossing: float) -> Load:
        """Of one of *stages* equal stages."""
        whole = self.load(0, len(self.costs))
        sizes = whole.parameters // stages, whole.trained // stages
        return Load(*sizes, whole.activations / stages, whole.recomputed, crossing, crossing)


def choose_cuts(
    model: nn.Module, flow: Flow, blocks: list[Block], prices: Prices, stages: int, memory: StageMemory | None
) -> list[int]:
    """Cut *flow* into *stages* of equal work between blocks; return the positions, indices into its nodes.

    Raises:
        UserError: what is shared between blocks, or the devices' memory, leaves no such cut.
    """
    name = model_name(model)
    shared = bound_together(model, flow)
    allowed = [cut for cut in between_blocks(flow, blocks) if not any(a < cut <= b for a, b in shared.values())]
    work = [cost.work for cost in prices.costs]
    if memory is None or memory.capacity is None:
        cuts, needs = best_cuts(work, allowed, stages, prices.crossing), ""
    else:
        even = prices.even_load(stages, max(map(prices.crossing, allowed), default=0.0))
        limits = memory.limits(even)

        def fits(stage: int, start: int, end: int) -> bool:
            return memory.needed(stage, prices.load(start, end)) <= limits[stage]

        cuts = best_cuts(work, allowed, stages, prices.crossing, fits)
        share, worst = max((memory.needed(stage, even) / limit, stage) for stage, limit in enumerate(limits))
        needs = f" (of equal stages, stage {worst} needs {share:.2f} times what its device has for it)"
    if cuts is not None:
        return cuts
    if best_cuts(work, allowed, stages, prices.crossing) is None:
        widest = max(shared, key=lambda key: shared[key][1] - shared[key][0], default="what connects them")
        raise UserError(
            f"parallel.stages: {name} cannot be cut into {stages} stages, since {widest} is shared between its blocks: "
            "use fewer stages, or parallel.strategy fsdp"
        )
    raise UserError(
        f"parallel.stages: no cut of {name} into {stages} stages fits the devices' memory{needs}: use more stages, "
        "parallel.recompute blocks, or smaller micro-batches"
    )


def between_blocks(flow: Flow, blocks: list[Block]) -> list[int]:
    """The positions right before and right after each block."""
    paths = {block.path for block in blocks}
    calls = [index for index, node in enumerate(flow.nodes) if node.op == "call_module" and str(node.target) in paths]
    return sorted({cut for index in calls for cut in (index, index + 1) if 0 < cut < len(flow.nodes)})


def bound_together(model: nn.Module, flow: Flow) -> dict[str, tuple[int, int]]:
    """What must stay on one stage, with its first and last use: tied parameters, modules with state that are called again."""
    first_names: dict[int, str] = {}
    tied_to = {name: first_names.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    uses: dict[str, list[int]] = {}
    for node in flow.nodes:
        if (at := flow.position.get(node.name)) is None:
            continue
        target = str(node.target)
        if node.op == "get_attr" and target in tied_to:
            uses.setdefault(tied_to[target], []).append(at)
        elif node.op == "call_module":
            module = model.get_submodule(target)
            for name, _ in module.named_parameters(remove_duplicate=False):
                uses.setdefault(tied_to[f"{target}.{name}"], []).append(at)
            if any(isinstance(part, NormBase) and part.track_running_stats for part in module.modules()):
                uses.setdefault(target, []).append(at)
    return {name: (min(at), max(at)) for name, at in uses.items() if min(at) < max(at)}


# Which cuts are the best.


def best_cuts(
    work: Sequence[float],
    allowed: Sequence[int],
    stages: int,
    crossing: Callable[[int], float],
    fits: Callable[[int, int, int], bool] = lambda stage, start, end: True,
) -> list[int] | None:
    """Cut the nodes ``0 .. len(work)`` into *stages* runs; return where each but the first begins, or None.

    The cost of the most expensive stage is the least possible. Among the cuts within 1 % of that, the ones with the least
    traffic are taken. Exact, by dynamic programming over the allowed positions.

    Args:
        work: what each node costs.
        allowed: positions p at which the run of nodes from p on may begin, ascending.
        crossing: what a cut at a position costs in traffic.
        fits: whether the nodes from start to end fit the device of a stage; None is returned when nothing fits.
    """
    total = [0.0, *accumulate(work)]
    ends = [*allowed, len(work)]

    def cost(start: int, end: int) -> float:
        return total[end] - total[start]

    def search(limit: float, value: Callable[[float, int, int], float]) -> tuple[float, list[int]] | None:
        """The cuts of the least *value* of (so far, start, end), summed up stage by stage; no stage costs more than *limit*."""
        states: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
        for stage in range(stages):
            reached: dict[int, tuple[float, list[int]]] = {}
            for end in ends if stage < stages - 1 else [len(work)]:
                for start, (so_far, cuts) in states.items():
                    if start >= end or cost(start, end) > limit or not fits(stage, start, end):
                        continue
                    new = value(so_far, start, end)
                    if end not in reached or new < reached[end][0]:
                        reached[end] = (new, [*cuts, end])
            states = reached
        return states.get(len(work))

    cheapest = search(float("inf"), lambda so_far, start, end: max(so_far, cost(start, end)))
    if cheapest is None:
        return None
    limit = cheapest[0] * SLACK
    lightest = search(limit, lambda so_far, start, end: so_far + (crossing(end) if end < len(work) else 0.0))
    assert lightest is not None
    return lightest[1][:-1]
