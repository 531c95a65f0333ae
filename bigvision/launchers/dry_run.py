"""What `bigvision doctor` tries: it opens the data, writes to `out`, adds up a tensor over the ranks and takes two steps."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from bigvision import disk
from bigvision.config import Config
from bigvision.errors import UserError
from bigvision.launchers.machine import Here, Lines, error, ok, warning
from bigvision.launchers.placement import ranges
from bigvision.monitor.monitor import peak_memory
from bigvision.runtime import Runtime, Watchdog, gather_json

if TYPE_CHECKING:
    from bigvision.data import Source

STEPS = 2
SAMPLES = 16
"""Samples of each split that are decoded: the first ones, and some evenly spread."""
MOST_LABELS = 5_000_000
"""Samples of a dataset whose labels are looked at."""
BLOCK, BLOCKS, WRITING = 8 << 20, 8, 2.0
"""Bytes that are written to `out` at once, how often, and the seconds after which that is enough."""
REDUCED = {"cuda": 256 << 20, "cpu": 16 << 20}
"""Bytes of the all-reduce that is measured."""
REPEATS = 5
SLOW = 2e9
"""Bytes/s below which an all-reduce between GPUs is slow: PCIe and 25-Gbit Ethernet give more."""


# Data and output.


def data(here: Here, classes: list[str]) -> Lines:
    """Whether both splits are there, their first samples can be decoded, and their labels agree; adds the *classes*."""
    from bigvision.data.report import describe
    from bigvision.tasks import build_task
    from bigvision.training.data import open_sources, training_targets

    config = here.config
    task = build_task(config.task)
    train, val = open_sources(config, task, first=here.identity.rank == 0)
    classes += train.classes
    for line in describe(train, val):
        yield ok(line)
    for key, source in (("data.train", train), ("data.val", val)):
        yield from _decoded(config, key, source)
    if task.target == "label" and train.lists_targets and val.lists_targets and len(train) + len(val) <= MOST_LABELS:
        targets = training_targets(train, None), training_targets(val, None)
        if any(labels.ndim != 1 for labels in targets):  # shares of classes
            return
        if unseen := [train.classes[label] for label in np.setdiff1d(targets[1], targets[0])]:
            yield warning(
                f"data.val: {len(unseen)} classes such as {unseen[0]!r} have no sample in data.train, and cannot be learned: "
                "add some, or leave them out"
            )


def _decoded(config: Config, key: str, source: Source) -> Lines:
    """Whether `SAMPLES` of *source* can be decoded."""
    from bigvision.data.decode import Decoding
    from bigvision.data.reading import Reader, Request
    from bigvision.data.transforms import transform

    small = transform(
        source.style, 64, train=False, channels=source.channels, mean=(0.0,) * source.channels,
        decoding=Decoding(config.data.max_pixels, config.data.image_range), ignore=config.task.ignore,
    )  # fmt: skip
    reader, length = Reader(source, small, config.seed), len(source)
    chosen = sorted({*range(min(SAMPLES // 2, length)), *(n * length // SAMPLES for n in range(SAMPLES))})
    bad = []
    for index in chosen:
        answer = reader[Request(index, 1, 1)]
        if isinstance(answer, UserError):
            raise answer
        bad += answer.bad
    if bad:
        kind = error if len(bad) == len(chosen) else warning
        yield kind(
            f"{key}: {len(bad)} of {len(chosen)} samples that were tried cannot be read, such as {bad[0].where}: "
            f"{bad[0].reason}: fix them; data.bad_budget: {config.data.bad_budget:g} allows some"
        )


def out(here: Here, classes: Sequence[str]) -> Lines:
    """Whether `out` can be written, how fast, and has space for the checkpoints that are kept."""
    from bigvision import checkpoint

    config, keep, folder = here.config, here.config.checkpoint, Path(here.config.out)
    there = nearest_folder(folder)
    try:
        speed = written(there)
    except OSError as failure:
        raise UserError(f"out: {folder} cannot be written ({failure.strerror}): choose another with --out") from None
    if here.identity.rank == 0 and (folder / ".lock").exists():
        checkpoint.Lock(folder).release()  # raises where another run has it
    found, steps = os.statvfs(there), checkpoint.steps_in(folder)
    free, kind = found.f_bavail * found.f_frsize, disk.file_system(there)
    yield ok(
        f"{folder}{f' on {kind}' if kind else ''}: {free / 1e9:.1f} GB free, written with {speed / 1e6:.0f} MB/s"
        f"{f'; has a run at step {steps[0]}' if steps else ''}"
    )
    if found.f_files and not found.f_favail:
        yield error(f"out: {there} has no free inodes, so no file can be made there: remove files, or choose another --out")
    size = checkpoint_bytes(config, len(classes))
    more = max(1, keep.keep + 1 + (keep.keep_best is not None) - len(steps))
    space = f"{more} more checkpoints of {size / 1e9:.3g} GB"
    if free < more * size:
        yield error(
            f"out: {folder} has {free / 1e9:.3g} GB free, but {space} may lie there (checkpoint.keep: {keep.keep}, and one "
            "that is written): free space, choose another --out, or keep fewer"
        )
    else:
        yield ok(f"has space for {space}, each of about {size / speed:.2g} s")
    if size / speed > keep.timeout:
        yield warning(
            f"out: a checkpoint may take {size / speed:.0f} s at the speed of this rank, longer than checkpoint.timeout: "
            f"{keep.timeout:g}: choose a faster disk, or a longer timeout"
        )


def nearest_folder(path: Path) -> Path:
    """*path*, or what above it is there."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def written(folder: Path) -> float:
    """Bytes per second with which a file in *folder* is written and brought to the disk; it is removed again."""
    path, block = folder / f".doctor-{os.getpid()}-{time.time_ns()}", os.urandom(BLOCK)
    descriptor = disk.open_new(path)
    try:
        began, count = time.monotonic(), 0
        while count < BLOCKS and time.monotonic() < began + WRITING:
            disk.write_at(descriptor, memoryview(block), count * BLOCK)
            count += 1
        os.fsync(descriptor)
        return count * BLOCK / max(1e-6, time.monotonic() - began)
    finally:
        os.close(descriptor)
        path.unlink()


