"""Optimizers by name."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from bigvision.config import OptimConfig
from bigvision.optim.groups import parameter_groups


def build_optimizer(module: nn.Module, config: OptimConfig) -> Optimizer:
    """Return AdamW (Loshchilov and Hutter 2019) or SGD with Nesterov momentum over the module's parameter groups."""
    groups = parameter_groups(module, config.weight_decay, config.layer_decay)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    momentum = config.momentum
    # Not fused: that step has no form for sharded tensors.
    return torch.optim.SGD(groups, lr=config.lr, momentum=momentum, nesterov=momentum > 0, foreach=True)


def allocate_state(optimizer: Optimizer) -> None:
    """Create the state that the optimizer would create at its first step, so that it can be saved and restored before.

    The parameters' values are not kept: call it before they are filled.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
