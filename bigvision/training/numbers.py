"""What becomes of losses that are not finite or stand out: steps are skipped, the run goes back to a checkpoint, or it ends."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bigvision import checkpoint
from bigvision.data import StepBatch
from bigvision.engine import StepResult
from bigvision.monitor import Monitor
from bigvision.runtime import gather_json
from bigvision.training.build import Build
from bigvision.training.data import Feed
from bigvision.training.saving import Saving

WINDOW = 100
"""Losses whose mean and deviation the next one is measured by."""
LEAST = 20
"""Losses before the first verdict; and spikes in a row that are no spikes any more, but where the loss is now."""
ROLLBACKS = 3
"""Returns to an earlier checkpoint without a newer one in between; one more ends the run."""
SHOWN = 20
"""Samples of a rank that a line names; metrics.jsonl has all."""


class BadNumbers(Exception):
    """Too many steps in a row were skipped, or too many losses were spikes; the same on every rank."""


class Numbers:
    """Takes each step and looks at its numbers. Every rank has one and calls all of its methods."""

    def __init__(self, run: Build, monitor: Monitor) -> None:
        self.run, self.config, self.engine, self.monitor = run, run.config, run.engine, monitor
        known = run.progress.get("faults", {})
        self.passed_over: list[list[int]] = known.get("passed_over", [])
        """(samples before it, its samples) of each batch that is not trained on."""
        self.back_from: tuple[int, int, Spike] | None = None
        """The step and the first sample of a spike after which the run has to be rolled back, and the spike."""
        self._take(known)

    def state(self) -> dict[str, Any]:
        """What a restarted run has to know, as JSON."""
        losses = {"losses": list(self.spikes.losses), "spikes": list(self.spikes.in_a_row)} if self.spikes else {}
        return {"passed_over": list(self.passed_over), "skipped_in_a_row": self.in_a_row} | losses

    def _take(self, known: dict[str, Any]) -> None:
        self.in_a_row: int = known.get("skipped_in_a_row", 0)
        self.spikes = None
        if (threshold := self.config.faults.spike) is not None:
            self.spikes = Spikes(threshold, known.get("losses", ()))
            self.spikes.in_a_row = known.get("spikes", [])

    def take(self, batch: StepBatch) -> StepResult:
        """Launch a step on *batch*, or skip it because it made a spike before."""
        engine, size = self.engine, self.config.train.global_batch
        # Of a run that went on with another global batch, all that overlap.
        if any(engine.samples < at + samples and at < engine.samples + size for at, samples in self.passed_over):
            self.monitor.say(f"step {engine.step + 1}: its batch made a spike before and is passed over")
            return engine.pass_over(batch)
        return engine.train_step(batch)

    def look(self, result: StepResult) -> None:
        """Read the numbers of a step; waits for it. Called in the order of the steps."""
        if result.skipped and not (result.passed_over or result.overflowed):
            self._not_finite(result)
        if result.skipped or result.passed_over:
            return
        self.in_a_row = 0
        if self.spikes and (spike := self.spikes.look(result.numbers[0])):
            words = f"loss {spike.loss:.4g}, {spike.deviations:.1f} standard deviations above the mean {spike.mean:.4g}"
            self.monitor.event(result.step, result.consumed, {"spike": asdict(spike)}, f"step {result.step}: a spike: {words}")
            if self.config.faults.rollback:
                self.back_from = (result.step, result.consumed - result.samples, spike)

    def _not_finite(self, result: StepResult) -> None:
        self.in_a_row += 1
        found = {rank: ids for rank, ids in enumerate(gather_json(list(result.offending))) if ids}
        what = f"the loss is not finite on {_listed(found)}"
        if not found:
            what = "the gradient or a running statistic is not finite, though every loss is"
        step = result.step
        self.monitor.event(step, result.consumed, {"not_finite": found}, f"step {step}: skipped, {what}")
        if self.in_a_row > (most := self.config.faults.nonfinite):
            advice = "look at these samples, or lower optim.lr"
            if self.config.parallel.precision == "fp16" and not found:
                advice = "fp16 overflows even at loss scale 1: use parallel.precision bf16 or fp32"
            raise BadNumbers(
                f"step {step}: {what}; {self.in_a_row} steps in a row were skipped, faults.nonfinite allows {most}: {advice}"
            )

    def roll_back(self, saving: Saving, batches: Feed) -> dict[str, float]:
        """Go back to the newest checkpoint; the batch of the spike will be passed over. Returns the metrics known there."""
        assert self.back_from is not None
        (step, at, spike), self.back_from = self.back_from, None
        engine, out, say = self.engine, Path(self.config.out), self.monitor.say
        saving.saver.wait()
        found = checkpoint.find("auto", out, self.config.checkpoint.verify, say)
        if found is None:
            raise BadNumbers(f"step {step}: a spike, but {out} has no checkpoint any more to go back to")
        since = sum(place >= found.progress["samples"] for place, _ in self.passed_over)
        if since >= ROLLBACKS:
            raise BadNumbers(
                f"step {step}: a spike, as in {since} batches before it since {found.folder.name}, which are passed over: "
                "lower optim.lr, raise faults.spike, or set faults.rollback to false"
            )
        found = found.restore_or_older(list(engine.fragments()), say, self.run.accept)
        engine.restored(found.progress["scalars"])
        self._take(found.progress.get("faults", {}))
        self.passed_over.append([at, self.config.train.global_batch])
        batches.go_to(engine.step, engine.samples)
        metrics: dict[str, float] = found.progress["metrics"]
        saving.evaluated = found.progress.get("evaluated")
        saving.patience.restore(found.progress.get("patience"))
        self.monitor.begin(engine.step, self.monitor.steps, metrics)
        facts = {"rolled_back": {"from_step": step, "passes_over": at} | asdict(spike)}
        words = f"step {step}: back to {found.folder.name}; the batch from sample {at} on will be passed over"
        self.monitor.event(engine.step, engine.samples, facts, words)
        # Now, so that a run that is killed before its next checkpoint knows it as well.
        saving.save(metrics, found.progress.get("evaluation_owed", False))
        saving.saver.wait()
        return metrics


def _listed(offending: dict[int, list[int]]) -> str:
    def ids(found: list[int]) -> str:
        return ", ".join(map(str, found[:SHOWN])) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")

    return "; ".join(f"rank {rank} (samples {ids(found)})" for rank, found in offending.items())


@dataclass(frozen=True)
class Spike:
    """A loss that is *deviations* standard deviations above the *mean* of those before it."""

    loss: float
    mean: float
    deviations: float


class Spikes:
    """Looks at each step's loss, which is the same on every rank, and so is the verdict.

    *threshold* is in standard deviations above the mean. *losses* are those of earlier steps, from :attr:`losses`: a run that
    goes on judges as one that was never interrupted.
    """

    def __init__(self, threshold: float, losses: Sequence[float] = ()) -> None:
        self.threshold = threshold
        self.losses = deque(losses, WINDOW)
        self.in_a_row: list[float] = []

    def look(self, loss: float) -> Spike | None:
        """Say whether the finite *loss* is a spike. Those that are none are what the next ones are compared with."""
        if len(self.losses) >= LEAST:
            mean = statistics.fmean(self.losses)
            # Where all were the same, the last digit is no spike.
            deviation = max(statistics.pstdev(self.losses, mean), 1e-6 * abs(mean), 1e-12)
            if loss - mean > self.threshold * deviation:
                self.in_a_row.append(loss)
                if len(self.in_a_row) == LEAST:
                    self.losses, self.in_a_row = deque(self.in_a_row, WINDOW), []
                return Spike(loss, mean, (loss - mean) / deviation)
        self.in_a_row = []
        self.losses.append(loss)
        return None
