"""The run's data: opened once, by rank 0 first, and cut into batches by position."""

from __future__ import annotations

from dataclasses import dataclass

from bigvision.config import Config
from bigvision.data import Batches, Source, Transform, eval_batches, open_source, train_batches, transform
from bigvision.models import Blueprint
from bigvision.runtime import Runtime, all_or_none


@dataclass(frozen=True)
class Data:
    """The training and validation sources."""

    train: Source
    val: Source

    @property
    def num_classes(self) -> int:
        return len(self.train.classes)


def open_data(config: Config, runtime: Runtime) -> Data:
    """Open both sources on every rank; what has to be downloaded is downloaded by rank 0 alone.

    Raises:
        UserError: a source is unknown, missing, empty or does not fit the other; the same on every rank.
    """

    def open_both(download: bool) -> Data:
        shared = config.data.train == config.data.val
        train = open_source(
            config.data.train, "train", key="data.train", root=config.data.root, download=download, shared=shared
        )  # fmt: skip
        val = open_source(
            config.data.val, "val", key="data.val", root=config.data.root, download=download, shared=shared,
            classes=train.classes,
        )  # fmt: skip
        return Data(train, val)

    first = all_or_none(lambda: open_both(download=True) if runtime.is_main else None)
    return all_or_none(lambda: first or open_both(download=False))


def training_batches(config: Config, data: Data, blueprint: Blueprint, runtime: Runtime, position: int) -> Batches:
    """This rank's batches from *position* samples on, without end."""
    return train_batches(
        data.train, _transform(config, data.train, blueprint, train=True), seed=config.seed, position=position,
        global_batch=config.train.global_batch, rank=runtime.data_rank, ranks=runtime.data_ranks,
        workers=config.data.workers, device=runtime.device, images=runtime.stage == 0,
    )  # fmt: skip


def validation_batches(config: Config, data: Data, blueprint: Blueprint, runtime: Runtime, batch: int) -> Batches:
    """This rank's batches of one evaluation; every rank gets as many, of as many samples."""
    return eval_batches(
        data.val, _transform(config, data.val, blueprint, train=False), batch=batch, rank=runtime.data_rank,
        ranks=runtime.data_ranks, workers=config.data.workers, device=runtime.device, images=runtime.stage == 0,
    )  # fmt: skip


def _transform(config: Config, source: Source, blueprint: Blueprint, train: bool) -> Transform:
    return transform(
        source.style, blueprint.image_size, train=train, augment=config.data.augment,
        interpolation=blueprint.interpolation, crop_pct=blueprint.crop_pct,
    )  # fmt: skip
