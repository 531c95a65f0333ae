"""What a task is to the rest of bigvision: everything about what is learned, and nothing about how."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bigvision.config import Config
from bigvision.samples import Targets, stack

Kind = Literal["label", "labels", "numbers", "mask", "none", "any"]
"""What the samples of a task have: a label each, several labels, numbers, a mask of labels, nothing, or whatever a dataset
of the user's gives."""
TargetsOf = Callable[[int | None], np.ndarray]
"""Targets of the training data, stacked: of all samples, or of so many of them, evenly spread, where the data does not list its
targets. With None it is a `UserError` where it does not list them, since all images would have to be read."""
Span = Literal["sample", "micro-batch", "global batch"]
"""The samples that a sample's loss depends on."""


class Features(NamedTuple):
    """Of a dataset, in its order."""

    values: Tensor
    """float32 (samples, width)"""
    labels: Tensor
    """int64 (samples,)"""


class Share(NamedTuple):
    """What a rank computes of the whole."""

    rank: int
    ranks: int
    device: torch.device
    total: Callable[[Tensor], object]
    """Replaces a tensor by its sum over all ranks."""
    beat: Callable[[], object]
    """Called now and then: the rank is at work."""

    def parts(self, count: int, size: int) -> list[slice]:
        """This rank's among the parts of *size* of *count* rows."""
        return [slice(begin, begin + size) for begin in range(0, count, size)][self.rank :: self.ranks]


