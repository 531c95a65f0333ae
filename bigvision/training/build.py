"""From a configuration to a run that is ready for its next step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from bigvision import checkpoint
from bigvision.checkpoint import Checkpoint
from bigvision.config import Config, Size, auto_keys, micro_batch, other_sizes, pair, stage_end, without_auto
from bigvision.data import check_source
from bigvision.engine import Engine, Teacher, build_engine, check_engine
from bigvision.engine.state import is_frozen
from bigvision.errors import UserError, either
from bigvision.models import (
    Blocks,
    Blueprint,
    GivenModel,
    SkippedBranches,
    blueprint,
    check_model,
    dropping,
    find_blocks,
    find_teacher,
    given_card,
    given_name,
    model_card,
    training_flops,
)
from bigvision.optim import freeze
from bigvision.planning.hardware import device_named, peak_of
from bigvision.planning.start import Planner, with_mesh
from bigvision.redact import redacted
from bigvision.runtime import Runtime, all_or_none, from_main, warn_of_shared_memory
from bigvision.tasks import Task, build_task, task_name
from bigvision.training.callbacks import Patience
from bigvision.training.data import BAD_SAMPLES, Data, Given, open_data, prepare_task
from bigvision.training.run_folder import (
    Starts,
    applied_origin,
    check_same_run,
    check_same_scale,
    data_facts,
    earlier_strategy,
    record,
    refusal,
    why_other_tensors,
    with_drop_path_mode,
    with_micro_batch,
)


@dataclass
class Build:
    """Everything the training loop needs."""

    config: Config
    """What was asked for, with what auto became and the micro-batch that the ranks have memory for."""
    runtime: Runtime
    """The ranks, with the mesh of *config*."""
    starts: Starts
    engine: Engine
    data: Data
    blueprint: Blueprint
    card: dict[str, Any]
    """timm's model card, config.json of every checkpoint."""
    steps: int
    """Optimizer steps of the whole run."""
    metrics: tuple[str, ...]
    """Names of those of an evaluation."""
    facts: dict[str, Any]
    """The fingerprints of the data, for progress.json of every checkpoint (see `run_folder`)."""
    accept: Callable[[Checkpoint], None]
    """Raises `UserError` where a checkpoint was trained on other data or classes."""
    resumed: Path | None
    """The step folder that was restored."""
    progress: dict[str, Any]
    """What its progress.json says; empty at a fresh start."""


