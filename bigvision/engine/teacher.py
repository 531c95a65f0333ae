"""A frozen model beside the one that learns, spread over the ranks as that is, whose outputs its loss gets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

from bigvision.config import Config
from bigvision.data.batch import Batch
from bigvision.engine.parallelize import choose_computing, replicate, shard, wrap_blocks
from bigvision.engine.state import allocate, fill, make_contiguous, model_fragments
from bigvision.errors import UserError
from bigvision.fragments import checksum
from bigvision.models import Blocks, Blueprint
from bigvision.runtime import Runtime


def precision_of_teacher(config: Config) -> Config:
    """*config* as a teacher computes: in bf16 in place of fp8, which would round what is learned from."""
    if config.parallel.precision != "fp8":
        return config
    return replace(config, parallel=replace(config.parallel, precision="bf16", fp8_layers="auto"))


class Teacher:
    """Runs in evaluation mode and without gradients, in the run's precision, but in bf16 where that is fp8. Checkpoints have
    only its fingerprint.

    Under fsdp and zero3 it is sharded block by block with ``fully_shard``; under ddp, zero1 and zero2 each rank has all of it.
    """

    def __init__(self, source: str, blueprint: Blueprint, blocks: Blocks, config: Config, runtime: Runtime) -> None:
        """Give the model of *blueprint*, on meta, its values; called on every rank. *config* is the run's, but for the model.

        Raises `UserError` where its weights cannot be read. *source* is what the user calls it.
        """
        module, parts = blueprint.module, [block.module for block in blocks]
        self.source, self.module, self.image_size = source, module, blueprint.image_size
        self.mean = torch.tensor(blueprint.mean, device=runtime.device)
        self.std = torch.tensor(blueprint.std, device=runtime.device)
        module.requires_grad_(False).eval()
        channels_last = make_contiguous(module)
        config = precision_of_teacher(config)
        self.computing = choose_computing(config, blueprint, blocks, runtime.device, channels_last, 1)
        sharded = config.parallel.strategy in ("fsdp", "zero3") and runtime.world_size > 1
        self.computing.apply([module], parts, not sharded, runtime.device)
        # There is nothing to recompute without a backward pass.
        once = replace(config, parallel=replace(config.parallel, recompute="none"))
        wrap_blocks(parts, once, runtime.device, module, blueprint.input_shape)
        if sharded:
            spread = shard(module, [module], parts, config, self.computing.dtype, runtime)
        else:
            spread = replicate(module, [module], runtime)
        allocate(module, runtime.device)
        if isinstance(module, FSDPModule):
            module._get_fsdp_state()._lazy_init()  # as in `NativeStep`
        fragments = list(model_fragments(spread.tensors(), spread.locate))
        fill(blueprint, config.seed, fragments, [module], runtime.device, restored=False)
        total = torch.zeros((), dtype=torch.int64, device=runtime.device)
        for fragment in fragments:
            if fragment.copy[0] == 0 and fragment.values.numel():
                total += checksum(fragment.values, fragment.start) * (2 * crc32(fragment.name.encode()) + 1)
        dist.all_reduce(total)
        self.fingerprint = f"{int(total) % 2**64:016x}"
        """Of all names and values, the same however they are spread."""

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Any:
        """What it returns for the images of a micro-batch, mixed as the student's are, in its own size."""
        images = batch.inputs(self.mean, self.std, None, self.computing.channels_last)
        if images.shape[-2:] != self.image_size:
            images = F.interpolate(images, self.image_size, mode="bilinear", antialias=True)
        return self.module(images)

    def check(self, known: str | None) -> None:
        """Raise `UserError` where the run that is resumed had a teacher with the fingerprint *known*, and it was another."""
        if known not in (None, self.fingerprint):
            raise UserError(
                f"task.teacher: {self.source} has other weights ({self.fingerprint}) than the teacher of the checkpoint "
                f"({known}): name that one, or start another run with --out"
            )
