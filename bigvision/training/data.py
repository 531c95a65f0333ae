"""The run's data: opened by rank 0 first, cut into batches by position; unreadable samples are counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bigvision.config import Config, Size, micro_batch, other_sizes, train_size
from bigvision.data import (
    BadSample,
    Batch,
    Batches,
    Mixer,
    Source,
    StepBatch,
    Stream,
    Transform,
    eval_batches,
    open_both,
    sources,
    train_batches,
    transform,
)
from bigvision.data.batch import Mix
from bigvision.data.decode import Decoding
from bigvision.data.on_device import check_decoder
from bigvision.data.order import balanced
from bigvision.data.report import describe
from bigvision.data.transforms import check_channels
from bigvision.errors import UserError
from bigvision.models import Blueprint
from bigvision.monitor import append_line, read_lines
from bigvision.ranges import WAIT, mark
from bigvision.runtime import Runtime, all_or_none, from_main, gather_json
from bigvision.samples import from_bytes, to_bytes
from bigvision.tasks import Task

T = TypeVar("T")
BAD_SAMPLES = "bad_samples.jsonl"
MESSAGE = 4096
"""Bytes that pass from a pipeline's first stage to the others with each micro-batch, where its targets need no more."""
Given = tuple[Any, Any]
"""Training and validation data as the caller has them, in the place of names; the second may be a name."""


@dataclass(frozen=True)
class Data:
    """The training and validation sources, and what of them could not be read."""

    train: Source
    val: Source
    bad: BadSamples
    task: Task

    @property
    def outputs(self) -> int | None:
        """How many outputs the model needs."""
        return self.task.outputs(self.train.classes)


def with_data(config: Config, data: Any, val: Any) -> tuple[Config, Given | None]:
    """*config* that says of whose class the given datasets are, and both of them; only one is a `UserError`."""
    if data is None and val is None:
        return config, None
    if data is None or val is None:
        raise UserError(f"{'data' if data is None else 'val'}: give training and validation data, both or none")
    return replace(config, data=replace(config.data, train=name_of_data(data), val=name_of_data(val))), (data, val)


def name_of_data(data: Any) -> str:
    """What a configuration calls the dataset or name *data*: ``python:Pets``."""
    return data if isinstance(data, str) else f"python:{type(data).__name__}"


def open_data(
    config: Config, runtime: Runtime, task: Task, given: Given | None = None, say: Callable[[str], None] | None = None
) -> Data:  # fmt: skip
    """Open both sources for *task* on every rank, and log with *say* on rank 0 what was found.

    A source that is unknown, missing, empty or does not fit the other is the same `UserError` on every rank.
    """
    if config.data.decode == "cuda":
        all_or_none(lambda: check_decoder(runtime.device))
    train, val = open_on_all(lambda first: open_sources(config, task, first, given), runtime)
    if say is not None and runtime.is_main:
        for line in describe(train, val):
            say(line)
    return Data(train, val, BadSamples(config.data.bad_budget, {"train": len(train), "val": len(val)}), task)


def open_sources(config: Config, task: Task, first: bool, given: Given | None = None) -> tuple[Source, Source]:
    """Open both sources on this rank; the *first* one downloads and indexes what is missing."""
    train, val = open_both(
        *(given or (config.data.train, config.data.val)), root=config.data.root, first=first,
        class_file=config.data.classes, target=task.target, ignore=config.task.ignore,
    )  # fmt: skip
    if train.channels != val.channels:
        raise UserError(f"data.val: images of {val.channels} channels, but those of data.train have {train.channels}")
    if config.data.augment:
        check_channels(train.channels, config.data.policy, config.data.jitter)
    return train, val


def open_validation(config: Config, runtime: Runtime, task: Task, classes: list[str]) -> Data:
    """Open the validation data alone, whose labels follow the *classes* of a checkpoint; it stands for both."""

    def open_it(first: bool) -> Source:
        settings = config.data
        return sources.open_validation(
            settings.train, settings.val, classes=classes, root=settings.root, first=first, target=task.target,
            ignore=config.task.ignore,
        )  # fmt: skip

    if config.data.decode == "cuda":
        all_or_none(lambda: check_decoder(runtime.device))
    val = open_on_all(open_it, runtime)
    return Data(val, val, BadSamples(config.data.bad_budget, {"train": 0, "val": len(val)}), task)


def open_on_all(open_it: Callable[[bool], T], runtime: Runtime) -> T:
    """What *open_it* opens, on every rank: rank 0 downloads and indexes, the others find what it left on a shared disk."""
    first = all_or_none(lambda: open_it(True) if runtime.is_main else None)
    return all_or_none(lambda: first or open_it(False))


