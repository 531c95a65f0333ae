"""The training loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigvision.config import Config
from bigvision.data import StepBatch
from bigvision.engine import Engine, StepResult
from bigvision.errors import Stopped
from bigvision.jsonlines import read_lines
from bigvision.models import GivenModel
from bigvision.monitor import Monitor
from bigvision.runtime import RankFailure, Runtime, Watchdog, collective_timeout, deterministic, start
from bigvision.signals import listening, while_alone
from bigvision.training.build import Build, build, with_model
from bigvision.training.callbacks import Callback, Callbacks, Event
from bigvision.training.data import Feed, with_data
from bigvision.training.evaluate import evaluate
from bigvision.training.memory import retry_with_smaller_batch
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
    history: list[dict[str, Any]] = field(default_factory=list)
    """The lines of metrics.jsonl, also those of starts before this one; on rank 0, which writes them."""


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
    parallel = config.parallel
    with ExitStack() as stack:
        stack.enter_context(listening())
        # Before CUDA and the process group start, and around what names other ranks' errors.
        stack.enter_context(deterministic(config.train.deterministic, parallel.device))
        watch = stack.enter_context(Watchdog(config.limits, Path(config.out) / "stacks"))
        with while_alone():
            timeout = collective_timeout(config.limits)
            runtime = stack.enter_context(start(parallel.device, parallel.replicas, parallel.pipeline_ranks, timeout))
        monitor = Monitor(config, runtime)
        stack.callback(monitor.close)
        told = Callbacks(callbacks, runtime)
        with watch.naming():
            run = build(config, runtime, monitor.say, stack, given, model)
            with retry_with_smaller_batch(run.config, run.blueprint, runtime, run.starts), _place_named(run.engine):
                loop = Loop(run, runtime, monitor, watch, told, stack)
                loop.run_steps()
                folder = loop.finish()
        monitor.close()
        if loop.unfinished:
            raise Stopped(loop.saving.stopped_by, run.engine.step, folder)
        monitor.farewell(folder, loop.metrics, run.data.bad.summary())
        history = read_history(config.out) if runtime.is_main else []
        return Result(run.engine.step, folder, loop.metrics, history)


class Loop:
    """Steps, with evaluations and checkpoints between them. Every rank calls all of its methods."""

    def __init__(
        self, run: Build, runtime: Runtime, monitor: Monitor, watch: Watchdog, told: Callbacks, stack: ExitStack
    ) -> None:  # fmt: skip
        config, engine = run.config, run.engine
        self.run, self.runtime, self.monitor, self.watch, self.told = run, runtime, monitor, watch, told
        self.config, self.engine, self.steps, self.metrics = config, engine, run.steps, run.metrics
        self.batches = Feed(
            config,
            run.data,
            run.blueprint,
            runtime,
            step=engine.step,
            steps=run.steps,
            position=engine.samples,
            say=monitor.say,
            waits=watch.waits_for_data,
        )
        stack.callback(self.batches.close)
        self.numbers = Numbers(config, engine, monitor, run.faults)
        self.saving = Saving(run, runtime, monitor.say, self.numbers.state)
        stack.callback(self.saving.close)
        monitor.begin(engine.step, run.steps, run.metrics)
        self.numbers.begin(self.saving, run.metrics)
        self.launched: deque[tuple[StepResult, float | None]] = deque()
        """Steps whose numbers were not read, each with the seconds that its batch was waited for."""
        self.owed = run.evaluation_owed
        """Whether the evaluation of the last step was broken off by a signal to stop."""

    def run_steps(self) -> None:
        """Train to the last step, or until a signal asks to stop.

        A step is read while the next one runs, so a request or a spike is known one step later; before an evaluation, a
        checkpoint or a digest everything is read.
        """
        engine, saving = self.engine, self.saving
        saving.ask()  # a signal may have come while the run was built
        if not saving.stopped_by and self.owed:
            self.measure()
            if saving.requested:
                self.save()
        while engine.step < self.steps and not saving.stopped_by:
            self.watch.beat("step", engine.step + 1)
            self._launch(next(self.batches))
            step, epoch_ended = engine.step, self._epoch_ended()
            evaluates = step == self.steps or _due(step, self.config.train.eval_every, epoch_ended)
            saves = step == self.steps or saving.due(epoch_ended)
            digests = self.config.faults.digest_every is not None and step % self.config.faults.digest_every == 0
            last = self.launched[-1][0]
            if not self._read(0 if evaluates or saves or digests else 1):
                continue  # rolled back
            if digests:
                self.numbers.digest(last)
            if (saving.requested or saving.stopped_by) and not self._read(0):
                continue
            if evaluates:
                self.measure()
            if saves or saving.requested or saving.stopped_by:
                self.save()
            saving.tell(self.told)

    def _launch(self, batch: StepBatch) -> None:
        """Take a step whose numbers are read later."""
        self.engine.requests = self._wishes()
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
                self.watch.beat("save", self.engine.step)
                self.metrics = self.numbers.roll_back(self.saving, self.batches)
                return False
            bad = self.run.data.bad.count("train")
            if line := self.monitor.after_step(result, bad, waited):
                self.told.tell(Event("step", result.step, line))
            self._hear(result.requests)
        return True

    def _wishes(self) -> frozenset[str]:
        return self.saving.wishes() | ({"failure"} if self.told.failed else set())

    def _hear(self, requests: set[str]) -> None:
        if "failure" in requests:
            self.told.check()
        self.saving.hear(requests)

    def _stop(self, requests: set[str]) -> bool:
        self._hear(requests)
        return bool(self.saving.stopped_by)

    def measure(self) -> None:
        """Evaluate, unless a signal asks to stop."""
        run = self.run
        found = None
        if not self.saving.stopped_by:
            found = evaluate(
                self.config, self.engine, run.data, run.blueprint, self.runtime, self.watch, self._wishes, self._stop
            )  # fmt: skip
        self.owed = found is None
        if found is not None:
            self.metrics = found
            self.saving.take(found)
            self.monitor.after_evaluation(self.engine.step, self.engine.samples, found)
            self.told.tell(Event("evaluation", self.engine.step, found))

    def save(self) -> None:
        """Begin to save the run as it stands."""
        self.watch.beat("save", self.engine.step)
        self.saving.save(self.metrics, self.owed)

    @property
    def unfinished(self) -> bool:
        """Whether there is something left to do: a signal asked to stop."""
        return self.engine.step < self.steps or self.owed

    def finish(self) -> Path:
        """Return the folder of the last step, once it is on the disk."""
        resumed_here = self.run.resumed_at == self.engine.step
        # A run that was resumed at its last step has nothing to train and still leaves its checkpoint.
        if self.saving.saved != self.engine.step and not (self.unfinished and resumed_here):
            self.save()
        folder = self.saving.finish() or self.run.resumed
        assert folder is not None
        self.saving.tell(self.told)
        self.told.tell(Event("end", self.engine.step, self.metrics, folder))
        self.told.check()
        return folder

    def _epoch_ended(self) -> bool:
        """Whether the last step took the last sample of an epoch. Batches run on across epochs, so none is short."""
        before, length = self.engine.samples - self.config.train.global_batch, len(self.run.data.train)
        return self.engine.samples // length > before // length


def read_history(out: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without those that were cut by a kill or a full disk."""
    try:
        return read_lines(Path(out, "metrics.jsonl"))
    except OSError:
        return []  # the run is over and saved: what it logged is no reason to fail it


@contextmanager
def _place_named(engine: Engine) -> Iterator[None]:
    """Let an error between ranks say which part of the model this one has, and beside which others."""
    try:
        yield
    except RankFailure:
        raise
    except RuntimeError as error:
        if engine.place:
            error.args = (f"{engine.place}: {error}",)
        raise


def _due(step: int, every: int | None, epoch_ended: bool) -> bool:
    return epoch_ended if every is None else step % every == 0
