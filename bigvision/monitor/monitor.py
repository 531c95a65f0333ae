"""What a run says of itself, on rank 0 only."""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console

from bigvision.config import Config
from bigvision.engine import StepResult
from bigvision.jsonlines import read_lines
from bigvision.monitor.progress import ProgressBar
from bigvision.monitor.stragglers import Own, Stragglers
from bigvision.runtime import Runtime, gather_json


class Monitor:
    """Writes metrics.jsonl, shows progress and names the next commands. Every rank has one; only rank 0's speaks."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
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
            _keep_lines(self.path, step)
            self.file = self.path.open("a", encoding="utf-8", buffering=1)
            if self.config.monitor.progress:
                self.progress = ProgressBar(self.console, step, steps, metrics)
        self.steps = steps
        self._restart_clock()

    def after_step(
        self, result: StepResult, bad: int = 0, waited: float | None = None
    ) -> dict[str, Any] | None:  # fmt: skip
        """Log an optimizer step; each ``monitor.every`` steps, and at the last, write it down and return the line.

        Args:
            bad: training samples that could not be read so far.
            waited: seconds that this rank waited for each batch of the steps since the last line.
        """
        self.seen, self.taken = self.seen + result.samples, self.taken + 1
        if not self.due(result.step):
            return None
        mine = Own(waited, result.seconds())
        loss, grad_norm = result.numbers
        gathered = gather_json([_peak_memory(self.runtime.device), mine.data, mine.work])
        elapsed = time.perf_counter() - self.since
        slow, said = self.stragglers.take([Own(*rest) for _, *rest in gathered], self.taken, elapsed / self.taken)
        for text in said:
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
        slow = {str(rank): round(seconds, 4) for rank, seconds in slow.items()}
        more = {"skipped": result.skipped, "bad_samples": bad, "stragglers": slow}
        line |= {name: value for name, value in more.items() if value}
        self._write(line)
        if self.progress:
            self.progress.update(result.step, line["loss"], line["images_per_second"])
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
            self.progress.close()
        if self.file:
            self.file.close()
            self.file = None

    def farewell(self, folder: Path, metrics: dict[str, float], note: str = "") -> None:
        """Tell the user where the checkpoint is and what to do with it, and *note*."""
        if note:
            self.say(note)
        if "top1" in metrics:
            self.say(f"validation accuracy {metrics['top1']:.2%}")
        self.say(f"checkpoint  {folder}")
        self.say("resume      run the same command again (more steps: --train.epochs or --train.steps)")
        self.say(f"evaluate    bigvision eval {folder}")
        if (folder / "model.safetensors").exists():
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


def _keep_lines(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = [line for line in read_lines(path) if isinstance(at := line.get("step"), int) and at <= step]
    kept = [json.dumps(line) + "\n" for line in lines]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
