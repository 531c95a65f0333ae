"""DeepSpeed ZeRO: optimizer state, then gradients too, then parameters too, sharded over the ranks."""

from __future__ import annotations

import copy
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bigvision.config import Config, deepspeed_settings
from bigvision.engine.engine import Engine
from bigvision.engine.parallelize import make_offload, wrap_blocks
from bigvision.engine.state import Statistics, allocate, fill
from bigvision.engine.step import reduce_with
from bigvision.errors import UserError
from bigvision.fragments import Fragment
from bigvision.models import Blueprint, formats
from bigvision.optim import build_optimizer, parameter_groups, state_layout
from bigvision.ranges import OPTIMIZER, REDUCE, mark
from bigvision.runtime import Runtime


class ZeroEngine(Engine):
    """ZeRO stages 1 to 3 (Rajbhandari et al. 2020) and ZeRO-Offload (Ren et al. 2021) through ``deepspeed.initialize``.

    DeepSpeed holds, gathers and reduces tensors, clips and steps; the parameter groups, the learning rate, the number of
    micro-batches in a step and all that is saved are ours. Its own checkpoints are never written or read.
    """

    def _build(self, blueprint: Blueprint, blocks: list[nn.Module]) -> None:
        # Autocast, if any, inside the model: DeepSpeed switches off one under which it is entered.
        self.computing.apply(self.parts, blocks, True, self.runtime.device)
        device, hooks = self.runtime.device, (_pack, _unpack) if self.config.parallel.strategy == "zero3" else None
        offload = make_offload(self.config, device, hooks)
        self.notes += wrap_blocks(blocks, self.config, device, self.module, self.input_shape, self.branches, offload)
        self.stepper = ZeroStep(self.module, blocks, blueprint, self.config, self.runtime, self.restoring)
        self.forward = self.stepper.forward


