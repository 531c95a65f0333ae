"""Stages: consecutive blocks of a model that run on one pipeline rank, and where the model's coarse trace is cut into them."""

from __future__ import annotations

import copy
import functools
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from bigvision.config import Size
from bigvision.errors import UserError
from bigvision.models import Block, Blocks, tracing
from bigvision.models.alike import EqualCalls
from bigvision.models.recompute import kept_by_path
from bigvision.models.tracing import Cost, Runner, TraceFailed, named_tensors, size, tensors_of
from bigvision.pipeline.cutting import SAMPLES, CannotCut, Flow, Spec
from bigvision.pipeline.schedules import StageMemory

SLACK = 1.01  # how much more than the least possible the most expensive stage may cost, if less then crosses the cuts
STATE = ("running_mean", "running_var", "num_batches_tracked")  # buffers that a forward pass changes
Pass = tuple[bool, Size]  # whether for training or for evaluation, and the height and width of the images
EVEN = 1.05  # when the largest stage's work is more than this times the mean, the blocks at the cuts are opened


class Stage(nn.Module):
    """A part of a model under the model's own names: it holds the modules that it calls and runs its part of the trace.

    ``forward`` takes the tensors that cross the cut before it (the first stage: the images) and returns a tuple of those
    that cross the next (the last stage: the model's output).
    """

    around: Callable[[], AbstractContextManager[object]] = nullcontext  # what surrounds each forward pass
    travels_as: torch.dtype | None = None  # in which type floating-point tensors leave; None leaves them as they are
    apart: bool = False
    """Whether backward passes are taken apart: what leaves is then detached in place, so it is neither a view nor kept by
    a backward pass, and gradients are sent as they come, so they are contiguous."""

    def __init__(self, model: nn.Module, graphs: dict[Pass, fx.Graph], owned: Iterable[str]) -> None:
        """Take the modules that *graphs* call, and the tensors *owned*, out of *model*."""
        super().__init__()
        # In the order of the calls, and so the same on all ranks: FSDP gathers in the order of the modules.
        calls = (str(node.target) for graph in graphs.values() for node in graph.nodes if node.op == "call_module")
        called = dict.fromkeys(calls)
        read = (str(node.target) for graph in graphs.values() for node in graph.nodes if node.op == "get_attr")
        plain = [
            path
            for path in dict.fromkeys(read)
            if path.rpartition(".")[2] in vars(model.get_submodule(path.rpartition(".")[0]))
        ]
        for path in (*sorted(called, key=lambda path: path.count(".")), *owned, *plain):
            self._adopt(path, model)
        self.train(model.training)
        self._runs = {key: Runner(self, graph=graph) for key, graph in graphs.items()}
        self.image_size = next(size for _, size in graphs)
        """Of the images of the next pass, which only the first stage sees."""

    def _adopt(self, path: str, model: nn.Module) -> None:
        """Hold the module, parameter, buffer or plain tensor at *path* too, as *model* does."""
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
            sent = self._runs[self.training, self.image_size].run(*received)
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

    graphs: dict[Pass, list[fx.Graph]]  # what each stage runs; the sizes that it was balanced for come first
    sends: dict[Pass, list[tuple[Spec, ...]]]  # the tensors that leave each stage; the model's output leaves the last
    blocks: list[list[Block]]  # each stage's; of a block that is cut in two, its parts
    costs: list[Cost]  # of each stage
    owners: dict[str, list[int]]  # stages with each parameter and buffer: several for buffers that none changes
    memory: StageMemory  # how the stages use memory

    def build(self, model: nn.Module, number: int) -> Stage:
        """The stage *number* of *model*, which shares its modules with it and may still be on meta."""
        owned = [name for name, stages in self.owners.items() if number in stages]
        return Stage(model, {key: graphs[number] for key, graphs in self.graphs.items()}, owned)

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
    model: nn.Module, blocks: Blocks, image_shape: tuple[int, int, int], device: torch.device, memory: StageMemory,
    sizes: Sequence[Size] = (),
) -> StagePlan:  # fmt: skip
    """Cut *model*, on meta, into stages of equal work. Nothing is computed and the model is left as it is.

    *image_shape* is (channels, height, width); *device* is where the stages will run; *memory* has how many there are and what
    they may use; *sizes* are those of other images that pass through the same stages. Raises `UserError` when the model cannot
    be traced or cut, has too few blocks or shares parameters too widely.
    """
    with _one_error(model):
        known: dict[Any, Any] = {}
        best = cut(model, blocks, image_shape, device, memory, known)
        training, graphs, sends = best.prices.flow, {}, {}
        channels, height, width = image_shape
        trained, evaluated = known["trained"], copy.deepcopy(model).eval()
        for size in dict.fromkeys([(height, width), *sizes]):
            # The same modules on each stage for every size; what was folded into a graph may differ.
            resized = training
            if size != (height, width):
                resized = _flow(trained, blocks, (channels, *size), device, best.inside)
            evaluation = _flow(evaluated, blocks, (channels, *size), device, best.inside)
            graphs[True, size], sends[True, size] = resized.split(best.cuts)
            graphs[False, size], sends[False, size] = evaluation.split(_same_cuts(resized, evaluation, best.cuts))
    known = {block.path: block for block in best.blocks}
    placed = [[known[path] for path in training.called[start:end] if path in known] for start, end in best.bounds]
    return StagePlan(graphs, sends, placed, best.costs, _owners(model, graphs), memory)