def build(
    config: Config, runtime: Runtime, say: Callable[[str], None], stack: ExitStack, given: Given | None = None,
    model: GivenModel | None = None, task: Task | None = None,
) -> Build:  # fmt: skip
    """Check everything that can be checked without a model, then build, shard and restore it. Called on every rank.

    *stack* lets go of the output folder and the engine when the run ends. *given* are datasets that are not opened by name,
    *model* is the caller's own, or a function that builds it, and *task* the caller's.
    """
    out = Path(config.out)

    learned = all_or_none(lambda: build_task(config.task, task))
    metrics = learned.metrics
    if config.ema.decay is not None and config.ema.evaluate:
        metrics += tuple(f"ema_{name}" for name in metrics)

    def check() -> None:
        for key, spec in (("data.train", config.data.train), ("data.val", config.data.val)):
            if given is None or not spec.startswith("python:"):
                check_source(spec, key=key)
        check_engine(without_auto(config), runtime, learned)
        if learned.teacher is not None:
            find_teacher(learned.teacher)
        if (best := config.checkpoint.keep_best) is not None and best not in metrics:
            raise UserError(f"checkpoint.keep_best: {best} is no metric of this run: use {either(metrics)}")
        Patience(config, metrics)

    # Together, also where every rank would find the same by itself: one that left early would break the others' start.
    all_or_none(check)
    take_folder(out, runtime, stack, say)
    warn_of_shared_memory(runtime, say)
    resume = applied_origin(config, runtime, say)
    found = checkpoint.find(resume, out, config.checkpoint.verify, say)
    config = with_drop_path_mode(config, found)
    starts = Starts(config, runtime)
    begin = (lambda: starts.begin(found.progress["step"] if found else 0)) if runtime.is_main else lambda: None
    smaller = from_main(all_or_none(begin))
    stack.enter_context(starts.logged())
    all_or_none(lambda: check_model((config if found is None else without_weights(config)).model, model))
    data = open_data(config, runtime, learned, given, say)
    about = prepare_task(config, data, runtime, found.card.get("task", {}) if found else {})
    earlier = earlier_strategy(out, runtime.world_size) if runtime.is_main and auto_keys(config) else None
    planner = Planner(runtime, say, model, task, data.outputs)
    config, keep = planner.settle(config, earlier)
    all_or_none(lambda: keep(out))
    runtime = stack.enter_context(with_mesh(config, runtime))
    if smaller is not None:
        say(f"{starts.path}: a rank was out of memory: train.micro_batch is {smaller}")
        config = with_micro_batch(config, smaller)
    all_or_none(lambda: planner.write(config, out) if runtime.is_main else None)
    fresh = config if found is None else without_weights(config)
    if (steps := config.train.steps) is None:
        # The last one may reach into the next epoch, so that every sample is seen.
        steps = math.ceil(config.train.epochs * len(data.train) / config.train.global_batch)
    if found and found.progress["step"] > steps:
        raise UserError(
            f"train.{'epochs' if config.train.steps is None else 'steps'}: the run would end at step {steps}, "
            f"but out: {out} holds a run that is at step {found.progress['step']}: name another folder for this one "
            f"(--out, or out= in Python), or more than {found.progress['step']} steps to train that one for longer"
        )
    facts, classes = data_facts(config, data, runtime), data.train.classes
    accept = partial(check_same_run, facts=facts, classes=classes, allow=config.checkpoint.allow, say=say)
    if found:
        accept(found)
        check_same_scale(found, config)
    resumes = found is not None
    engine, plan, card = build_model(
        fresh, data.outputs, runtime, steps, say, data.train.channels, model, resumes, task=learned, classes=classes
    )  # fmt: skip
    if config.data.resize_schedule:
        say(stages_in_words(config, plan.image_size, steps))
    if classes:
        card["label_names"] = list(classes)  # timm's key
    if about:
        card["task"] = about
    stack.callback(engine.close)
    starts.engine = engine
    data.bad.keep_in(out / BAD_SAMPLES, runtime, resumes)
    if found:
        found = found.restore_or_older(list(engine.fragments()), say, accept, partial(why_other_tensors, config=config))
        engine.restored(found.progress["scalars"])
        say(f"resuming from {found.folder}, step {engine.step} of {steps}")

    def log_start() -> None:
        if runtime.is_main:
            if found and resume != "auto" and found.is_in(out):
                checkpoint.set_aside_later(out, engine.step, say)
            record(config, facts, classes, found, resume, say)
            saved = yaml.safe_dump(redacted(config.to_dict()), sort_keys=False)
            checkpoint.replace(out / "run.yaml", saved.encode())

    all_or_none(log_start)
    folder, progress = (found.folder, found.progress) if found else (None, {})
    return Build(config, runtime, starts, engine, data, plan, card, steps, metrics, facts, accept, folder, progress)


def take_folder(out: Path, runtime: Runtime, stack: ExitStack, say: Callable[[str], None]) -> None:
    """Lock *out* until *stack* ends, and remove what a killed run has left half done there. Called on every rank."""

    def take() -> None:
        if runtime.is_main:
            stack.callback(checkpoint.Lock(out, say).release)
            checkpoint.prepare_folder(out)

    all_or_none(take)
    checkpoint.check_shared(out)


