"""Saving while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from bigvision.checkpoint.commit import Verify, Writer, commit
from bigvision.checkpoint.disk import ONE_WRITER, file_system
from bigvision.checkpoint.memory import Arena
from bigvision.checkpoint.pieces import Plan, plan
from bigvision.checkpoint.retention import Retention
from bigvision.errors import lacks_memory
from bigvision.fragments import Fragment
from bigvision.runtime import RankFailure, from_main, gather_json


class Saver:
    """Saves a run's checkpoints, one at a time; training waits only until this rank has copied what it writes.

    Every rank has one and calls all of its methods.
    """

    def __init__(
        self, out: Path, shard_size: int, retention: Retention, *, background: bool = True,
        writer: Literal["auto"] | Writer = "auto", verify: Verify = "sample", timeout: float = 600.0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        """Args:
        background: False writes before training goes on, and holds no copy.
        writer: "auto" takes what suits the file system of *out*.
        verify: how much of what was written is read back before older checkpoints are pruned.
        timeout: seconds that a rank waits for the others' answers while a checkpoint is written.
        say: called with one line: which file system *out* is on, where that matters; that there is no memory for the copy.
        """
        self.out, self.shard_size, self.retention, self.say = out, shard_size, retention, say
        self.writer: Writer = self._suitable() if writer == "auto" else writer
        self.verify: Verify = verify
        self.arena = Arena() if background else None
        self.thread: threading.Thread | None = None
        self.failure: Exception | None = None
        # A group of its own: collectives of the background thread must not meet those of training.
        self.group: Any = None
        if dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def save(self, step: int, fragments: Iterable[Fragment], documents: dict[str, Any]) -> None:
        """Begin to save; *fragments* may change as soon as this returns. The save before is waited for.

        Raises:
            RankFailure: the save before failed, or this one if it is not in the background.
        """
        self.wait()
        content = plan(list(fragments), self.shard_size)
        if (copy := self._copied(content)) is None:
            self._commit(step, content, documents)
            self.wait()
        else:
            self.thread = threading.Thread(target=self._commit, args=(step, copy, documents), name="checkpoint")
            self.thread.start()

    @property
    def failed(self) -> bool:
        """Whether a save of this rank has failed in the background. Does not communicate."""
        return self.failure is not None

    def raise_failure(self) -> None:
        """Raise what any rank's save in the background failed with. Called by all ranks, once any of them has `failed`.

        Raises:
            RankFailure: names the first rank that failed and its error; the same on every rank.
        """
        self._join()  # a rank whose save is still under way comes to the same end
        failure, self.failure = self.failure, None
        for text in gather_json(failure and str(failure)):
            if text:
                raise RankFailure(text) from failure

    @property
    def done(self) -> bool:
        """Whether the last save is complete on the disk, as far as this rank knows."""
        return self.failure is None and (self.thread is None or not self.thread.is_alive())

    def wait(self) -> None:
        """Wait until nothing is being saved.

        Raises:
            RankFailure: it failed.
        """
        self._join()
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Wait until nothing is being saved; a failure is no longer reported."""
        self._join()

    def _join(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _suitable(self) -> Writer:
        # As rank 0 sees it: all have to do the same.
        found: str = from_main(file_system(self.out))
        writer: Writer = "owner" if found in ONE_WRITER else "direct"
        if found:
            self.say(f"out: {self.out} is on {found}: checkpoint.writer is {writer}")
        return writer

    def _copied(self, content: Plan) -> Plan | None:
        if self.arena is None:
            return None
        try:
            return Plan(content.layouts, self.arena.copy(content.pieces))
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            # The other ranks need not know: this one takes part in the same collectives, before training goes on.
            self.arena = None
            self.say(f"no memory for a copy of the state ({error}): checkpoints are written before training goes on")
            return None

    def _commit(self, step: int, content: Plan, documents: dict[str, Any]) -> None:
        try:
            commit(self.out, step, content, documents, self.retention, self.writer, self.group, self.verify)
        except Exception as error:
            self.failure = error
