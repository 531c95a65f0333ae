"""Classification."""

from __future__ import annotations

import math

import pytest
import torch

from bigvision.tasks import Classify


def test_loss_and_metrics() -> None:
    torch.manual_seed(0)
    outputs, labels = torch.randn(6, 10), torch.tensor([0, 1, 2, 3, 4, 5])
    task = Classify(label_smoothing=0.1)
    expected = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(outputs, labels) * 6
    torch.testing.assert_close(task.loss(outputs, labels), expected)
    valid = torch.tensor([True, True, True, True, False, False])
    loss, top1, top5 = task.measure(outputs, labels, valid).tolist()
    top = outputs.topk(5).indices[:4]
    assert top1 == (top[:, 0] == labels[:4]).sum() and top5 == (top == labels[:4, None]).sum()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(outputs[:4], labels[:4], reduction="sum").item())


@pytest.mark.parametrize(
    ("outputs", "top1", "top5"),
    [
        ([0.0] * 10, 1 / 10, 5 / 10),  # all alike: chance level
        ([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0], 1 / 3, 1.0),
        ([1.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0], 0.0, 2 / 4),
        ([1.0, 2.0, 2.0, 2.0, 2.0, 1.0], 0.0, 1 / 2),
        ([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0], 0.0, 0.0),
        ([1.0, 1.0], 1 / 2, 1.0),
        ([math.nan] * 10, 0.0, 0.0),
        ([math.nan, 0.0, 0.0], 0.0, 0.0),
        ([1.0, math.nan, 0.0], 0.0, 1.0),
        ([1.0, *[math.nan] * 5], 0.0, 0.0),
        ([math.inf, math.inf, 0.0], 0.0, 0.0),
        ([-math.inf, 0.0, 0.0], 0.0, 0.0),
    ],
)
def test_ties_and_what_is_no_number(outputs: list[float], top1: float, top5: float) -> None:
    """The label is class 0."""
    found = Classify().measure(torch.tensor([outputs]), torch.tensor([0]), torch.tensor([True]))[1:]
    assert found.tolist() == pytest.approx([top1, top5])
    padding = Classify().measure(torch.tensor([outputs]), torch.tensor([0]), torch.tensor([False]))[1:]
    assert padding.tolist() == [0, 0]


def test_ties_of_bf16_count_as_topk_counts_them_on_average() -> None:
    """Of 1,000 classes in bf16 the best two often tie."""
    draw = torch.Generator().manual_seed(0)
    count, classes = 6000, 1000
    labels = torch.randint(classes, (count,), generator=draw)
    exact = torch.randn(count, classes, generator=draw)
    exact[torch.arange(count), labels] += 3
    rounded = exact.bfloat16()
    found = Classify().measure(rounded, labels, torch.ones(count, dtype=torch.bool))[1:] / count
    # Which of several equal ones topk takes depends on their order, so the classes are shuffled.
    hits = torch.zeros(2, dtype=torch.float64)
    rounds = 8
    for _ in range(rounds):
        order = torch.randperm(classes, generator=draw)
        top = order[rounded[:, order].topk(5).indices]
        hits += torch.stack([(top[:, :k] == labels[:, None]).sum().double() for k in (1, 5)]) / count / rounds
    tied = (rounded == rounded.amax(dim=1, keepdim=True)).sum(dim=1) > 1
    assert tied.double().mean() > 0.01, "a tie as a miss would be noticed"
    strict = (rounded.argmax(dim=1) == labels) & ~tied
    assert (found - hits).abs().max() < 1e-3 < found[0] - strict.double().mean()


def test_fewer_than_five_classes() -> None:
    sums = Classify().measure(torch.tensor([[1.0, 2.0]]), torch.tensor([0]), torch.tensor([True]))
    assert sums[1:].tolist() == [0, 1]
