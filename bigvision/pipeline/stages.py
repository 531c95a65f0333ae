"""Stages: consecutive blocks of a model that run on one pipeline rank, cut out of its coarse trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from bigvision.errors import UserError
from bigvision.models.blocks import Block, Blocks
from bigvision.models.costs import Cost, node_costs
from bigvision.models.exact_init import named_tensors
from bigvision.models.tracing import Runner, TraceFailed, has_parts, model_name, size, trace
from bigvision.pipeline.balance import Prices, choose_cuts
from bigvision.pipeline.cutting import SAMPLES, CannotCut, Flow, Spec
from bigvision.pipeline.memory import StageMemory

EVEN = 1.05
"""When the largest stage's work is more than this times the mean, the blocks at the cuts are opened."""


class Stage(nn.Module):
    """A part of a model under the model's own names: it holds the modules that it calls and runs its part of the trace.

    ``forward`` takes the tensors that cross the cut before it (the first stage: the images) and returns a tuple of those
    that cross the next (the last stage: the model's output).
    """

    around: Callable[[], AbstractContextManager[object]] = nullcontext
    """What surrounds each forward pass."""
    travels_as: torch.dtype | None = None
    """In which type floating-point tensors leave; None leaves them as they are."""
    apart: bool = False
    """Whether backward passes are taken apart: what leaves is then detached in place, so it is neither a view nor kept by
    a backward pass, and gradients are sent as they come, so they are contiguous."""

    def __init__(self, model: nn.Module, graphs: dict[bool, fx.Graph], owned: Iterable[str]) -> None:
        """Take the modules that *graphs* call, and the parameters and buffers *owned*, out of *model*.

        Args:
            graphs: for training (True) and for evaluation (False).
        """
        super().__init__()
        called = {str(node.target) for graph in graphs.values() for node in graph.nodes if node.op == "call_module"}
        for path in sorted(called, key=lambda path: path.count(".")):
            self._adopt(path, model)
        held = {name for name, _ in named_tensors(self)}
        for name in sorted(set(owned) - held):
            self._adopt(name, model)
        self.train(model.training)
        self._runs = {mode: Runner(self, graph=graph) for mode, graph in graphs.items()}

    def _adopt(self, path: str, model: nn.Module) -> None:
        """Hold the module, parameter or buffer at *path* too, as *model* does."""
        owner, _, name = path.rpartition(".")
        source, holder = model.get_submodule(owner), self._container(owner)
        for mine, theirs in (
            (holder._modules, source._modules), (holder._parameters, source._parameters), (holder._buffers, source._buffers)
        ):  # fmt: skip
            if name in theirs:
                mine.setdefault(name, theirs[name])  # type: ignore[arg-type]
        if name in source._non_persistent_buffers_set:
            holder._non_persistent_buffers_set.add(name)

    def _container(self, path: str) -> nn.Module:
        holder: nn.Module = self
        for name in path.split(".") if path else ():
            if name not in holder._modules:
                holder.add_module(name, nn.Module())
            holder = holder.get_submodule(name)
        return holder

    def forward(self, *received: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.apart:
            received = tuple(_ContiguousGradient.apply(t) if t.requires_grad else t for t in received)  # type: ignore[misc]
        with self.around():
            sent = self._runs[self.training].run(*received)
        if not isinstance(sent, tuple):
            return sent
        return tuple(map(self._leaving, sent))

    def _leaving(self, tensor: Tensor) -> Tensor:
        if self.travels_as is not None and tensor.is_floating_point():
            tensor = tensor.to(self.travels_as)
        return tensor.clone(memory_format=torch.contiguous_format) if self.apart else tensor.contiguous()


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.contiguous()


@dataclass(frozen=True)
class StagePlan:
    """Where a model is cut, and what each stage has, needs and sends."""

    graphs: dict[bool, list[fx.Graph]]
    """What each stage runs, in training (True) and in evaluation (False)."""
    sends: dict[bool, list[tuple[Spec, ...]]]
    """The tensors that leave each stage; the model's output leaves the last."""
    blocks: list[list[Block]]
    """Each stage's; of a block that is cut in two, its parts."""
    costs: list[Cost]
    """Of each stage."""
    owners: dict[str, list[int]]
    """The stages that hold each parameter and buffer: one, but for buffers that several read and none changes."""
    memory: StageMemory | None
    """How the stages use memory, where that is known."""

    @property
    def stages(self) -> int:
        return len(self.costs)

    @property
    def imbalance(self) -> float:
        """The largest stage's work over the mean."""
        return _imbalance(self.costs)

    def build(self, model: nn.Module, numbers: Iterable[int]) -> list[Stage]:
        """The stages *numbers* of *model*, which shares its modules with them and may still be on meta."""
        return [
            Stage(
                model,
                {mode: graphs[number] for mode, graphs in self.graphs.items()},
                (name for name, stages in self.owners.items() if number in stages),
            )
            for number in numbers
        ]

    def table(self, samples: int) -> str:
        """The stages as text; FLOPs, activations and traffic are of the forward pass of *samples* images."""
        top = max(cost.work for cost in self.costs)
        rows = [("stage", "blocks", "parameters", "GFLOPs", "activations", "sends", "memory", "of the slowest")]
        for number, cost in enumerate(self.costs):
            needed = self.memory.needed(number, cost) / 2**20 if self.memory else 0.0
            rows.append(
                (
                    str(number), str(len(self.blocks[number])), f"{cost.parameters / 1e6:.2f} M",
                    f"{cost.flops * samples / 1e9:.2f}", f"{cost.activations * samples / 2**20:.1f} MiB",
                    f"{cost.sent * samples / 2**20:.2f} MiB", f"{needed:.0f} MiB", f"{cost.work / top:.0%}",
                )
            )  # fmt: skip
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def plan_stages(
    model: nn.Module, blocks: Blocks, image_shape: tuple[int, int, int], stages: int, device: torch.device | None = None,
    memory: StageMemory | None = None,
) -> StagePlan:  # fmt: skip
    """Cut *model*, on meta, into *stages* of equal work. Nothing is computed and the model is left as it is.

    Args:
        image_shape: (channels, height, width).
        device: where it will run; CPU by default.
        memory: how the stages will use memory and how much they have; by default nothing is limited.

    Raises:
        UserError: the model cannot be traced or cut, has too few blocks or shares parameters too widely.
    """
    name = model_name(model)
    advice = "use parallel.strategy fsdp or zero3, which cut nothing"
    if blocks.graph is None:
        raise UserError(f"parallel.strategy: pipeline cannot cut {name}: {blocks.reason}: {advice}")
    if stages > len(blocks):
        raise UserError(f"parallel.stages: {stages} stages, but {name} has {len(blocks)} blocks: use fewer stages")
    device = device or torch.device("cpu")

    def cut_between(pieces: list[Block], inside: Sequence[str]) -> _Candidate:
        flow = Flow(trace(copy.deepcopy(model).train(), blocks.max_share, inside), image_shape)
        compute = memory.compute if memory else torch.float32
        recomputed = [piece.path for piece in pieces] if memory and memory.recompute else []
        prices = Prices(flow, node_costs(flow.graph, image_shape, device, compute, recomputed), compute)
        return _Candidate(pieces, inside, flow, prices, choose_cuts(model, flow, pieces, prices, stages, memory))

    try:
        best = candidate = cut_between(list(blocks), ())
        while _imbalance(best.costs) > EVEN and (uneven := candidate.uneven()):
            try:
                candidate = cut_between(candidate.opened(uneven), [*candidate.inside, *uneven])
            except (CannotCut, TraceFailed):  # a block that cannot be traced inside stays whole
                break
            best = min(best, candidate, key=lambda candidate: _imbalance(candidate.costs))
        # Of a copy: a module that keeps what it computes would keep the trace's proxies.
        evaluation = Flow(trace(copy.deepcopy(model).eval(), blocks.max_share, best.inside), image_shape)
        for flow in (best.flow, evaluation):
            flow.lay_out(device)
        return _plan(model, best, evaluation, memory)
    except (CannotCut, TraceFailed) as error:
        raise UserError(f"parallel.strategy: pipeline cannot cut {name}: {error}: {advice}") from error


@dataclass(frozen=True)
class _Candidate:
    """A cut of the trace for training."""

    blocks: list[Block]
    inside: Sequence[str]
    """The blocks that were opened."""
    flow: Flow
    prices: Prices
    cuts: list[int]

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Where each stage begins and ends."""
        return list(pairwise([0, *self.cuts, len(self.flow.nodes)]))

    @property
    def costs(self) -> list[Cost]:
        return [self.prices.stage(*bounds) for bounds in self.bounds]

    def uneven(self) -> set[str]:
        """The blocks, of those that have parts, in the middle of which stages of equal work would meet."""
        openable = {block.path for block in self.blocks if has_parts(block.module)}
        ends, stages = list(accumulate(cost.work for cost in self.prices.costs)), len(self.cuts) + 1
        meetings = [ends[-1] * number / stages for number in range(1, stages)]
        found = set()
        for node, end, cost in zip(self.flow.nodes, ends, self.prices.costs):
            if str(node.target) in openable and any(end - cost.work < meeting < end for meeting in meetings):
                found.add(str(node.target))
        return found

    def opened(self, paths: set[str]) -> list[Block]:
        """The blocks, with those at *paths* replaced by their parts that have parameters."""
        found = []
        for block in self.blocks:
            parts = {block.path: block.module}
            if block.path in paths:
                parts = {f"{block.path}.{name}": part for name, part in block.module.named_children()}
            found += [Block(path, part, size(part)) for path, part in parts.items() if size(part)]
        return found


def _plan(model: nn.Module, best: _Candidate, evaluation: Flow, memory: StageMemory | None) -> StagePlan:
    flows = {True: best.flow, False: evaluation}
    known = {block.path: block for block in best.blocks}
    targets = [[str(node.target) for node in best.flow.nodes[a:b] if node.op == "call_module"] for a, b in best.bounds]
    cuts = {True: best.cuts, False: _same_cuts(best.flow, evaluation, best.cuts)}
    graphs = {mode: flow.split(cuts[mode]) for mode, flow in flows.items()}
    sends = {
        mode: [tuple(map(flow.spec, leaves)) for leaves in [*flow.crossing(cuts[mode]), flow.results()]]
        for mode, flow in flows.items()
    }
    for mode, flow in flows.items():
        for graph, received in zip(graphs[mode][1:], sends[mode]):
            _copy_changed_inputs(flow, graph, received)
    blocks = [[known[target] for target in called if target in known] for called in targets]
    return StagePlan(graphs, sends, blocks, best.costs, _owners(model, graphs), memory)


def _imbalance(costs: list[Cost]) -> float:
    work = [cost.work for cost in costs]
    return max(work) * len(work) / sum(work)


def _same_cuts(training: Flow, flow: Flow, cuts: list[int]) -> list[int]:
    """*cuts* of the trace for training in another trace: right before, or right after, the same calls."""
    calls = {str(node.target): index for index, node in enumerate(flow.nodes) if node.op == "call_module"}
    found = []
    for cut in cuts:
        after, before = (node if node.op == "call_module" else None for node in training.nodes[cut - 1 : cut + 1])
        at = calls.get(str(before.target)) if before is not None else None
        if at is None and after is not None and str(after.target) in calls:
            at = calls[str(after.target)] + 1
        if at is None:
            raise CannotCut("its trace for evaluation differs from the one for training where it would be cut")
        found.append(at)
    return found


def _owners(model: nn.Module, graphs: dict[bool, list[fx.Graph]]) -> dict[str, list[int]]:
    """The stages that use each parameter and buffer; the first keeps what none uses."""
    used: dict[str, set[int]] = {}
    for stages in graphs.values():
        for number, graph in enumerate(stages):
            for node in graph.nodes:
                if node.op == "get_attr":
                    used.setdefault(str(node.target), set()).add(number)
                elif node.op == "call_module":
                    for name, _ in named_tensors(model.get_submodule(str(node.target))):
                        used.setdefault(f"{node.target}.{name}", set()).add(number)
    tied: dict[int, set[int]] = {}
    for name, tensor in named_tensors(model):
        tied.setdefault(id(tensor), set()).update(used.get(name, ()))
    return {name: sorted(tied[id(tensor)]) or [0] for name, tensor in named_tensors(model)}


def _copy_changed_inputs(flow: Flow, graph: fx.Graph, received: tuple[Spec, ...]) -> None:
    """Let a stage copy those of its inputs that it changes in place: autograd forbids that for what was received."""
    inputs = [torch.empty(spec.sizes(SAMPLES[0]), dtype=spec.dtype, device="meta") for spec in received]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        Runner(copy.deepcopy(flow.graph), graph=graph).run(*inputs)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, tensor in zip(placeholders, inputs):
        if tensor._version:
            with graph.inserting_after(placeholders[-1]):
                copied = graph.call_method("clone", (node,))
            node.replace_all_uses_with(copied, delete_user_cb=lambda user, copied=copied: user is not copied)
