"""The restart log: each start of a run, how it ended, and the smaller micro-batch after a lack of memory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from bigvision.config import Config, check_batches, micro_batch
from bigvision.engine import Engine
from bigvision.errors import Stopped, UserError, lacks_memory, one_line
from bigvision.models import Blueprint
from bigvision.monitor import append_line, read_lines
from bigvision.runtime import RankFailure, Runtime

NAME = "starts.jsonl"


class Starts:
    """The file starts.jsonl of ``out``: a line for each start, for each rank's own error, and for each orderly end."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.path = Path(config.out) / NAME
        self.faults, self.runtime = config.faults, runtime
        # Whoever changes the run has reason to hope.
        self.config = xxhash.xxh3_64_hexdigest(json.dumps(config.to_dict(), sort_keys=True).encode())
        self.engine: Engine | None = None
        """Says at which step an error came; None while it is built."""
        self.smaller: int | None = None
        """The micro-batch that the next start should have, after an error for lack of memory."""

    def begin(self, step: int) -> int | None:
        """Note a start that goes on from *step*. Called on rank 0.

        Returns the micro-batch that starts before this one came to for lack of memory; None where none did.

        Raises:
            UserError: the last starts crashed at the same step, or came to no newer checkpoint, too often.
        """
        starts = self._read()
        last = (starts[-1]["crash"], self.config, None) if starts else ()
        same = _in_a_row(starts, lambda start: (start["crash"], start["config"], start["smaller"]) == last)
        fix = f"fix that, then change the configuration or remove {self.path} to start again"
        if starts and starts[-1]["crash"] is not None and same >= self.faults.same_crash:
            where = "before its first step" if starts[-1]["crash"] < 0 else f"at step {starts[-1]['crash']}"
            raise UserError(
                f"faults.same_crash: {same} starts in a row crashed {where}, the last one with {starts[-1]['error']}: {fix}"
            )
        stuck = _in_a_row(starts, lambda start: (start["step"], start["config"]) == (step, self.config) and not start["ended"])
        if stuck > self.faults.restarts:
            raise UserError(f"faults.restarts: {stuck} starts in a row from step {step} came to no newer checkpoint: {fix}")
        self._write({"start": len(starts) + 1, "step": step, "ranks": self.runtime.world_size, "config": self.config})
        sizes = [start["smaller"] for start in starts if start["config"] == self.config and start["smaller"] is not None]
        return min(sizes, default=None)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note how what runs in here ends, on every rank."""
        try:
            yield
        except UserError:
            self._end("mistake")  # not a restart: whoever fixes it has reason to hope
            raise
        except (Stopped, KeyboardInterrupt):
            self._end("stopped")
            raise
        except Exception as error:
            if not _of_others(error) and self.path.exists():
                step = self.engine.step if self.engine is not None else -1
                said = f"{type(error).__name__}: {one_line(error)[:500]}"
                fix = {"micro_batch": self.smaller} if self.smaller is not None else {}
                self._write({"crash": step, "rank": self.runtime.rank, "error": said} | fix)
            raise
        self._end("done")

    def _end(self, how: str) -> None:
        if self.runtime.is_main:
            self._write({"end": how})

    def _write(self, line: dict[str, Any]) -> None:
        append_line(self.path, {"time": time.strftime("%Y-%m-%d %H:%M:%S")} | line)

    def _read(self) -> list[dict[str, Any]]:
        """The starts, each with where it crashed first (-1 while it was built; None: it did not, or nobody could say)."""
        starts: list[dict[str, Any]] = []
        for line in read_lines(self.path):
            try:
                if "start" in line:
                    fresh = {"crash": None, "error": "", "ended": False, "smaller": None}
                    starts.append({"step": line["step"], "config": line["config"]} | fresh)
                elif "crash" in line and starts:
                    if starts[-1]["crash"] is None:
                        starts[-1] |= {"crash": int(line["crash"]), "error": f"rank {line['rank']}: {line['error']}"}
                    if "micro_batch" in line:
                        starts[-1]["smaller"] = int(line["micro_batch"])
                elif "end" in line and starts:
                    starts[-1]["ended"] = True
            except (ValueError, KeyError, TypeError):
                continue  # edited
        return starts


def _in_a_row(starts: list[dict[str, Any]], like: Any) -> int:
    """How many of the last ones are *like* that."""
    count = 0
    for start in reversed(starts):
        if not like(start):
            break
        count += 1
    return count


def _of_others(error: Exception) -> bool:
    """Whether *error* only says that another rank is gone or has failed: it says so itself, if it still can."""
    words = str(error)
    return isinstance(error, (RankFailure, dist.DistError)) or any(mark in words for mark in ("gloo", "NCCL", "Connection"))


@contextmanager
def retry_with_smaller_batch(config: Config, blueprint: Blueprint, runtime: Runtime, starts: Starts) -> Iterator[None]:
    """When this rank runs out of memory, add to its error what helps, and make the next start use a smaller micro-batch.

    A rank that runs out of memory in the middle of a pass leaves the others inside collectives, where nothing can be agreed.
    So all ranks end, and the next start reads the micro-batch from the restart log.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RankFailure) or not lacks_memory(error):  # a RankFailure repeats another rank's error
            raise
        starts.smaller, advice = smaller(config, blueprint, runtime)
        error.args = (f"{one_line(error)}: {advice}",)
        error.again = starts.smaller is not None  # type: ignore[attr-defined]  # for whoever can start the ranks again
        raise


def smaller(config: Config, blueprint: Blueprint, runtime: Runtime) -> tuple[int | None, str]:
    """Half the micro-batch, or the largest below it that the run allows (None: there is none); and advice for the user."""
    size = micro_batch(config, runtime.data_ranks, runtime.pipeline_ranks)
    half = -(-size // 2)
    less = "use parallel.recompute blocks, a strategy that shards more, or more ranks"
    if config.faults.out_of_memory == "stop":
        return None, f"faults.out_of_memory: stop: use halve, or a train.micro_batch below {size}"
    if size == 1:
        return None, f"train.micro_batch: 1 cannot be halved: {less}"
    modules = list(blueprint.module.modules())
    if any(isinstance(module, BatchNorm) or "running_var" in module._buffers for module in modules):
        return None, (
            f"train.micro_batch: {size} is what batch normalisation takes its statistics over, another one trains otherwise: "
            f"choose it yourself, or {less}"
        )
    reason = ""
    for found in range(half, 0, -1):
        try:
            check_batches(with_micro_batch(config, found), runtime.data_ranks, runtime.pipeline_ranks)
            return found, f"start again to go on with train.micro_batch {found} instead of {size}"
        except UserError as error:
            reason = reason or str(error)
    return None, f"no train.micro_batch below {size} is allowed ({reason}): {less}"


def with_micro_batch(config: Config, size: int) -> Config:
    """*config* with micro-batches of *size* samples."""
    train, parallel = replace(config.train, micro_batch=size), replace(config.parallel, microbatches=None)
    return replace(config, train=train, parallel=parallel)
