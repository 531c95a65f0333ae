"""Stages: consecutive blocks of a model that run on one pipeline rank, cut out of its coarse trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, fx, nn

from bigvision.errors import UserError
from bigvision.models.blocks import Block, Blocks
from bigvision.models.exact_init import named_tensors
from bigvision.models.tracing import Cost, Runner, TraceFailed, has_parts, model_name, node_costs, size, tensors_of, trace
from bigvision.pipeline.balance import Prices, choose_cuts
from bigvision.pipeline.cutting import CannotCut, Flow, Spec
from bigvision.pipeline.schedules import StageMemory

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
        # In the order of the calls, and so the same on all ranks: FSDP gathers in the order of the modules.
        calls = (str(node.target) for graph in graphs.values() for node in graph.nodes if node.op == "call_module")
        called = dict.fromkeys(calls)
        for path in sorted(called, key=lambda path: path.count(".")):
            self._adopt(path, model)
        for name in owned:
            self._adopt(name, model)
        self.train(model.training)
        self._runs = {mode: Runner(self, graph=graph) for mode, graph in graphs.items()}

    def _adopt(self, path: str, model: nn.Module) -> None:
        """Hold the module, parameter or buffer at *path* too, as *model* does."""
        *owners, name = path.split(".")
        source, holder = model, self
        for owner in owners:
            source = source.get_submodule(owner)
            if owner not in holder._modules:
                holder.add_module(owner, nn.Module())
            holder = holder.get_submodule(owner)
        if name in source._buffers:
            persistent = name not in source._non_persistent_buffers_set
            holder.register_buffer(name, source._buffers[name], persistent)
        else:
            setattr(holder, name, getattr(source, name))

    def forward(self, *received: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.apart:
            received = tuple(map(_with_contiguous_gradient, received))
        with self.around():
            sent = self._runs[self.training].run(*received)
        return tuple(map(self._leaving, sent)) if isinstance(sent, tuple) else sent

    def _leaving(self, tensor: Tensor) -> Tensor:
        if self.travels_as is not None and tensor.is_floating_point():
            tensor = tensor.to(self.travels_as)
        return tensor.clone(memory_format=torch.contiguous_format) if self.apart else tensor.contiguous()


def _with_contiguous_gradient(tensor: Tensor) -> Tensor:
    tensor = tensor.view_as(tensor)  # the schedule receives into the same tensors in every step: a hook on them would stay
    if tensor.requires_grad:
        tensor.register_hook(Tensor.contiguous)
    return tensor


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
    memory: StageMemory
    """How the stages use memory."""

    def build(self, model: nn.Module, number: int) -> Stage:
        """The stage *number* of *model*, which shares its modules with it and may still be on meta."""
        owned = [name for name, stages in self.owners.items() if number in stages]
        return Stage(model, {mode: graphs[number] for mode, graphs in self.graphs.items()}, owned)

    def table(self, samples: int) -> str:
        """The stages as text; FLOPs, activations and traffic are of the forward pass of *samples* images."""
        top = max(cost.work for cost in self.costs)
        rows = [("stage", "blocks", "parameters", "GFLOPs", "activations", "sends", "memory", "of the slowest")]
        for number, cost in enumerate(self.costs):
            needed = self.memory.needed(number, cost) / 2**20
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
    model: nn.Module, blocks: Blocks, image_shape: tuple[int, int, int], device: torch.device, memory: StageMemory
) -> StagePlan:  # fmt: skip
    """Cut *model*, on meta, into stages of equal work. Nothing is computed and the model is left as it is.

    Args:
        image_shape: (channels, height, width).
        device: where it will run.
        memory: how many stages there are, how they use memory and how much they have.

    Raises:
        UserError: the model cannot be traced or cut, has too few blocks or shares parameters too widely.
    """
    name, stages = model_name(model), memory.placement.stages
    advice = "use parallel.strategy fsdp or zero3, which cut nothing"
    if blocks.graph is None:
        raise UserError(f"parallel.strategy: pipeline cannot cut {name}: {blocks.reason}: {advice}")
    if stages > len(blocks):
        raise UserError(f"parallel.stages: {stages} stages, but {name} has {len(blocks)} blocks: use fewer stages")

    def flow(training: bool, inside: Sequence[str]) -> Flow:
        # Of a copy: a module that keeps what it computes would keep the trace's proxies.
        return Flow(trace(copy.deepcopy(model).train(training), blocks.max_share, inside), image_shape, device)

    def cut_between(pieces: list[Block], inside: Sequence[str]) -> _Candidate:
        whole = flow(True, inside)
        recomputed = [piece.path for piece in pieces] if memory.recompute else []
        costs = node_costs(whole.graph, image_shape, device, memory.compute, recomputed)
        prices = Prices(whole, costs, memory.compute)
        return _Candidate(pieces, inside, prices, choose_cuts(model, pieces, prices, memory))

    try:
        best = candidate = cut_between(list(blocks), ())
        while imbalance(best.costs) > EVEN and (uneven := candidate.uneven()):
            try:
                candidate = cut_between(candidate.opened(uneven), [*candidate.inside, *uneven])
            except (CannotCut, TraceFailed):  # a block that cannot be traced inside stays whole
                break
            best = min(best, candidate, key=lambda candidate: imbalance(candidate.costs))
        training, evaluation = best.prices.flow, flow(False, best.inside)
        graphs, sends = {}, {}
        for mode, whole, cuts in (
            (True, training, best.cuts), (False, evaluation, _same_cuts(training, evaluation, best.cuts))
        ):  # fmt: skip
            graphs[mode], sends[mode] = whole.split(cuts)
    except (CannotCut, TraceFailed) as error:
        raise UserError(f"parallel.strategy: pipeline cannot cut {name}: {error}: {advice}") from error
    known = {block.path: block for block in best.blocks}
    placed = [[known[path] for path in training.called[start:end] if path in known] for start, end in best.bounds]
    return StagePlan(graphs, sends, placed, best.costs, _owners(model, graphs), memory)


@dataclass(frozen=True)
class _Candidate:
    """A cut of the trace for training."""

    blocks: list[Block]
    inside: Sequence[str]
    """The blocks that were opened."""
    prices: Prices
    cuts: list[int]

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Where each stage begins and ends."""
        return list(pairwise([0, *self.cuts, len(self.prices.costs)]))

    @property
    def costs(self) -> list[Cost]:
        return [self.prices.stage(*bounds) for bounds in self.bounds]

    def uneven(self) -> set[str]:
        """The blocks, of those that have parts, in the middle of which stages of equal work would meet."""
        openable = {block.path for block in self.blocks if has_parts(block.module)}
        ends, stages = list(accumulate(cost.work for cost in self.prices.costs)), len(self.cuts) + 1
        meetings = [ends[-1] * number / stages for number in range(1, stages)]
        return {
            path
            for path, start, end in zip(self.prices.flow.called, [0.0, *ends], ends)
            if path in openable and any(start < meeting < end for meeting in meetings)
        }

    def opened(self, paths: set[str]) -> list[Block]:
        """The blocks, with those at *paths* replaced by their parts that have parameters."""
        found = []
        for block in self.blocks:
            parts = {block.path: block.module}
            if block.path in paths:
                parts = {f"{block.path}.{name}": part for name, part in block.module.named_children()}
            found += [Block(path, part, size(part)) for path, part in parts.items() if size(part)]
        return found


