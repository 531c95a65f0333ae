"""Where a run's records go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow, trackio, trackers of the user's own.

metrics.jsonl stays the source of truth. A tracker runs on rank 0, in a thread of its own, so that training waits neither for
its files nor for its network. One that fails is reported once and gets nothing more; it never ends a run.

``OUT/trackers.json`` has the id of each library's run, by which a restarted run goes on with the same one.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any, Literal

import yaml

from bigvision import checkpoint
from bigvision.config import Config
from bigvision.errors import Stopped, UserError, how_to_install, one_line

IDS = "trackers.json"
WAITING = 10_000
"""Calls that a slow tracker may be behind; what comes then it does not get."""
TO_END = {"finished": 30.0, "stopped": 10.0, "failed": 10.0}
"""Seconds that trackers have to end, by how the run ended: others wait for a run that was stopped or has failed."""
Status = Literal["finished", "stopped", "failed"]
Line = dict[str, Any]
"""A line of metrics.jsonl; what is not finite is None."""


class Tracker:
    """Takes a run's records as they come. Subclass it, override what you need, and pass it to `bigvision.train`.

    All methods are called on rank 0, one after the other, in a thread of this tracker's own. What one raises is reported, and
    no method is called any more; the run goes on.
    """

    def begin(self, config: dict[str, Any], step: int) -> None:
        """The run begins, or goes on, after *step*; lines of later steps that came before will come again.

        It is also called when the run goes back to an earlier checkpoint. *config* is what run.yaml has.
        """

    def record(self, line: Line) -> None:
        """A logged step: ``step``, ``samples``, ``loss``, ``lr``, ..."""

    def evaluation(self, line: Line) -> None:
        """An evaluation: ``step``, ``samples``, ``val_loss``, ..."""

    def event(self, line: Line) -> None:
        """Something else that was written down, such as a skipped step or a spike."""

    def end(self, status: Status) -> None:
        """The run has finished, was stopped by a signal, or failed. After a kill nothing is called."""


class Trackers:
    """Feeds all trackers of a run, each by a thread; on ranks beside 0 there are none."""

    def __init__(self) -> None:
        self.feeds: list[_Feed] = []

    def start(self, trackers: Sequence[Tracker], say: Callable[[str], None]) -> None:
        self.feeds = [_Feed(tracker, say) for tracker in trackers]

    def put(self, method: str, *arguments: Any) -> None:
        """Call *method* of each tracker, later, in its thread."""
        for feed in self.feeds:
            feed.put(method, *arguments)

    def ended(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let all trackers end, for a limited time; *kind* is the error that ends the run, if one does."""
        stopped = kind is not None and issubclass(kind, Stopped | KeyboardInterrupt)
        status: Status = "finished" if kind is None else "stopped" if stopped else "failed"
        deadline = time.monotonic() + TO_END[status]
        for feed in self.feeds:
            feed.put("end", status)
        for feed in self.feeds:
            feed.join(deadline)


class _Feed:
    """Calls the methods of one tracker in a thread."""

    def __init__(self, tracker: Tracker, say: Callable[[str], None]) -> None:
        self.tracker, self.say = tracker, say
        self.name = NAMES.get(type(tracker), type(tracker).__name__)
        self.calls: Queue[tuple[str, tuple[Any, ...]]] = Queue(WAITING)
        self.behind = self.done = False
        self.thread = Thread(target=self._run, name=f"tracker {self.name}", daemon=True)
        self.thread.start()

    def put(self, method: str, *arguments: Any) -> None:
        if self.done:
            return
        try:
            self.calls.put_nowait((method, arguments))
        except Full:
            if not self.behind:
                self.behind = True
                self._warn(f"is {WAITING} lines behind and misses what comes now")

    def join(self, deadline: float) -> None:
        """Wait until the tracker has ended, or for the *deadline*."""
        self.thread.join(max(0.0, deadline - time.monotonic()))
        if self.thread.is_alive() and not self.done:
            self.done = True
            self._warn("did not end in time and may miss the last lines")

    def _run(self) -> None:
        method = ""
        while method != "end" and not self.done:
            method, arguments = self.calls.get()
            try:
                getattr(self.tracker, method)(*arguments)
            except (Exception, SystemExit) as error:  # a library may try to end the program
                if not self.done:
                    self._warn(f"has failed in {method} and gets nothing more: {type(error).__name__}: {one_line(error)}")
                break
        self.done = True

    def _warn(self, what: str) -> None:
        self.say(f"warning: tracker {self.name} {what}; metrics.jsonl has all lines")


