"""The training loop, and evaluation over all ranks."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bigvision import checkpoint
from bigvision.config import Config, train_size, without_auto
from bigvision.data import Batch, StepBatch
from bigvision.engine import Engine, Metrics, StepResult
from bigvision.errors import Stopped, UserError
from bigvision.models import Blueprint, GivenModel
from bigvision.monitor import Forecast, Monitor, Profile, Tracker, Trackers, open_trackers, read_lines
from bigvision.monitor.examples import Examples
from bigvision.monitor.reporter import Reporter
from bigvision.runtime import (
    Runtime,
    Watchdog,
    all_or_none,
    collective_timeout,
    deterministic,
    from_main,
    start,
)
from bigvision.signals import listening, until_ranks_meet
from bigvision.tasks import Task
from bigvision.training.build import Build, build, peak_flops, with_model, with_task
from bigvision.training.callbacks import Callback, Callbacks, Event
from bigvision.training.data import Data, Feed, Validation, with_data
from bigvision.training.numbers import Numbers
from bigvision.training.run_folder import explain_errors
from bigvision.training.saving import Saving, check_copies

PLAN = "plan.json"
"""In the output folder: what was predicted of the run."""
EVALUATION = "evaluation.json"
"""In the output folder: what the task says of the last evaluation, such as each class's accuracy."""


