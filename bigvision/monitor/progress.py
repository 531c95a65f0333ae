"""The progress bar, or lines where there is no terminal to draw on."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """Shows loss, accuracy, images/s and the time left."""

    def __init__(self, console: Console, step: int, steps: int, metrics: dict[str, float]) -> None:
        self.console, self.steps = console, steps
        self.loss, self.speed, self.accuracy = "", "", _accuracy(metrics)
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
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

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.stop()

    def _facts(self) -> str:
        return "  ".join(fact for fact in (self.loss, self.accuracy, self.speed) if fact)


def _accuracy(metrics: dict[str, float]) -> str:
    return f"accuracy {metrics['top1']:.2%}" if "top1" in metrics else ""
