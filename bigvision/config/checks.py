"""Values that no run can have; how a global batch is cut into the micro-batches of each rank; the size of a step's images."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from bigvision.config.ds_file import read_ds_file
from bigvision.config.schema import (
    ONE_STAGE,
    SCHEDULE_KEYS,
    SPLIT_BACKWARD,
    TRACKERS,
    Config,
    DataConfig,
    LoraConfig,
    OptimConfig,
    ParallelConfig,
    ResizeConfig,
    TaskConfig,
)
from bigvision.config.values import get, parse_size, spell, with_values
from bigvision.errors import UserError, either, nearest

WHOLE = {
    "lamb": ("scales each step by norms of whole tensors", ("ddp", "fsdp", "pipeline")),
    "adafactor": ("factors the second moments of whole matrices", ("ddp", "pipeline")),
    "muon": ("orthogonalises whole matrices", ("ddp", "fsdp", "pipeline")),
}
"""The optimizers that are not elementwise: what they need whole, and the strategies that have it."""
LOWEST = {
    "seed": 0, "data.workers": 0, "parallel.replicas": 1, "parallel.stages": 2, "parallel.stages_per_rank": 1,
    "parallel.microbatches": 1, "train.global_batch": 1, "train.micro_batch": 1, "train.steps": 0, "train.eval_every": 1,
    "train.patience": 1,
    "checkpoint.every": 1, "checkpoint.keep": 1, "checkpoint.keep_every": 1, "monitor.every": 1, "model.num_classes": 1,
    "data.max_pixels": 1, "data.balance": 0, "optim.warmup": 0, "optim.lr": 0, "optim.weight_decay": 0, "optim.min_lr": 0,
    "optim.lr_base_size": 1, "task.label_smoothing": 0, "task.ignore": 0,
    "task.mixup": 0, "task.cutmix": 0, "model.drop_path": 0, "data.jitter": 0, "data.erase": 0, "data.repeats": 1,
    "data.shuffle_block": 1, "data.shuffle_window": 1, "data.bad_budget": 0, "faults.nonfinite": 0,
    "task.k": 1, "task.distill_weight": 0,
    "faults.digest_every": 1, "ema.every": 1, "faults.same_crash": 1, "faults.restarts": 0,
}  # fmt: skip
"""The least value of keys that are finite numbers."""
ABOVE_ZERO = (
    "train.epochs", "checkpoint.minutes", "checkpoint.timeout", "faults.spike",
    "limits.start", "limits.step", "limits.evaluate", "limits.save", "limits.grace", "optim.cooldown", "optim.power",
    "task.temperature",
)  # fmt: skip
PROFILED = 20
"""Steps of a profile: of a large model in many micro-batches they are a million events, which no viewer shows any more."""
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda value: value < 2**63, "below 2**63"),
    **dict.fromkeys(("task.label_smoothing", "model.drop_path"), (lambda value: value < 1, "below 1")),
    **dict.fromkeys(ABOVE_ZERO, (lambda value: 0 < value < math.inf, "a number above 0")),
    "optim.betas": (lambda pair: all(0 <= value < 1 for value in pair), "from 0 to below 1"),
    "ema.decay": (lambda value: 0 <= value < 1, "from 0 to below 1; null keeps no average"),
    "optim.momentum": (lambda value: 0 <= value < 1, "from 0 to below 1"),
    **dict.fromkeys(
        ("model.image_size", "data.val_size"),
        (
            lambda size: min(size if isinstance(size, tuple) else (size,)) >= 1,
            "a number of pixels from 1 on, or two: [height, width]",
        ),
    ),
    "data.image_range": (lambda ends: -math.inf < ends[0] < ends[1] < math.inf, "two finite numbers, the smaller first"),
    "data.crop_scale": (lambda ends: 0 < ends[0] <= ends[1] <= 1, "two shares above 0, the smaller first"),
    **dict.fromkeys(("data.hflip", "data.vflip", "data.erase"), (lambda value: value <= 1, "a share, at most 1")),
    "task.distill_weight": (lambda value: value <= 1, "a share, at most 1"),
    "data.balance": (lambda value: value <= 1, "at most 1"),
    "task.class_weights": (
        lambda value: isinstance(value, str) or (all(0 <= one < math.inf for one in value) and any(value)),
        "balanced, a file, or finite numbers from 0 on, not all of them 0",
    ),
    "optim.clip": (lambda value: value > 0, "above 0; null does not clip"),
    "optim.gamma": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "optim.milestones": (
        lambda places: (
            (
                all(0 < one < other < math.inf for one, other in itertools.pairwise((*places, places[-1] + 1)))
                and (places[0] >= 1 or places[-1] < 1)
            )
            if places
            else True
        ),
        "numbers above 0 that rise, all shares (below 1) or all steps (1 and above)",
    ),
    "monitor.profile": (
        lambda ends: 1 <= ends[0] <= ends[1] < ends[0] + PROFILED,
        f"the first step, from 1 on, and the last, at most {PROFILED} steps with both: each adds up to 30 MB to a rank's trace",
    ),
    "optim.layer_decay": (lambda value: 0 < value <= 1, "above 0 and at most 1; null: one rate for all"),
}
"""What other keys must be where they are not null."""
Size = tuple[int, int]
"""height and width in pixels"""
MIXING = ("mixup", "cutmix", "mix_each")
DISTILLING = ("distill", "distill_weight", "temperature")
TASK_KEYS: dict[str, tuple[str, ...]] = {
    "classify": ("loss", "label_smoothing", "class_weights", *MIXING, "teacher", *DISTILLING),
    "multilabel": ("loss", *MIXING),
    "regress": ("loss", "standardize"),
    "segment": ("loss", "decoder", "decoder_options", "ignore"),
    "embed": ("k",),
}
"""The tasks, and the keys of `task` that each has a use for."""
LOSSES: dict[str, tuple[str, ...]] = {
    "classify": ("ce", "bce"),
    "multilabel": ("bce", "asymmetric"),
    "regress": ("l2", "l1", "huber"),
    "segment": ("ce", "dice", "ce+dice"),
}
"""The values of `task.loss` that each task has; null is the first."""
AUTO_KEYS: dict[str, Any] = {"parallel.strategy": "fsdp", "parallel.recompute": "none", "train.micro_batch": None}
"""The keys that auto leaves to the planner, and what they are where nothing is planned: in evaluations, for models that it
cannot profile."""
PIPELINE_KEYS = ("stages", "stages_per_rank", "microbatches", "schedule")
"""Keys of `parallel` that only a pipeline has a use for."""
SHARDED_KEYS = ("replicas", "reshard", "unit_size", "scatter")
"""Those that fsdp has a use for too."""


def micro_batch(config: Config, ranks: int, stages: int) -> int:
    """Samples in one forward and backward pass, with *ranks* data-parallel parts of the batch and *stages* of a pipeline."""
    total = config.train.global_batch
    if total % ranks:
        below, above = total - total % ranks, total - total % ranks + ranks
        fits = f"{below} or {above}" if below else f"{above}"
        raise UserError(f"train.global_batch: {total} cannot be divided among {ranks} data-parallel ranks: use {fits}")
    share = total // ranks
    if config.parallel.strategy == "pipeline":
        return _in_pipeline(config, share, stages)
    return min(_settled(config) or share, share)


def _settled(config: Config) -> int | None:
    """``train.micro_batch`` once a run has settled what auto is."""
    assert config.train.micro_batch != "auto"
    return config.train.micro_batch


def _in_pipeline(config: Config, share: int, stages: int) -> int:
    """Samples in a micro-batch of a pipeline of *stages* ranks whose step has *share* samples."""
    parallel, asked = config.parallel, _settled(config)
    count = parallel.microbatches
    if count is not None:
        if share % count:
            fits = [n for n in range(1, share + 1) if share % n == 0]
            near = min(fits, key=lambda n: abs(n - count))
            raise UserError(
                f"parallel.microbatches: {count} does not divide the {share} samples of a pipeline's step: use {near}"
            )
        if asked not in (None, share // count):
            raise UserError(
                f"train.micro_batch: {asked} contradicts parallel.microbatches: {count} of {share} samples: keep one of the two"
            )
        size = share // count
    else:
        most = min(4 * stages, share)
        size = min(asked, share) if asked else share // max(n for n in range(1, most + 1) if share % n == 0)
    whole, rest = divmod(share, size)
    if parallel.schedule not in ONE_STAGE:
        if rest:
            raise UserError(
                f"train.micro_batch: {size} does not divide the {share} samples of a pipeline's step, which "
                f"parallel.schedule: {parallel.schedule} needs: use a divisor, or the schedule 1f1b"
            )
        least = {"interleaved": 1, "zbv": 1, "dualpipev": stages * parallel.per_rank}[parallel.schedule]
        rounds = max(1, whole // stages) if parallel.schedule == "interleaved" else 1
        if whole < least or whole % rounds:
            wanted = f"at least {least}" if whole < least else f"a multiple of {rounds}"
            raise UserError(
                f"parallel.microbatches: {whole}, but parallel.schedule: {parallel.schedule} on {stages} ranks needs {wanted}"
            )
    return size


def check_batches(config: Config, ranks: int, stages: int) -> None:
    """Raise `UserError` for batch sizes and layouts that so many *ranks* and *stages* (see `micro_batch`) cannot have."""
    parallel = config.parallel
    if parallel.strategy == "pipeline" and stages == 1:
        raise UserError("parallel.strategy: pipeline needs at least 2 ranks: start more, or use parallel.strategy fsdp")
    if parallel.schedule in SPLIT_BACKWARD and parallel.replicas != ranks:
        raise UserError(
            f"parallel.replicas: {parallel.replicas}, but parallel.schedule: {parallel.schedule} takes backward passes apart, "
            f"which sharded stages do not allow: use {ranks} for whole copies of each stage, or the schedule interleaved"
        )
    if config.optim.name == "adafactor" and parallel.strategy == "pipeline" and parallel.replicas != ranks:
        raise UserError(
            f"optim.name: adafactor {WHOLE['adafactor'][0]}, but with parallel.replicas: {parallel.replicas} each of the "
            f"{ranks} ranks of a stage has some rows of them: use parallel.replicas {ranks} for whole copies, or adamw"
        )
    size, share = micro_batch(config, ranks, stages), config.train.global_batch // ranks
    whole = 2 * config.data.repeats
    if (config.task.mixup or config.task.cutmix) and (share % whole or (size < share and size % whole)):
        raise UserError(
            f"task.{'mixup' if config.task.mixup else 'cutmix'}: samples are mixed in pairs, but a rank's {share} samples of a "
            f"step, in micro-batches of {size}, are not multiples of {whole}: change train.global_batch or train.micro_batch"
        )
    if not parallel.deepspeed:
        return
    # How often the file accumulates is compared here, since ours depends on the number of ranks.
    file, total = read_ds_file(parallel.deepspeed), config.train.global_batch
    asked, ours = file.accumulation, -(-total // ranks // size)
    if asked is not None and asked != ours:
        fits = f"train.micro_batch {total // ranks // asked}" if total % (ranks * asked) == 0 else "another value"
        raise UserError(
            f"{file.path}: gradient_accumulation_steps: {asked} contradicts train.global_batch: {total}, which "
            f'in micro-batches of {size} on {ranks} ranks takes {ours}: use {fits}, or write "auto" in the file'
        )
    asked_size = file.written.get("train_micro_batch_size_per_gpu")
    if isinstance(asked_size, int) and asked_size != size:
        raise UserError(
            f"{file.path}: train_micro_batch_size_per_gpu: {asked_size} is more than the {size} samples that "
            f'train.global_batch: {total} leaves to each of {ranks} ranks: write at most {size}, or "auto"'
        )


def pair(size: int | Size) -> Size:
    """Height and width of *size*, which may be the side of a square."""
    return (size, size) if isinstance(size, int) else size


def other_sizes(data: DataConfig) -> dict[str, Size]:
    """The image sizes that a run has beside ``model.image_size``, by the key that asks for each."""
    stages = enumerate(data.resize_schedule)
    sizes = {f"data.resize_schedule[{place}].image_size": pair(stage.image_size) for place, stage in stages}
    return sizes | ({} if data.val_size is None else {"data.val_size": pair(data.val_size)})


def train_size(data: DataConfig, last: Size, step: int, steps: int) -> Size:
    """Of the images of the step that follows *step* of a run's *steps*; *last* is the size after ``data.resize_schedule``.

    A function of the position alone, so that a run resumes with the size that it would have had.
    """
    stage = next((stage for stage in data.resize_schedule if step < stage_end(stage, steps)), None)
    return last if stage is None else pair(stage.image_size)


def stage_end(stage: ResizeConfig, steps: int) -> int:
    """The number of steps after which *stage* is over, in a run of *steps*."""
    return round(stage.until if stage.until >= 1 else stage.until * steps)


def check(config: Config) -> None:
    """Values that no run can have. What depends on ranks, model or data is checked where those are known."""
    for key, lowest in LOWEST.items():
        value = get(config, key)
        if value is not None and value != "auto" and not lowest <= value < math.inf:
            raise UserError(f"{key}: {value} must be a finite number from {lowest} on")
    for key, (fits, text) in RANGES.items():
        value = get(config, key)
        if value is not None and not fits(value):
            raise UserError(f"{key}: {spell(value) if isinstance(value, tuple) else value} must be {text}")
    if config.data.reduce and config.data.decode == "cuda":
        raise UserError("data.reduce: true is for data.decode: cpu, since GPUs decode whole images: use one of both")
    _check_task(config.task)
    _check_recompute(config.parallel.recompute)
    _check_fp8(config.parallel)
    if config.data.balance and config.task.name in ("multilabel", "regress", "segment"):
        raise UserError(
            f"data.balance: {config.data.balance}, but task.name: {config.task.name} has no class for each sample: use 0"
        )
    _check_rate(config.optim, config.train.global_batch)
    for place, group in enumerate(config.optim.groups):
        if not 0 < group.lr_scale < math.inf:
            raise UserError(
                f"optim.groups[{place}].lr_scale: {group.lr_scale} must be a number above 0; to leave "
                "parameters as they are, use model.trainable"
            )
        if group.weight_decay is not None and not 0 <= group.weight_decay < math.inf:
            raise UserError(f"optim.groups[{place}].weight_decay: {group.weight_decay} must be a finite number from 0 on")
    _check_resize(config.data.resize_schedule)
    monitor, steps = config.monitor, config.train.steps
    if monitor.profile is not None and steps is not None and monitor.profile[0] > steps:
        raise UserError(
            f"monitor.profile: {list(monitor.profile)} begins after the last step, train.steps: {steps}: name earlier steps"
        )
    if monitor.memory_snapshot and monitor.profile is None:
        raise UserError("monitor.memory_snapshot: true needs monitor.profile: name the steps, such as [2, 3]")
    if config.parallel.cuda_graphs:
        _check_graphs(config.parallel)
    if config.parallel.strategy == "auto":
        admitted(config)
    else:
        _check_strategy(config)
    trainable = config.model.trainable
    if isinstance(trainable, str) and not re.fullmatch(r"all|head|last:0*[1-9][0-9]*", trainable):
        raise UserError(
            f"model.trainable: {trainable!r} must be all, head, last:N with N from 1 on, or a list of names: "
            f"{spell([trainable])}"
        )
    if (lora := config.model.lora) is not None:
        _check_lora(lora)
    elif not trainable:
        raise UserError("model.trainable: [] leaves nothing to train: name what is trained, or use all")
    if config.model.pretrained and config.model.weights:
        raise UserError("model.pretrained: true contradicts model.weights: choose one of the two")
    if config.faults.rollback and config.faults.spike is None:
        raise UserError("faults.rollback: true needs faults.spike: say how far above the mean a loss is a spike, such as 8")
    parse_size(config.checkpoint.shard_size, "checkpoint.shard_size")
    if config.parallel.unit_size not in ("auto", "block"):
        parse_size(config.parallel.unit_size, "parallel.unit_size")
    if config.train.patience_metric is not None and config.train.patience is None:
        raise UserError(
            f"train.patience_metric: {config.train.patience_metric} needs train.patience: say how many evaluations without a "
            "better value end the run, such as 5"
        )
    for name in config.monitor.trackers:
        if name not in TRACKERS:
            hint = nearest(name, TRACKERS) or f"; known are {', '.join(TRACKERS)}"
            raise UserError(f"monitor.trackers: unknown tracker {name!r}{hint}; one of your own is given from Python")
    if len(set(config.monitor.trackers)) < len(config.monitor.trackers):
        raise UserError(f"monitor.trackers: {spell(config.monitor.trackers)} names a tracker twice: drop one of the two")
    allow = config.checkpoint.allow
    if allow is not None and not {name.strip() for name in allow.split(",")} <= {"data", "classes"}:
        raise UserError(f"checkpoint.allow: {allow!r} must be data, classes, or both: data,classes")


def _check_strategy(config: Config) -> None:
    """Settings that contradict ``parallel.strategy``, and those of a pipeline that contradict each other."""
    parallel = config.parallel
    what, fits = WHOLE.get(config.optim.name, ("", (parallel.strategy,)))
    if parallel.strategy not in fits:
        part = "some rows" if parallel.strategy in ("fsdp", "pipeline") else "a flat piece"
        raise UserError(
            f"optim.name: {config.optim.name} {what}, but parallel.strategy: {parallel.strategy} gives each rank {part} of "
            f"them: use {either(fits)}, or adamw"
        )
    if parallel.offloads_state and not parallel.strategy.startswith("zero"):
        other = "; activations alone works with every strategy" if parallel.offloads_activations else ""
        raise UserError(f"parallel.offload: {parallel.offload} needs parallel.strategy zero1, zero2 or zero3{other}")
    if parallel.offloads_parameters and parallel.strategy != "zero3":
        other = parallel.offload.replace("all", "optimizer")
        raise UserError(
            f"parallel.offload: {parallel.offload} needs parallel.strategy zero3; {other} works with each ZeRO stage"
        )
    if parallel.offloads_activations and parallel.strategy == "pipeline" and parallel.schedule in SPLIT_BACKWARD:
        raise UserError(
            f"parallel.offload: activations excludes parallel.schedule: {parallel.schedule}, which takes backward passes apart "
            "and would keep what has come back until the second part: use 1f1b, gpipe or interleaved"
        )
    if parallel.cuda_graphs and parallel.strategy != "ddp":
        raise UserError(f"parallel.cuda_graphs: true needs parallel.strategy ddp, not {parallel.strategy}: use ddp, or false")
    unused = {"pipeline": (), "fsdp": PIPELINE_KEYS}.get(parallel.strategy, SHARDED_KEYS + PIPELINE_KEYS)
    for key in unused:
        if (value := getattr(parallel, key)) != getattr(ParallelConfig, key):
            fits = "pipeline" if key in PIPELINE_KEYS else "fsdp or pipeline"
            raise UserError(f"parallel.{key}: {value} needs parallel.strategy {fits}")
    if parallel.strategy == "pipeline":
        _check_schedule(parallel)


def _check_graphs(parallel: ParallelConfig) -> None:
    """Settings under which ``parallel.cuda_graphs`` captures nothing; strategies, ranks and devices are checked elsewhere."""
    key = "parallel.cuda_graphs: true"
    if parallel.recompute != "none":
        # checkpoint asks for the state of the device's generator, which is not known during a capture.
        raise UserError(f"{key} excludes parallel.recompute: {parallel.recompute}: use none, or cuda_graphs: false")
    if parallel.offloads_activations:
        # Copies on another stream, of memory that the host counts.
        raise UserError(f"{key} excludes parallel.offload: {parallel.offload}: use none, or cuda_graphs: false")
    if parallel.precision == "fp8":
        why = "whose layers are too wide to be bound by launches"
        raise UserError(f"{key} excludes parallel.precision: fp8, {why}: use bf16, or cuda_graphs: false")


def auto_keys(config: Config) -> list[str]:
    """The keys of `AUTO_KEYS` that are auto."""
    return [key for key in AUTO_KEYS if get(config, key) == "auto"]


def admitted(config: Config) -> list[str]:
    """The strategies that the other keys of *config* allow, the simplest first. A `UserError` where they allow none."""
    allowed = []
    for strategy in ("ddp", "fsdp", "zero1", "zero2", "zero3", "pipeline"):
        try:
            _check_strategy(with_values(config, {"parallel.strategy": strategy}))
        except UserError:
            continue
        allowed.append(strategy)
    if not allowed:
        keys = ("optim.name", *(f"parallel.{key}" for key in ("offload", "cuda_graphs", *SHARDED_KEYS, *PIPELINE_KEYS)))
        given = [f"{key}: {spell(get(config, key))}" for key in keys if get(config, key) != get(Config(), key)]
        raise UserError(f"parallel.strategy: auto finds none that has {', '.join(given)} together: drop one of them")
    return allowed


def recompute_budget(recompute: str) -> float | None:
    """The share of a block's activations that ``parallel.recompute`` lets it keep; None where only its input is kept."""
    return None if recompute == "blocks" else 1.0 if recompute == "selective" else float(recompute.removeprefix("budget:"))


