"""When a run is saved and what of it, after a comparison of what several ranks hold alike; and when it ends."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_64_hexdigest as _hash

from bigvision import checkpoint
from bigvision.checkpoint import Retention, Saver, folder_name
from bigvision.config import CheckpointConfig, Config, parse_size
from bigvision.engine import Engine
from bigvision.fragments import DOWN, UP, Fragment, checksum
from bigvision.redact import without_secrets
from bigvision.runtime import Runtime, all_or_none, from_main, gather_json
from bigvision.signals import SIGNALS
from bigvision.training.build import Build
from bigvision.training.callbacks import Callbacks, Event, Patience
from bigvision.training.run_folder import Say

SHOWN = 4
"""Tensors that an error names."""


class Saving:
    """Saves a run by steps, by epochs, by minutes and when asked to, and knows when it ends early. Every rank has one and calls
    all of its methods.

    A save in the background that failed is raised on every rank as a `RankFailure`, by whichever method hears of it first.
    """

    def __init__(
        self, run: Build, runtime: Runtime, say: Say, callbacks: Callbacks, faults: Callable[[], dict[str, Any]],
        completed: Callable[[int], object],
    ) -> None:  # fmt: skip
        """Args: *faults* gives what a restarted run has to know of them (`Numbers.state`); *completed* gets the step of each
        checkpoint that is complete."""
        self.run, self.runtime, self.callbacks, self.faults = run, runtime, callbacks, faults
        self.config, self.engine, self.completed = run.config, run.engine, completed
        self.evaluated: int | None = run.progress.get("evaluated")
        """The step of the last evaluation, whose metrics are saved."""
        keep, self.out = self.config.checkpoint, Path(self.config.out)
        self.best: float | None = None
        """The best value of `checkpoint.keep_best` that a checkpoint was evaluated with."""
        if (metric := keep.keep_best) is not None:
            step = run.engine.step
            value = all_or_none(lambda: checkpoint.best_value(self.out, metric, step) if runtime.is_main else None)
            self.best = from_main(value)
        self.saver = new_saver(self.out, keep, say)
        self.saved: int | None = None
        self.unreported: list[int] = []
        """Steps of checkpoints that the callbacks have not heard of."""
        self.asking = False
        """Whether this rank has asked for a save that not all have heard of."""
        self.requested = False
        self.stopped_by = ""
        """The signal that asked any rank to stop, once all ranks know of it."""
        self.ended_by = ""
        """Why the run ends before its last step, evaluated and saved, once all ranks know of it."""
        self.patience = Patience(self.config, run.metrics)
        self.patience.restore(run.progress.get("patience"))
        owed = run.progress.get("evaluation_owed", False)
        if run.engine.step < run.steps:
            # What ended it is forgotten once its last evaluation was done: a callback may let the same run go on later.
            self.ended_by = self.patience.why() or (run.progress.get("ending", "") if owed else "")
        self.since = time.monotonic()

    def requests(self) -> frozenset[str]:
        """What this rank asks the others for at this moment: engine requests. Clocks differ, and a signal reaches one rank."""
        plan = self.config.checkpoint
        late = plan.minutes is not None and self.runtime.is_main and time.monotonic() - self.since >= 60 * plan.minutes
        if SIGNALS.save or late:
            self.asking, SIGNALS.save = True, False
        failed = self.saver.failed or self.callbacks.failure is not None
        ends = bool(self.callbacks.stopped_by) and not self.ended_by
        names = {"save": self.asking, "stop": bool(SIGNALS.stop), "failure": failed, "end": ends}
        return frozenset(name for name, wish in names.items() if wish)

    def hear(self, requests: set[str]) -> bool:
        """Take note of what any rank asked for with a step or evaluation; every rank calls it with the same.

        Returns whether the run has to stop. Raises what a callback has raised.
        """
        if "failure" in requests:
            self.callbacks.check()
            self.saver.raise_failure()
        if "save" in requests:
            self.requested, self.asking = True, False
        if "stop" in requests and not self.stopped_by:
            self.stopped_by = next(name for name in gather_json(SIGNALS.stop) if name)
        if "end" in requests and not self.ended_by:
            self.ended_by = self.callbacks.why()
        return bool(self.stopped_by)

    def ask(self) -> None:
        """Exchange requests now: where no step or evaluation carries them."""
        self.hear({name for names in gather_json(sorted(self.requests())) for name in names})

    def take(self, metrics: dict[str, float]) -> None:
        """Take note of the evaluation of the step just taken: ask for a save where it is the best so far, end where patience is
        exhausted.

        Every rank has the same metrics.
        """
        self.evaluated, name = self.engine.step, self.config.checkpoint.keep_best
        self.patience.take(self.engine.step, metrics)
        self.ended_by = self.ended_by or self.patience.why()
        if name is None or not math.isfinite(value := metrics[name]):
            return
        if self.best is None or checkpoint.sign(name) * value > checkpoint.sign(name) * self.best:
            self.best, self.requested = value, True

    @property
    def over(self) -> bool:
        """Whether the step just taken is this start's last one."""
        return bool(self.stopped_by or self.ended_by)

    def due(self, epoch_ended: bool) -> bool:
        """Whether the step just taken is to be saved; the same on every rank."""
        plan = self.config.checkpoint
        if self.requested or self.over:
            return True
        return epoch_ended and plan.minutes is None if plan.every is None else self.engine.step % plan.every == 0

    def save(self, metrics: dict[str, float], owed: bool = False) -> None:
        """Begin to write a checkpoint of the run as it stands.

        *owed*: the evaluation of this step was broken off, and is the first thing to do on going on.
        """
        engine = self.engine
        engine.synchronize()
        if self.config.faults.digest_every is not None:
            check_copies(engine)
        progress = progress_of(engine, self.config, metrics, self.evaluated)
        progress |= {"evaluation_owed": owed, "ending": self.ended_by, "patience": self.patience.state()}
        progress |= {"faults": self.faults(), "data": self.run.facts}
        self.saver.save(engine.step, engine.fragments(), {"config.json": self.run.card, "progress.json": progress})
        self.saved, self.requested, self.since = engine.step, False, time.monotonic()
        self.unreported.append(engine.step)

    def report(self) -> None:
        """Tell the callbacks of the checkpoints that are complete by now."""
        # A save waits for the one before: only the last may still be under way.
        while self.unreported and (len(self.unreported) > 1 or self.saver.done):
            step = self.unreported.pop(0)
            self.completed(step)
            self.callbacks.notify(Event("checkpoint", step, folder=self.out / folder_name(step)))

    def finish(self) -> Path | None:
        """Wait until the last save is on the disk, and return its folder; None where nothing was saved."""
        self.saver.wait()
        return self.out / folder_name(self.saved) if self.saved is not None else None


