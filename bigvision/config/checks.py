"""Values that no run can have, and how a global batch is cut into the micro-batches of each rank."""

from __future__ import annotations

import math

from bigvision.config.ds_file import read_ds_file
from bigvision.config.schema import ONE_STAGE, SPLIT_BACKWARD, Config, ParallelConfig
from bigvision.config.values import get, parse_size, spell
from bigvision.errors import UserError, either

WHOLE = {
    "lamb": ("scales each step by norms of whole tensors", ("ddp", "fsdp", "pipeline")),
    "adafactor": ("factors the second moments of whole matrices", ("ddp",)),
    "muon": ("orthogonalises whole matrices", ("ddp",)),
}
"""The optimizers that are not elementwise: what they need whole, and the strategies that have it."""


def micro_batch(config: Config, ranks: int, stages: int) -> int:
    """Samples in one forward and backward pass.

    Args:
        ranks: data-parallel parts of the global batch.
        stages: ranks of a pipeline.

    Raises:
        UserError: the ranks do not divide the global batch; the micro-batches of a pipeline do not divide its samples, or its
            schedule needs more or others.
    """
    total = config.train.global_batch
    if total % ranks:
        below, above = total - total % ranks, total - total % ranks + ranks
        fits = f"{below} or {above}" if below else f"{above}"
        raise UserError(f"train.global_batch: {total} cannot be divided among {ranks} data-parallel ranks: use {fits}")
    share = total // ranks
    if config.parallel.strategy == "pipeline":
        return _in_pipeline(config, share, stages)
    return min(config.train.micro_batch or share, share)


def _in_pipeline(config: Config, share: int, stages: int) -> int:
    """Samples in a micro-batch of a pipeline of *stages* ranks whose step has *share* samples."""
    parallel, asked = config.parallel, config.train.micro_batch
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
    """Find batch sizes and layouts that so many ranks cannot have.

    Args:
        ranks, stages: as of :func:`micro_batch`.

    Raises:
        UserError: a pipeline without a second rank, or whose schedule does not fit its ranks; pairs of samples that are mixed
            and would lie on two ranks or in two micro-batches; an accumulation that the DeepSpeed file contradicts.
    """
    parallel = config.parallel
    if parallel.strategy == "pipeline" and stages == 1:
        raise UserError("parallel.strategy: pipeline needs at least 2 ranks: start more, or use parallel.strategy fsdp")
    if parallel.schedule in SPLIT_BACKWARD and parallel.replicas != ranks:
        raise UserError(
            f"parallel.replicas: {parallel.replicas}, but parallel.schedule: {parallel.schedule} takes backward passes apart, "
            f"which sharded stages do not allow: use {ranks} for whole copies of each stage, or the schedule interleaved"
        )
    size, share = micro_batch(config, ranks, stages), config.train.global_batch // ranks
    whole = 2 * config.data.repeats
    if (config.task.mixup or config.task.cutmix) and (share % whole or (size < share and size % whole)):
        raise UserError(
            f"task.{'mixup' if config.task.mixup else 'cutmix'}: samples are mixed in pairs, but a rank's {share} samples of a "
            f"step, in micro-batches of {size}, are not multiples of {whole}: change train.global_batch or train.micro_batch"
        )
    if parallel.deepspeed:
        _compare_accumulation(config, parallel.deepspeed, ranks, size)