def _check_recompute(recompute: str) -> None:
    if recompute in ("none", "selective", "blocks", "auto"):
        return
    kind, _, share = recompute.partition(":")
    if kind == "budget" and re.fullmatch(r"0?\.[0-9]+|1(\.0*)?|0", share) and 0 < float(share) < 1:
        return
    raise UserError(
        f"parallel.recompute: {recompute!r} must be none, selective, blocks, auto, or budget:X with X between 0 and 1, such as "
        "budget:0.4"
    )


def _check_fp8(parallel: ParallelConfig) -> None:
    """Settings that contradict ``parallel.fp8_layers``."""
    asked = parallel.fp8_layers
    if asked != "auto" and parallel.precision != "fp8":
        raise UserError(f"parallel.fp8_layers: {spell(asked)} needs parallel.precision: fp8: use it, or drop fp8_layers")
    if not asked or "" in tuple(asked):
        raise UserError(f"parallel.fp8_layers: {spell(asked)} names no layer: name some, or use auto")


def without_auto(config: Config) -> Config:
    """*config* with the values of `AUTO_KEYS` for what is auto: where nothing is planned, or before it is."""
    values = {key: AUTO_KEYS[key] for key in auto_keys(config)}
    if "parallel.strategy" in values and values["parallel.strategy"] not in (allowed := admitted(config)):
        values["parallel.strategy"] = allowed[0]
    return with_values(config, values)