def build_model(
    config: Config, needed: int | None, runtime: Runtime, steps: int, say: Callable[[str], None], channels: int = 3,
    model: GivenModel | None = None, restored: bool = False, trains: bool = True, task: Task | None = None,
    classes: Sequence[str] = (),
) -> tuple[Engine, Blueprint, dict[str, Any]]:  # fmt: skip
    """Build the sharded model with its first values; returns the engine, the blueprint and the model card.

    *needed* are the outputs that the task needs of the model, None where it takes what there is. *model* is the caller's own,
    or a function that builds it, in the place of timm's; *task* is by default the one that *config* names. *restored*: the
    caller restores a checkpoint right afterwards, so only what no checkpoint contains gets first values. *trains*: the caller
    takes steps. *classes* are the names, where they are known, that a teacher's are compared with.
    """
    learned, outputs = build_task(config.task, task), needed
    if needed is not None and (outputs := config.model.num_classes or needed) < needed:
        raise UserError(f"model.num_classes: {outputs}, but the data has {needed} classes: use null or at least {needed}")
    around = learned.model(config)
    if around is not None and model is not None and learned.teacher is not None:
        raise UserError(f"task.distill: {config.task.distill} needs a timm model, not {config.model.name}: use logits")
    if around is not None and model is not None:
        raise UserError(f"model: {config.model.name}, but task.name: {config.task.name} builds its own: name a timm model")

    def plan_model() -> tuple[Blueprint, Blocks, dict[str, Any]]:
        plan = blueprint(config.model, outputs, model, around, other_sizes(config.data))
        freeze(plan.module, config.model.trainable, plan.adapters)
        drawn = not (config.model.pretrained or config.model.weights or model is not None or restored)
        if plan.adapters and drawn and trains:
            say("warning: model.lora adapts random weights, which stay as they are: set model.pretrained or model.weights")
        blocks = find_blocks(plan.module, plan.image_size)
        for note in (plan.note, blocks.reason and f"{config.model.name}: blocks taken from its containers: {blocks.reason}"):
            if note:
                say(note)
        if model is not None:
            card = given_card(
                config.model.name, plan.outputs, plan.input_shape, mean=plan.mean, std=plan.std,
                interpolation=plan.interpolation, crop_pct=plan.crop_pct, crop_mode=plan.crop_mode,
            )  # fmt: skip
        else:
            val_size = other_sizes(config.data).get("data.val_size")
            card = model_card(plan.module, image_size=plan.image_size, mean=plan.mean, std=plan.std, val_size=val_size)
        if plan.in_chans != channels:
            raise UserError(
                f"model.options.in_chans: {plan.in_chans}, but the images have {channels} channels: "
                f"{'remove it' if channels == 3 else f'use {channels}'}"
            )
        if trains:
            check_one_sample(config, plan, runtime)
        return plan, blocks, card

    plan, blocks, card = all_or_none(plan_model)
    if trains and runtime.is_main and peak_flops(config, runtime) is not None:
        sizes = {plan.image_size, *(pair(stage.image_size) for stage in config.data.resize_schedule)}
        samples = micro_batch(config, runtime.data_ranks, runtime.pipeline_ranks)
        plan.flops = {size: flops_of_image(config, plan, blocks, size, samples) for size in sizes}
    engine = build_engine(config, plan, blocks, learned, runtime, steps, restored, trains)
    for note in engine.notes:
        say(note)
    if trains and learned.teacher is not None:
        engine.teacher = build_teacher(learned, config, plan, outputs, classes, runtime)
        say(f"task.teacher: {learned.teacher}, fingerprint {engine.teacher.fingerprint}")
    return engine, plan, card


def flops_of_image(config: Config, plan: Blueprint, blocks: Blocks, size: Size, samples: int) -> float | None:
    """FLOPs of an image of *size* in a micro-batch of so many *samples*, forward and backward, with nothing computed again.

    Of the model of *plan*, on meta; what branches leave out is not counted. None where it cannot be run there.
    """
    shape, module = (plan.in_chans, *size), plan.module
    if config.model.drop_path_mode == "skip" and dropping(module):
        module = copy.deepcopy(module)
        branches, _ = SkippedBranches.of(module, blocks, [shape], torch.device("meta"), False, samples)
        if branches is not None:
            branches.draw(samples, 0)
            return training_flops(module.train(), shape, samples)
    return training_flops(module, shape)


def peak_flops(config: Config, runtime: Runtime) -> float | None:
    """FLOPs that all devices together have in a second by their datasheet; None where they are not known."""
    if runtime.device.type != "cuda" or (device := device_named(torch.cuda.get_device_name(runtime.device))) is None:
        return None
    peak = peak_of(device, config.parallel.precision)
    return None if peak is None else peak * runtime.world_size


def build_teacher(
    task: Task, config: Config, student: Blueprint, outputs: int | None, classes: Sequence[str], runtime: Runtime
) -> Teacher:  # fmt: skip
    """Build the *task*'s teacher for a *student* with *outputs* of these *classes*. Called on every rank."""
    source = task.teacher
    assert source is not None
    around = task.teacher_model()

    def plan_model() -> tuple[Blueprint, Blocks, Config]:
        known = find_teacher(source)
        theirs = list(known.classes or ())
        if around is None and (known.outputs != outputs or (theirs and classes and theirs != list(classes))):
            other = next((name for name, ours in zip(theirs, classes) if name != ours), None)
            what = f"{known.outputs} classes, and the student {outputs}"
            what = what if other is None or known.outputs != outputs else f"the classes {other!r}, ..., not the data's"
            raise UserError(
                f"task.teacher: {source} has {what}: use a teacher of the same classes, or task.distill: features or tokens"
            )
        used = replace(config, model=replace(known.config, num_classes=known.outputs if around is None else 0))
        try:
            plan = blueprint(used.model, used.model.num_classes if around is None else None, around=around)
        except UserError as error:
            raise UserError(f"task.teacher: {source}: {error}") from error
        if fresh := next((note for note in plan.notes if "starts fresh" in note), None):
            raise UserError(
                f"task.teacher: {source}: {fresh}, and cannot teach: use weights with it, or task.distill: features"
            )
        plan.mean, plan.std = known.mean or plan.mean, known.std or plan.std
        if plan.in_chans != student.in_chans:
            raise UserError(
                f"task.teacher: {source} takes images of {plan.in_chans} channels, the student {student.in_chans}: use another"
            )
        return plan, find_blocks(plan.module, plan.image_size), used

    plan, blocks, used = all_or_none(plan_model)
    return Teacher(source, plan, blocks, used, runtime)