def _compare_accumulation(config: Config, path: str, ranks: int, size: int) -> None:
    """Compare the accumulation that the DeepSpeed file asks for with ours, which depends on the number of ranks."""
    file, total = read_ds_file(path), config.train.global_batch
    asked, ours = file.accumulation, -(-total // ranks // size)
    if asked is not None and asked != ours:
        fits = f"train.micro_batch {total // ranks // asked}" if total % (ranks * asked) == 0 else "another value"
        raise UserError(
            f"{file.path}: gradient_accumulation_steps: {asked} contradicts train.global_batch: {total}, which "
            f'in micro-batches of {size} on {ranks} ranks takes {ours}: use {fits}, or write "auto" in the file'
        )
    asked_size = file.said.get("train_micro_batch_size_per_gpu")
    if isinstance(asked_size, int) and asked_size != size:
        raise UserError(
            f"{file.path}: train_micro_batch_size_per_gpu: {asked_size} is more than the {size} samples that "
            f'train.global_batch: {total} leaves to each of {ranks} ranks: write at most {size}, or "auto"'
        )


def check(config: Config) -> None:
    """Values that no run can have. What depends on ranks, model or data is checked where those are known."""
    for key, lowest in {
        "seed": 0, "data.workers": 0, "parallel.replicas": 1, "parallel.stages": 2,
        "parallel.stages_per_rank": 1, "parallel.microbatches": 1, "train.global_batch": 1, "train.micro_batch": 1,
        "train.steps": 0, "train.eval_every": 1, "checkpoint.every": 1, "checkpoint.keep": 1, "checkpoint.keep_every": 1,
        "monitor.every": 1,
        "model.num_classes": 1, "data.max_pixels": 1, "optim.warmup": 0, "optim.lr": 0, "optim.weight_decay": 0,
        "task.label_smoothing": 0, "task.mixup": 0, "task.cutmix": 0, "model.drop_path": 0,
        "data.jitter": 0, "data.erase": 0, "data.repeats": 1, "data.shuffle_block": 1, "data.shuffle_window": 1,
        "data.bad_budget": 0, "faults.nonfinite": 0, "faults.digest_every": 1, "faults.same_crash": 1, "faults.restarts": 0,
    }.items():  # fmt: skip
        value = get(config, key)
        if value is not None and not lowest <= value < math.inf:
            raise UserError(f"{key}: {value} must be a finite number from {lowest} on")
    if config.seed >= 2**63:
        raise UserError(f"seed: {config.seed} must be below 2**63")
    for key in ("task.label_smoothing", "model.drop_path"):
        if not get(config, key) < 1:
            raise UserError(f"{key}: {get(config, key)} must be below 1")
    limits = [f"limits.{name}" for name in ("start", "step", "evaluate", "save", "grace")]
    for key in ("train.epochs", "checkpoint.minutes", "checkpoint.timeout", "faults.spike", *limits):
        value = get(config, key)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{key}: {value} must be a number above 0")
    for key, values in (("optim.betas", config.optim.betas), ("optim.momentum", (config.optim.momentum,))):
        if not all(0 <= value < 1 for value in values):
            raise UserError(f"{key}: {spell(get(config, key))} must be from 0 to below 1")
    size = config.model.image_size
    if size is not None and min(size if isinstance(size, tuple) else (size,)) < 1:
        raise UserError(f"model.image_size: {spell(size)} must be a number of pixels from 1 on, or two: [height, width]")
    if (bounds := config.data.image_range) is not None and not -math.inf < bounds[0] < bounds[1] < math.inf:
        raise UserError(f"data.image_range: {spell(bounds)} must be two finite numbers, the smaller first")
    least, largest = config.data.crop_scale
    if not 0 < least <= largest <= 1:
        raise UserError(f"data.crop_scale: {spell(config.data.crop_scale)} must be two shares above 0, the smaller first")
    if config.data.erase > 1:
        raise UserError(f"data.erase: {config.data.erase} must be a share, at most 1")
    if config.optim.clip is not None and not config.optim.clip > 0:
        raise UserError(f"optim.clip: {config.optim.clip} must be above 0; null does not clip")
    if config.optim.layer_decay is not None and not 0 < config.optim.layer_decay <= 1:
        raise UserError(f"optim.layer_decay: {config.optim.layer_decay} must be above 0 and at most 1; null: one rate for all")
    parallel = config.parallel
    what, fits = WHOLE.get(config.optim.name, ("", (parallel.strategy,)))
    if parallel.strategy not in fits:
        piece = "some rows" if parallel.strategy in ("fsdp", "pipeline") else "a flat piece"
        raise UserError(
            f"optim.name: {config.optim.name} {what}, but parallel.strategy: {parallel.strategy} gives each rank {piece} of "
            f"them: use {either(fits)}, or adamw"
        )
    if parallel.offload != "none" and not parallel.strategy.startswith("zero"):
        raise UserError(f"parallel.offload: {parallel.offload} needs parallel.strategy zero1, zero2 or zero3")
    if parallel.offload == "all" and parallel.strategy != "zero3":
        raise UserError("parallel.offload: all needs parallel.strategy zero3; optimizer works with each ZeRO stage")
    if parallel.strategy not in ("fsdp", "pipeline") and parallel.replicas != 1:
        raise UserError(f"parallel.replicas: {parallel.replicas} needs parallel.strategy fsdp or pipeline")
    for key in ("reshard", "scatter"):
        value = getattr(parallel, key)
        if value != getattr(ParallelConfig, key) and parallel.strategy not in ("fsdp", "pipeline"):
            raise UserError(f"parallel.{key}: {value} needs parallel.strategy fsdp or pipeline")
    check_pipeline(parallel)
    if config.model.pretrained and config.model.weights:
        raise UserError("model.pretrained: true contradicts model.weights: choose one of the two")
    if config.faults.rollback and config.faults.spike is None:
        raise UserError("faults.rollback: true needs faults.spike: say how far above the mean a loss is a spike, such as 8")
    parse_size(config.checkpoint.shard_size, "checkpoint.shard_size")
    for name in (config.checkpoint.allow or "").split(",") if config.checkpoint.allow is not None else ():
        if name.strip() not in ("data", "classes"):
            raise UserError(f"checkpoint.allow: {config.checkpoint.allow!r} must be data, classes, or both: data,classes")


def check_pipeline(parallel: ParallelConfig) -> None:
    """Settings of a pipeline that contradict each other or the strategy."""
    if parallel.strategy != "pipeline":
        for key in ("stages", "stages_per_rank", "microbatches"):
            if (value := getattr(parallel, key)) is not None:
                raise UserError(f"parallel.{key}: {value} needs parallel.strategy pipeline")
        if parallel.schedule != ParallelConfig.schedule:
            raise UserError(f"parallel.schedule: {parallel.schedule} needs parallel.strategy pipeline")
        return
    several, count = parallel.schedule not in ONE_STAGE, parallel.stages_per_rank
    if count is not None and several != (count > 1):
        raise UserError(
            f"parallel.stages_per_rank: {count} does not fit parallel.schedule: {parallel.schedule}, which has "
            f"{'several stages' if several else 'one stage'} on each rank: use {2 if several else 1}, or another schedule"
        )
    if count is not None and count != 2 and parallel.schedule in SPLIT_BACKWARD:
        raise UserError(f"parallel.stages_per_rank: {count}, but parallel.schedule: {parallel.schedule} needs 2")
    if parallel.compile is True and parallel.schedule in SPLIT_BACKWARD:
        raise UserError(
            f"parallel.compile: true, but parallel.schedule: {parallel.schedule} takes backward passes apart, "
            "which compiled code does not allow: use auto or false, or the schedule interleaved"
        )