def _check_lora(lora: LoraConfig) -> None:
    if lora.rank < 1:
        raise UserError(f"model.lora.rank: {lora.rank} must be at least 1; to train without adapters, set model.lora to null")
    if not 0 < lora.alpha < math.inf:
        raise UserError(f"model.lora.alpha: {lora.alpha:g} must be a number above 0, often rank or twice as much")
    if lora.targets == ():
        raise UserError("model.lora.targets: [] gives no layer an adapter: name some, or use null")


def peak_rate(optim: OptimConfig, global_batch: int) -> float:
    """The learning rate after the warm-up: ``optim.lr``, scaled with the batch where ``optim.lr_base_size`` is given."""
    if optim.lr_base_size is None:
        return optim.lr
    ratio = global_batch / optim.lr_base_size
    return optim.lr * (math.sqrt(ratio) if optim.lr_base_scale == "sqrt" else ratio)


def _check_rate(optim: OptimConfig, global_batch: int) -> None:
    """Settings of the learning rate that contradict each other."""
    for key, schedules in SCHEDULE_KEYS.items():
        if (value := getattr(optim, key)) != getattr(OptimConfig, key) and optim.schedule not in schedules:
            raise UserError(
                f"optim.{key}: {spell(value)} has no meaning for optim.schedule: {optim.schedule}: use {either(schedules)}, "
                "or drop the key"
            )
    if optim.schedule == "step" and not optim.milestones:
        raise UserError("optim.schedule: step needs optim.milestones: say where the rate falls, such as [0.3, 0.6, 0.9]")
    if optim.schedule == "wsd" and optim.warmup < 1 and optim.cooldown < 1 < optim.warmup + optim.cooldown:
        raise UserError(
            f"optim.cooldown: {optim.cooldown} and optim.warmup: {optim.warmup} are more than all steps together: lower one"
        )
    if optim.lr_base_scale != "linear" and optim.lr_base_size is None:
        raise UserError(
            f"optim.lr_base_scale: {optim.lr_base_scale} needs optim.lr_base_size: the batch that lr is for, or drop it"
        )
    if optim.min_lr > (peak := peak_rate(optim, global_batch)):
        raise UserError(
            f"optim.min_lr: {optim.min_lr:g} is above the peak learning rate, {peak:g}: lower it, or raise optim.lr"
        )


