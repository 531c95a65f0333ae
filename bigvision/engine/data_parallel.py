"""What ddp and fsdp share: every rank runs the whole model on its part of the global batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from bigvision.config import Config
from bigvision.data.batch import Batch, normalize
from bigvision.engine.base import Engine, Metrics, StepResult
from bigvision.engine.precision import LossScale, autocast
from bigvision.engine.prepare import fill, to_empty, wrap_blocks
from bigvision.errors import UserError
from bigvision.fragments import Fragment
from bigvision.models import Block, Blueprint
from bigvision.optim import allocate_state, build_optimizer, learning_rate
from bigvision.runtime import Runtime
from bigvision.seeds import seed_from
from bigvision.tasks import Task


class DataParallelEngine(Engine):
    """Trains a timm model; subclasses say how parameters and gradients are spread over the ranks."""

    def __init__(
        self, config: Config, blueprint: Blueprint, blocks: list[Block], task: Task, runtime: Runtime, steps: int
    ) -> None:
        """Place and initialise the model.

        Args:
            blueprint: the model on meta and where its first values come from.
            steps: optimizer steps of the whole run, for the schedule.
        """
        self.config, self.task, self.runtime, self.steps = config, task, runtime, steps
        self.micro_batch = micro_batch(config, runtime.world_size)
        self.scale = LossScale(config.parallel.precision)
        self.statistics_differ = False
        self.input_shape = (blueprint.in_chans, blueprint.image_size, blueprint.image_size)
        self.mean = torch.tensor(blueprint.mean, device=runtime.device)
        self.std = torch.tensor(blueprint.std, device=runtime.device)

        if config.parallel.precision == "fp32":
            # Convolutions would else round their inputs to 10 bits on CUDA, and the strategies differ in the third digit.
            torch.backends.cudnn.allow_tf32 = False
        self.module: nn.Module = blueprint.module
        parallel = config.parallel
        wrap_blocks([block.module for block in blocks], parallel.recompute == "blocks", parallel.compile)
        self.module.train()
        self._shard([block.module for block in blocks])
        to_empty(self.module, runtime.device)
        self.optimizer: Optimizer = build_optimizer(self.module, config.optim)
        allocate_state(self.optimizer)
        persistent = self.module.state_dict(keep_vars=True)
        unsaved = {name: buffer for name, buffer in self.module.named_buffers() if name not in persistent}
        fill(blueprint.tensors(config.seed), self._model_fragments(), unsaved)
        blueprint.fill_attributes(self.module, runtime.device)
        self.forward = self._distribute()

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

    def train_step(self, batch: Batch) -> StepResult:
        if not self.module.training:
            self.module.train()
        torch.manual_seed(seed_from("dropout", self.config.seed, self.step, self.runtime.rank))
        lr = learning_rate(self.config.optim, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        samples = len(batch) * self.runtime.world_size
        # Strategies average gradients over ranks; what is wanted is the sum of all samples' over their number.
        factor = self.runtime.world_size / samples * self.scale.value
        parts = batch.to(self.runtime.device).split(self.micro_batch)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for number, part in enumerate(parts, start=1):
            with self._micro_step(last=number == len(parts)):
                loss = self.task.loss(self._outputs(part), part.labels)
                (loss * factor).backward()
            loss_sum += loss.detach()
        self._reduce()

        loss, grad_norm = self._loss_and_norm(loss_sum, samples)
        # Only fp16 has to know on the CPU whether to step; elsewhere the device is never waited for.
        skipped = self.scale.dynamic and not bool(torch.isfinite(grad_norm))
        if not skipped:
            self._clip(grad_norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scale.update(skipped)
        self.statistics_differ = True
        self.step += 1
        self.samples += samples
        return StepResult(loss, grad_norm, lr, skipped, samples)

    def eval_step(self, batch: Batch) -> Metrics:
        if self.module.training:
            self.module.eval()
        batch = batch.to(self.runtime.device)
        with torch.no_grad():
            sums = self.task.measure(self._outputs(batch), batch.labels, batch.valid)
        totals = torch.cat([sums, batch.valid.sum(dtype=torch.float64)[None]])
        dist.all_reduce(totals)
        return Metrics(self.task.metrics, totals[:-1], totals[-1])

    def _outputs(self, batch: Batch) -> Tensor:
        images = normalize(batch.images, self.mean, self.std)
        with autocast(self.config.parallel.precision, self.runtime.device):
            return self.forward(images)

    def _loss_and_norm(self, loss_sum: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        totals = torch.stack([loss_sum, self._squared_norm(gradients)])
        dist.all_reduce(totals)
        return totals[0] / samples, totals[1].sqrt() / self.scale.value

    def _clip(self, grad_norm: Tensor) -> None:
        """Scale the gradients to the largest allowed norm (Pascanu et al. 2013), and undo the loss scale."""
        factor = torch.ones_like(grad_norm)
        if self.config.optim.clip is not None:
            factor = (self.config.optim.clip / (grad_norm + 1e-6)).clamp(max=1.0)
        elif not self.scale.dynamic:
            return
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_([local(g) for g in gradients], (factor / self.scale.value).float())

    # The state.

    def synchronize(self) -> None:
        # Once only: the mean of equal numbers may differ from them in its last bit.
        if not self.statistics_differ:
            return
        # Each rank's batches moved its own running statistics; their mean is what one rank would keep on average.
        running = [m._buffers.get(name) for m in self.module.modules() for name in ("running_mean", "running_var")]
        average([buffer for buffer in running if buffer is not None], self.runtime.world_size)
        self.statistics_differ = False

    def fragments(self) -> Iterator[Fragment]:
        yield from self._model_fragments()
        for group in self.optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"]):
                for key, value in self.optimizer.state[parameter].items():
                    if isinstance(value, Tensor) and key != "step":
                        values, start, copy = self._run(value, is_parameter=True)
                        yield Fragment("optimizer", f"{name}/{key}", tuple(value.shape), start, values, copy)

    def _model_fragments(self) -> Iterator[Fragment]:
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            values, start, copy = self._run(tensor.detach(), isinstance(tensor, nn.Parameter))
            yield Fragment("model", name, tuple(tensor.shape), start, values, copy)

    def scalars(self) -> dict[str, Any]:
        # Parameters that never had a gradient are still at 0.
        steps = max((int(state["step"]) for state in self.optimizer.state.values() if "step" in state), default=None)
        return {
            "step": self.step,
            "samples": self.samples,
            "optimizer_steps": steps,
            "loss_scale": self.scale.value if self.scale.dynamic else None,
            "good_steps": self.scale.good_steps,
        }

    def restored(self, scalars: dict[str, Any]) -> None:
        self.step, self.samples = scalars["step"], scalars["samples"]
        if self.scale.dynamic and scalars["loss_scale"] is not None:
            self.scale.value, self.scale.good_steps = scalars["loss_scale"], scalars["good_steps"]
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(scalars["optimizer_steps"])


def micro_batch(config: Config, ranks: int) -> int:
    """Samples in one pass on one rank.

    Raises:
        UserError: the ranks do not divide the global batch.
    """
    total = config.train.global_batch
    if total % ranks:
        below, above = total - total % ranks, total - total % ranks + ranks
        fits = f"{below} or {above}" if below else f"{above}"
        raise UserError(f"train.global_batch: {total} cannot be divided among {ranks} data-parallel ranks: use {fits}")
    return min(config.train.micro_batch or total // ranks, total // ranks)


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


def average(tensors: list[Tensor], ranks: int) -> None:
    """Replace each tensor by its mean over all ranks, in one exchange."""
    if not tensors or ranks == 1:
        return
    flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= ranks
    with torch.no_grad():
        for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(values.view_as(tensor))
