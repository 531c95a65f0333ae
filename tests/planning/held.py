"""What a rank's engine really holds, for comparison with what is predicted."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor


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


def held_and_predicted(plain: dict[str, Any], outputs: int = 10) -> dict[str, Any]:
    """After two steps: bytes by category that this rank holds, and those that are predicted. Called on every rank."""
    from bigvision.config import load_config
    from bigvision.planning.memory import Layout, rank_memory
    from bigvision.planning.profile import profile
    from bigvision.runtime import start
    from bigvision.training.build import build_model

    config = load_config(plain)
    with start("cpu", config.parallel.replicas, config.parallel.pipeline_ranks) as runtime:
        predicted = rank_memory(profile(config, outputs), config, Layout.of(config, runtime.world_size), runtime.rank)
        if config.parallel.strategy.startswith("zero"):
            from bigvision.engine.zero import load_deepspeed

            load_deepspeed(runtime.device)
        before = everything()
        engine, plan, _ = build_model(config, outputs, runtime, 9, say=lambda text: None)
        batch = batch_of(plan, engine, config.train.global_batch // runtime.data_ranks)
        extra = sum(storages(batch.tensors()).values())
        for _ in range(2):
            engine.train_step(batch)
        if engine._buffer is not None:
            extra += engine._buffer.untyped_storage().nbytes()
        stepper = engine.stepper
        inner = stepper.optimizer if hasattr(stepper, "optimizer") else stepper.inner
        found = {
            "optimizer": sum(storages(v for s in inner.state.values() for v in s.values() if isinstance(v, Tensor)).values()),
            "ema": sum(storages(f.values for f in engine.ema.fragments()).values()) + 8 if engine.ema else 0,
            "all": everything() - before - extra,
        }
        result = {"found": found, "predicted": {**vars(predicted), "state": predicted.state}, "rank": runtime.rank}
        engine.close()
        return result