@dataclass(frozen=True)
class Result:
    """What a finished run leaves."""

    step: int
    checkpoint: Path
    """The last step's folder."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """The lines of metrics.jsonl, also those of starts before this one; on rank 0, which writes them."""
    reason: str = ""
    """Why the run ended before its last step: patience, or a callback that returned `STOP`."""


Track = Callable[[Iterable[Batch], int], Iterable[Batch]]
"""Yields batches, of which there are so many, and shows how far they are; see `Display.batches`."""


def train_on_rank(
    config: Config, data: Any = None, val: Any = None, *, model: GivenModel | None = None,
    task: Task | None = None, callbacks: Sequence[Callback] = (), trackers: Sequence[Tracker] = (), began: float | None = None,
    origins: Mapping[str, str] | None = None,
) -> Result:  # fmt: skip
    """Train, evaluate and save as *config* says, from the newest checkpoint or from the start. Run on every rank.

    `bigvision.train` starts the ranks, and calls this on each.

    Args:
        data, val: map-style datasets of your own (see `bigvision.data.MapStyle`) in the place of what ``data.train`` and
            ``data.val`` name; both or none.
        model: your own module, or a function that builds one, in the place of what ``model.name`` names.
        task: your own, in the place of what ``task.name`` names.
        callbacks: called on rank 0 with an `Event`; one that returns `STOP` ends the run well.
        trackers: get the records of the run on rank 0, beside those that ``monitor.trackers`` names.
        began: the `time.monotonic()` from which the seconds to the first step are counted; by default now.
        origins: where the value of each key came from, for the report (see `bigvision.config.resolve`).

    Raises:
        UserError: what was asked for cannot be done; the same on every rank, before anything is trained.
        Stopped: SIGTERM, SIGUSR1 or SIGINT came to any rank, and the run was saved; on every rank.
    """
    began = time.monotonic() if began is None else began
    config, given = with_data(config, data, val)
    config = with_task(with_model(config, model), task)
    parallel = without_auto(config).parallel
    with ExitStack() as stack:
        stack.enter_context(listening())
        # Trackers end last: nobody waits for this rank any more.
        fed = Trackers()
        stack.push(fed.ended)
        # Before CUDA and the process group start, and around what names other ranks' errors.
        stack.enter_context(deterministic(config.train.deterministic, parallel.device))
        watch = stack.enter_context(Watchdog(config.limits, Path(config.out) / "stacks"))
        with until_ranks_meet():
            timeout = collective_timeout(config.limits)
            runtime = stack.enter_context(start(parallel.device, parallel.replicas, parallel.pipeline_ranks, timeout))
        monitor = Monitor(config, runtime, began, fed)
        stack.callback(monitor.close)
        report = Reporter(config, runtime, monitor, origins)
        stack.callback(report.close)
        notified = Callbacks(callbacks, runtime)
        with watch.naming():
            opened = all_or_none(lambda: open_trackers(config, trackers) if runtime.is_main else [])
            run = build(config, runtime, monitor.say, stack, given, model, task)
            with explain_errors(run.config, run.engine, run.blueprint, run.runtime, run.starts):
                fed.start(opened, monitor.say)
                report.begin(run.engine, run.steps)
                loop = Loop(run, run.runtime, monitor, watch, notified, stack, report)
                loop.run_steps()
                folder = loop.finish()
        monitor.close()
        if loop.unfinished:
            raise Stopped(loop.saving.stopped_by, run.engine.step, folder)
        reason = loop.saving.ended_by if run.engine.step < run.steps else ""
        if reason:
            monitor.say(f"ended at step {run.engine.step} of {run.steps}: {reason}")
        timms = model is None and run.engine.task.model(run.config) is None
        monitor.farewell(folder, loop.metrics, run.data.bad.summary(), config.model.lora is not None, timms)
        history = read_history(config.out) if runtime.is_main else []
        return Result(run.engine.step, folder, loop.metrics, history, reason)


class Loop:
    """Steps, with evaluations and checkpoints between them. Every rank calls all of its methods."""

    def __init__(
        self, run: Build, runtime: Runtime, monitor: Monitor, watch: Watchdog, callbacks: Callbacks, stack: ExitStack,
        report: Reporter,
    ) -> None:  # fmt: skip
        config, engine = run.config, run.engine
        self.run, self.runtime, self.monitor, self.watch, self.callbacks = run, runtime, monitor, watch, callbacks
        self.config, self.engine, self.steps, self.begun = config, engine, run.steps, run.engine.step
        self.metrics: dict[str, float] = run.progress.get("metrics", {})
        """Of the last evaluation, also one before this start."""
        self.owed: bool = run.progress.get("evaluation_owed", False)
        """Whether the evaluation of the last step was broken off by a signal to stop."""
        self.batches = Feed(
            config, run.data, run.blueprint, runtime, step=engine.step, steps=run.steps, position=engine.samples,
            say=monitor.say, waits=watch.waits_for_data,
        )  # fmt: skip
        stack.callback(self.batches.close)
        self.numbers = Numbers(run, monitor)
        self.saving = Saving(run, runtime, monitor.say, callbacks, self.numbers.state, report.saved)
        stack.callback(self.saving.saver.close)
        monitor.forecast = forecast(run, runtime)
        self.profile = Profile(config, runtime, monitor, watch, run.steps)
        stack.callback(self.profile.close)
        monitor.begin(engine.step, run.steps, self.metrics)
        if config.faults.rollback and not from_main(checkpoint.steps_in(Path(config.out))):
            self.saving.save(self.metrics)  # a run that may have to go back needs a checkpoint from its beginning
        self.launched: deque[tuple[StepResult, float | None]] = deque()
        """Steps whose numbers were not read, each with the seconds that its batch was waited for."""

    def run_steps(self) -> None:
        """Train to the last step, or until a signal asks to stop, a callback to end or patience is exhausted.

        A step is read while the next one runs, so a request or a spike is known one step later; before an evaluation, a
        checkpoint or a digest everything is read.
        """
        engine, saving, plan, length = self.engine, self.saving, self.config.train, len(self.run.data.train)
        digest_every = self.config.faults.digest_every
        saving.ask()  # a signal may have come while the run was built
        if not saving.stopped_by and self.owed:
            self.measure()
            if saving.requested:
                self.save()
        while engine.step < self.steps and not saving.over:
            self.watch.beat("step", engine.step + 1)
            self.profile.before_step(engine.step + 1)
            self._launch(next(self.batches))
            step, last = engine.step, engine.step == self.steps
            # Batches run on across epochs, so that none is short.
            epoch_ended = engine.samples // length > (engine.samples - plan.global_batch) // length
            evaluates = last or (epoch_ended if plan.eval_every is None else step % plan.eval_every == 0)
            saves = last or saving.due(epoch_ended)
            digests = digest_every is not None and step % digest_every == 0
            newest, _ = self.launched[-1]
            # The first one is read at once: it shows that the run works.
            if not self._read(0 if evaluates or saves or digests or step == self.begun + 1 else 1):
                continue  # rolled back
            self.profile.after_step(step)
            if digests and not newest.skipped:
                check_copies(engine)
            if (saving.requested or saving.over) and not self._read(0):
                continue
            if evaluates or saving.ended_by:
                self.measure()
            if saves or saving.requested or saving.over:
                self.save()
            saving.report()
        if saving.ended_by and not saving.stopped_by and saving.evaluated != engine.step:
            self.measure()  # rolled back after a callback asked to end
            self.save()
        self.profile.finish()

    def _launch(self, batch: StepBatch) -> None:
        """Take a step whose numbers are read later."""
        self.engine.requests = self.saving.requests()
        result = self.numbers.take(batch)
        self.batches.finish()
        if result.passed_over:
            self.saving.ask()
        waited = self.batches.waited() if self.monitor.due(result.step) else None
        self.launched.append((result, waited))

    def _read(self, ahead: int) -> bool:
        """Read the steps that were launched, but for the last *ahead*; False where that led back to an earlier checkpoint."""
        while len(self.launched) > ahead:
            result, waited = self.launched.popleft()
            self.numbers.look(result)
            if self.numbers.back_from:
                self.launched.clear()  # they are undone
                self.profile.after_step(self.engine.step)
                self.watch.beat("save", self.engine.step)
                self.metrics = self.numbers.roll_back(self.saving, self.batches)
                return False
            bad = self.run.data.bad.count("train")
            if line := self.monitor.after_step(result, bad, waited):
                self.callbacks.notify(Event("step", result.step, line))
            self.saving.hear(result.requests)
        return True

    def measure(self) -> None:
        """Evaluate, unless a signal asks to stop."""
        found, report, began = None, dict[str, Any](), time.monotonic()
        with self.monitor.pause("evaluation"):
            if not self.saving.stopped_by:
                found = self._evaluated(report, "evaluation")
            if found is not None and self.engine.ema is not None and self.config.ema.evaluate:
                with self.engine.averaged():
                    other = self._evaluated(averaged := {}, "evaluation of the average", averaged=True)
                found = None if other is None else found | {f"ema_{name}": value for name, value in other.items()}
                report |= {"ema": averaged}
        self.owed = found is None
        if found is None:
            return
        self.metrics = found
        if self.runtime.is_main:
            about = {"step": self.engine.step, "samples": self.engine.samples}
            try:
                write_report(Path(self.config.out) / EVALUATION, about | report)
            except UserError as error:
                self.monitor.say(str(error))  # no reason to end a run
        self.saving.take(found)
        self.monitor.after_evaluation(self.engine.step, self.engine.samples, found, time.monotonic() - began)
        self.callbacks.notify(Event("evaluation", self.engine.step, found))
        self.saving.ask()  # a callback that ends the run after an evaluation ends it here

    def _evaluated(self, report: dict[str, Any], what: str, averaged: bool = False) -> dict[str, float] | None:
        run, config, runtime = self.run, self.config, self.runtime
        examples = None
        if config.monitor.report and not averaged:
            batches = -(-len(run.data.val) // (self.engine.eval_batch * runtime.data_ranks))
            classes, count = run.data.val.classes, config.monitor.report_images
            examples = Examples(self.engine.task, classes, runtime, count, batches)
        found = evaluate(
            config, self.engine, run.data, run.blueprint, runtime, self.watch, self.saving, report, examples,
            lambda batches, total: self.monitor.display.batches(what, batches, total),
        )  # fmt: skip
        if found is not None and examples is not None:
            examples.write(Path(config.out), self.engine.step, self.monitor.say)
        return found

    def save(self) -> None:
        """Begin to save the run as it stands."""
        self.watch.beat("save", self.engine.step)
        with self.monitor.pause("save"):
            self.saving.save(self.metrics, self.owed)

    @property
    def unfinished(self) -> bool:
        """Whether there is something left to do: a signal asked to stop."""
        return self.owed or (self.engine.step < self.steps and not self.saving.ended_by)

    def finish(self) -> Path:
        """Return the folder of the last step, once it is on the disk."""
        resumed_here = self.run.progress.get("step") == self.engine.step
        # A run that was resumed at its last step has nothing to train and still leaves its checkpoint.
        if self.saving.saved != self.engine.step and not (self.unfinished and resumed_here):
            self.save()
        folder = self.saving.finish() or self.run.resumed
        assert folder is not None
        self.saving.report()
        self.callbacks.notify(Event("end", self.engine.step, self.metrics, folder))
        self.callbacks.check()
        return folder


def forecast(run: Build, runtime: Runtime) -> Forecast:
    """What is known of *run* before its first step."""
    config, plan, length = run.config, run.blueprint, len(run.data.train)
    end = run.engine.samples + (run.steps - run.engine.step) * config.train.global_batch
    evaluations = 2 if run.engine.ema is not None and config.ema.evaluate else 1
    memory = None
    if runtime.device.type == "cuda":  # elsewhere what is measured has the program too
        with suppress(OSError, ValueError, KeyError, TypeError):
            memory = int(json.loads(Path(config.out, PLAN).read_bytes())["memory"]["peak"])
    return Forecast(
        partial(to_come, config=config, steps=run.steps, samples=end, length=length),
        len(run.data.val) * evaluations,
        lambda step: plan.flops.get(train_size(config.data, plan.image_size, step - 1, run.steps)),
        peak_flops(config, runtime),
        memory,
    )


def to_come(step: int, *, config: Config, steps: int, samples: int, length: int) -> tuple[int, int]:
    """How many evaluations, and saves by steps and epochs, follow after *step* of a run's *steps*.

    At its end it will have consumed so many *samples*; an epoch has *length*.
    """
    plan, every, minutes = config.train, config.checkpoint.every, config.checkpoint.minutes
    left = steps - step
    epochs = min(left, samples // length - (samples - left * plan.global_batch) // length)
    last_ends_one = samples % length < plan.global_batch

    def count(every: int | None, epochs: int, last: bool) -> int:
        """By steps or by epochs; and the last step, where it is not among them."""
        found, among = (epochs, last) if every is None else (steps // every - step // every, steps % every == 0)
        return found + (left > 0 and not among)

    saves = count(every, epochs, last_ends_one) if every or not minutes else int(left > 0)
    return count(plan.eval_every, epochs, last_ends_one), saves


def evaluate(
    config: Config, engine: Engine, data: Data, blueprint: Blueprint, runtime: Runtime, watch: Watchdog,
    saving: Saving | None = None, report: dict[str, Any] | None = None, examples: Examples | None = None,
    track: Track = lambda batches, total: batches,
) -> dict[str, float] | None:  # fmt: skip
    """Return the mean metrics over the validation data: each sample once, whatever the number of ranks.

    What the task says beyond them is put into *report*, and predictions for a few images into *examples*. *saving* exchanges
    requests with each batch; where any rank was asked to stop, the evaluation is broken off, and None is returned. *track*
    shows progress.
    """
    watch.beat("evaluate", engine.step)
    engine.synchronize()
    before: Metrics | None = None
    batches = Validation(config, data, blueprint, runtime, engine.eval_batch)
    try:
        total = None
        for batch in track(batches, batches.number):
            watch.waits_for_data(False)
            if saving:
                engine.requests = saving.requests()
            metrics = engine.eval_step(batch, examples.take(batch)) if examples is not None else engine.eval_step(batch)
            total = metrics if total is None else total + metrics
            # Of the batch before, whose numbers arrive while this one runs.
            if saving and before is not None and saving.hear(before.requests):
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
    means = total.means()
    if report is not None:
        report |= {"metrics": means} | total.report(data.val.classes)
    return means


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write what an evaluation says as JSON; what is not finite is null."""
    try:
        checkpoint.replace(path, (json.dumps(_finite(report), ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError(
            f"{path}: the report cannot be written: {error.strerror}: choose a file in a folder that is there"
        ) from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_history(out: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without those that were cut by a kill or a full disk."""
    try:
        return read_lines(Path(out, "metrics.jsonl"))
    except OSError:
        return []  # the run is over and saved: what it logged is no reason to fail it
