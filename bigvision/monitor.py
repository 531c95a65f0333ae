"""What a run reports, on rank 0 only: progress, metrics.jsonl, slow ranks."""

from __future__ import annotations

import json
import math
import os
import resource
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import IO, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bigvision import checkpoint
from bigvision.config import Config
from bigvision.engine import StepResult
from bigvision.runtime import Runtime, gather_json

SLOWER = 1.5
"""A rank is slow that takes this many times the median of all ranks, ..."""
SHARE = 0.1
"""... where this share of each step is lost by it, ..."""
WINDOWS, STEPS = 3, 20
"""... for this many windows and steps in a row: anything may be slow once."""


class Monitor:
    """Writes metrics.jsonl, shows progress and names the next commands. Every rank has one; only rank 0's prints."""

    def __init__(self, config: Config, runtime: Runtime, began: float) -> None:
        """Args: *began* is the `time.monotonic()` from which the first step's line counts the seconds."""
        self.config, self.runtime, self.began = config, runtime, began
        self.first_step = True
        self.console = Console(quiet=not runtime.is_main, highlight=False, soft_wrap=True)
        self.path = Path(config.out) / "metrics.jsonl"
        self.progress: ProgressBar | None = None
        self.file: IO[str] | None = None
        self.stragglers = Stragglers()

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False)

    def begin(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        """Start to measure at *step*, also again. Lines beyond it, of what was not saved or is not kept, are dropped."""
        self.close()
        if self.runtime.is_main:
            if self.path.exists():
                kept = [line for line in read_lines(self.path) if isinstance(at := line.get("step"), int) and at <= step]
                checkpoint.replace(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self.file = self.path.open("a", encoding="utf-8", buffering=1)
            if self.config.monitor.progress:
                self.progress = ProgressBar(self.console, step, steps, metrics)
        self.steps = steps
        self._restart_clock()

    def after_step(self, result: StepResult, bad: int, waited: float | None) -> dict[str, Any] | None:
        """Log an optimizer step; each ``monitor.every`` steps, and at the last, write it down and return the line.

        *bad* training samples could not be read so far; this rank *waited* so many seconds for each batch since the last line.
        """
        self.seen, self.taken = self.seen + result.samples, self.taken + 1
        loss, grad_norm = result.numbers
        if self.first_step and not result.skipped:
            self.first_step = False
            seconds = time.monotonic() - self.began
            self.say(f"step {result.step} of {self.steps}: loss {loss:.4f}, {seconds:.1f} s after the start")
        if not self.due(result.step):
            return None
        gathered = gather_json([_peak_memory(self.runtime.device), waited, result.seconds()])
        elapsed = time.perf_counter() - self.since
        slow, news = self.stragglers.take([Own(*rest) for _, *rest in gathered], self.taken, elapsed / self.taken)
        for text in news:
            self.say(text)
        line = {
            "step": result.step,
            "samples": result.consumed,
            "loss": loss,
            "lr": result.lr,
            "grad_norm": grad_norm,
            "images_per_second": round(self.seen / (time.perf_counter() - self.since), 2),
            "peak_memory": max(peak for peak, *_ in gathered),
        }
        stragglers = {str(rank): round(seconds, 4) for rank, seconds in slow.items()}
        more = {"skipped": result.skipped, "bad_samples": bad, "stragglers": stragglers}
        line |= {name: value for name, value in more.items() if value}
        self._write(line)
        if self.progress:
            self.progress.update(result.step, loss, line["images_per_second"])
        self._restart_clock()
        return line

    def due(self, step: int) -> bool:
        """Whether a step is written down."""
        return step % self.config.monitor.every == 0 or step == self.steps

    def after_evaluation(self, step: int, samples: int, metrics: dict[str, float]) -> None:
        """Write the metrics of an evaluation down."""
        self._write({"step": step, "samples": samples} | {f"val_{name}": value for name, value in metrics.items()})
        if self.progress:
            self.progress.evaluated(step, metrics)
        self._restart_clock()

    def event(self, step: int, samples: int, facts: dict[str, Any], text: str) -> None:
        """Write *facts* down, and print *text*."""
        self._write({"step": step, "samples": samples} | facts)
        self.say(text)

    def close(self) -> None:
        """Stop drawing; also when the run ends by an error."""
        if self.progress:
            self.progress.bar.stop()
        if self.file:
            self.file.close()
            self.file = None

    def farewell(self, folder: Path, metrics: dict[str, float], note: str = "", adapters: bool = False) -> None:
        """Tell the user where the checkpoint is and what to do with it, and *note*. timm cannot open one with *adapters*."""
        if note:
            self.say(note)
        if accuracy := _accuracy(metrics):
            self.say(f"validation {accuracy}")
        self.say(f"checkpoint  {folder}")
        self.say("resume      run the same command again (more steps: --train.epochs or --train.steps)")
        self.say(f"evaluate    bigvision eval {folder}")
        if adapters:
            self.say(f"merge       bigvision export {folder} FILE.safetensors (for peft: FOLDER --adapter)")
        elif (folder / "model.safetensors").exists():
            self.say(f'load        timm.create_model("local-dir:{folder}", pretrained=True)')
        else:
            self.say(f'load        accelerate.load_checkpoint_in_model(model, "{folder}")')

    def _write(self, line: dict[str, Any]) -> None:
        if self.file:
            # JSON has no word for what is not finite.
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            self.file.write(json.dumps(finite) + "\n")

    def _restart_clock(self) -> None:
        self.since, self.seen, self.taken = time.perf_counter(), 0, 0


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a CUDA device, or the most that was resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class ProgressBar:
    """Shows loss, accuracy, images/s and the time left."""

    def __init__(self, console: Console, step: int, steps: int, metrics: dict[str, float]) -> None:
        self.console, self.steps = console, steps
        self.loss, self.speed, self.accuracy = "", "", _accuracy(metrics)
        self.bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[facts]}"), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("train", total=steps, completed=step, facts=self._facts())
        self.bar.start()

    def update(self, step: int, loss: float, images_per_second: float) -> None:
        """Show a logged step."""
        self.loss, self.speed = f"loss {loss:.4f}", f"{images_per_second:.0f} images/s"
        self.bar.update(self.task, completed=step, facts=self._facts())

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Show an evaluation; without a terminal, as a line of its own."""
        self.accuracy = _accuracy(metrics)
        self.bar.update(self.task, completed=step, facts=self._facts())
        if not self.console.is_terminal:
            self.console.print(f"step {step}/{self.steps}  {self._facts()}", markup=False)

    def _facts(self) -> str:
        return "  ".join(fact for fact in (self.loss, self.accuracy, self.speed) if fact)


def _accuracy(metrics: dict[str, float]) -> str:
    """The accuracy, or the first metric that is not the loss."""
    name = next((name for name in ("top1", *metrics) if name in metrics and name not in ("loss", "ema_loss")), None)
    if name is None:
        return ""
    word, form = ("accuracy", ".2%") if name == "top1" else (name, ".4g")
    averaged = f" (EMA {metrics[f'ema_{name}']:{form}})" if f"ema_{name}" in metrics else ""
    return f"{word} {metrics[name]:{form}}{averaged}"


@dataclass(frozen=True)
class Own:
    """What a rank spent by itself in a step, in seconds: not what it waited for others, which is alike on all."""

    data: float | None
    """Waiting for its data; None where another rank reads it."""
    work: float
    """Working before it first needed the others."""


class Stragglers:
    """Compares the ranks, window by window. Ranks take their steps together, so that all steps last as long as the slowest."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[int, int]] = {}
        """For each slow rank the windows and steps for which it has been."""
        self.known: set[int] = set()

    def take(self, ranks: list[Own], steps: int, seconds: float) -> tuple[dict[int, float], list[str]]:
        """Take note of each rank's mean over a window of *steps* that took *seconds* each.

        Returns the ranks that are slow, with the seconds by which each is in a step, and what is new about it, in words.
        """
        compared = {rank: own.data + own.work for rank, own in enumerate(ranks) if own.data is not None}
        if len(compared) < 2:
            return {}, []
        usual = median_low(compared.values())
        behind = {rank: own - usual for rank, own in compared.items() if own > SLOWER * usual and own - usual > SHARE * seconds}
        before = {rank: self.rows.get(rank, (0, 0)) for rank in behind}
        self.rows = {rank: (windows + 1, taken + steps) for rank, (windows, taken) in before.items()}
        slow = {r: behind[r] for r, (windows, taken) in self.rows.items() if windows >= WINDOWS and taken >= STEPS}
        news = []
        for rank in sorted(slow.keys() - self.known):
            own = ranks[rank]
            news.append(
                f"rank {rank} is slow: the others wait {slow[rank]:.3g} of the {seconds:.3g} s of each step for it; it waits "
                f"{own.data:.3g} s for its data and works {own.work:.3g} s before it needs them"
            )
        news += [f"rank {rank} is no longer slow" for rank in sorted(self.known - behind.keys())]
        self.known = (self.known & behind.keys()) | slow.keys()
        return slow, news


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in *path*, without lines that are cut, damaged or no object; none where there is no file.

    An `OSError` where the file is there and cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    found: list[Any] = []
    for line in text.split("\n"):
        with suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add *line* to *path*; behind what a kill has cut it stands on a line of its own."""
    with path.open("a+b") as file:
        cut = b""
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            cut = b"" if file.read(1) == b"\n" else b"\n"
        # In one piece: several ranks may add to one file.
        file.write(cut + json.dumps(line).encode() + b"\n")
