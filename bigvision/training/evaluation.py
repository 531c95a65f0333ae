"""A model that is evaluated or predicts: a checkpoint's or timm's, under any strategy, without an optimizer's memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console

from bigvision import checkpoint
from bigvision.config import Config, without_auto
from bigvision.engine import Engine
from bigvision.errors import UserError
from bigvision.models import Blueprint, check_model, classifier_layers
from bigvision.monitor import Display
from bigvision.runtime import (
    Runtime,
    Watchdog,
    all_or_none,
    collective_timeout,
    deterministic,
    gather_rows,
    identify,
    start,
    warn_of_shared_memory,
)
from bigvision.tasks import Features, Share, Task, build_task
from bigvision.training.build import build_model, without_weights
from bigvision.training.data import Data, Validation, open_data, open_validation
from bigvision.training.trainer import evaluate

Say = Callable[[str], None]
Opener = Callable[[Config, Runtime, Task, list[str] | None], Data]
"""Opens data for a model of these classes; None where nobody knows them."""


@dataclass(frozen=True)
class Ready:
    """A model with its weights, and data for it."""

    config: Config
    engine: Engine
    data: Data
    blueprint: Blueprint
    runtime: Runtime
    watch: Watchdog
    display: Display

    def evaluate(self, report: dict[str, Any] | None = None) -> dict[str, float]:
        """The mean metrics over the validation data; of a task that learns nothing, what it makes of the features of both.

        *report* gets what the task says beyond them.
        """
        if not (task := self.engine.task).learns:
            train, val = self.features("train"), self.features("val")
            runtime = self.runtime
            share = Share(
                runtime.rank, runtime.world_size, runtime.device, dist.all_reduce,
                lambda: self.watch.beat("evaluate", self.engine.step),
            )  # fmt: skip
            found = task.compare(train, val, len(self.data.train.classes), share)
            if report is not None:
                report |= {"metrics": found}
            return found
        metrics = evaluate(
            self.config, self.engine, self.data, self.blueprint, self.runtime, self.watch, report=report,
            track=lambda batches, total: self.display.batches("evaluation", batches, total),
        )  # fmt: skip
        assert metrics is not None
        return metrics

    def features(self, split: Literal["train", "val"]) -> Features:
        """What the model returns for all samples of a *split* that can be read, in their order, on every rank."""
        engine, mine = self.engine, [torch.empty(0, 0)]
        places: list[tuple[int, Any]] = []
        batches = Validation(self.config, self.data, self.blueprint, self.runtime, engine.eval_batch, split)
        try:
            for batch in self.display.batches(f"features of data.{split}", batches, batches.number):
                self.watch.waits_for_data(False)
                scores = engine.predict_step(batch)
                if batch.targets.ndim != 1:
                    raise UserError(
                        f"data.{split}: {self.config.task.name} needs one class for each image, not shares of classes"
                    )
                if scores:
                    mine.append(torch.cat(scores).cpu()[batch.valid])
                    places += zip(batch.ids[batch.valid].tolist(), batch.targets[batch.valid].tolist())
                self.watch.beat("evaluate", engine.step)
            batches.finish()
        finally:
            batches.close()
        values = gather_rows(torch.cat(mine[1:] or mine))
        labels = gather_rows(torch.tensor(places, dtype=torch.float64).reshape(-1, 2))
        if not len(labels):
            raise UserError(
                f"data.{split}: none of its samples can be read, {self.data.bad.example}; check the path and the files"
            )
        order = labels[:, 0].argsort()
        return Features(values[order], labels[order, 1].long())


def evaluate_checkpoint(
    folder: Path, config: Config, say: Say = lambda text: None, ema: bool = False, report: dict[str, Any] | None = None
) -> dict[str, float]:  # fmt: skip
    """Return the validation metrics of a step folder under *config*'s strategy. Run on every rank; see :func:`restored`.

    *report* gets what the task says beyond the metrics.
    """

    def open_it(config: Config, runtime: Runtime, task: Task, classes: list[str] | None) -> Data:
        # Earlier versions saved no class names: theirs are those of the training data. Where features are compared, the classes
        # are the data's.
        if classes is None or not task.learns:
            return open_data(config, runtime, task)
        return open_validation(config, runtime, task, classes)

    with restored(folder, config, open_it, say, ema) as ready:
        return ready.evaluate(report)


@contextmanager
def restored(folder: Path, config: Config, open_it: Opener, say: Say, ema: bool = False) -> Iterator[Ready]:
    """The model of a step folder, with data that *open_it* opens. Run on every rank.

    *say* is told where /dev/shm is small for NCCL. With *ema* it has the averaged weights; what has no average comes from the
    model.

    Raises:
        UserError: the folder is not a valid checkpoint, is of another model or, with *ema*, has no averaged weights; or
            ``train.deterministic`` meets an operation without a deterministic form.
    """
    config = for_ranks(without_weights(config), identify(os.environ).world_size)
    parallel, timeout = config.parallel, collective_timeout(config.limits)
    with (
        deterministic(config.train.deterministic, parallel.device),
        Watchdog(config.limits) as watch,
        start(parallel.device, parallel.replicas, parallel.pipeline_ranks, timeout) as runtime,
        watch.naming(),
        closing(shown(config, runtime)) as display,
    ):
        warn_of_shared_memory(runtime, say)
        found = checkpoint.open_checkpoint(folder, config.checkpoint.verify, "checkpoint")
        if ema and "ema" not in found.tensors.places:
            raise UserError(f"--ema: {folder} has no averaged weights, its run had no ema.decay: leave --ema out")
        classes = found.card.get("label_names")
        task = all_or_none(lambda: build_task(config.task))
        if not task.learns:
            config = replace(config, model=replace(config.model, trainable="all"))  # there is no head
        data = open_it(config, runtime, task, classes if isinstance(classes, list) else None)
        if names := data.train.classes:
            all_or_none(lambda: task.prepare(names, found.card.get("task", {})))
        engine, blueprint, _ = build_model(
            config, data.outputs, runtime, steps=1, say=lambda text: None, channels=data.val.channels, restored=True,
            trains=False, task=task,
        )  # fmt: skip
        with closing(engine):
            fragments = list(engine.fragments())
            # Features are what comes before the classifier.
            without = () if task.learns else classifier_layers(vars(engine.module).get("pretrained_cfg", {}))
            found.restore(fragments, groups=("model",), without=without)
            if ema:
                averaged = found.tensors.places["ema"]
                fragments = [replace(fragment, group="ema") for fragment in fragments if fragment.name in averaged]
                found.restore(fragments, groups=("ema",), without=without)
            engine.refresh()
            yield Ready(config, engine, data, blueprint, runtime, watch, display)


@contextmanager
def first_weights(
    config: Config, open_it: Callable[[Config, Runtime, Task], tuple[Data, int | None]], say: Say
) -> Iterator[Ready]:
    """The model that *config* names with its first weights, on each rank whole. *open_it* also says how many outputs it has.

    Run on every rank. `UserError` where the model, its weights and the data do not fit together.
    """
    config = without_auto(config)
    parallel = replace(config.parallel, strategy="ddp", replicas=1, offload="none", deepspeed=None)
    config = replace(config, parallel=parallel)
    with (
        Watchdog(config.limits) as watch,
        start(parallel.device, 1, 1, collective_timeout(config.limits)) as runtime,
        watch.naming(),
        closing(shown(config, runtime)) as display,
    ):
        warn_of_shared_memory(runtime, say)
        all_or_none(lambda: check_model(config.model))
        task = all_or_none(lambda: build_task(config.task))
        data, outputs = open_it(config, runtime, task)
        total = -(-config.train.global_batch // runtime.world_size) * runtime.world_size
        model, train = replace(config.model, num_classes=outputs), replace(config.train, global_batch=total)
        config = replace(config, model=model, train=train)
        engine, blueprint, _ = build_model(
            config, data.outputs, runtime, steps=1, say=say, channels=data.val.channels, trains=False, task=task
        )
        with closing(engine):
            yield Ready(config, engine, data, blueprint, runtime, watch, display)


def shown(config: Config, runtime: Runtime) -> Display:
    """Progress on the error output: the other one has the metrics."""
    return Display(Console(stderr=True, quiet=not runtime.is_main, highlight=False, soft_wrap=True), config.monitor.progress)


def for_ranks(config: Config, ranks: int) -> Config:
    """*config* for an evaluation: what of the run's layout does not fit so many ranks is left out, as is what a step needs.

    ZeRO spreads what an optimizer needs. An evaluation has none: zero3, which spreads the weights too, becomes fsdp.
    """
    config = without_auto(config)
    parallel: Any = replace(
        config.parallel, offload="none", deepspeed=None, schedule="1f1b", stages_per_rank=None, microbatches=None
    )  # fmt: skip
    if parallel.strategy.startswith("zero"):
        parallel = replace(parallel, strategy="fsdp" if parallel.strategy == "zero3" else "ddp")
    if parallel.strategy == "pipeline" and (ranks == 1 or ranks % (parallel.stages or ranks)):
        parallel = replace(parallel, strategy="fsdp", stages=None)
    if ranks // (parallel.pipeline_ranks or ranks) % parallel.replicas:
        parallel = replace(parallel, replicas=1)
    whole = -(-config.train.global_batch // ranks) * ranks
    # Nobody teaches: the model is timm's alone.
    task, train = replace(config.task, teacher=None), replace(config.train, global_batch=whole)
    return replace(config, parallel=parallel, train=train, task=task)
