"""Functions of the caller's that a run calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bigvision.runtime import RankFailure, Runtime, all_or_none, from_main


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
    """Calls the functions on rank 0. Every rank has one and calls :meth:`check`."""

    def __init__(self, functions: Sequence[Callback], runtime: Runtime) -> None:
        """Args: *functions* count on rank 0 only; the other ranks may have none."""
        self.functions, self.main = functions, runtime.is_main
        self.any = bool(from_main(bool(functions)))
        self.failure: Exception | None = None

    def tell(self, event: Event) -> None:
        """Call the functions, in their order; what one raises is kept for :meth:`check`, and no other is called any more."""
        if not self.main or self.failure is not None:
            return
        try:
            for function in self.functions:
                function(event)
        except Exception as error:
            self.failure = error

    @property
    def failed(self) -> bool:
        """Whether a function has raised on this rank. Does not communicate."""
        return self.failure is not None

    def check(self) -> None:
        """End the run on all ranks where a function has raised. Called on all ranks when one asks, and at the end.

        Raises:
            Exception: the function's own, on rank 0; a `UserError` with the same words everywhere.
            RankFailure: on the other ranks, with its name and words.
        """
        if not self.any:
            return
        try:
            all_or_none(self._fail)
        except RankFailure as error:
            raise self.failure or error from None

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure
