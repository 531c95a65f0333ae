"""The progress bar of a run, and what an evaluation found in words."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """Shows loss, accuracy, images/s and the time left."""

    def __init__(self, console: Console, step: int, steps: int, metrics: dict[str, float]) -> None:
        self.console, self.steps = console, steps
        self.loss, self.speed, self.accuracy = "", "", accuracy_text(metrics)
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
        self.accuracy = accuracy_text(metrics)
        self.bar.update(self.task, completed=step, facts=self._facts())
        if not self.console.is_terminal:
            self.console.print(f"step {step}/{self.steps}  {self._facts()}", markup=False)

    def _facts(self) -> str:
        return "  ".join(fact for fact in (self.loss, self.accuracy, self.speed) if fact)


def accuracy_text(metrics: dict[str, float]) -> str:
    """The accuracy, or the first metric that is not the loss."""
    name = next((name for name in ("top1", *metrics) if name in metrics and name not in ("loss", "ema_loss")), None)
    if name is None:
        return ""
    word, form = ("accuracy", ".2%") if name == "top1" else (name, ".4g")
    averaged = f" (EMA {metrics[f'ema_{name}']:{form}})" if f"ema_{name}" in metrics else ""
    return f"{word} {metrics[name]:{form}}{averaged}"
