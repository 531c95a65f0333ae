"""From a model on meta to one in memory: recompute and compile per block, storage, first values."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils.checkpoint import checkpoint

from bigvision.errors import UserError
from bigvision.fragments import Fragment
from bigvision.models import Blueprint
from bigvision.runtime import all_or_none


def wrap_blocks(blocks: Iterable[nn.Module], recompute: bool, compile: bool) -> None:
    """Recompute and compile each block, in this order and in place.

    Only the blocks' ``forward`` is replaced: names do not change, and hooks that gather and free parameters stay outside
    of what is compiled.

    Raises:
        UserError: both for blocks with BatchNorm.
    """
    for block in blocks:
        norms = [module for module in block.modules() if isinstance(module, BatchNorm)]
        if recompute and compile and norms:
            raise UserError("parallel.recompute: blocks and parallel.compile: true exclude each other for BatchNorm: drop one")
        if recompute:
            options = {"context_fn": functools.partial(_pass_contexts, norms)} if norms else {}
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **options)
        if compile:
            # Blocks of different widths share one code: dynamic shapes would make one slow kernel for all of them.
            block.forward = torch.compile(block.forward, dynamic=False)


def _pass_contexts(norms: list[BatchNorm]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first pass and around the second one."""
    return nullcontext(), _statistics_held(norms)


@contextmanager
def _statistics_held(norms: list[BatchNorm]) -> Iterator[None]:
    """Undo what a second pass does to the running statistics, which the first one has moved already."""
    buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before):
            # Not a change for autograd: the backward pass holds on to the buffers and does not use their values.
            buffer.data.copy_(value)


def to_empty(module: nn.Module, device: torch.device) -> None:
    """Give every parameter and buffer storage on *device*, without values; tied parameters stay tied."""
    ties: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                ties.setdefault(id(parameter), []).append((owner, name))
    module.to_empty(device=device)
    for (first, first_name), *others in ties.values():
        for owner, name in others:
            owner._parameters[name] = first._parameters[first_name]


def fill(blueprint: Blueprint, seed: int, fragments: Iterable[Fragment], parts: list[nn.Module], device: torch.device) -> None:
    """Give this rank's runs their first values, and make the plain attributes. Called on every rank.

    What lies in a weights file as it is, is read run by run; of what is drawn or computed, one whole tensor is held at a
    time. Buffers that are not saved are in no fragment and are filled whole.

    Raises:
        UserError: on every rank, when a weights file could not be read on any.
    """
    all_or_none(lambda: _fill(blueprint, seed, fragments, parts))
    for part in parts:
        blueprint.fill_attributes(part, device)


def _fill(blueprint: Blueprint, seed: int, fragments: Iterable[Fragment], parts: list[nn.Module]) -> None:
    missing: dict[str, list[Fragment]] = {}
    for fragment in fragments:
        if fragment.values.numel() or not math.prod(fragment.shape):
            missing.setdefault(fragment.name, []).append(fragment)
    saved = {run.values.data_ptr() for runs in missing.values() for run in runs}
    left: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, buffer in part.named_buffers():
            if buffer.data_ptr() not in saved:
                left.setdefault(name, []).append(buffer)
    with torch.no_grad():
        for name in blueprint.runs():
            for run in missing.pop(name, ()):
                blueprint.read(name, run.start, run.values)
            for buffer in left.pop(name, ()):
                blueprint.read(name, 0, buffer.view(-1))
        for name, tensor in blueprint.tensors(seed, {*missing, *left}):
            for run in missing.pop(name, ()):
                assert run.shape == tuple(tensor.shape), f"{name}: {run.shape} against {tuple(tensor.shape)}"
                run.values.copy_(tensor.reshape(-1)[run.start : run.start + run.values.numel()])
            for buffer in left.pop(name, ()):
                buffer.copy_(tensor)
    assert not missing and not left, f"without values: {[*missing, *left]}"


def materialize(module: nn.Module, device: torch.device, dtype: torch.dtype, place: Callable[[nn.Parameter], None]) -> None:
    """Give parameters storage in *dtype* and buffers in their own, without values; *place* takes each parameter at once."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, old in owner._parameters.items():
            if old is None:
                continue
            if old not in made:
                made[old] = nn.Parameter(torch.empty_like(old, device=device, dtype=dtype), old.requires_grad)
                vars(made[old]).update(vars(old))
                place(made[old])
            owner._parameters[name] = made[old]
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = torch.empty_like(buffer, device=device)


def norms_in_fp32(module: nn.Module) -> None:
    """Let BatchNorm compute with its weights as fp32, as its running statistics are, whatever format they are held in."""
    for norm in module.modules():
        if isinstance(norm, BatchNorm):
            norm.forward = functools.partial(_with_fp32_weights, norm, norm.forward)  # type: ignore[method-assign]


def _with_fp32_weights(norm: BatchNorm, forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    # Plain attributes hide the parameters of the same names, which stay where hooks look for them.
    cast = {name: weight.float() for name, weight in norm._parameters.items() if weight is not None}
    norm.__dict__.update(cast)
    try:
        return forward(images)
    finally:
        for name in cast:
            del norm.__dict__[name]
