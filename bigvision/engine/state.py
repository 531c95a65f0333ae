"""The state of a model in memory: storage, first values, running statistics, and fragments of all of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.optim import Optimizer

from bigvision.fragments import Fragment
from bigvision.models import Blueprint
from bigvision.runtime import Runtime, all_or_none

RUNNING = ("running_mean", "running_var")
BUCKET = 16 * 2**20  # numbers exchanged at a time: the tensor that reaches as many is the last of its bucket

Located = tuple[Tensor, int, tuple[int, int]]  # a 1-D view of local values, their start in the whole tensor, (copy, copies)


# Storage and first values.


def allocate(
    module: nn.Module, device: torch.device, place: Callable[[nn.Parameter], None] = lambda parameter: None
) -> None:  # fmt: skip
    """Give every parameter and buffer contiguous storage on *device*, without values; tied parameters stay tied.

    *place* is called with each parameter as soon as it has storage.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, old in owner._parameters.items():
            if old is None:
                continue
            if old not in made:
                empty = torch.empty_like(old, device=device, memory_format=torch.contiguous_format)
                made[old] = nn.Parameter(empty, old.requires_grad)
                vars(made[old]).update(vars(old))
                place(made[old])
            owner._parameters[name] = made[old]
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = torch.empty_like(buffer, device=device, memory_format=torch.contiguous_format)


