"""From a model on meta to one in memory: recompute and compile per block, storage, first values."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils.checkpoint import checkpoint

from bigvision.errors import UserError
from bigvision.fragments import Fragment


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


def fill(tensors: Iterable[tuple[str, Tensor]], fragments: Iterable[Fragment], buffers: Mapping[str, Tensor]) -> None:
    """Copy this rank's runs of each whole tensor into place, one tensor at a time; *buffers* are those in no fragment."""
    missing: dict[str, list[Fragment]] = {}
    for fragment in fragments:
        missing.setdefault(fragment.name, []).append(fragment)
    left = dict(buffers)
    with torch.no_grad():
        for name, tensor in tensors:
            for run in missing.pop(name, ()):
                assert run.shape == tuple(tensor.shape), f"{name}: {run.shape} against {tuple(tensor.shape)}"
                run.values.copy_(tensor.reshape(-1)[run.start : run.start + run.values.numel()])
            if name in left:
                left.pop(name).copy_(tensor)
    assert not missing and not left, f"without values: {[*missing, *left]}"