def new_saver(out: Path, keep: CheckpointConfig, say: Say) -> Saver:
    """What saves checkpoints in the folder *out* as *keep* says. Called on every rank."""
    return Saver(
        out, parse_size(keep.shard_size, "checkpoint.shard_size"), Retention(keep.keep, keep.keep_best, keep.keep_every),
        background=keep.background, writer=keep.writer, verify=keep.verify_after_save, timeout=keep.timeout, say=say,
    )  # fmt: skip


def progress_of(engine: Engine, config: Config, metrics: dict[str, float], evaluated: int | None = None) -> dict[str, Any]:
    """What progress.json of a checkpoint says; *evaluated* is the step that *metrics* are of."""
    beside = [name for name, one in engine.module.named_parameters() if one.requires_grad and not name.endswith((DOWN, UP))]
    return {
        "step": engine.step,
        "samples": engine.samples,
        "scalars": engine.scalars(),
        "metrics": metrics,
        "evaluated": evaluated,
        "config": without_secrets(config.to_dict()),
    } | ({"trained": beside} if config.model.lora else {})


class Corruption(Exception):
    """What ranks hold alike differs; the same on every rank."""


def check_copies(engine: Engine) -> None:
    """Compare over the ranks all that :meth:`Engine.copies` yields. Called on every rank.

    Where some differ, `Corruption` names the tensors, and the ranks that differ from most others.
    """
    mine = _digests(engine.copies())
    # Ranks that hold the same tensors hold the same bits, so one digest of all of them is enough while all is well.
    groups = {held: _hash("".join(found.values()).encode()) for held, found in mine.items()}
    seen: dict[str, set[str]] = defaultdict(set)
    for theirs in gather_json(groups):
        for held, digest in theirs.items():
            seen[held].add(digest)
    if all(len(digests) == 1 for digests in seen.values()):
        return
    # Every rank knows which groups differ, and so all come to the same error.
    unequal = {held: found for held, found in mine.items() if len(seen[held]) > 1}
    where: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, theirs in enumerate(gather_json(unequal)):
        for held, found in theirs.items():
            for name, digest in found.items():
                where[f"{held}:{name}"][digest].append(rank)
    wrong = [_who_differs(key.partition(":")[2], ranks) for key, ranks in where.items() if len(ranks) > 1]
    more = f"; and {len(wrong) - SHOWN} more tensors" if len(wrong) > SHOWN else ""
    raise Corruption(
        f"silent corruption, found after step {engine.step}: what ranks hold alike differs: {'; '.join(wrong[:SHOWN])}{more}. "
        "Nothing of it was saved: check the memory and the device of that rank, and start the run again"
    )


def _who_differs(name: str, ranks: dict[str, list[int]]) -> str:
    """Whose digest of the tensor *name* is another than that of most ranks; *ranks* are those that have each digest."""
    *_, second, most = sorted(ranks.values(), key=len)
    undecided = len(second) == len(most)
    others = sorted(rank for found in ranks.values() if undecided or found is not most for rank in found)
    listed = ", ".join(map(str, others))
    if undecided:
        return f"{name} on ranks {listed}, either of which may be wrong"
    return f"{name} on rank{'s'[: len(others) > 1]} {listed}, unlike on {', '.join(map(str, most))}"


def _digests(fragments: Iterable[Fragment]) -> dict[str, dict[str, str]]:
    """Of each run of a tensor, by its name; those that the same ranks hold together, under a digest of the names."""
    groups: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for fragment in fragments:
        name = f"{fragment.group} {fragment.name}"
        if fragment.values.numel() < fragment.numel:
            name += f"[{fragment.start}:{fragment.start + fragment.values.numel()}]"
        groups[fragment.copy[1]][name] = fragment.values
    found: dict[str, dict[str, str]] = {}
    for values in groups.values():
        found[_hash("\n".join(values).encode())] = dict(zip(values, digests(list(values.values()))))
    return found


def digests(tensors: list[Tensor]) -> list[str]:
    """A digest of the bits of each 1-D tensor, 16 hexadecimal digits; what lies on a device is not copied from it."""
    away = [checksum(tensor) for tensor in tensors if tensor.device.type != "cpu"]
    sums = iter(torch.stack(away).tolist() if away else [])
    return [
        _hash(tensor.contiguous().view(torch.uint8).numpy().data)
        if tensor.device.type == "cpu"
        else f"{next(sums) % 2**64:016x}"
        for tensor in tensors
    ]
