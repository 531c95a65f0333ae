"""What ddp and fsdp share: a torch optimizer over this rank's tensors, driven by us."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from bigvision.data.batch import Batch
from bigvision.engine.data_parallel import DataParallelEngine
from bigvision.engine.precision import LossScale
from bigvision.engine.prepare import fill, to_empty
from bigvision.fragments import Fragment
from bigvision.models import Blueprint
from bigvision.optim import allocate_state, build_optimizer, parameter_groups, step_counters


class NativeEngine(DataParallelEngine):
    """Accumulates, clips and steps with torch's own means; subclasses say how tensors are spread and gradients averaged."""

    def _build(self, blueprint: Blueprint, blocks: list[nn.Module]) -> None:
        self.scale = LossScale(self.config.parallel.precision)
        self._shard(blocks)
        for part in self.parts:
            to_empty(part, self.runtime.device)
        optim = self.config.optim
        groups = parameter_groups(self.module, optim.weight_decay, optim.layer_decay, self._held())
        self.optimizer: Optimizer = build_optimizer(groups, self.config.optim)
        allocate_state(self.optimizer)
        fill(blueprint, self.config.seed, self._model_fragments(), self.parts, self.runtime.device)
        self.forward = self._distribute()

    def _held(self) -> dict[str, nn.Parameter]:
        """The parameters of which this rank holds at least a shard, each tied one once."""
        # By the names under which the whole model knows them: a stage may meet a tied one under another first.
        here = {name: tensor for part in self.parts for name, tensor in part.named_parameters(remove_duplicate=False)}
        return {name: here[name] for name, _ in self.module.named_parameters() if name in here}

    # What a strategy decides.

    @abstractmethod
    def _shard(self, blocks: list[nn.Module]) -> None:
        """Spread the parameters of the model, still on meta, over the ranks, in place."""

    @abstractmethod
    def _distribute(self) -> nn.Module:
        """Return what is called in a step, once parameters have values."""

    @abstractmethod
    def _micro_step(self, last: bool) -> AbstractContextManager[object]:
        """Surround the forward and backward pass of one micro-batch."""

    @abstractmethod
    def _reduce(self) -> None:
        """Average over the ranks those gradients that the backward passes did not."""

    @abstractmethod
    def _run(self, tensor: Tensor, is_parameter: bool) -> tuple[Tensor, int, tuple[int, int]]:
        """Return (this rank's values, their start in the whole tensor, copy) of a tensor of the model or optimizer."""

    @abstractmethod
    def _squared_norm(self, gradients: list[Tensor]) -> Tensor:
        """Return a part of the gradient's squared norm, float64 and 0-D; summed over all ranks it is the whole."""

    # The step.

    def _set_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def _pass(self, part: Batch, factor: float, last: bool) -> Tensor:
        with self._micro_step(last):
            loss = self._checked_loss(self._outputs(part), part.targets())
            (loss * (factor * self.scale.value)).backward()
        return loss.detach()

    def _update(self, loss_sum: Tensor) -> tuple[Tensor, Tensor, bool]:
        self._reduce()
        spoilt = torch.where(self.statistics.finite(), 0.0, math.inf).double()
        totals = torch.stack([loss_sum, self._squared_norm(self._gradients()), spoilt])
        dist.all_reduce(totals)
        grad_norm = totals[1].sqrt() / self.scale.value
        # The one place of a step where the device is waited for: the rate of the next step depends on it as well.
        skipped = not bool(torch.isfinite(totals).all())
        if not skipped:
            self._clip(grad_norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scale.update(skipped)
        return totals[0], grad_norm, skipped

    def _scale_may_fall(self) -> bool:
        return self.scale.may_fall

    def _clip(self, grad_norm: Tensor) -> None:
        """Scale the gradients to the largest allowed norm (Pascanu et al. 2013), and undo the loss scale."""
        factor = torch.ones_like(grad_norm)
        if self.config.optim.clip is not None:
            factor = (self.config.optim.clip / (grad_norm + 1e-6)).clamp(max=1.0)
        elif not self.scale.dynamic:
            return
        torch._foreach_mul_([local(g) for g in self._gradients()], (factor / self.scale.value).float())

    def _gradients(self) -> list[Tensor]:
        return [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    # The state.

    def _model_fragments(self) -> Iterator[Fragment]:
        for name, tensor in self._tensors().items():
            values, start, copy = self._run(tensor, isinstance(tensor, nn.Parameter))
            yield Fragment("model", name, tuple(tensor.shape), start, values.detach(), copy)

    def _tensors(self) -> dict[str, Tensor]:
        """What is saved of the whole model, by name; on meta where this rank holds nothing of it."""
        return self.module.state_dict(keep_vars=True)

    def _optimizer_fragments(self) -> Iterator[Fragment]:
        for group in self.optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"]):
                for key, value in self.optimizer.state[parameter].items():
                    if isinstance(value, Tensor) and key != "step":
                        values, start, copy = self._run(value, is_parameter=True)
                        yield Fragment("optimizer", f"{name}/{key}", tuple(value.shape), start, values, copy)

    def scalars(self) -> dict[str, Any]:
        # Parameters that never had a gradient are still at 0.
        steps = max((int(counter) for counter in step_counters(self.optimizer)), default=None)
        return {
            "step": self.step,
            "skipped": self.skipped,
            "samples": self.samples,
            "optimizer_steps": steps,
            "loss_scale": self.scale.value if self.scale.dynamic else None,
            "good_steps": self.scale.good_steps,
        }

    def restored(self, scalars: dict[str, Any]) -> None:
        super().restored(scalars)
        if self.scale.dynamic and scalars["loss_scale"] is not None:
            self.scale.value, self.scale.good_steps = scalars["loss_scale"], scalars["good_steps"]
        for counter in step_counters(self.optimizer):
            counter.fill_(scalars["optimizer_steps"])


def local(tensor: Tensor) -> Tensor:
    """The part of *tensor* that this rank holds, as a plain tensor over the same storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def squared_norm(tensors: list[Tensor], device: torch.device) -> Tensor:
    """The sum of the squares of all elements, float64 and 0-D."""
    pieces = [tensor.reshape(-1) for tensor in tensors]
    if device.type == "cpu":
        # There the norm adds up one by one in fp32, which over ten million elements costs four digits.
        pieces = [part for piece in pieces for part in piece.split(1 << 16)]
    if not pieces:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(pieces)).double().square().sum()
