"""When a run is saved, and what of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigvision import checkpoint
from bigvision.checkpoint import Retention, Saver, folder_name
from bigvision.config import Config, parse_size
from bigvision.engine import Engine
from bigvision.runtime import Runtime, all_or_none, from_main, gather_json
from bigvision.signals import SIGNALS
from bigvision.training.build import Build
from bigvision.training.callbacks import Callbacks, Event
from bigvision.training.digest import check_copies


class Saving:
    """Saves a run by steps, by epochs, by minutes and when asked to. Every rank has one and calls all of its methods."""

    def __init__(self, run: Build, runtime: Runtime, say: Callable[[str], None], faults: Callable[[], dict[str, Any]]) -> None:
        """Args: *faults* gives what a restarted run has to know of them (`Numbers.state`)."""
        self.faults, self.runtime = faults, runtime
        self.config, self.engine, self.card, self.facts = run.config, run.engine, run.card, run.facts
        self.evaluated = run.evaluated
        """The step of the last evaluation, whose metrics are saved."""
        keep, out = self.config.checkpoint, Path(self.config.out)
        self.best: float | None = None
        """The best value of `checkpoint.keep_best` that a checkpoint was evaluated with."""
        if (metric := keep.keep_best) is not None:
            value = all_or_none(lambda: checkpoint.best_value(out, metric, run.engine.step) if runtime.is_main else None)
            self.best = from_main(value)
        self.saver = Saver(
            out,
            parse_size(keep.shard_size, "checkpoint.shard_size"),
            Retention(keep.keep, keep.keep_best, keep.keep_every),
            background=keep.background,
            writer=keep.writer,
            verify=keep.verify_after_save,
            timeout=keep.timeout,
            say=say,
        )
        self.saved: int | None = None
        self.untold: list[int] = []
        self.asking = False
        """Whether this rank has asked for a save that not all have heard of."""
        self.requested = False
        self.stopped_by = ""
        """The signal that asked any rank to stop, once all ranks know of it."""
        self.since = time.monotonic()

    def wishes(self) -> frozenset[str]:
        """What this rank asks the others for at this moment: engine requests. Clocks differ, and a signal reaches one rank."""
        plan = self.config.checkpoint
        late = plan.minutes is not None and self.runtime.is_main and time.monotonic() - self.since >= 60 * plan.minutes
        if SIGNALS.save or late:
            self.asking, SIGNALS.save = True, False
        names = {"save": self.asking, "stop": bool(SIGNALS.stop), "failure": self.saver.failed}
        return frozenset(name for name, wish in names.items() if wish)

    def hear(self, requests: set[str]) -> None:
        """Take note of what any rank asked for with a step or evaluation; every rank calls it with the same.

        Raises:
            RankFailure: a save in the background failed.
        """
        if "failure" in requests:
            self.saver.raise_failure()
        if "save" in requests:
            self.requested, self.asking = True, False
        if "stop" in requests and not self.stopped_by:
            self.stopped_by = next(name for name in gather_json(SIGNALS.stop) if name)

    def ask(self) -> None:
        """Exchange requests now: where no step or evaluation carries them.

        Raises:
            RankFailure: a save in the background failed.
        """
        self.hear({name for names in gather_json(sorted(self.wishes())) for name in names})

    def take(self, metrics: dict[str, float]) -> None:
        """Take note of the evaluation of the step just taken, and ask for a save where it is the best so far.

        Every rank has the same metrics.
        """
        self.evaluated, name = self.engine.step, self.config.checkpoint.keep_best
        if name is None or not math.isfinite(value := metrics[name]):
            return
        if self.best is None or checkpoint.sign(name) * value > checkpoint.sign(name) * self.best:
            self.best, self.requested = value, True

    def due(self, epoch_ended: bool) -> bool:
        """Whether the step just taken is to be saved; the same on every rank."""
        plan, step = self.config.checkpoint, self.engine.step
        asked = self.requested or bool(self.stopped_by)
        if plan.every is not None:
            return asked or step % plan.every == 0
        return asked or (epoch_ended and plan.minutes is None)

    def save(self, metrics: dict[str, float], owed: bool = False) -> None:
        """Begin to write a checkpoint of the run as it stands.

        Args:
            owed: the evaluation of this step was broken off, and is the first thing to do on going on.

        Raises:
            RankFailure: the one before, or this one, could not be written.
            Corruption: what ranks hold alike differs.
        """
        engine = self.engine
        engine.synchronize()
        if self.config.faults.digest_every is not None:
            check_copies(engine)
        progress = progress_of(engine, self.config, metrics, self.evaluated)
        progress |= {"evaluation_owed": owed, "faults": self.faults(), "data": self.facts}
        self.saver.save(engine.step, engine.fragments(), {"config.json": self.card, "progress.json": progress})
        self.saved, self.requested, self.since = engine.step, False, time.monotonic()
        self.untold.append(engine.step)

    def tell(self, told: Callbacks) -> None:
        """Tell of the checkpoints that are complete by now."""
        # A save waits for the one before: only the last may still be under way.
        while self.untold and (len(self.untold) > 1 or self.saver.done):
            step = self.untold.pop(0)
            told.tell(Event("checkpoint", step, folder=Path(self.config.out) / folder_name(step)))

    def wait(self) -> None:
        """Wait until the last save is on the disk.

        Raises:
            RankFailure: it could not be written.
        """
        self.saver.wait()

    def finish(self) -> Path | None:
        """Wait until the last save is on the disk, and return its folder; None where nothing was saved.

        Raises:
            RankFailure: it could not be written.
        """
        self.wait()
        return Path(self.config.out) / folder_name(self.saved) if self.saved is not None else None

    def close(self) -> None:
        """Wait for what is being written; also when the run ends by an error."""
        self.saver.close()


def progress_of(engine: Engine, config: Config, metrics: dict[str, float], evaluated: int | None = None) -> dict[str, Any]:
    """What progress.json of a checkpoint says; *evaluated* is the step that *metrics* are of."""
    return {
        "step": engine.step,
        "samples": engine.samples,
        "scalars": engine.scalars(),
        "metrics": metrics,
        "evaluated": evaluated,
        "config": config.to_dict(),
    }