def checkpoint_bytes(config: Config, classes: int) -> int:
    """Bytes of the tensors in a checkpoint: the model, the optimizer's state, and the average of the weights."""
    from bigvision.engine.ema import never_averaged
    from bigvision.models import blueprint
    from bigvision.models.formats import hold_frozen
    from bigvision.optim import freeze
    from bigvision.planning.state import optimizer_bytes
    from bigvision.tasks import build_task
    from bigvision.training.build import without_weights

    task, model = build_task(config.task), without_weights(config).model
    outputs = model.num_classes or task.outputs([""] * classes)
    plan = blueprint(model, outputs, around=task.model(config))
    freeze(plan.module, model.trainable, plan.adapters)
    if model.frozen_dtype == "bf16":
        hold_frozen(plan.module, plan.input_shape)
    saved = plan.module.state_dict(keep_vars=True)
    size = sum(tensor.nbytes for tensor in saved.values())
    for parameter in (parameter for parameter in plan.module.parameters() if parameter.requires_grad):
        size += optimizer_bytes(config.optim, tuple(parameter.shape), parameter.numel())
    if config.ema.decay is not None:
        still = never_averaged(plan.module)
        size += sum(tensor.nbytes for name, tensor in saved.items() if name not in still and tensor.is_floating_point())
    return size


# A process group, and a run in it.


def scratch(config: Config) -> str:
    """A new folder for a run, on the file system of `out`, which all hosts see."""
    return tempfile.mkdtemp(prefix=".doctor-", dir=nearest_folder(Path(config.out)))


def all_reduce(runtime: Runtime) -> Lines:
    """How fast the ranks add up a tensor."""
    size = REDUCED[runtime.device.type]
    tensor = torch.empty(size // 4, device=runtime.device)
    seconds, right = math.inf, True
    for _ in range(1 + REPEATS):  # the first one makes the connections
        tensor.fill_(1.0)
        dist.barrier()
        _wait_for(runtime.device)
        began = time.perf_counter()
        dist.all_reduce(tensor)
        _wait_for(runtime.device)
        seconds = min(seconds, time.perf_counter() - began)
        right = right and bool((tensor == runtime.world_size).all())
    gathered = gather_json([seconds, right])
    seconds, ranks = max(seconds for seconds, _ in gathered), runtime.world_size
    speed = 2 * (ranks - 1) / ranks * size / seconds
    if wrong := [rank for rank, (_, right) in enumerate(gathered) if not right]:
        yield error(f"sums over ranks are wrong on rank {ranges(wrong)}: take these devices or links out of use")
    yield ok(f"{size >> 20} MB over {ranks} ranks in {seconds * 1e3:.3g} ms: {speed / 1e9:.3g} GB/s for each rank")
    if runtime.device.type == "cuda" and speed < SLOW:
        yield warning(
            f"{speed / 1e9:.3g} GB/s between GPUs is slow: compare with the lines on links and network, and with what NCCL has "
            "chosen (NCCL_DEBUG=INFO)"
        )


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def steps(config: Config, folder: Path, runtime: Runtime, watch: Watchdog) -> Lines:
    """Take `STEPS` steps of the recipe, in *folder*."""
    from bigvision.training.build import build
    from bigvision.training.data import Feed
    from bigvision.training.run_folder import explain_errors

    saved = config.checkpoint
    if saved.resume.isdecimal():  # a step of `out`
        saved = replace(saved, resume="auto")
    config = replace(config, out=str(folder), checkpoint=saved, data=replace(config.data, trace=None))
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(runtime.device)
    notes: list[str] = []
    took: list[str] = []
    with ExitStack() as stack:
        run = build(config, runtime, notes.append, stack)
        engine = run.engine
        with explain_errors(run.config, engine, run.blueprint, runtime, run.starts):
            feed = Feed(
                run.config, run.data, run.blueprint, runtime, step=engine.step, steps=run.steps, position=engine.samples,
                waits=watch.waits_for_data,
            )  # fmt: skip
            stack.callback(feed.close)
            for _ in range(min(STEPS, run.steps - engine.step)):
                watch.beat("step", engine.step + 1)
                began = time.perf_counter()
                result = engine.train_step(next(feed))
                feed.finish()
                loss, _ = result.numbers
                seconds = max(gather_json(time.perf_counter() - began))
                took.append(f"loss {loss:.4f} in {seconds:.2f} s")
                if result.skipped and not result.overflowed:
                    yield error(
                        f"step {result.step}: the loss, a gradient or a statistic is not finite: look at the data and at the "
                        "weights, lower optim.lr, or use parallel.precision bf16 or fp32"
                    )
        peak = max(gather_json(peak_memory(runtime.device)))
    for note in notes if runtime.is_main else ():
        if note.startswith("warning: ") and "/dev/shm" not in note:
            yield warning(note.removeprefix("warning: "))
    yield ok(f"{len(took)} steps of {config.train.global_batch} samples: {', '.join(took)}; peak memory {peak / 1e9:.2f} GB")
