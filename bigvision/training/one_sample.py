"""Micro-batches of one sample, over which BatchNorm cannot take statistics: found before anything is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bigvision.config import Config, check_batches, micro_batch
from bigvision.engine.state import is_frozen
from bigvision.errors import UserError, either
from bigvision.models import Blueprint
from bigvision.runtime import Runtime
from bigvision.training.memory import with_micro_batch


def check_one_sample(config: Config, blueprint: Blueprint, runtime: Runtime) -> None:
    """Raise `UserError` where a step has a micro-batch of one sample and the model, on meta, cannot train on one."""
    ranks = runtime.data_ranks
    share = config.train.global_batch // ranks
    size = micro_batch(config, ranks, runtime.pipeline_ranks)
    if not _has_one(share, size) or (config.model.sync_batchnorm and ranks > 1):
        return
    norm = refusing_norm(blueprint.module, blueprint.input_shape)
    if norm is None:
        return
    why = f"{norm} would take its statistics over a single value of each channel"
    if share == 1:
        raise UserError(
            f"train.global_batch: {config.train.global_batch} gives each of {ranks} data-parallel ranks one sample, and {why}: "
            f"use at least {2 * ranks}, or fewer ranks"
        )
    fits = [other for other in range(2, share + 1) if not _has_one(share, other) and _allowed(config, other, runtime)]
    below, above = [n for n in fits if n < size][-1:], [n for n in fits if n > size][:1]
    advice = f"use {either([str(n) for n in below + above])}" if fits else "change train.global_batch"
    if (count := config.parallel.microbatches) is not None:
        asked, advice = f"parallel.microbatches: {count}", f"use at most {share // 2}"
    else:
        asked = f"train.micro_batch: {'null' if config.train.micro_batch is None else config.train.micro_batch}"
    raise UserError(f"{asked} cuts the {share} samples of a rank so that one is alone, and {why}: {advice}")


def refusing_norm(module: nn.Module, shape: tuple[int, int, int]) -> str | None:
    """The path of the norm that refuses to train on a single image of *shape*; None where *module*, on meta, can."""
    modes = {part: part.training for part in module.modules()}
    entered: list[str] = []

    def enter(path: str) -> Any:
        return lambda part, inputs: entered.append(path)

    hooks = [part.register_forward_pre_hook(enter(path)) for path, part in module.named_modules()]
    try:
        for part in modes:
            part.training = not is_frozen(part)
        with torch.no_grad():
            module(torch.empty(1, *shape, device="meta"))
    except Exception as error:  # a model of the user's may not run on meta at all
        return entered[-1] if "more than 1 value per channel" in str(error) else None
    finally:
        for hook in hooks:
            hook.remove()
        for part, mode in modes.items():
            part.training = mode
    return None


def _has_one(share: int, size: int) -> bool:
    """Whether one of the micro-batches of *share* samples has a single one."""
    return size == 1 or share % size == 1


def _allowed(config: Config, size: int, runtime: Runtime) -> bool:
    try:
        check_batches(with_micro_batch(config, size), runtime.data_ranks, runtime.pipeline_ranks)
    except UserError:
        return False
    return True