ADVICE = "use parallel.strategy fsdp or zero3, which cut nothing"


@contextmanager
def _one_error(model: nn.Module) -> Iterator[None]:
    """What cannot be traced or cut becomes a `UserError`."""
    try:
        yield
    except (CannotCut, TraceFailed) as error:
        raise UserError(f"parallel.strategy: pipeline cannot cut {tracing.model_name(model)}: {error}: {ADVICE}") from error


def _flow(
    model: nn.Module, blocks: Blocks, image_shape: tuple[int, int, int], device: torch.device, inside: Sequence[str],
    calls: EqualCalls | None = None,
) -> Flow:  # fmt: skip
    return Flow(tracing.trace(model, blocks.max_share, inside), image_shape, device, calls)


def cut(
    model: nn.Module, blocks: Blocks, image_shape: tuple[int, int, int], device: torch.device, memory: StageMemory,
    known: dict[Any, Any] | None = None,
) -> Candidate:  # fmt: skip
    """Where `plan_stages` cuts *model*. *known* keeps its traces and their prices for other numbers of stages."""
    name, stages, known = tracing.model_name(model), memory.placement.stages, {} if known is None else known
    if blocks.graph is None:
        raise UserError(f"parallel.strategy: pipeline cannot cut {name}: {blocks.reason}: {ADVICE}")
    if stages > len(blocks):
        raise UserError(f"parallel.stages: {stages} stages, but {name} has {len(blocks)} blocks: use fewer stages")

    # What modules do when their calls are watched, and when they are counted.
    watched, counted = known.setdefault("calls", (EqualCalls(), EqualCalls()))
    if "trained" not in known:
        known["trained"] = copy.deepcopy(model).train()

    def cut_between(pieces: list[Block], inside: Sequence[str]) -> Candidate:
        if (key := tuple(inside)) not in known:
            known[key] = _flow(known["trained"], blocks, image_shape, device, inside, watched)
        if (kind := (key, memory.recompute, memory.compute)) not in known:
            recomputed = kept_by_path(pieces, memory.recompute, model, image_shape)
            costs = tracing.node_costs(known[key].graph, image_shape, device, memory.compute, recomputed, counted)
            known[kind] = Prices(known[key], costs, memory.compute)
        return Candidate(pieces, inside, known[kind], choose_cuts(model, pieces, known[kind], memory))

    with _one_error(model):
        best = candidate = cut_between(list(blocks), ())
        while imbalance(best.costs) > EVEN and (uneven := candidate.uneven()):
            try:
                candidate = cut_between(candidate.opened(uneven), [*candidate.inside, *sorted(uneven)])
            except (CannotCut, TraceFailed):  # a block that cannot be traced inside stays whole
                break
            best = min(best, candidate, key=lambda candidate: imbalance(candidate.costs))
    return best


