"""Evaluation over all ranks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from bigvision import checkpoint
from bigvision.config import Config
from bigvision.engine import micro_batch
from bigvision.runtime import Runtime, identify, start
from bigvision.training.build import Build, build_model, restore_model, without_weights
from bigvision.training.data import open_data, validation_batches


def evaluate(config: Config, run: Build, runtime: Runtime) -> dict[str, float]:
    """Return the mean metrics over the validation data: each sample once, whatever the number of ranks."""
    run.engine.synchronize()
    batches = validation_batches(config, run.data, run.blueprint, runtime, micro_batch(config, runtime.world_size))
    try:
        total = None
        for batch in batches:
            metrics = run.engine.eval_step(batch)
            total = metrics if total is None else total + metrics
    finally:
        batches.close()
    assert total is not None
    assert int(total.count) == len(run.data.val)
    return total.means()


def evaluate_checkpoint(folder: Path, config: Config) -> dict[str, float]:
    """Return the validation metrics of a step folder under *config*'s strategy. Run on every rank.

    Raises:
        UserError: the folder is not a valid checkpoint or is of another model.
    """
    # Neither the replicas nor the global batch of the run need fit the ranks that evaluate it.
    ranks = identify(os.environ).world_size
    replicas = config.parallel.replicas if ranks % config.parallel.replicas == 0 else 1
    whole = -(-config.train.global_batch // ranks) * ranks
    config = replace(
        without_weights(config),
        # There is no step to take.
        parallel=replace(config.parallel, replicas=replicas, offload="none", deepspeed=None),
        train=replace(config.train, global_batch=whole),
    )
    with start(config.parallel.device, replicas) as runtime:
        found = checkpoint.open_checkpoint(folder, config.checkpoint.verify, "checkpoint")
        data = open_data(config, runtime)
        engine, blueprint, card = build_model(config, data.num_classes, runtime, steps=1, say=lambda text: None)
        try:
            restore_model(found, engine)
            return evaluate(config, Build(engine, data, blueprint, card, 1, {}), runtime)
        finally:
            engine.close()