class Task:
    """What is learned. A subclass needs :meth:`loss` and :meth:`measure`, and the names of what it measures.

    Engine and trainer know no task: they call these methods, and form sums over micro-batches and ranks. A loss is a sum over
    samples and so is what normalises it (:meth:`weight`), and both are of the global batch. So losses do not depend on how
    samples lie on ranks.
    """

    target: ClassVar[Kind] = "any"
    """What the data must have; sources are opened for it."""
    metrics: tuple[str, ...] = ("loss",)
    """Names of what :meth:`compute` returns. Where less is better, say so in the name: "loss", "error", "mae", "mse"."""
    span: Span = "sample"
    """The samples that :meth:`loss` has to see together. A loss over pairs says "micro-batch", or "global batch": then it gets
    the outputs and targets of all ranks, and a rank's samples must be one micro-batch."""
    cuttable: ClassVar[bool] = True
    """Whether a pipeline can cut what :meth:`model` builds."""
    learns: ClassVar[bool] = True
    """Whether a model is trained for it; otherwise an evaluation calls :meth:`compare`, and nothing else of a task."""

    # The model.

    def outputs(self, classes: Sequence[str]) -> int | None:
        """How many outputs the model's head has; None: the model returns what it likes, and timm's returns features.

        *classes* are the data's, or the names of its numbers.
        """
        return len(classes)

    def model(self, config: Config) -> Callable[..., nn.Module] | None:
        """A function that is called as ``timm.create_model(name, **arguments)`` and builds the model around that backbone;
        None: timm's alone. Its tensors are named as in a checkpoint."""
        return None

    # The data.

    def study(self, targets: TargetsOf, classes: Sequence[str], known: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the task has to know of the training data, as JSON, such as the mean of its numbers.

        It is called on rank 0 at each start, and what it returns is given to :meth:`prepare` and kept in config.json of every
        checkpoint. *known* is what a checkpoint that the run goes on from has of it, {} at the first start.
        """
        return {}

    def prepare(self, classes: Sequence[str], facts: Mapping[str, Any]) -> None:
        """Take note of the *classes*, or names of numbers, and of what :meth:`study` returned: on every rank, before the model
        is built; in an evaluation with the facts in config.json."""

    # Training.

    def collate(self, targets: Sequence[Any]) -> Targets:
        """Return the targets of a micro-batch, made of those of its samples; with the samples as their first dimension.

        What has to move with an image in crops and flips is given by the data as torchvision's `Mask`, `BoundingBoxes`,
        `KeyPoints` or `Image`, and arrives here moved.
        """
        return stack(targets)

    def mixed(self, targets: Targets, partners: Callable[[Tensor], Tensor], share: Tensor) -> Targets:
        """Return the targets for :meth:`loss` of samples that are mixed in pairs (``task.mixup``, ``task.cutmix``).

        Args:
            partners: puts, in a tensor (B, ...), each sample's partner in its place.
            share: fp32 (B,), how much of each sample is its own.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what the targets of mixed samples are")

    @property
    def weighed(self) -> bool:
        """Whether samples have weights (see :meth:`weight`). Without, a step begins when its first micro-batch is there."""
        return type(self).weight is not Task.weight

    def weight(self, targets: Targets) -> Tensor | None:
        """Return the 0-D sum of the samples' weights, by which the loss of the global batch is divided; None: their number.

        *targets* are what :meth:`loss` gets. Where it is None depends on the task alone, never on the samples.
        """
        return None

    def loss(self, outputs: Any, targets: Targets) -> Tensor:
        """Return the 0-D sum of the samples' losses."""
        raise NotImplementedError

    # A teacher.

    teacher: str | None = None
    """The model that teaches, as in ``task.teacher``: frozen, and spread over the ranks as the one that learns is."""

    def teacher_model(self) -> Callable[..., nn.Module] | None:
        """What builds the teacher, as :meth:`model` does; None: timm, with the teacher's own classes."""
        return None

    def loss_with_teacher(self, outputs: Any, targets: Targets, told: Any, scale: Tensor | float) -> Tensor:
        """Return the 0-D sum of the samples' losses where there is a :attr:`teacher`.

        Args:
            outputs, targets: as of :meth:`loss`.
            told: what the teacher returns for the same images, normalised and resized as it needs them.
            scale: by which a sum over samples is multiplied so that its mean over samples counts: what the loss is divided by
                is the sum of :meth:`weight`.
        """
        raise NotImplementedError(f"{type(self).__name__} has a teacher and does not say what is learned from it")

    # Evaluation.

    @property
    def sums(self) -> int:
        """How many numbers :meth:`measure` returns."""
        return len(self.metrics)

    def measure(self, outputs: Any, targets: Targets, valid: Tensor) -> Tensor:
        """Return sums over the samples that are *valid*, bool (B,): float64 of shape (:attr:`sums`,)."""
        raise NotImplementedError

    keeps_rows: ClassVar[bool] = False
    """Whether metrics or report need :meth:`rows`."""
    means_need_rows: ClassVar[bool] = True
    """Where rows are kept: whether :meth:`compute` gets them, so that all ranks have to ask for means together; or only
    :meth:`report`."""

    def rows(self, outputs: Any, targets: Targets) -> Tensor:
        """Return numbers of each sample, (B, columns), for metrics that no sums give.

        They are kept until the end of the evaluation and come to :meth:`compute` from all ranks.
        """
        raise NotImplementedError

    def compute(self, sums: Tensor, count: float, rows: Tensor | None) -> dict[str, float]:
        """Return the :attr:`metrics` of an evaluation.

        Args:
            sums: of :meth:`measure` over all samples, float64 on the CPU. As a default these are sums over the samples of
                each metric.
            count: of the samples.
            rows: of :meth:`rows`, float64 (samples, columns), in the order of the data; None without, and where only
                :meth:`report` needs them.
        """
        return {name: value / (count or math.nan) for name, value in zip(self.metrics, sums.tolist(), strict=True)}

    def report(self, sums: Tensor, count: float, rows: Tensor | None, classes: Sequence[str]) -> dict[str, Any]:
        """Return what an evaluation says beyond numbers of the whole, as JSON: of each class, a confusion matrix, ...

        The arguments are those of :meth:`compute`; *classes* are the names.
        """
        return {}

    def compare(self, train: Features, val: Features, classes: int, share: Share) -> dict[str, float]:
        """Return the :attr:`metrics` of a frozen model, where :attr:`learns` is False.

        All ranks call it together with the same features, what :meth:`scores` returns, and the number of *classes*.
        """
        raise NotImplementedError(f"{type(self).__name__} learns nothing and does not say what is compared")

    # Prediction.

    def scores(self, outputs: Any) -> Any:
        """Return of a model's outputs what may be averaged over several views of an image, as probabilities may."""
        return outputs

    def mirrored(self, scores: Any) -> Any:
        """Return the *scores* of a mirror image as those of the image: masks are mirrored back."""
        return scores

    def predict(self, scores: Any, classes: Sequence[str], top: int = 1) -> list[dict[str, Any]]:
        """Return for each sample its row of a table: ``prediction`` first, then what else belongs to it.

        A value is a number, a text, or a mask: a uint8 or int32 tensor (H, W), which is written as a PNG file. *top* is how
        many choices a row has, with their probabilities, where the task has choices. *scores* are what :meth:`scores` returned.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its predictions are")

    def draw(self, image: Tensor, row: Mapping[str, Any]) -> Tensor:
        """Return *image*, uint8 (3, H, W), with the prediction *row* drawn on it."""
        return image


def name_of(label: int, classes: Sequence[str]) -> str:
    """A class's name; its number where a model has more outputs than there are names."""
    return classes[label] if label < len(classes) else str(label)


def as_sum(values: Tensor, valid: Tensor) -> Tensor:
    """The float64 sum of the 1-D *values* of the samples that are *valid*; others may be anything, NaN too."""
    return torch.where(valid, values.double(), 0.0).sum()
