"""Evaluation over all ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bigvision import checkpoint
from bigvision.config import Config
from bigvision.engine import Engine, Metrics
from bigvision.errors import UserError
from bigvision.models import Blueprint
from bigvision.runtime import Runtime, Watchdog, collective_timeout, deterministic, identify, start, warn_of_shared_memory
from bigvision.training.build import build_model, restore_model, without_weights
from bigvision.training.data import Data, Validation, open_data, open_validation


def evaluate(
    config: Config, engine: Engine, data: Data, blueprint: Blueprint, runtime: Runtime, watch: Watchdog,
    wishes: Callable[[], frozenset[str]] = frozenset, stop: Callable[[set[str]], bool] = lambda requests: False,
) -> dict[str, float] | None:  # fmt: skip
    """Return the mean metrics over the validation data: each sample once, whatever the number of ranks.

    Args:
        wishes: what this rank asks the others for, before each batch.
        stop: called with what any rank asked for with the batch before the last; where it returns True the evaluation is
            broken off, and None is returned.
    """
    watch.beat("evaluate", engine.step)
    engine.synchronize()
    before: Metrics | None = None
    batches = Validation(config, data, blueprint, runtime, engine.eval_batch)
    try:
        total = None
        for batch in batches:
            watch.waits_for_data(False)
            engine.requests = wishes()
            metrics = engine.eval_step(batch)
            total = metrics if total is None else total + metrics
            # Of the batch before, whose numbers arrive while this one runs.
            if before is not None and stop(before.requests):
                return None
            before = metrics
            watch.beat("evaluate", engine.step)
        unreadable = batches.finish()
    finally:
        batches.close()
    if total is None or int(total.count) + unreadable != len(data.val):
        counted = 0 if total is None else int(total.count)
        raise RuntimeError(f"data.val: {counted} samples were measured and {unreadable} unreadable, of {len(data.val)}")
    if not total.count:
        raise UserError(f"data.val: none of its samples can be read, {data.bad.example}; check the path and the files")
    return total.means()


def evaluate_checkpoint(
    folder: Path, config: Config, say: Callable[[str], None] = lambda text: None
) -> dict[str, float]:  # fmt: skip
    """Return the validation metrics of a step folder under *config*'s strategy. Run on every rank.

    Args:
        say: told where /dev/shm is small for NCCL.

    Raises:
        UserError: the folder is not a valid checkpoint or is of another model; or ``train.deterministic`` and an operation
            without a deterministic form.
    """
    config = _for_ranks(without_weights(config), identify(os.environ).world_size)
    parallel, timeout = config.parallel, collective_timeout(config.limits)
    with (
        deterministic(config.train.deterministic, parallel.device),
        Watchdog(config.limits) as watch,
        start(parallel.device, parallel.replicas, parallel.pipeline_ranks, timeout) as runtime,
        watch.naming(),
    ):
        warn_of_shared_memory(runtime, say)
        found = checkpoint.open_checkpoint(folder, config.checkpoint.verify, "checkpoint")
        classes = found.card.get("label_names")
        # Earlier versions saved no class names: theirs are those of the training data.
        data = open_validation(config, runtime, classes) if isinstance(classes, list) else open_data(config, runtime)
        engine, blueprint, _ = build_model(
            config, data.num_classes, runtime, steps=1, say=lambda text: None, channels=data.val.channels, restored=True,
            trains=False,
        )  # fmt: skip
        try:
            restore_model(found, engine)
            metrics = evaluate(config, engine, data, blueprint, runtime, watch)
            assert metrics is not None
            return metrics
        finally:
            engine.close()


def _for_ranks(config: Config, ranks: int) -> Config:
    """*config* for an evaluation: what of the run's layout does not fit so many ranks is left out, as is what a step needs."""
    parallel = replace(
        config.parallel, offload="none", deepspeed=None, schedule="1f1b", stages_per_rank=None, microbatches=None
    )  # fmt: skip
    if parallel.strategy == "pipeline" and (ranks == 1 or ranks % (parallel.stages or ranks)):
        parallel = replace(parallel, strategy="fsdp", stages=None)
    if ranks // (parallel.pipeline_ranks or ranks) % parallel.replicas:
        parallel = replace(parallel, replicas=1)
    whole = -(-config.train.global_batch // ranks) * ranks
    return replace(config, parallel=parallel, train=replace(config.train, global_batch=whole))