@dataclass(frozen=True)
class Candidate:
    """A cut of the trace for training."""

    blocks: list[Block]
    inside: Sequence[str]  # the blocks that were opened
    prices: Prices
    cuts: list[int]

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Where each stage begins and ends."""
        return list(pairwise([0, *self.cuts, len(self.prices.costs)]))

    @property
    def costs(self) -> list[Cost]:
        return [self.prices.stage(*bounds) for bounds in self.bounds]

    def owners(self, model: nn.Module) -> dict[str, list[int]]:
        """The stages that use each parameter and buffer of *model* in training."""
        flow, used = self.prices.flow, dict[int, set[int]]()

        @functools.cache
        def stages(node: fx.Node) -> frozenset[int]:
            if (at := flow.position.get(node.name)) is not None:
                return frozenset({bisect(self.cuts, at)})
            # Neither images nor parameters go into it: it is made again on each stage that needs it.
            return frozenset().union(*map(stages, node.users))

        for node in flow.nodes:
            for tensor in tensors_of(node, model):
                used.setdefault(id(tensor), set()).update(stages(node))
        return {name: sorted(used.get(id(tensor), [0])) for name, tensor in named_tensors(model)}

    def uneven(self) -> set[str]:
        """The blocks, of those that have parts, in the middle of which stages of equal work would meet."""
        openable = {block.path for block in self.blocks if tracing.has_parts(block.module)}
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


def _owners(model: nn.Module, graphs: dict[Pass, list[fx.Graph]]) -> dict[str, list[int]]:
    """The stages that use each parameter and buffer; the first keeps what none uses."""
    used: dict[int, set[int]] = {}
    for stages in graphs.values():
        for number, graph in enumerate(stages):
            for tensor in (tensor for node in graph.nodes for tensor in tensors_of(node, model)):
                used.setdefault(id(tensor), set()).add(number)
    return {name: sorted(used.get(id(tensor), [0])) for name, tensor in named_tensors(model)}


# Where to cut.


class Prices:
    """What runs of a flow's nodes cost; a node counts where its value is made or used first."""

    def __init__(self, flow: Flow, costs: dict[str, Cost], compute: torch.dtype) -> None:
        self.flow, self.compute = flow, compute
        self.costs = [Cost()] * len(flow.nodes)
        for node in flow.nodes:
            self.costs[flow.position.get(node.name, 0)] += costs[node.name]
        self.searches: dict[int, tuple[list[int], Callable[..., list[int] | None], list[int] | None]] = {}
        """By the number of stages: allowed cuts, the search for the best ones, and those without a limit of memory."""
        # The search for the best cuts asks for the same ones again and again.
        self.crossing, self.stage = functools.cache(self._crossing), functools.cache(self._stage)

    def _crossing(self, cut: int) -> float:
        """The bytes that cross *cut* for one image."""
        return sum(spec.nbytes(SAMPLES[0], self.compute) for spec in self._specs(cut)) / SAMPLES[0]

    def returning(self, cut: int) -> float:
        """The bytes of gradients that come back over *cut* for one image."""
        return sum(spec.nbytes(SAMPLES[0], self.compute) for spec in self._specs(cut) if spec.requires_grad) / SAMPLES[0]

    def _specs(self, cut: int) -> list[Spec]:
        """What crosses *cut*."""
        return [] if cut in (0, len(self.costs)) else list(map(self.flow.spec, self.flow.crossing(cut)))

    def _stage(self, start: int, end: int) -> Cost:
        """Of the stage between the cuts *start* and *end*."""
        return sum(self.costs[start:end], Cost(received=self.crossing(start), sent=self.crossing(end)))


class DoesNotFit(UserError):
    """No cut leaves each stage the memory that it needs."""


def choose_cuts(model: nn.Module, blocks: list[Block], prices: Prices, memory: StageMemory) -> list[int]:
    """Cut the flow of *prices* into stages of equal work between *blocks*, which are always the same for one *prices*; return
    the positions, indices into its nodes. Where *memory* has a limit, cuts that do not fit are moved; `DoesNotFit` if none do.
    """
    name, stages = tracing.model_name(model), memory.placement.stages
    if stages not in prices.searches:
        allowed = _allowed_cuts(model, blocks, prices, stages)
        search = functools.partial(best_cuts, [cost.work for cost in prices.costs], allowed, stages, prices.crossing)
        prices.searches[stages] = allowed, search, search()
    allowed, search, cuts = prices.searches[stages]
    assert cuts is not None, "enough cuts are allowed"
    if memory.capacity is None:
        return cuts
    # Equal stages, as far as memory goes.
    whole, crossing = prices.stage(0, len(prices.costs)), max(map(prices.crossing, allowed))
    sizes = {key: getattr(whole, key) / stages for key in ("activations", "parameters", "trained")}
    even = replace(whole, **sizes, received=crossing, sent=crossing)
    limits = memory.limits(even)

    def fits(stage: int, start: int, end: int) -> bool:
        return memory.needed(stage, prices.stage(start, end)) <= limits[stage]

    bounds = pairwise([0, *cuts, len(prices.costs)])
    if all(fits(stage, *ends) for stage, ends in enumerate(bounds)):
        return cuts
    if cuts := search(fits):
        return cuts
    share, worst = max((memory.needed(stage, even) / limit, stage) for stage, limit in enumerate(limits))
    raise DoesNotFit(
        f"parallel.stages: no cut of {name} into {stages} stages fits the devices' memory (of equal stages, stage {worst} "
        f"needs {share:.2f} times what its device has for it): use more stages, parallel.recompute blocks, or smaller "
        "micro-batches"
    )