def _check_resize(stages: Sequence[ResizeConfig]) -> None:
    """Raise `UserError` for stages that no run can have, or that never begin."""
    before = 0.0
    for place, stage in enumerate(stages):
        key = f"data.resize_schedule[{place}]"
        if min(pair(stage.image_size)) < 1:
            raise UserError(f"{key}.image_size: {spell(stage.image_size)} must be a number of pixels from 1 on, or two")
        if not before < stage.until < math.inf or (stage.until < 1) != (stages[0].until < 1):
            raise UserError(
                f"{key}.until: {stage.until:g} must be above {before:g}, where it begins, and all of them shares of all steps "
                "(below 1) or all numbers of steps (1 and above); after the last one images are of model.image_size"
            )
        before = stage.until


def _check_schedule(parallel: ParallelConfig) -> None:
    """Settings of a pipeline that contradict each other."""
    several, count = parallel.schedule not in ONE_STAGE, parallel.stages_per_rank
    if count is not None and several != (count > 1):
        raise UserError(
            f"parallel.stages_per_rank: {count} does not fit parallel.schedule: {parallel.schedule}, which has "
            f"{'several stages' if several else 'one stage'} on each rank: use {2 if several else 1}, or another schedule"
        )
    if count is not None and count != 2 and parallel.schedule in SPLIT_BACKWARD:
        raise UserError(f"parallel.stages_per_rank: {count}, but parallel.schedule: {parallel.schedule} needs 2")
    if parallel.precision == "fp8" and parallel.schedule in SPLIT_BACKWARD:
        raise UserError(
            f"parallel.precision: fp8 excludes parallel.schedule: {parallel.schedule}, which takes backward passes apart and "
            "would compute both parts of fp8 layers twice: use interleaved, 1f1b or gpipe, or bf16"
        )
    if parallel.compile is True and parallel.schedule in SPLIT_BACKWARD:
        raise UserError(
            f"parallel.compile: true, but parallel.schedule: {parallel.schedule} takes backward passes apart, "
            "which compiled code does not allow: use auto or false, or the schedule interleaved"
        )
    if parallel.recompute.startswith(("selective", "budget")) and parallel.schedule in SPLIT_BACKWARD:
        raise UserError(
            f"parallel.recompute: {parallel.recompute} excludes parallel.schedule: {parallel.schedule}, which takes backward "
            "passes apart: use blocks or none, or the schedule interleaved"
        )


