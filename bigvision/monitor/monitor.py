"""What a run reports, on rank 0 only: a record of each logged step, progress, slow ranks, the last lines."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console

from bigvision import checkpoint
from bigvision.config import Config
from bigvision.disk import read_lines
from bigvision.engine import StepResult
from bigvision.monitor.progress import Display, Forecast, Pace, Pause, facts_of, metric_text
from bigvision.monitor.stragglers import Own, Stragglers
from bigvision.monitor.trackers import Trackers
from bigvision.redact import redacted
from bigvision.runtime import Runtime, gather_json


class Monitor:
    """Writes metrics.jsonl, shows progress and names the next commands. Every rank has one; only rank 0's prints."""

    def __init__(self, config: Config, runtime: Runtime, began: float, trackers: Trackers | None = None) -> None:
        """Args: *began* is the `time.monotonic()` from which the first step's line counts the seconds."""
        self.config, self.runtime, self.began = config, runtime, began
        self.trackers = trackers or Trackers()
        self.first_step = True
        self.console = Console(quiet=not runtime.is_main, highlight=False, soft_wrap=True)
        self.path = Path(config.out) / "metrics.jsonl"
        self.display = Display(self.console, config.monitor.progress)
        self.forecast, self.pace = Forecast(), Pace()
        self.metrics: dict[str, float] = {}
        """Of the last evaluation."""
        self.line: dict[str, Any] = {}
        """The last one of a logged step, with the loss of the last step."""
        self.file: IO[str] | None = None
        self.stragglers = Stragglers()
        self.peaks: list[int] = []
        """Of each rank, the most bytes that it has needed, for the report."""

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False)

    def begin(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        """Start to measure at *step*, also again. Lines beyond it, of what was not saved or is not kept, are dropped."""
        self.close()
        self.steps, self.metrics = steps, metrics
        if self.runtime.is_main:
            if self.path.exists():
                kept = [line for line in read_lines(self.path) if isinstance(at := line.get("step"), int) and at <= step]
                checkpoint.replace(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
                for line in kept:
                    if isinstance(seconds := line.get("seconds"), int | float):
                        self.pace.pauses["evaluation"].append(seconds)
            self.file = self.path.open("a", encoding="utf-8", buffering=1)
            self.display.begin(step, steps, [metric_text(metrics)])
        self.trackers.put("begin", redacted(self.config.to_dict()), step)
        self._restart_clock()

    def after_step(self, result: StepResult, bad: int, waited: float | None) -> dict[str, Any] | None:
        """Log an optimizer step; each ``monitor.every`` steps, and at the last, write it down and return the line.

        *bad* training samples could not be read so far; this rank *waited* so many seconds for each batch since the last line.
        """
        self.seen, self.taken = self.seen + result.samples, self.taken + 1
        loss, grad_norm = result.numbers
        self.line["loss"] = loss
        self.pace.step()
        if self.first_step and not result.skipped:
            self.first_step = False
            seconds = time.monotonic() - self.began
            self.say(f"step {result.step} of {self.steps}: loss {loss:.4f}, {seconds:.1f} s after the start")
        if not self.due(result.step):
            self._show(result.step)
            return None
        gathered = gather_json([peak_memory(self.runtime.device), waited, result.seconds()])
        self.peaks = [peak for peak, *_ in gathered]
        elapsed = self._elapsed()
        slow, news = self.stragglers.take([Own(*rest) for _, *rest in gathered], self.taken, elapsed / self.taken)
        for text in news:
            self.say(text)
        waiting = max(waited for _, waited, _ in gathered if waited is not None) * self.taken
        line = {
            "step": result.step,
            "samples": result.consumed,
            "loss": loss,
            "lr": result.lr,
            "grad_norm": grad_norm,
            "images_per_second": round(self.seen / elapsed, 2),
            "peak_memory": max(self.peaks),
            "waiting": round(min(1.0, waiting / elapsed), 4),
        }
        flops, peak = self.forecast.flops_per_image(result.step), self.forecast.peak_flops
        if flops is not None and peak is not None:
            line["mfu"] = round(flops * self.seen / elapsed / peak, 4)
        stragglers = {str(rank): round(seconds, 4) for rank, seconds in slow.items()}
        more = {"planned_memory": self.forecast.memory, "skipped": result.skipped, "bad_samples": bad, "stragglers": stragglers}
        line |= {name: value for name, value in more.items() if value}
        self._write("record", line)
        self.line = dict(line)
        self._show(result.step)
        self._restart_clock()
        return line

    def due(self, step: int) -> bool:
        """Whether a step is written down."""
        return step % self.config.monitor.every == 0 or step == self.steps

    @contextmanager
    def pause(self, kind: Pause) -> Iterator[None]:
        """What is done in here is no training: it counts in the time left, and not in the images per second."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self.pace.pause(kind, seconds)
        self.paused += seconds

    def after_evaluation(self, step: int, samples: int, metrics: dict[str, float], seconds: float) -> None:
        """Write the metrics of an evaluation down, which took so many *seconds*."""
        self.metrics = metrics
        values = {f"val_{name}": value for name, value in metrics.items()}
        self._write("evaluation", {"step": step, "samples": samples, "seconds": round(seconds, 3)} | values)
        self._show(step, evaluated=True)

    def event(self, step: int, samples: int, facts: dict[str, Any], text: str) -> None:
        """Write *facts* down, and print *text*."""
        self._write("event", {"step": step, "samples": samples} | facts)
        self.say(text)

    def close(self) -> None:
        """Stop drawing; also when the run ends by an error."""
        self.display.close()
        if self.file:
            self.file.close()
            self.file = None

    def farewell(
        self, folder: Path, metrics: dict[str, float], note: str = "", adapters: bool = False, timms: bool = True
    ) -> None:  # fmt: skip
        """Tell the user where the checkpoint is and what to do with it, and *note*.

        timm opens models of its own (*timms*: nothing is built around one) without *adapters*.
        """
        if note:
            self.say(note)
        if text := metric_text(metrics):
            self.say(f"validation {text}")
        self.say(f"checkpoint  {folder}")
        if self.config.monitor.report:
            self.say(f"report      {self.path.parent / 'report.html'}")
        self.say("resume      run the same command again (more steps: --train.epochs or --train.steps)")
        self.say(f"evaluate    bigvision eval {folder}")
        if adapters:
            self.say(f"merge       bigvision export {folder} FILE.safetensors (for peft: FOLDER --adapter)")
        elif timms and (folder / "model.safetensors").exists():
            self.say(f'load        timm.create_model("local-dir:{folder}", pretrained=True)')
        else:
            self.say(f'load        accelerate.load_checkpoint_in_model(model, "{folder}")')

    def _show(self, step: int, evaluated: bool = False) -> None:
        if self.display.shown:
            facts = facts_of(self.line, self.metrics)
            left = self.pace.left(step, self.steps, self.config.train.global_batch, self.forecast)
            if evaluated and self.display.plain:
                facts, left = facts[:3], left or None  # a line of its own, which is short
            self.display.step(step, self.steps, facts, left, at_once=evaluated)

    def _write(self, kind: str, line: dict[str, Any]) -> None:
        line["time"] = round(time.time(), 3)
        if self.file:
            # JSON has no word for what is not finite.
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            self.file.write(json.dumps(finite) + "\n")
            self.trackers.put(kind, finite)

    def _elapsed(self) -> float:
        """Seconds of training since the last line."""
        return time.perf_counter() - self.since - self.paused

    def _restart_clock(self) -> None:
        self.since, self.paused, self.seen, self.taken = time.perf_counter(), 0.0, 0, 0


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a CUDA device, or the most that was resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
