"""The caller's functions, and what may end a run before its last step: `STOP`, returned by one of them, and patience."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from bigvision import checkpoint
from bigvision.config import Config
from bigvision.errors import UserError, either
from bigvision.monitor import main_metric
from bigvision.runtime import RankFailure, Runtime, all_or_none, from_main


class Answer(Enum):
    """What a callback may return."""

    STOP = "stop"
    """End the run well: it is evaluated and saved as after its last step, and the exit code is 0."""

    def __repr__(self) -> str:
        return f"bigvision.{self.name}"


STOP = Answer.STOP


@dataclass(frozen=True)
class Event:
    """Something that a run has done."""

    kind: Literal["step", "evaluation", "checkpoint", "end"]
    """step: a line of metrics.jsonl was written, each `monitor.every` steps and at the last. evaluation: all of the validation
    data was seen. checkpoint: one is complete on the disk. end: the run is over, or stopped by a signal, and its last
    checkpoint is complete."""
    step: int
    """Optimizer steps taken so far; of a checkpoint, the step that it holds."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Plain numbers. step: the line. evaluation and end: loss, top1, ... of the evaluation. checkpoint: empty."""
    folder: Path | None = None
    """checkpoint and end: the step's folder."""


Callback = Callable[[Event], object]


class Callbacks:
    """Calls the functions on rank 0. Every rank has one and calls :meth:`check` and :meth:`why`."""

    def __init__(self, functions: Sequence[Callback], runtime: Runtime) -> None:
        """Args: *functions* count on rank 0 only; the other ranks may have none."""
        self.functions = functions if runtime.is_main else ()
        self.failure: Exception | None = None
        """What a function has raised on this rank. No function is called any more then."""
        self.stopped_by = ""
        """The name of the function that has returned `STOP` on this rank."""

    def notify(self, event: Event) -> None:
        """Call the functions, in their order."""
        try:
            for function in self.functions if self.failure is None else ():
                if function(event) is STOP and not self.stopped_by:
                    self.stopped_by = getattr(function, "__name__", type(function).__name__)
        except Exception as error:
            self.failure = error

    def check(self) -> None:
        """End the run on all ranks where a function has raised. Called on all ranks when one asks, and at the end.

        Rank 0 raises the function's own error, the others a `RankFailure` that repeats it; a `UserError` is raised everywhere.
        """

        def fail() -> None:
            if self.failure is not None:
                raise self.failure

        try:
            all_or_none(fail)
        except RankFailure as error:
            raise self.failure or error from None

    def why(self) -> str:
        """Why the run ends, the same on every rank; called on all ranks when one asks to end."""
        return f"the callback {from_main(self.stopped_by)} returned STOP"


class Patience:
    """Counts evaluations in a row that bring no better value of a metric (``train.patience``).

    Every rank has one. All have the same metrics, so that they come to the same verdict.
    """

    def __init__(self, config: Config, metrics: Sequence[str]) -> None:
        """*metrics* are the names of those of an evaluation; a `UserError` where ``train.patience_metric`` is none of them."""
        self.allowed = config.train.patience
        named = config.train.patience_metric
        if named is not None and named not in metrics:
            raise UserError(f"train.patience_metric: {named} is no metric of this run: use {either(metrics)}")
        self.metric = named or config.checkpoint.keep_best or main_metric(metrics)
        self.restore(None)

    def restore(self, known: dict[str, Any] | None) -> None:
        """Go on from what :meth:`state` returned; from the beginning where that was of another metric, or nothing."""
        known = known if known is not None and known.get("metric") == self.metric else {}
        self.best: float | None = known.get("best")
        self.best_step: int | None = known.get("best_step")
        self.without: int = known.get("without", 0)
        """Evaluations since the best one."""

    def state(self) -> dict[str, Any]:
        """What a restarted run has to know, as JSON."""
        return {"metric": self.metric, "best": self.best, "best_step": self.best_step, "without": self.without}

    def take(self, step: int, metrics: dict[str, float]) -> None:
        """Take note of an evaluation. A value that is not finite is not better."""
        value, sign = metrics[self.metric], checkpoint.sign(self.metric)
        if math.isfinite(value) and (self.best is None or sign * value > sign * self.best):
            self.best, self.best_step, self.without = value, step, 0
        else:
            self.without += 1

    def why(self) -> str:
        """Why the run ends now; empty while it goes on."""
        if self.allowed is None or self.without < self.allowed:
            return ""
        best = f"best at step {self.best_step}, {self.best:.4g}" if self.best is not None else "never finite"
        return (
            f"train.patience: {self.allowed}: {self.metric} was {best}, and no better in {self.without} evaluations since; "
            "raise it to train on"
        )
