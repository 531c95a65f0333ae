"""What a rank's engine holds, and what is predicted."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bigvision.config import Config, load_config
from bigvision.models import blueprint, find_blocks
from bigvision.planning.memory import Memory, rank_memory
from bigvision.planning.profile import Profile, profile
from bigvision.planning.state import Layout


def storages(tensors: Any) -> dict[int, int]:
    """Bytes by the address of each storage."""
    found = {}
    for tensor in tensors:
        local = getattr(tensor, "_local_tensor", tensor)
        found[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return found


def everything() -> int:
    """Bytes of all storages that tensors of this process use."""
    gc.collect()
    kinds = (Tensor, torch.nn.Parameter)
    return sum(storages(t for t in gc.get_objects() if type(t) in kinds and not t.is_meta).values())


def batch_of(plan: Any, engine: Any, samples: int) -> Any:
    """Random images, with targets as the task's data would give them."""
    from bigvision.data import Batch
    from bigvision.planning.profile import example_targets

    task, outputs = engine.task, torch.empty(2, plan.outputs or 10, *plan.image_size)
    targets = example_targets(task, outputs, samples)
    targets = targets.zero_() if isinstance(targets, Tensor) else targets
    images = torch.randint(0, 256, (samples, *plan.input_shape), dtype=torch.uint8)
    ids = torch.arange(samples)
    return Batch(images, targets, ids, torch.ones(samples, dtype=torch.bool))


OUTPUTS = 10
Make = Callable[[], nn.Module] | None
"""Builds a model of the user's; None is timm's of the configuration."""


def profiled(config: Config, make: Make = None) -> Profile:
    """What is counted of a step."""
    if make is None:
        return profile(config, OUTPUTS)
    plan = blueprint(config.model, OUTPUTS, make())
    return profile(config, OUTPUTS, plan=(plan, find_blocks(plan.module, plan.image_size)))


def predicted(plain: dict[str, Any], ranks: int, make: Make = None) -> list[Memory]:
    """What each of *ranks* is predicted to hold."""
    config = load_config(plain)
    layout, counted = Layout.of(config, ranks), profiled(config, make)
    return [rank_memory(counted, config, layout, rank) for rank in range(ranks)]


def held(plain: dict[str, Any], make: Make = None) -> dict[str, int]:
    """Bytes by category that this rank holds after a step. Called on every rank.

    Without the batch and the images made of it. A process's memory is the host's, so "all" has what is offloaded too.
    """
    from bigvision.runtime import start
    from bigvision.training.build import build_model

    config = load_config(plain)
    with start("cpu", config.parallel.replicas, config.parallel.pipeline_ranks) as runtime:
        if config.parallel.strategy.startswith("zero"):
            from bigvision.engine.zero import load_deepspeed

            load_deepspeed(runtime.device)
        before = everything()
        engine, plan, _ = build_model(config, OUTPUTS, runtime, 9, lambda text: None, model=make and make())
        batch = batch_of(plan, engine, config.train.global_batch // runtime.data_ranks)
        del plan  # its recording of the constructor has constants, which the engine does not need
        extra = sum(storages(batch.tensors()).values())
        while engine.train_step(batch).skipped and config.parallel.precision == "fp16":
            pass  # until its loss scale fits
        if engine._buffer is not None:
            extra += engine._buffer.untyped_storage().nbytes()
        stepper = engine.stepper
        inner = stepper.optimizer if hasattr(stepper, "optimizer") else stepper.inner
        kept = [value for state in (*inner.state.values(), *inner.param_groups) for value in state.values()]
        found = {
            "all": everything() - before - extra,
            "optimizer": sum(storages(value for value in kept if isinstance(value, Tensor)).values()),
            "ema": sum(storages([engine.ema.updates, *(f.values for f in engine.ema.fragments())]).values())
            if engine.ema
            else 0,
        }
        if getattr(getattr(engine, "forward", None), "find_unused_parameters", False):
            # DistributedDataParallel's map is no object of Python's; the host has one as large.
            found["all"] += 2 * engine.forward.reducer._get_local_used_map().nbytes
        engine.close()
        return found


def one_of_many(plain: dict[str, Any], rank: int, ranks: int) -> dict[str, int]:
    """What *rank* of *ranks* holds, of which the others are torch's fake process group."""
    import os
    from unittest.mock import patch

    import torch.distributed as dist
    from torch._C._distributed_c10d import FakeProcessGroup  # type: ignore[attr-defined]
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        with patch.object(FakeProcessGroup, "_set_default_timeout", lambda group, timeout: None, create=True):
            return held(plain)
    finally:
        dist.destroy_process_group()