def make_contiguous(module: nn.Module) -> bool:
    """Lay out *module*, on meta, row by row, as fragments and ``fully_shard`` need it; return whether it was channels_last."""
    tensors = [*module.parameters(), *module.buffers()]
    found = any(t.ndim == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
    if any(not tensor.is_contiguous() for tensor in tensors):
        allocate(module, torch.device("meta"))
    return found


def fill(
    blueprint: Blueprint, seed: int, fragments: Iterable[Fragment], parts: list[nn.Module], device: torch.device, restored: bool
) -> None:  # fmt: skip
    """Give this rank's runs their first values, and make the plain attributes. Called on every rank.

    What lies in a weights file as it is, is read run by run; of what is drawn or computed, one whole tensor is held at a
    time. Where the fragments are about to be *restored*, only what no checkpoint has is computed. Raises `UserError` on every
    rank, when a weights file could not be read on any.
    """

    @torch.no_grad()
    def values() -> None:
        runs = [fragment for fragment in fragments if fragment.values.numel() or not math.prod(fragment.shape)]
        saved = {run.values.data_ptr() for run in runs}
        if restored:
            for run in runs:  # a value that no restore reaches must show, not pass for a weight
                run.values.fill_(math.nan if run.values.is_floating_point() else 0)
            runs = []
        for name, buffer in (named for part in parts for named in part.named_buffers()):
            if buffer.data_ptr() not in saved:  # it is not saved, so in no fragment
                runs.append(Fragment("model", name, tuple(buffer.shape), 0, buffer.view(-1), (0, 1)))
        missing: dict[str, list[Fragment]] = {}
        for run in runs:
            missing.setdefault(run.name, []).append(run)
        for name in blueprint.runs():
            for run in missing.pop(name, ()):
                blueprint.read(name, run.start, run.values)
        for name, tensor in blueprint.tensors(seed, set(missing)):
            for run in missing.pop(name, ()):
                if run.shape != tuple(tensor.shape):
                    raise RuntimeError(f"{name}: {run.shape} against {tuple(tensor.shape)}")
                run.values.copy_(tensor.reshape(-1)[run.start : run.start + run.values.numel()])
        if missing:
            raise RuntimeError(f"without values: {list(missing)}")

    all_or_none(values)
    for part in parts:
        blueprint.fill_attributes(part, device)


# Running statistics.


class Statistics:
    """Running statistics (BatchNorm's) of this rank's part of the model, and how they were before the step.

    A forward pass moves them before anyone knows whether its numbers are finite. They are made views of one flat tensor for
    each type, so that keeping, restoring, checking and averaging them is one operation, whatever their number.
    """

    def __init__(self, parts: Sequence[nn.Module], device: torch.device) -> None:
        self.frozen = [norm for part in parts for norm in part.modules() if is_frozen(norm)]
        still = set(self.frozen)
        moving = [module for part in parts for module in part.modules() if module not in still]
        self.running = _flattened(moving, RUNNING)
        self.live = [*self.running, *_flattened(moving, ("num_batches_tracked",))]
        self.kept = [flat.clone() for flat in self.live]
        self._zero = torch.zeros((), dtype=torch.float64, device=device)

    def keep(self) -> None:
        """Remember them as they are now."""
        for kept, live in zip(self.kept, self.live):
            kept.copy_(live)

    def restore(self, skipped: Tensor) -> None:
        """Make them what they were when they were last kept where *skipped*, bool and 0-D on the device, is true."""
        for kept, live in zip(self.kept, self.live):
            torch.where(skipped, kept, live, out=live)

    def largest(self) -> Tensor:
        """The largest magnitude of all, float64 and 0-D on the device; not finite where any is not.

        A variance may overflow where outputs, which are divided by it, do not.
        """
        norms = [torch.linalg.vector_norm(flat, ord=math.inf).double() for flat in self.running]
        return torch.stack(norms).max() if norms else self._zero


def is_frozen(module: nn.Module) -> bool:
    """Whether *module* is a BatchNorm whose weights are all frozen: it then normalises by its statistics and keeps them."""
    weights = list(module.parameters(recurse=False)) if isinstance(module, BatchNorm) else []
    return bool(weights) and not any(weight.requires_grad for weight in weights)


def _flattened(modules: list[nn.Module], names: tuple[str, ...]) -> list[Tensor]:
    """Make the buffers *names* of *modules* views of one tensor for each type, and return these."""
    kinds: dict[torch.dtype, list[tuple[nn.Module, str, Tensor]]] = {}
    for module in modules:
        for name in names:
            if (buffer := module._buffers.get(name)) is not None:
                kinds.setdefault(buffer.dtype, []).append((module, name, buffer))
    flats: list[Tensor] = []
    for found in kinds.values():
        flats.append(torch.cat([buffer.reshape(-1) for *_, buffer in found]))
        for (module, name, buffer), values in zip(found, flats[-1].split([buffer.numel() for *_, buffer in found])):
            # `data` has a version counter of its own. Views share one, and autograd would take the update of one norm for a
            # change of what another one's compiled block keeps for its backward pass.
            module._buffers[name] = values.view(buffer.shape).data
    return flats


def average(tensors: Iterable[Tensor], runtime: Runtime, dtype: torch.dtype = torch.float32) -> None:
    """Replace each tensor by its mean over the data-parallel ranks, exchanging many at a time in *dtype*."""
    if runtime.data_ranks == 1:
        return
    left = list(tensors)
    while left:
        sizes = itertools.accumulate(one.numel() for one in left)
        count = 1 + sum(size < BUCKET for size in sizes)
        bucket, left = left[:count], left[count:]
        flat = torch.cat([one.detach().reshape(-1).float() for one in bucket]).to(dtype)
        dist.all_reduce(flat, group=runtime.data_group)
        flat = flat.float().div_(runtime.data_ranks)
        with torch.no_grad():
            for one, values in zip(bucket, flat.split([one.numel() for one in bucket])):
                one.copy_(values.view_as(one))


# Fragments of what a torch optimizer steps.


def model_fragments(tensors: Mapping[str, Tensor], locate: Callable[[Tensor], Located]) -> Iterator[Fragment]:
    """This rank's runs of the parameters and buffers *tensors*; of those on meta it holds nothing."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            yield Fragment("model", name, tuple(tensor.shape), 0, torch.empty(0, dtype=tensor.dtype), (0, 1))
        else:
            values, start, copy = locate(tensor)
            yield Fragment("model", name, tuple(tensor.shape), start, values.detach(), copy)


def optimizer_fragments(
    optimizer: Optimizer, shapes: Mapping[str, tuple[int, ...]], place: Mapping[str, tuple[int, tuple[int, int]]],
    layout: Callable[[tuple[int, ...]], Mapping[str, tuple[tuple[int, ...], torch.dtype]]],
) -> Iterator[Fragment]:  # fmt: skip
    """This rank's runs of the optimizer's state.

    *shapes* are those of the whole trainable parameters by name, *place* is (start, copy) of the run of each that this rank
    holds, *layout* gives the state of a parameter of another pipeline stage from its shape: keys, shapes and types.
    """
    held: set[str] = set()
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"]):
            held.add(name)
            for key, value in optimizer.state[parameter].items():
                if not isinstance(value, Tensor) or key == "step":
                    continue
                local = local_tensor(value)
                if local.numel() == local_tensor(parameter).numel():
                    (start, copy), shape = place[name], shapes[name]
                else:  # factored moments (Adafactor's), which only whole copies have
                    start, copy, shape = 0, place[name][1], tuple(value.shape)
                yield Fragment("optimizer", f"{name}/{key}", shape, start, local.view(-1), copy)
    for name, shape in shapes.items():
        if name not in held:
            for key, (kept, dtype) in layout(shape).items():
                yield Fragment("optimizer", f"{name}/{key}", kept, 0, torch.empty(0, dtype=dtype), (0, 1))


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of *tensor* that this rank holds, as a plain tensor over the same storage, without a gradient's history."""
    # What ``to_local()`` returns without grad mode; with it, each call makes a node of the graph, which for 400 gradients takes
    # longer than the optimizer's step.
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
