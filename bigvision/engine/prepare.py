"""From a model on meta to one in memory: recompute and compile per block, storage, first values."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigvision.fragments import Fragment


def wrap_blocks(blocks: Iterable[nn.Module], recompute: bool, compile: bool) -> None:
    """Recompute and compile each block, in this order and in place.

    Only the blocks' ``forward`` is replaced: names do not change, and hooks that gather and free parameters stay outside
    of what is compiled.
    """
    for block in blocks:
        if recompute:
            # The step's generator state is a function of the position, but dropout inside a block draws from it.
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if compile:
            block.forward = torch.compile(block.forward)


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