def _allowed_cuts(model: nn.Module, blocks: list[Block], prices: Prices, stages: int) -> list[int]:
    """The positions between blocks at which nothing that must stay on one stage is cut. Raises `UserError` for too few."""
    flow = prices.flow
    shared = bound_together(model, flow)
    paths = {block.path for block in blocks}
    between = {cut for at, path in enumerate(flow.called) if path in paths for cut in (at, at + 1) if 0 < cut < len(flow.nodes)}
    allowed = [cut for cut in sorted(between) if not any(a < cut <= b for a, b in shared.values())]
    if len(allowed) < stages - 1:
        widest = max(shared, key=lambda key: shared[key][1] - shared[key][0], default="what connects them")
        raise UserError(
            f"parallel.stages: {tracing.model_name(model)} cannot be cut into {stages} stages, since {widest} is shared "
            "between its blocks: use fewer stages, or parallel.strategy fsdp"
        )
    return allowed


def bound_together(model: nn.Module, flow: Flow) -> dict[str, tuple[int, int]]:
    """What must stay on one stage, with its first and last use: tied parameters, running statistics that move again."""
    bound = [(name, t) for name, t in named_tensors(model) if isinstance(t, nn.Parameter) or name.endswith(STATE)]
    first_names = {id(tensor): name for name, tensor in reversed(bound)}
    uses: dict[str, list[int]] = {}
    for node in flow.nodes:
        for tensor in tensors_of(node, model) if node.name in flow.position else ():
            if (name := first_names.get(id(tensor))) is not None:
                uses.setdefault(name, []).append(flow.position[node.name])
    return {name: (min(at), max(at)) for name, at in uses.items() if min(at) < max(at)}


def best_cuts(
    work: Sequence[float],
    allowed: Sequence[int],
    stages: int,
    crossing: Callable[[int], float],
    fits: Callable[[int, int, int], bool] = lambda stage, start, end: True,
) -> list[int] | None:
    """Cut the nodes ``0 .. len(work)`` into *stages* runs; return where each but the first begins, or None where none fits.

    The cost of the most expensive stage is the least possible. Among the cuts within 1 % of that, the ones with the least
    traffic are taken. Exact, by dynamic programming over the positions *allowed*, ascending, at which a run may begin. *work*
    is what each node costs, *crossing* a position's traffic, *fits* whether a stage's device has the memory for its nodes.
    """
    total = [0.0, *accumulate(work)]

    def search(limit: float, value: Callable[[float, int, int], float]) -> tuple[float, list[int]] | None:
        """The cuts of the least *value* of (so far, start, end), summed up stage by stage; no stage costs more than *limit*.

        A value is at least what came before, and grows with its stage's cost, which grows from the last start to the first.
        """
        best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
        for stage in range(stages):
            reached: dict[int, tuple[float, list[int]]] = {}
            starts = [(start, total[start], so_far) for start, (so_far, _) in best.items()][::-1]
            for end in allowed if stage < stages - 1 else [len(work)]:
                least, chosen, until = float("inf"), None, total[end]
                for start, begun, so_far in starts:
                    if start >= end:
                        continue
                    if until - begun > limit or value(0.0, start, end) > least:
                        break
                    # Of equal ones the first start, as the earlier stages are then the smallest.
                    if (worth := value(so_far, start, end)) <= least and fits(stage, start, end):
                        least, chosen = worth, start
                if chosen is not None:
                    reached[end] = least, [*best[chosen][1], end]
            best = reached
        return best.get(len(work))

    cheapest = search(float("inf"), lambda so_far, start, end: max(so_far, total[end] - total[start]))
    if cheapest is None:
        return None
    limit = cheapest[0] * SLACK
    lightest = search(limit, lambda so_far, start, end: so_far + (crossing(end) if end < len(work) else 0.0))
    assert lightest is not None
    return lightest[1][:-1]
