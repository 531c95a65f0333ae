"""The training steps that bigvision's is measured against: what one would write without it, for the same work.

Every peer takes uint8 images and labels on the device, normalises, runs one forward and backward pass, sets the rate of a
cosine schedule, clips the norm of the whole gradient, steps AdamW and returns the loss of its own samples. Weights start equal
for equal seeds, so the first losses of all sides must agree: check that before believing a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Optimizer

Step = Callable[[Tensor, Tensor], Tensor]
"""(uint8 images (B, 3, H, W), int64 labels (B,)) on the device → the loss, 0-D."""


@dataclass(frozen=True)
class Work:
    """What every side does."""

    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    fused: bool = True
    """AdamW's fused kernel; false takes the foreach one."""
    clip: float = 1.0
    warmup: int = 50
    steps: int = 1000
    precision: str = "fp32"
    """fp32 or bf16; master weights are fp32."""


def vit(seed: int = 0, depth: int = 12, image_size: int = 32, classes: int = 10) -> nn.Module:
    """A ViT-Ti for small images: 192 wide, 64 tokens and a class token for 32 pixels."""
    torch.manual_seed(seed)
    name = "vit_tiny_patch16_224"
    return timm.create_model(name, patch_size=4, depth=depth, img_size=image_size, num_classes=classes).train()


def batch(size: int, seed: int = 0, image_size: int = 32, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Random images and labels; each rank takes its own seed."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, image_size, image_size), dtype=torch.uint8, generator=draw)
    return images, torch.randint(0, classes, (size,), generator=draw)


def hand_written(
    model: nn.Module, work: Work, device: torch.device, compiled: Iterable[nn.Module] = (), channels_last: bool = False
) -> Step:
    """A loop in plain PyTorch, in `DistributedDataParallel` on several ranks.

    Args:
        compiled: the submodules that are compiled, each in place.
        channels_last: put weights and images into that memory format.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.to(device).to(memory_format=layout)
    normalize, optimizer, rate = _normalizer(model, device), adamw(model, work), _rates(work)
    parameters = list(model.parameters())
    for module in compiled:
        module.compile()
    forward: nn.Module = model
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        forward = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with _autocast(work, device):
            outputs = forward(normalize(images.contiguous(memory_format=layout)))
        loss = F.cross_entropy(outputs.float(), labels)
        loss.backward()
        clip_grad_norm_(parameters, work.clip)
        _set_rate(optimizer, rate())
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def plain_fully_shard(
    model: nn.Module, units: Iterable[nn.Module], work: Work, device: torch.device, compiled: bool = False
) -> Step:
    """``fully_shard`` on each unit and on the root, over all ranks, and the same loop; the units are *compiled* or not."""
    normalize = _normalizer(model, device)
    model.to(device)
    policy = MixedPrecisionPolicy(None if work.precision == "fp32" else torch.bfloat16, torch.float32)
    for unit in units:
        if compiled:
            unit.compile()
        fully_shard(unit, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer, rate = adamw(model, work), _rates(work)
    parameters = list(model.parameters())

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(model(normalize(images)).float(), labels)
        loss.backward()
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        clip_grads_with_norm_(parameters, work.clip, norm.full_tensor() if isinstance(norm, DTensor) else norm)
        _set_rate(optimizer, rate())
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def plain_deepspeed(model: nn.Module, settings: dict[str, Any], work: Work, device: torch.device) -> Step:
    """The loop of DeepSpeed's documentation over ``deepspeed.initialize``, with our optimizer and rates."""
    import deepspeed

    normalize, rate = _normalizer(model, device), _rates(work)
    # The throughput timer is DeepSpeed's default.
    told = {name: value for name, value in settings.items() if name != "timers"}
    wrapped: Any = deepspeed.initialize(model=model, optimizer=adamw(model, work), config=told, dist_init_required=False)
    engine = wrapped[0]
    # Its weights are in the compute type, and it leaves the inputs as they are.
    dtype = torch.bfloat16 if work.precision == "bf16" else torch.float32

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(engine(normalize(images).to(dtype)).float(), labels)
        engine.backward(loss)
        _set_rate(engine.optimizer, rate())
        engine.step()
        return loss.detach()

    return step


def accelerate_loop(model: nn.Module, work: Work, device: torch.device, units: str = "Block") -> Step:
    """The loop of Accelerate's documentation: DDP on CPU ranks (it has no FSDP there), FSDP2 around *units* on several GPUs.

    Creating an Accelerator may change torch's number of threads: set it afterwards.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    normalize, rate = _normalizer(model, device), _rates(work)
    plugin = None
    if device.type == "cuda" and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[units],
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
        )
    precision = "no" if work.precision == "fp32" else work.precision
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision, fsdp_plugin=plugin)
    model, optimizer = accelerator.prepare(model, adamw(model, work))
    parameters = list(model.parameters())

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(model(normalize(images)).float(), labels)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, work.clip)
        _set_rate(optimizer, rate())
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _normalizer(model: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    card: Any = model.pretrained_cfg
    mean, std = (torch.tensor(card[key], device=device).mul_(255).view(-1, 1, 1) for key in ("mean", "std"))
    return lambda images: images.float().sub_(mean).div_(std)


def adamw(model: nn.Module, work: Work) -> AdamW:
    exempt: Any = getattr(model, "no_weight_decay", set)
    groups = param_groups_weight_decay(model, work.weight_decay, no_weight_decay_list=exempt())
    return AdamW(groups, lr=work.lr, betas=work.betas, fused=work.fused, foreach=not work.fused)


def _rates(work: Work) -> Callable[[], float]:
    """Each call gives the next step's rate: linear warm-up from 0, then cosine towards 0."""
    step = -1

    def rate() -> float:
        nonlocal step
        step += 1
        if step + 1 < work.warmup:
            return work.lr * (step + 1) / work.warmup
        progress = min(1.0, max(0, step - work.warmup) / max(1, work.steps - work.warmup))
        return work.lr * 0.5 * (1 + math.cos(math.pi * progress))

    return rate


def _set_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _autocast(work: Work, device: torch.device) -> torch.autocast | nullcontext[None]:
    return nullcontext() if work.precision == "fp32" else torch.autocast(device.type, torch.bfloat16)
