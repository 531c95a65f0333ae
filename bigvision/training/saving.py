"""When a run is saved, and what of it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from bigvision.checkpoint import Retention, Saver, folder_name
from bigvision.config import Config, parse_size
from bigvision.engine import Engine
from bigvision.runtime import Runtime

REQUEST = signal.SIGUSR1


class Saving:
    """Saves a run by steps, by epochs, by minutes and on request. Every rank has one and calls all of its methods."""

    def __init__(
        self, config: Config, engine: Engine, card: dict[str, Any], runtime: Runtime, say: Callable[[str], None]
    ) -> None:
        self.config, self.engine, self.card, self.runtime = config, engine, card, runtime
        keep = config.checkpoint
        self.saver = Saver(
            Path(config.out),
            parse_size(keep.shard_size, "checkpoint.shard_size"),
            Retention(keep.keep, keep.keep_best, keep.keep_every),
            background=keep.background,
            writer=keep.writer,
            timeout=keep.timeout,
            say=say,
        )
        self.saved: int | None = None
        self.requested = False
        self.since = time.monotonic()
        # Only the main thread may take signals.
        listening = threading.current_thread() is threading.main_thread()
        self.before: Any = signal.signal(REQUEST, self._request) if listening else None

    def due(self, epoch_ended: bool) -> bool:
        """Whether the step just taken is to be saved; the same on every rank. Called after each step.

        Raises:
            RankFailure: a save in the background failed.
        """
        plan, step = self.config.checkpoint, self.engine.step
        late = plan.minutes is not None and self.runtime.is_main and time.monotonic() - self.since >= 60 * plan.minutes
        # Clocks differ and a signal reaches one rank: all have to come to the same step.
        asked = any(self.saver.poll(self.requested or late))
        if plan.every is not None:
            return asked or step % plan.every == 0
        return asked or (epoch_ended and plan.minutes is None)

    def save(self, metrics: dict[str, float]) -> None:
        """Begin to write a checkpoint of the run as it stands.

        Raises:
            RankFailure: the one before, or this one, could not be written.
        """
        engine = self.engine
        engine.synchronize()
        progress: dict[str, Any] = {
            "step": engine.step,
            "samples": engine.samples,
            "scalars": engine.scalars(),
            "metrics": metrics,
            "config": self.config.to_dict(),
        }
        self.saver.save(engine.step, engine.fragments(), {"config.json": self.card, "progress.json": progress})
        self.saved, self.requested, self.since = engine.step, False, time.monotonic()

    def finish(self) -> Path:
        """Wait until the last save is on the disk, and return its folder.

        Raises:
            RankFailure: it could not be written.
        """
        assert self.saved is not None
        self.saver.wait()
        return Path(self.config.out) / folder_name(self.saved)

    def close(self) -> None:
        """Wait for what is being written; also when the run ends by an error."""
        if self.before is not None:
            signal.signal(REQUEST, self.before)
        self.saver.close()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