def numbers(line: Line) -> dict[str, float]:
    """The finite numbers of a *line* by the names that trackers group: train/loss, val/top1."""
    return {
        f"val/{name[4:]}" if name.startswith("val_") else f"train/{name}": float(value)
        for name, value in line.items()
        if name not in ("step", "time", "seconds") and isinstance(value, int | float) and math.isfinite(value)
    }


def text_of(line: Line) -> str:
    """What an event says, as JSON."""
    return json.dumps({name: value for name, value in line.items() if name not in ("step", "samples", "time")})


class Ids:
    """The ids by which libraries know this run, kept in its folder."""

    def __init__(self, out: Path) -> None:
        self.path = out / IDS

    def get(self, name: str) -> str | None:
        try:
            found = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return None
        return found.get(name) if isinstance(found, dict) else None

    def set(self, name: str, value: str) -> None:
        try:
            found = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            found = {}
        checkpoint.replace(self.path, (json.dumps(found | {name: value}) + "\n").encode())


class _BuiltIn(Tracker):
    """A tracker that `monitor.trackers` names."""

    def __init__(self, out: Path) -> None:
        self.out = out


class TensorBoard(_BuiltIn):
    """Event files in ``OUT/tensorboard``. TensorBoard drops what was logged of steps that come again."""

    writer: Any = None

    def begin(self, config: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is not None:
            self.writer.close()
        self.writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=step + 1)
        text = yaml.safe_dump(config, sort_keys=False)
        self.writer.add_text("config", "\n".join(f"    {row}" for row in text.splitlines()), step)

    def record(self, line: Line) -> None:
        for name, value in numbers(line).items():
            self.writer.add_scalar(name, value, line["step"])

    def evaluation(self, line: Line) -> None:
        self.record(line)
        self.writer.flush()

    def event(self, line: Line) -> None:
        self.writer.add_text("events", text_of(line), line["step"])

    def end(self, status: Status) -> None:
        self.writer.close()


class WeightsAndBiases(_BuiltIn):
    """A run of Weights & Biases, over an axis of its own: lines of steps that come again are drawn over the earlier ones.

    Where and how it is logged is said by wandb's own variables, such as WANDB_PROJECT and WANDB_MODE. What wandb finds out by
    itself about the program, its output, its code and its user is switched off.
    """

    run: Any = None

    def begin(self, config: dict[str, Any], step: int) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        if self.run is not None:
            return
        ids = Ids(self.out)
        if (known := os.environ.get("WANDB_RUN_ID") or ids.get("wandb")) is None:
            ids.set("wandb", known := secrets.token_hex(4))
        settings = wandb.Settings(
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_save_requirements=False,
            host="",
            silent=True,
        )
        self.run = wandb.init(
            id=known, resume="allow", project=os.environ.get("WANDB_PROJECT", "bigvision"),
            name=os.environ.get("WANDB_NAME", self.out.name), dir=str(self.out), settings=settings,
        )  # fmt: skip
        self.run.config.update(config, allow_val_change=True)
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def record(self, line: Line) -> None:
        self.run.log({"step": line["step"]} | numbers(line))

    def evaluation(self, line: Line) -> None:
        self.record(line)

    def event(self, line: Line) -> None:
        self.run.log({"step": line["step"], "event": text_of(line)})

    def end(self, status: Status) -> None:
        self.run.finish(exit_code=int(status == "failed"))