def stages_in_words(config: Config, last: Size, steps: int) -> str:
    """The training sizes of a run of *steps*, the *last* after ``data.resize_schedule``."""
    parts, begin = [], 0
    stages = [(stage_end(stage, steps), pair(stage.image_size)) for stage in config.data.resize_schedule]
    for end, size in [*stages, (steps, last)]:
        if begin < (end := min(end, steps)):
            parts.append(f"{size[0]} x {size[1]} in steps {begin + 1} to {end}")
            begin = end
    return f"training images: {', '.join(parts)}"


def without_weights(config: Config) -> Config:
    """The configuration of a model whose weights will all come from a checkpoint: the first ones are not looked for."""
    return replace(config, model=replace(config.model, pretrained=False, weights=None))


def with_model(config: Config, model: GivenModel | None) -> Config:
    """*config* that says of which class the given model is."""
    return config if model is None else replace(config, model=replace(config.model, name=given_name(model)))


def with_task(config: Config, task: Task | None) -> Config:
    """*config* that says of which class the given task is."""
    return config if task is None else replace(config, task=replace(config.task, name=task_name(task)))


def check_one_sample(config: Config, blueprint: Blueprint, runtime: Runtime) -> None:
    """Raise `UserError` where a step has a micro-batch of one sample and the model, on meta, cannot train on one."""
    ranks = runtime.data_ranks
    share = config.train.global_batch // ranks
    size = micro_batch(config, ranks, runtime.pipeline_ranks)
    if not _has_one(share, size) or (config.model.sync_batchnorm and ranks > 1):
        return
    trained = [size for key, size in other_sizes(config.data).items() if key != "data.val_size"]
    shapes = [blueprint.input_shape, *((blueprint.in_chans, *size) for size in trained)]
    norms = [norm for shape in shapes if (norm := refusing_norm(blueprint.module, shape)) is not None]
    if not norms:
        return
    why = f"{norms[0]} would take its statistics over a single value of each channel"
    if share == 1:
        raise UserError(
            f"train.global_batch: {config.train.global_batch} gives each of {ranks} data-parallel ranks one sample, and {why}: "
            f"use at least {2 * ranks}, or fewer ranks"
        )
    fits = [other for other in range(2, share + 1) if not _has_one(share, other) and not refusal(config, other, runtime)]
    below, above = [n for n in fits if n < size][-1:], [n for n in fits if n > size][:1]
    advice = f"use {either([str(n) for n in below + above])}" if fits else "change train.global_batch"
    if (count := config.parallel.microbatches) is not None:
        asked, advice = f"parallel.microbatches: {count}", f"use at most {share // 2}"
    else:
        asked = f"train.micro_batch: {'null' if config.train.micro_batch is None else config.train.micro_batch}"
    raise UserError(f"{asked} cuts the {share} samples of a rank so that one is alone, and {why}: {advice}")


def refusing_norm(module: nn.Module, shape: tuple[int, int, int]) -> str | None:
    """The path of the norm that refuses to train on a single image of *shape*; None where *module*, on meta, can."""
    modes = {part: part.training for part in module.modules()}
    entered: list[str] = []
    hooks = [
        part.register_forward_pre_hook(lambda *_, path=path: entered.append(path)) for path, part in module.named_modules()
    ]
    try:
        for part in modes:
            part.training = not is_frozen(part)
        with torch.no_grad():
            module(torch.empty(1, *shape, device="meta"))
    except Exception as error:  # a model of the user's may not run on meta at all
        return entered[-1] if "more than 1 value per channel" in str(error) else None
    finally:
        for hook in hooks:
            hook.remove()
        for part, mode in modes.items():
            part.training = mode
    return None


def _has_one(share: int, size: int) -> bool:
    """Whether one of the micro-batches of *share* samples has a single one."""
    return size == 1 or share % size == 1
