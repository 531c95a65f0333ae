"""Classification."""

from __future__ import annotations

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


def test_no_credit_for_ties_and_nan() -> None:
    labels = torch.tensor([0, 1])
    for outputs in (torch.zeros(2, 10), torch.full((2, 10), torch.nan)):
        assert Classify().measure(outputs, labels, torch.tensor([True, True]))[1:].tolist() == [0, 0]


def test_fewer_than_five_classes() -> None:
    sums = Classify().measure(torch.tensor([[1.0, 2.0]]), torch.tensor([0]), torch.tensor([True]))
    assert sums[1:].tolist() == [0, 1]
