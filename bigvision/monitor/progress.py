"""What a user sees of a run while it goes on: a bar in a terminal, plain lines now and then without one; and the time left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

FIRST, EVERY = 5.0, 30.0
"""Without a terminal: seconds to the first line, and between lines."""
STEPS = 100
"""The last steps, whose mean time is that of the steps to come."""
BESIDE = 56
"""Columns of a terminal for what stands beside the facts: step, bar, time left."""
FORWARD = 1 / 3
"""Time of an image in an evaluation over its time in training, until one was measured: there is no backward pass."""
Pause = Literal["evaluation", "save"]
T = TypeVar("T")


@dataclass(frozen=True)
class Forecast:
    """What is known of a run before its first step; None where nobody can say."""

    to_come: Callable[[int], tuple[int, int]] = lambda step: (0, 0)
    """How many evaluations and saves follow after a step."""
    evaluated: int = 0
    """Images of an evaluation."""
    flops_per_image: Callable[[int], float | None] = lambda step: None
    """Of the training images of a step, forward and backward, without what is computed again."""
    peak_flops: float | None = None
    """Of all devices together, in a second, by their datasheet."""
    memory: int | None = None
    """Bytes on the rank that needs most, as planned."""


class Pace:
    """How long a run still takes, from what its last steps, evaluations and saves took."""

    def __init__(self) -> None:
        self.steps: deque[float] = deque(maxlen=STEPS + 1)
        """When each of the last steps was read, on a clock that stands still in pauses."""
        self.paused = 0.0
        """Seconds in pauses so far."""
        self.pauses: dict[Pause, deque[float]] = {"evaluation": deque(maxlen=5), "save": deque(maxlen=5)}

    def step(self) -> None:
        """Take note of a step. The first one, with its compilation, is not measured."""
        self.steps.append(time.perf_counter() - self.paused)

    def pause(self, kind: Pause, seconds: float) -> None:
        """Take note of an evaluation, or of a save for as long as training waited."""
        self.paused += seconds
        self.pauses[kind].append(seconds)

    def left(self, step: int, steps: int, global_batch: int, forecast: Forecast) -> float | None:
        """Seconds from *step* to the end of *steps*; None as long as nobody can say."""
        if len(self.steps) < 2:
            return None
        each = (self.steps[-1] - self.steps[0]) / (len(self.steps) - 1)
        evaluations, saves = forecast.to_come(step)
        measured, saved = self.pauses["evaluation"], self.pauses["save"]
        evaluation = fmean(measured) if measured else forecast.evaluated * FORWARD * each / global_batch
        return (steps - step) * each + evaluations * evaluation + saves * (fmean(saved) if saved else 0.0)


class Display:
    """Shows how far steps and batches are. Where it is not *shown*, its methods do nothing."""

    def __init__(self, console: Console, shown: bool) -> None:
        self.console, self.shown = console, shown and not console.quiet
        self.plain = self.shown and not console.is_terminal
        self.next_line: float | None = None
        """When the next plain line is due; None before anything was done."""
        self.bar = Progress(
            TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.fields[facts]}"),
            _TimeLeft(), console=console, disable=not self.shown or self.plain,
        )  # fmt: skip
        self.row: Any = None

    def begin(self, step: int, steps: int, facts: Sequence[str]) -> None:
        """Show that a run is at *step* of *steps*."""
        if self.shown:
            if self.row is None:
                self.row = self.bar.add_task("step", total=steps, facts=self._fitting(facts), ends=None)
            self.bar.update(self.row, completed=step)
            self.bar.start()

    def step(self, step: int, steps: int, facts: Sequence[str], left: float | None, at_once: bool = False) -> None:
        """Show a step; without a terminal when it is time for a line, or *at_once*."""
        if not self.shown:
            return
        if self.plain:
            self._line(f"step {step}/{steps}", facts, left, at_once)
        else:
            ends = None if left is None else time.monotonic() + left
            self.bar.update(self.row, completed=step, facts=self._fitting(facts), ends=ends)

    def batches(self, what: str, batches: Iterable[T], total: int) -> Iterator[T]:
        """Yield *batches*, of which there are *total*, and show how far *what* is made of them."""
        if not self.shown:
            yield from batches
            return
        began = time.monotonic()
        row = self.bar.add_task(what, total=total, facts="batches", ends=None)
        self.bar.start()  # where no run has
        try:
            for done, batch in enumerate(batches):
                left = (time.monotonic() - began) / done * (total - done) if done else None
                if self.plain:
                    self._line(f"{what} {done}/{total} batches", (), left)
                else:
                    self.bar.update(row, completed=done, ends=None if left is None else time.monotonic() + left)
                yield batch
        finally:
            self.bar.remove_task(row)

    def close(self) -> None:
        """Stop drawing. It may be called again."""
        if self.bar.live.is_started:
            self.bar.stop()

    def _line(self, what: str, facts: Sequence[str], left: float | None, at_once: bool = False) -> None:
        now = time.monotonic()
        if self.next_line is None:
            self.next_line = now + FIRST
        if at_once or now >= self.next_line:
            self.next_line = now + EVERY
            ending = () if left is None else (f"{duration(left)} left",)
            self.console.print("  ".join([what, *facts, *ending]), markup=False)

    def _fitting(self, facts: Sequence[str]) -> str:
        """The first of *facts*, as many as there are columns for."""
        text = ""
        for fact in facts:
            if len(text) + len(fact) + BESIDE > self.console.width and text:
                break
            text += f"  {fact}" if text else fact
        return text


class _TimeLeft(ProgressColumn):
    """Counts down between updates."""

    def render(self, task: Task) -> Text:
        ends = task.fields["ends"]
        return Text("" if ends is None else f"{duration(max(0.0, ends - time.monotonic()))} left", style="progress.remaining")


def duration(seconds: float) -> str:
    """*seconds* as m:ss, h:mm:ss, or days and h:mm."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def main_metric(names: Iterable[str]) -> str:
    """The metric that stands for a model: top1, else the first that is no loss."""
    names = list(names)
    return next((name for name in ("top1", *names) if name in names and name not in ("loss", "ema_loss")), "loss")


def metric_text(metrics: dict[str, float]) -> str:
    """The main metric of an evaluation; empty where there is no other than the loss."""
    if (name := main_metric(metrics)) == "loss":
        return ""
    word, form = ("accuracy", ".2%") if name == "top1" else (name, ".4g")
    averaged = f" (EMA {metrics[f'ema_{name}']:{form}})" if f"ema_{name}" in metrics else ""
    return f"{word} {metrics[name]:{form}}{averaged}"


def facts_of(line: dict[str, Any], metrics: dict[str, float]) -> list[str]:
    """What is known of a record of a step, and the *metrics* of the last evaluation, in words: what matters most first."""
    facts = [f"loss {line['loss']:.4f}" if line.get("loss") is not None else "", metric_text(metrics)]
    if "images_per_second" in line:
        facts.append(f"{line['images_per_second']:.0f} images/s")
    if "mfu" in line:
        facts.append(f"MFU {line['mfu']:.0%}")
    if "peak_memory" in line:
        planned = f" of {line['planned_memory'] / 1e9:.1f}" if "planned_memory" in line else ""
        facts.append(f"{line['peak_memory'] / 1e9:.1f}{planned} GB")
    if line.get("waiting", 0.0) >= 0.01:
        facts.append(f"{line['waiting']:.0%} waiting for data")
    return [fact for fact in facts if fact]
