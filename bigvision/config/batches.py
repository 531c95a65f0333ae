"""How a global batch is cut into the micro-batches of each rank."""

from __future__ import annotations

from bigvision.config.ds_file import read_ds_file
from bigvision.config.schema import ONE_STAGE, SPLIT_BACKWARD, Config
from bigvision.errors import UserError


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