class ZeroStep:
    """DeepSpeed's step, and what this rank holds of its state. It waits for the device where DeepSpeed does."""

    def __init__(
        self, module: nn.Module, blocks: list[nn.Module], blueprint: Blueprint, config: Config, runtime: Runtime, restored: bool
    ) -> None:  # fmt: skip
        self.module, self.config, self.runtime = module, config, runtime
        deepspeed = load_deepspeed(runtime.device)
        parallel = config.parallel
        self.weights_sharded = parallel.strategy == "zero3"
        dtype = formats.COMPUTE_DTYPES[parallel.precision]
        largest = max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)
        total = sum(p.numel() for p in module.parameters())
        settings = deepspeed_settings(config, runtime.world_size, runtime.device.type, total, largest)
        # Now, while every parameter has its shape.
        groups = parameter_groups(module, config.optim.weight_decay, config.optim.layer_decay, rules=config.optim.groups)
        saved_as = {name: parameter.dtype for name, parameter in module.named_parameters()}
        for parameter in module.parameters():
            # What is frozen and held in bf16 stays so where fp32 is computed in: the model's modules read it as fp32.
            if parameter.requires_grad or dtype.itemsize <= parameter.dtype.itemsize:
                parameter.data = parameter.data.to(dtype)
        if self.weights_sharded:
            # Each parameter is sharded as soon as it is allocated, so that no rank ever holds two whole ones.
            initializer = deepspeed.zero.Init(config_dict_or_path=settings, dtype=dtype)

            def shard(parameter: nn.Parameter) -> None:
                initializer._convert_to_deepspeed_param(parameter)
                parameter.partition()  # type: ignore[attr-defined]

            allocate(module, runtime.device, shard)
        else:
            allocate(module, runtime.device)
        named = dict(module.named_parameters())
        for group in groups:
            group["params"] = [named[name] for name in group["names"]]
        self.inner: Any = build_optimizer(groups, config.optim, on_cpu=parallel.offloads_state)
        # Every rank fills its own tensors; what rank 0 would send has no values yet, and DeepSpeed cannot send 0-D ones.
        with patch.object(deepspeed.DeepSpeedEngine, "_broadcast_model", lambda self: None):
            wrapped: Any = deepspeed.initialize(model=module, optimizer=self.inner, config=settings, dist_init_required=False)
        self.deepspeed, self.sharded = wrapped[:2]
        if scaler := self._scaler():
            # How often a step may be skipped at the least scale is decided as in every other format.
            scaler.raise_error_at_min_scale = False
        self.names = {id(p): name for name, p in module.named_parameters()}
        # DeepSpeed keeps fp32 values of what it trains only: of what is frozen and saved in another format than it computes in,
        # each rank keeps a share in host memory.
        self.frozen = {
            name: torch.empty(self._share(p)[1], dtype=saved_as[name])
            for name, p in named.items()
            if not p.requires_grad and p.dtype != saved_as[name]
        }
        self.cpu_adam = hasattr(self.inner, "ds_opt_adam")
        self.state_keys = tuple(state_layout(config.optim, (1, 1)))
        counts_steps = config.optim.name == "adamw"  # sgd and lion do not
        # The state that the optimizer would create at its first step, so that it can be saved and restored before.
        for flat in self._flats():
            state = self.inner.state[flat]
            state.update({key: torch.zeros_like(flat, requires_grad=False) for key in self.state_keys})
            if counts_steps:
                state["step"] = 0 if self.cpu_adam else torch.zeros((), device=flat.device)
        if not self.weights_sharded:
            self.sharded._lazy_init_hp_params_optimizer_state()
        fill(blueprint, config.seed, self.model_fragments(), [module], runtime.device, restored)
        self.statistics = Statistics([module], runtime.device)
        self.finite = torch.ones((), dtype=torch.bool, device=runtime.device)
        if not restored:
            self.refresh()

    # The step.

    def forward(self, images: Tensor) -> Any:
        with saved_tensors_hooks(_pack, _unpack) if self.weights_sharded else nullcontext():
            return self.deepspeed(images)

    def around(self, last: bool) -> AbstractContextManager[object]:
        self.deepspeed.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor, factor: Tensor | float) -> None:
        # DeepSpeed skips a step by its gradients alone; with this factor whatever is not finite makes them so too.
        whole = torch.isfinite(loss.detach()) & torch.isfinite(self.statistics.largest())
        self.finite = self.finite & whole
        self.deepspeed.backward(loss * torch.where(whole, factor, math.nan), scale_wrt_gas=False)

    def update(self, loss_sum: Tensor, weight: Tensor | int, lr: float, requests: frozenset[str]) -> Tensor:
        for group in self.inner.param_groups:
            group["lr"] = lr * group["lr_scale"]
        scaler = self._scaler()
        before = copy.copy(vars(scaler)) if scaler is not None else {}
        may_fall = scaler is not None and scaler.cur_scale > scaler.min_scale
        with mark(OPTIMIZER):
            self.deepspeed.step()
        with mark(REDUCE):
            totals = reduce_with(requests, torch.stack([loss_sum, (~self.finite).double()]))
        self.finite = torch.ones_like(self.finite)
        norm = self.deepspeed.get_global_grad_norm()
        skipped, overflowed = not self.deepspeed.was_step_applied(), False
        if skipped:
            self.statistics.restore(torch.ones_like(self.finite))
            nonfinite = bool(totals[1])
            overflowed = may_fall and not nonfinite
            if nonfinite and scaler is not None:  # no overflow: the loss does not depend on the scale, which stays as it was
                vars(scaler).update(before)
        # Filled on the device: a copy from the host would wait for the optimizer's kernels.
        known = [
            value if isinstance(value, Tensor) else torch.full_like(loss_sum, value) for value in (norm, skipped, overflowed)
        ]
        return torch.cat([torch.stack([totals[0] / weight, *(value.to(loss_sum) for value in known)]), totals[2:]])

    # The state.

    def model_fragments(self) -> Iterator[Fragment]:
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if isinstance(tensor, nn.Parameter):
                values, start = self._run(tensor, None)
                yield Fragment("model", name, whole_shape(tensor), start, values, (0, 1))
            else:
                copy = (self.runtime.rank, self.runtime.world_size)
                yield Fragment("model", name, tuple(tensor.shape), 0, tensor.view(-1), copy)

    def copies(self) -> Iterator[Fragment]:
        # What computes is a whole copy on each rank, brought up to date from the masters after each step.
        copy = (self.runtime.rank, self.runtime.world_size)
        whole = self.sharded.persistent_parameters if self.weights_sharded else list(self.module.parameters())
        if self.runtime.world_size > 1:
            for parameter in whole:
                name = self.names[id(parameter)]
                yield Fragment("computing", name, whole_shape(parameter), 0, parameter.detach().view(-1), copy)

    def optimizer_fragments(self) -> Iterator[Fragment]:
        for parameter in self.module.parameters():
            for key in self.state_keys if parameter.requires_grad else ():
                values, start = self._run(parameter, key)
                yield Fragment("optimizer", f"{self.names[id(parameter)]}/{key}", whole_shape(parameter), start, values, (0, 1))

    def _share(self, parameter: nn.Parameter) -> tuple[int, int]:
        """(start, length) of this rank's share of a parameter: as ZeRO-3 cuts it."""
        numel = math.prod(whole_shape(parameter))
        size = -(-numel // self.runtime.world_size)
        start = min(size * self.runtime.rank, numel)
        return start, min(size, numel - start)

    def _run(self, parameter: nn.Parameter, key: str | None) -> tuple[Tensor, int]:
        """This rank's values of a parameter (*key* None) or of its optimizer state, and their start in the whole.

        They are fp32, but of a frozen parameter as it is saved.
        """
        start, length = self._share(parameter)
        if not parameter.requires_grad:
            share = self.frozen.get(self.names[id(parameter)])
            return self._computing_share(parameter) if share is None else share, start
        if self.weights_sharded:
            # The last ranks' pieces are padded to the size of the others'.
            group, offset, _ = self.sharded.grad_position[self.sharded.get_param_id(parameter)]
            flat = self.sharded.fp32_partitioned_groups_flat[group]
            flat = flat if key is None else self.inner.state[flat][key]
            return flat.detach()[offset : offset + length], start
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return torch.empty(0, device=self.runtime.device), 0
        return mapping.get_hp_fragment(key).detach(), mapping.lp_fragment_address.start

    def _computing_share(self, parameter: nn.Parameter) -> Tensor:
        """This rank's share of the values that the model computes with."""
        start, length = self._share(parameter)
        if self.weights_sharded:
            return parameter.ds_tensor.data.view(-1)[:length]  # type: ignore[attr-defined]
        return parameter.data.view(-1)[start : start + length]

    def _flats(self) -> list[Tensor]:
        """The fp32 tensors that the optimizer steps: this rank's pieces of many parameters, one behind the other."""
        if self.weights_sharded:
            return self.sharded.fp32_partitioned_groups_flat
        return [flat for group in self.inner.param_groups for flat in group["params"]]

    def refresh(self) -> None:
        """Bring the parameters that the model computes with up to date with what is saved."""
        for parameter in (p for p in self.module.parameters() if not p.requires_grad):
            share, _ = self._run(parameter, None)
            if self.weights_sharded:
                self._computing_share(parameter).copy_(share)
                continue
            numel, ranks = parameter.numel(), self.runtime.world_size
            mine = parameter.new_zeros(-(-numel // ranks))
            mine[: share.numel()].copy_(share)
            whole = [torch.empty_like(mine) for _ in range(ranks)]
            dist.all_gather(whole, mine)
            parameter.data.copy_(torch.cat(whole)[:numel].view_as(parameter))
        if not self.weights_sharded:
            self.sharded.update_lp_params()
            return
        self.sharded._partition_all_parameters()
        for group in range(len(self.sharded.fp16_groups)):
            self.sharded._reassign_or_swap_out_partitioned_parameters(group)
        if kept_whole := self.sharded.persistent_parameters:
            kept_whole[0].all_gather(kept_whole)

    def _scaler(self) -> Any:
        """DeepSpeed's loss scale, where it changes (fp16)."""
        scaler = getattr(self.sharded, "loss_scaler", None)
        return scaler if scaler is not None and scaler.dynamic else None

    def scalars(self) -> dict[str, Any]:
        state, scaler = self.inner.state[self._flats()[0]], self._scaler()
        stable = scaler.cur_iter - scaler.last_overflow_iter - 1 if scaler else 0
        return {
            "optimizer_steps": int(state["step"]) if "step" in state else None,
            "loss_scale": scaler.cur_scale if scaler else None,
            # DeepSpeed doubles the scale at the step after this many, and counts on.
            "good_steps": (stable - 1) % scaler.scale_window if scaler and stable else 0,
            "deepspeed": {"stable_steps": stable, "hysteresis": scaler.cur_hysteresis} if scaler else None,
        }

    def restored(self, scalars: dict[str, Any]) -> None:
        steps, scaler = scalars["optimizer_steps"], self._scaler()
        for flat in self._flats():
            state = self.inner.state[flat]
            if "step" in state:
                state["step"] = steps if self.cpu_adam else state["step"].fill_(steps)
        if self.cpu_adam:
            # It multiplies up the powers of its decay rates step by step; computed at once they differ in the last bit.
            nothing, group = [torch.zeros(1) for _ in range(4)], self.inner.param_groups[0]
            settings = (*group["betas"], group["eps"], 0.0, group["bias_correction"])
            for one in range(1, steps + 1):
                self.inner.ds_opt_adam.adam_update(self.inner.opt_id, one, 0.0, *settings, *nothing)
        if scaler and scalars["loss_scale"] is not None:
            # Another strategy counts only the good steps.
            own = scalars.get("deepspeed") or {"stable_steps": scalars["good_steps"] + 1, "hysteresis": scaler.delayed_shift}
            scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = scalars["loss_scale"], own["stable_steps"], -1
            scaler.cur_hysteresis = own["hysteresis"]
        self.deepspeed.global_steps = self.deepspeed.micro_steps = scalars["step"]
        self.deepspeed.global_samples = scalars["samples"]

    def close(self) -> None:
        """Undo the hooks that hold the model and the optimizer for as long as the process lives, or empty what they hold."""
        from deepspeed.runtime.zero import parameter_offload

        self.deepspeed.destroy()
        self.deepspeed.optimizer = None
        vars(self.sharded).clear()
        self.inner.state.clear()
        self.inner.param_groups.clear()
        for parameter in self.module.parameters():
            parameter.data, parameter.grad = parameter.data.new_empty(0), None
            vars(parameter).pop("ds_tensor", None)
        parameter_offload.FWD_MODULE_STACK.clear()


def _pack(tensor: Tensor) -> Any:
    """What autograd keeps of a gathered parameter or of a view of one: which view it is.

    A convolution saves its weight, and a linear layer its transposed weight, whose values would stay gathered from the forward
    pass to the backward one.
    """
    whole = tensor if hasattr(tensor, "ds_id") else tensor._base
    if whole is None or not hasattr(whole, "ds_id"):
        # Detached: an operation that keeps its own result would keep itself alive until a backward pass, which never comes
        # where the forward pass runs out of memory.
        return tensor.detach()
    return whole, tensor.shape, tensor.stride(), tensor.storage_offset() - whole.storage_offset()


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    whole, shape, stride, offset = kept
    return whole.data.as_strided(shape, stride, whole.data.storage_offset() + offset)


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, also where this rank holds only a piece."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


# DeepSpeed as a library.


def load_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for *device*, with its log at warnings and without what an earlier run in this process left."""
    os.environ["DS_ACCELERATOR"] = device.type
    # What it says of compilers and CUDA is said by check_cpu_adam, in one line, where it matters.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    from deepspeed.utils import groups
    from timm.optim import Lion

    accelerator: Any = get_accelerator()
    counted: Any = parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls them by names that newer releases of torch replace.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", rf"`torch\.distributed\.{name}` is deprecated", FutureWarning)
    # It warns of those that it has not tested; tests/engine has.
    ZERO_SUPPORTED_OPTIMIZERS.extend({torch.optim.SGD, Lion} - set(ZERO_SUPPORTED_OPTIMIZERS))
    groups._release_process_group_references()
    deepspeed.comm.comm.cdb = None
    # Ranks compare these counters, and need not have run the same before.
    deepspeed.zero.Init.param_id = 0
    counted.__defaults__[0][0] = 0
    parameter_offload.FWD_MODULE_STACK.clear()  # every model of stage 3 so far
    if device.type == "cpu":
        # It asks for matrix instructions that few processors have; torch computes fp16 on every one.
        accelerator.is_fp16_supported = lambda: True
        # A library for inference that it would else compile first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(accelerator.communication_backend_name(), dist_init_required=False)
    return deepspeed


def check_cpu_adam(device: torch.device) -> None:
    """Compile DeepSpeed's CPU Adam, or find it compiled in torch's cache; raises `UserError` without a working compiler."""
    deepspeed = load_deepspeed(device)
    # DeepSpeed requires the package ninja; the folder of its program is on PATH only in an activated environment.
    os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))
    try:
        deepspeed.ops.op_builder.CPUAdamBuilder().load(verbose=False)
    except (Exception, SystemExit) as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        cause = next((line for line in said if re.search(r"not found|error:|required", line)), said[0])[:200]
        raise UserError(
            "parallel.offload: the optimizer's step on the CPU is compiled once, and here it cannot be "
            f"({cause}): install a C++ compiler (g++) and ninja, or use parallel.offload none"
        ) from None
