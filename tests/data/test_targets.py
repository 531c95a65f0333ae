"""Targets of any kind, from the source through the loader to the device: as the task puts them together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bigvision.data import Batch, Sample, Source, StepBatch, eval_batches, train_batches, transform
from bigvision.data.sources.base import UnreadableSample
from bigvision.samples import concatenate, stack
from bigvision.tasks import Classify, Task

LENGTH = 30


class Boxes(NamedTuple):
    corners: Tensor
    kinds: Tensor


KINDS: dict[str, Any] = {
    "label": lambda index: index % 3,
    "number": lambda index: index / 2,
    "vector": lambda index: torch.tensor([index, 1.0, 0.5]),
    "mask": lambda index: torch.full((8, 8), index, dtype=torch.uint8).numpy(),
    "dict": lambda index: {"mask": torch.full((4, 4), index), "grade": (index, float(index))},
    "boxes": lambda index: Boxes(torch.full((1 + index % 3, 4), float(index)), torch.full((1 + index % 3,), index)),
    "none": lambda index: None,
}


class AnyKind(Source):
    style = "tiny"

    def __init__(self, kind: str) -> None:
        self.name, self.kind, self.classes = kind, kind, ["a", "b", "c"]

    def __len__(self) -> int:
        return LENGTH

    def read(self, index: int) -> Sample:
        if index == 7:
            raise UnreadableSample("torn")
        return Sample(torch.full((3, 8, 8), index, dtype=torch.uint8), self.label(index))

    def label(self, index: int) -> Any:
        return KINDS[self.kind](index)


class Plain(Task):
    """A task that says nothing of its targets."""

    metrics = ("loss",)


class Detect(Task):
    """Images have different numbers of boxes: they are filled up to the largest of a micro-batch."""

    metrics = ("loss",)

    def collate(self, targets: Sequence[Boxes]) -> dict[str, Tensor]:
        corners, kinds = zip(*targets)
        return {
            "corners": torch.nn.utils.rnn.pad_sequence(list(corners), batch_first=True),
            "kinds": torch.nn.utils.rnn.pad_sequence(list(kinds), batch_first=True, padding_value=-1),
        }


def task_of(kind: str) -> Task:
    return {"label": Classify(), "boxes": Detect()}.get(kind, Plain())


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and all(map(equal, one, other))
    return one is other is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_target_of_any_kind_reaches_the_device(kind: str, workers: int) -> None:
    source, task = AnyKind(kind), task_of(kind)
    options = {"seed": 1, "global_batch": 40, "ranks": 1, "workers": workers, "micro_batch": 10, "collate": task.collate}
    with train_batches(source, transform("photo", 8, train=True), position=0, rank=0, **options) as loader:
        parts = list(StepBatch(loader, 40, 10).split(10))
    for part in parts:
        moved = part.to("cpu")
        assert equal(moved.targets, task.collate([KINDS[kind](index) for index in moved.ids.tolist()]))
        assert equal(moved.labels, moved.targets)
        if kind not in ("boxes", "none"):
            halves = moved.split(6)
            assert equal(concatenate([half.targets for half in halves]), moved.targets)
            assert len(halves[1]) == 4 and equal(
                halves[1].targets, task.collate([KINDS[kind](i) for i in halves[1].ids.tolist()])
            )
    assert 7 in [bad.id for bad in loader.bad] and 7 not in torch.cat([part.ids for part in parts])
    moved = parts[0].to("meta")
    assert all(tensor.device.type == "meta" for tensor in moved.tensors())


@pytest.mark.parametrize("kind", ["label", "mask", "none"])
def test_padding_and_unreadable_samples_have_targets_too(kind: str) -> None:
    source = AnyKind(kind)
    for rank in range(2):
        batches: list[Batch] = list(
            eval_batches(source, transform("photo", 8, train=False), batch=12, rank=rank, ranks=2, workers=0)
        )
        assert [len(batch) for batch in batches] == [12, 12]
        if kind != "none":
            assert all(len(batch.targets) == 12 for batch in batches)
    assert batches[1].valid.tolist() == [False] * 12, "rank 1 has nothing left"


def test_how_targets_are_stacked() -> None:
    assert stack([3, 1]).dtype == torch.int64 and stack([0.5, 1.0]).dtype == torch.float32 and stack([None, None]) is None
    assert stack([True, False]).dtype == torch.bool
    boxes = stack([Boxes(torch.zeros(2, 4), torch.zeros(2)), Boxes(torch.ones(2, 4), torch.ones(2))])
    assert isinstance(boxes, Boxes) and boxes.corners.shape == (2, 2, 4)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        stack([(1, 2), (1,)])
    sample = Sample(b"", 5)
    assert sample.label == sample.target == 5 and sample == (b"", 5)