class MLflow(_BuiltIn):
    """A run of MLflow. It keeps both values of a step that comes again, the later one with the later time.

    Where it is logged is said by MLflow's own variables, such as MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME.
    """

    client: Any = None

    def begin(self, config: dict[str, Any], step: int) -> None:
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

        if self.client is not None:
            return
        client, ids = MlflowClient(), Ids(self.out)
        if (known := os.environ.get("MLFLOW_RUN_ID") or ids.get("mlflow")) is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "bigvision")
            found = client.get_experiment_by_name(name)
            experiment = found.experiment_id if found is not None else client.create_experiment(name)
            known = client.create_run(experiment, run_name=self.out.name).info.run_id
            ids.set("mlflow", known)
        self.client, self.id = client, known
        client.update_run(known, status="RUNNING")
        # A parameter cannot change: those of the run's first start stay.
        there = client.get_run(known).data.params
        for name, value in _flat(config):
            if name not in there:
                client.log_param(known, name, value)

    def record(self, line: Line) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(1000 * line["time"])
        self.client.log_batch(self.id, [Metric(name, value, now, line["step"]) for name, value in numbers(line).items()])

    def evaluation(self, line: Line) -> None:
        self.record(line)

    def event(self, line: Line) -> None:
        self.client.set_tag(self.id, f"event.step_{line['step']}", text_of(line))

    def end(self, status: Status) -> None:
        names = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        self.client.set_terminated(self.id, names[status])


class Trackio(_BuiltIn):
    """A run of trackio, in its local database. Lines of steps that come again are there twice.

    Where it is logged is said by trackio's own variables, such as TRACKIO_PROJECT and TRACKIO_SPACE_ID.
    """

    run: Any = None

    def begin(self, config: dict[str, Any], step: int) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        if self.run is not None:
            return
        self.finish = trackio.finish
        ids = Ids(self.out)
        if (known := ids.get("trackio")) is None:
            ids.set("trackio", known := f"{self.out.name}-{secrets.token_hex(3)}")
        project = os.environ.get("TRACKIO_PROJECT", "bigvision")
        self.run = trackio.init(project=project, name=known, config=dict(_flat(config)), resume="allow", embed=False)

    def record(self, line: Line) -> None:
        self.run.log(numbers(line), step=line["step"])

    def evaluation(self, line: Line) -> None:
        self.record(line)

    def event(self, line: Line) -> None:
        self.run.log({"event": text_of(line)}, step=line["step"])

    def end(self, status: Status) -> None:
        self.finish()


BUILT_IN: dict[str, type[_BuiltIn]] = {
    "tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow, "trackio": Trackio,
}  # fmt: skip
"""By the values of `monitor.trackers`, which are the names of their packages and of the extras too."""
NAMES: dict[type[Tracker], str] = {kind: name for name, kind in BUILT_IN.items()}


def open_trackers(config: Config, given: Sequence[Tracker]) -> list[Tracker]:
    """The trackers of `monitor.trackers`, and those that the caller has *given*; nothing of them has begun.

    `UserError` where the library of one is not installed, or what is given is no tracker.
    """
    names = config.monitor.trackers
    for name in names:
        # A folder of that name, as wandb makes one where it runs, is found too, and has no file.
        if (spec := find_spec(name)) is None or spec.origin is None:
            raise UserError(f"monitor.trackers: {name} is not installed: {how_to_install(name)}")
        if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI") and find_spec("sqlalchemy") is None:
            raise UserError(
                "monitor.trackers: mlflow, but MLFLOW_TRACKING_URI names no server; for a database on this machine: "
                "pip install mlflow"
            )
    for tracker in given:
        if not isinstance(tracker, Tracker):
            what = f"the class {tracker.__name__}" if isinstance(tracker, type) else type(tracker).__name__
            raise UserError(f"trackers: {what} is no tracker: give instances of subclasses of bigvision.Tracker")
    return [*(BUILT_IN[name](Path(config.out)) for name in names), *given]


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The keys of *config* with dots, and their values as texts."""
    found = []
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value if isinstance(value, str) else json.dumps(value)))
    return found