def prepare_task(config: Config, data: Data, runtime: Runtime, known: dict[str, Any]) -> dict[str, Any]:
    """Let the task know the training data, on every rank; returns what it has to know of them.

    *known* is what the checkpoint that the run goes on from has of that. A `UserError` where they do not fit together.
    """
    task, classes = data.task, data.train.classes

    def check_balance() -> dict[str, Any]:
        if config.data.balance:
            if len(data.train.parts) > 1:
                raise UserError(
                    f"data.balance: {config.data.balance}, but data.train mixes datasets with weights: use one of both"
                )
            if runtime.is_main and training_targets(data.train, None, "data.balance").ndim != 1:
                raise UserError(
                    f"data.balance: {config.data.balance} needs a class for each sample, but data.train has shares: use 0"
                )
        return task.study(partial(training_targets, data.train), classes, known) if runtime.is_main else {}

    facts = from_main(all_or_none(check_balance))
    all_or_none(lambda: task.prepare(classes, facts))
    return facts


def training_targets(source: Source, most: int | None, key: str = "task.class_weights") -> np.ndarray:
    """The targets of all samples of *source*, stacked, or where it does not list them of *most*, evenly spread.

    With None it is a `UserError`, which names *key*, where it does not list them.
    """
    if not source.lists_targets:
        if most is None:
            raise UserError(f"{key}: {source.name} does not list its labels: give it an attribute 'targets' with all of them")
        number, step = min(most, len(source)), max(1, len(source) // most)
        return np.stack([source.label(place * step) for place in range(number)])
    return np.stack([source.label(index) for index in range(len(source))])


class Feed(Iterator[StepBatch]):
    """This rank's training batches from a step on, without end. After each, call :meth:`finish`."""

    def __init__(
        self, config: Config, data: Data, blueprint: Blueprint, runtime: Runtime, *, step: int, steps: int, position: int,
        say: Callable[[str], None] = lambda text: None, waits: Callable[[bool], None] = lambda waits: None,
    ) -> None:  # fmt: skip
        """After *step* of the run's *steps*, *position* samples were consumed. *say* reports workers that were started again;
        *waits* is called with True before, and False after, each micro-batch is waited for."""
        self.say, self.waits, self.restarts = say, waits, 0
        self.seconds, self.given = 0.0, 0
        self.batch: StepBatch | None = None
        self.data, self.runtime, self.step, self.steps, self.every = data, runtime, step, steps, config.monitor.every
        self.position, self.global_batch = position, config.train.global_batch
        self.train_size = lambda step: train_size(config.data, blueprint.image_size, step, steps)
        self.image_size = self.train_size(step)
        settings, collate = config.data, data.task.collate
        apart, total = settings.repeats, config.train.global_batch
        mixer = None
        if config.task.mixup or config.task.cutmix:
            every = 2 * apart if config.task.mix_each == "pair" else total
            mixer = Mixer(config.seed, config.task.mixup, config.task.cutmix, every, apart)
        parts, members = data.train.parts, None
        if settings.balance:
            parts, members = balanced(training_targets(data.train, None, "data.balance"), settings.balance)
        stream = Stream(
            config.seed, parts, repeats=apart, block=settings.shuffle_block, window=settings.shuffle_window, members=members
        )  # fmt: skip
        self.batches: Batches | None = None
        self.share = self.size = total // runtime.data_ranks
        if runtime.pipeline_ranks == 1:  # the schedules of pipelines take a step's micro-batches all at once
            self.size = micro_batch(config, runtime.data_ranks, 1)

        def begin(position: int) -> Iterator[Batch]:
            if runtime.stage == 0:
                self.batches = train_batches(
                    data.train, _transform(config, data.train, blueprint, self.image_size, train=True), seed=config.seed,
                    position=position, global_batch=total, rank=runtime.data_rank, ranks=runtime.data_ranks,
                    workers=settings.workers, device=runtime.device, stream=stream, mixer=mixer, micro_batch=self.size,
                    collate=collate, on_device=settings.decode == "cuda",
                )  # fmt: skip
            return _relayed(self.batches, runtime)

        self.begin, self.relayed = begin, begin(position)
        self.trace: IO[str] | None = None
        if settings.trace is not None and runtime.stage == 0:
            # Every rank adds whole lines to one file.
            self.trace = Path(settings.trace).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def __next__(self) -> StepBatch:
        if self.batch is not None:
            self.finish()
        if (size := self.train_size(self.step)) != self.image_size:
            bad = _taken(self.batches)
            self.say(f"step {self.step + 1}: training images are {size[0]} x {size[1]} from now on")
            self.go_to(self.step, self.position)
            if self.batches is not None:
                self.batches.bad += bad

        def awaited() -> Iterator[Batch]:
            while True:
                self.waits(True)
                with mark(WAIT):
                    part = next(self.relayed)
                self.waits(False)
                yield part

        self.batch = StepBatch(awaited(), self.share, self.size)
        return self.batch

    def finish(self) -> None:
        """Log what the last batch has brought, once its step is launched. Too many unreadable samples are a `UserError`."""
        assert self.batch is not None
        batch, self.batch = self.batch, None
        batch.finish()
        self.seconds, self.given = self.seconds + batch.waited, self.given + 1
        self.step, self.position = self.step + 1, self.position + self.global_batch
        if self.batches is not None and self.batches.restarts > self.restarts:
            self.restarts = self.batches.restarts
            self.say(f"a data worker died; the workers were started again and went on with step {self.step}")
        if self.trace is not None:
            line = {"step": self.step, "rank": self.runtime.rank, "ids": batch.ids.tolist()}
            self.trace.write(json.dumps(line) + "\n")
        if self.step % self.every == 0 or self.step == self.steps:
            self.data.bad.exchange("train", _taken(self.batches))

    def go_to(self, step: int, position: int) -> None:
        """Go on from another position, at which *step* steps were taken."""
        if self.batches is not None:
            self.batches.close()
        self.step, self.position, self.image_size, self.restarts = step, position, self.train_size(step), 0
        self.relayed = self.begin(position)

    def waited(self) -> float | None:
        """Seconds that this rank waited for each batch since it was last asked; None where another rank reads its data."""
        mean = self.seconds / max(1, self.given)
        self.seconds, self.given = 0.0, 0
        return mean if self.batches is not None else None

    def close(self) -> None:
        """End the worker processes."""
        if self.batches is not None:
            self.batches.close()
        if self.trace is not None:
            self.trace.close()


class Validation(Iterator[Batch]):
    """This rank's batches of one evaluation; every rank gets as many, of as many samples."""

    def __init__(
        self, config: Config, data: Data, blueprint: Blueprint, runtime: Runtime, batch: int,
        split: Literal["train", "val"] = "val",
    ) -> None:  # fmt: skip
        """Of *data*'s *split*, in batches of *batch* samples."""
        self.data, self.batches, self.split = data, None, split
        source = data.val if split == "val" else data.train
        size = other_sizes(config.data).get("data.val_size", blueprint.image_size)
        if runtime.stage == 0:
            self.batches = eval_batches(
                source, _transform(config, source, blueprint, size, train=False), batch=batch, rank=runtime.data_rank,
                ranks=runtime.data_ranks, workers=config.data.workers, device=runtime.device,
                collate=data.task.collate, on_device=config.data.decode == "cuda",
            )  # fmt: skip
        self.number = -(-len(source) // (batch * runtime.data_ranks))
        self.relayed = _relayed(self.batches, runtime, self.number)

    def __next__(self) -> Batch:
        return next(self.relayed)

    def unreadable(self) -> list[BadSample]:
        """What of this rank's batches could not be read, since this was last asked."""
        return _taken(self.batches)

    def finish(self) -> int:
        """Return how many samples could not be read, over all ranks. Too many are a `UserError`."""
        return self.data.bad.exchange(self.split, self.unreadable())

    def close(self) -> None:
        """End the worker processes."""
        if self.batches is not None:
            self.batches.close()


def _taken(batches: Batches | None) -> list[BadSample]:
    if batches is None:
        return []
    found, batches.bad = batches.bad, []
    return found


def _relayed(batches: Batches | None, runtime: Runtime, number: int | None = None) -> Iterator[Batch]:
    """The first stage's batches on all stages of its pipeline, *number* of them or for ever; the others get all but the images.

    They cannot know these by themselves: only who reads the images knows which have a stand-in.
    """
    if runtime.pipeline_ranks == 1:
        assert batches is not None
        yield from batches
        return
    group, first = runtime.mesh["stage"].get_group(), runtime.data_rank
    capacity = MESSAGE
    for _ in count() if number is None else range(number):
        batch = next(batches) if batches is not None else None
        # One message as a rule: the length of what is sent, then what was enough so far. The rest of a longer one follows.
        data = to_bytes(_but_images(batch)) if batch is not None else torch.empty(0, dtype=torch.uint8)
        memory = np.zeros(8 + capacity, dtype=np.uint8)
        memory[:8] = np.array([len(data)]).view(np.uint8)
        message = torch.from_numpy(memory)
        message[8 : 8 + len(data)] = data[:capacity]
        dist.broadcast(message, first, group)
        length = int.from_bytes(memory[:8].tobytes(), "little")
        sent = memory[8 : 8 + length]
        if length > capacity:
            rest = np.empty(length - capacity, np.uint8)
            dist.broadcast(data[capacity:] if batch is not None else torch.from_numpy(rest), first, group)
            sent, capacity = np.concatenate([sent, rest]), length + MESSAGE // 16
        yield batch if batch is not None else _without_images(*from_bytes(sent))


def _but_images(batch: Batch) -> tuple[Any, ...]:
    mix = (batch.mix.weight, batch.mix.box, batch.mix.share, batch.mix.apart) if batch.mix is not None else None
    return batch.targets, batch.ids, batch.valid, mix, list(batch.images.shape[-2:])


def _without_images(targets: Any, ids: Tensor, valid: Tensor, mix: tuple[Any, ...] | None, size: Sequence[int]) -> Batch:
    """A batch that knows of its images only how many they are and their *size*, height and width."""
    images = torch.empty(len(ids), 0, *size, dtype=torch.uint8)
    return Batch(images, targets, ids, valid, Mix(*mix) if mix is not None else None)


def _transform(config: Config, source: Source, blueprint: Blueprint, size: Size, train: bool) -> Transform:
    settings = config.data
    return transform(
        source.style, size, train=train, augment=settings.augment, interpolation=blueprint.interpolation,
        crop_pct=blueprint.crop_pct, crop_mode=blueprint.crop_mode, mean=blueprint.mean, scale=settings.crop_scale,
        hflip=settings.hflip, vflip=settings.vflip, policy=settings.policy, jitter=settings.jitter, erase=settings.erase,
        reduce=settings.reduce, channels=source.channels,
        decoding=Decoding(settings.max_pixels, settings.image_range), ignore=config.task.ignore,
    )  # fmt: skip


class BadSamples:
    """Unreadable samples, counted. Every rank has one and calls all of its methods.

    *budget* is the share (below 1) or number of each split's samples that may be unreadable, *lengths* the splits' samples.
    """

    def __init__(self, budget: float, lengths: dict[str, int]) -> None:
        self.budget, self.lengths = budget, lengths
        self.known: dict[str, set[int]] = {split: set() for split in lengths}
        self.path: Path | None = None
        self.example = ""
        """The last one that was found: where it is, and why it cannot be read."""

    def keep_in(self, path: Path, runtime: Runtime, resumed: bool) -> None:
        """List what is found in the file *path* from now on; what a *resumed* run lists there already is known."""
        if runtime.is_main:
            self.path = path
            if not resumed:
                path.unlink(missing_ok=True)
        lines = [line for line in read_lines(path) if {"split", "id"} <= line.keys()] if runtime.is_main else []
        for split, id in from_main([(line["split"], line["id"]) for line in lines]):
            self.known.setdefault(split, set()).add(id)

    def count(self, split: str) -> int:
        return len(self.known[split])

    def summary(self) -> str:
        """What the user should know at the end; empty where all could be read."""
        counts = [f"{len(ids)} of {self.lengths[split]} samples of data.{split}" for split, ids in self.known.items() if ids]
        return f"{' and '.join(counts)} could not be read: {self.path}" if counts else ""

    def exchange(self, split: str, found: list[BadSample]) -> int:
        """Record what each rank has found since the last time, and return how many different samples these are.

        Where too many samples are unreadable it is a `UserError` on every rank.
        """
        samples = [BadSample(*sample) for part in gather_json(found) for sample in part]
        for sample in samples:
            if sample.id not in self.known[split]:
                self.known[split].add(sample.id)
                if self.path is not None:
                    append_line(self.path, {"split": split} | sample._asdict())
        if samples:
            self.example = f"such as {samples[-1].where}: {samples[-1].reason}"
        allowed = self.budget if self.budget >= 1 else self.budget * self.lengths[split]
        if (count := self.count(split)) > allowed:
            example = f", {self.example}" if self.example else ""
            raise UserError(
                f"data.bad_budget: {self.budget:g} allows {int(allowed)} of {self.lengths[split]} samples of data.{split} to "
                f"be unreadable, {count} are{example}; fix them, or allow more"
            )
        return len({sample.id for sample in samples})