def imbalance(costs: Sequence[Cost]) -> float:
    """The largest stage's work over the mean."""
    work = [cost.work for cost in costs]
    return max(work) * len(work) / sum(work)


def _same_cuts(training: Flow, evaluation: Flow, cuts: list[int]) -> list[int]:
    """*cuts* of the trace for training in the one for evaluation: right before, or right after, the same calls."""
    calls = {path: index for index, path in enumerate(evaluation.called) if path}
    found = []
    for cut in cuts:
        after, before = training.called[cut - 1 : cut + 1]
        if before in calls:
            found.append(calls[before])
        elif after in calls:
            found.append(calls[after] + 1)
        else:
            raise CannotCut("its trace for evaluation differs from the one for training where it would be cut")
    return found


def _owners(model: nn.Module, graphs: dict[bool, list[fx.Graph]]) -> dict[str, list[int]]:
    """The stages that use each parameter and buffer; the first keeps what none uses."""
    used: dict[int, set[int]] = {}
    for stages in graphs.values():
        for number, graph in enumerate(stages):
            for tensor in (tensor for node in graph.nodes for tensor in tensors_of(node, model)):
                used.setdefault(id(tensor), set()).add(number)
    return {name: sorted(used.get(id(tensor), [0])) for name, tensor in named_tensors(model)}