def _check_task(task: TaskConfig) -> None:
    """Raise `UserError` for an unknown task, and for keys of other tasks."""
    own = task.name.startswith("python:")
    if task.name not in TASK_KEYS and not own:
        hint = nearest(task.name, TASK_KEYS) or f"; known are {', '.join(TASK_KEYS)}"
        raise UserError(f"task.name: unknown task {task.name!r}{hint}; a task of your own is given from Python")
    taken = MIXING if own else TASK_KEYS[task.name]
    for field in fields(TaskConfig):
        if field.name not in ("name", *taken) and getattr(task, field.name) != getattr(TaskConfig(), field.name):
            users = [name for name, keys in TASK_KEYS.items() if field.name in keys]
            raise UserError(
                f"task.{field.name}: {getattr(task, field.name)}, but task.name: {task.name} has no use for it, only "
                f"{' and '.join(users)}: leave it out"
            )
    if task.loss is not None and task.loss not in LOSSES[task.name]:
        raise UserError(f"task.loss: {task.loss}, but task.name: {task.name} has {either(LOSSES[task.name])}: use one of them")
    for key in DISTILLING if task.teacher is None else ():
        if (value := getattr(task, key)) != getattr(TaskConfig, key):
            raise UserError(f"task.{key}: {value} needs task.teacher: name a model to learn from, or leave it out")
    if task.distill != "logits" and task.temperature != TaskConfig.temperature:
        raise UserError(f"task.temperature: {task.temperature} is for task.distill: logits, not {task.distill}: leave it out")
