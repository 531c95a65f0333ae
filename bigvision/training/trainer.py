"""The training loop."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigvision.config import Config
from bigvision.engine import Engine
from bigvision.errors import Stopped
from bigvision.models import GivenModel
from bigvision.monitor import Monitor, Own
from bigvision.runtime import RankFailure, Watchdog, collective_timeout, start
from bigvision.signals import listening, while_alone
from bigvision.training.build import Build, build, with_model
from bigvision.training.callbacks import Callback, Callbacks, Event
from bigvision.training.data import Feed, with_data
from bigvision.training.evaluate import evaluate
from bigvision.training.numbers import Numbers
from bigvision.training.saving import Saving


@dataclass(frozen=True)
class Result:
    """What a finished run leaves."""

    step: int
    checkpoint: Path
    """The last step's folder."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation."""
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """The lines of metrics.jsonl."""


def train(
    config: Config, data: Any = None, val: Any = None, *, model: GivenModel | None = None, callbacks: Sequence[Callback] = ()
) -> Result:
    """Train, evaluate and save as *config* says, from the newest checkpoint or from the start. Run on every rank.

    Args:
        data, val: map-style datasets of your own (see `bigvision.data.MapStyle`) in the place of what ``data.train`` and
            ``data.val`` name; both or none.
        model: your own module, or a function that builds one, in the place of what ``model.name`` names.
        callbacks: called on rank 0 with an `Event`.

    Raises:
        UserError: what was asked for cannot be done; the same on every rank, before anything is trained.
        Stopped: SIGTERM, SIGUSR1 or SIGINT came to any rank, and the run was saved; on every rank.
    """
    config, given = with_data(config, data, val)
    config = with_model(config, model)
    with ExitStack() as stack:
        watch = stack.enter_context(Watchdog(config.limits, Path(config.out) / "stacks"))
        stack.enter_context(listening())
        parallel, timeout = config.parallel, collective_timeout(config.limits)
        with while_alone():
            runtime = stack.enter_context(start(parallel.device, parallel.replicas, parallel.pipeline_ranks, timeout))
        monitor = Monitor(config, runtime)
        stack.callback(monitor.close)
        told = Callbacks(callbacks, runtime)
        with watch.naming():
            run = build(config, runtime, monitor.say, stack, given, model)
        engine, steps, metrics = run.engine, run.steps, run.metrics
        batches = Feed(
            config, run.data, run.blueprint, runtime, step=engine.step, steps=steps, position=engine.samples, say=monitor.say
        )
        stack.callback(batches.close)
        numbers = Numbers(config, engine, monitor, run.faults)
        saving = Saving(config, engine, run.card, runtime, monitor.say, numbers.state)
        stack.callback(saving.close)
        monitor.begin(engine.step, steps, metrics)
        numbers.begin(saving, metrics)

        def own() -> Own:
            return Own(batches.waited(), engine.alone())

        def measure() -> bool:
            """Evaluate; returns whether the evaluation is still owed, since it was broken off by a signal to stop."""
            nonlocal metrics
            if (found := evaluate(config, run, runtime, watch, saving.stop)) is not None:
                metrics = found
                monitor.after_evaluation(engine.step, engine.samples, metrics)
                told.tell(Event("evaluation", engine.step, metrics))
            return found is None

        with watch.naming(), _place_named(engine):
            stopped = saving.stop()  # by a signal that came while the run was built
            owed = run.evaluation_owed and (stopped or measure())
            while engine.step < steps and not saving.stopped_by:
                watch.beat("step", engine.step + 1)
                batch = next(batches)
                watch.fed()
                result = numbers.step(batch)
                if numbers.back_from:
                    watch.beat("save", engine.step)
                    metrics = numbers.roll_back(saving, batches)
                    continue
                if line := monitor.after_step(engine.step, engine.samples, result, run.data.bad.count("train"), own):
                    told.tell(Event("step", engine.step, line))
                last, epoch_ended = engine.step == steps, _epoch_ended(engine, run, config)
                owed = (last or _due(engine.step, config.train.eval_every, epoch_ended)) and measure()
                if saving.due(epoch_ended) or last:
                    watch.beat("save", engine.step)
                    saving.save(metrics, owed)
                saving.tell(told)
                told.check()
            watch.beat("save", engine.step)
            unfinished = engine.step < steps or owed
            # A run that was resumed at its last step has nothing to train and still leaves its checkpoint.
            if saving.saved != engine.step and not (unfinished and run.resumed_at == engine.step):
                saving.save(metrics, owed)
            folder = saving.finish() or run.resumed
        assert folder is not None
        saving.tell(told)
        told.tell(Event("end", engine.step, metrics, folder))
        told.check()
        monitor.close()
        if unfinished:
            raise Stopped(saving.stopped_by, engine.step, folder)
        monitor.farewell(folder, metrics, run.data.bad.summary())
        return Result(engine.step, folder, metrics, read_history(config.out))


def read_history(out: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none on a host that does not share the folder."""
    try:
        return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []


@contextmanager
def _place_named(engine: Engine) -> Iterator[None]:
    """Let an error between ranks say which part of the model this one has, and beside which others."""
    try:
        yield
    except RankFailure:
        raise
    except RuntimeError as error:
        if not engine.place:
            raise
        raise RuntimeError(f"{engine.place}: {error}") from error


def _due(step: int, every: int | None, epoch_ended: bool) -> bool:
    return epoch_ended if every is None else step % every == 0


def _epoch_ended(engine: Engine, run: Build, config: Config) -> bool:
    """Whether the last step took the last sample of an epoch. Batches run on across epochs, so none is short."""
    before = engine.samples - config.train.global_batch
    return engine.samples // len(run.data.train) > before // len(run.data.train)
