"""Classification."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy

from bigvision.errors import UserError
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


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_binary_loss_is_timms(smoothing: float) -> None:
    torch.manual_seed(0)
    outputs, labels = torch.randn(6, 10), torch.tensor([0, 1, 2, 3, 4, 5])
    task, peer = Classify(smoothing, "bce"), BinaryCrossEntropy(smoothing=smoothing)
    torch.testing.assert_close(task.loss(outputs, labels), peer(outputs, labels) * 6)
    mixed = task.mixed(labels, lambda values: values.flip(0), torch.full((6,), 0.3))
    theirs = mixup_target(labels, 10, lam=0.3, smoothing=smoothing)
    torch.testing.assert_close(task.loss(outputs, mixed), peer(outputs, theirs) * 6)


def test_distributions_are_targets() -> None:
    """Their most probable class is what metrics count; one-hot ones are labels."""
    torch.manual_seed(0)
    outputs, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    for loss in (None, "bce"):
        task = Classify(0.1, loss, [0.5, 1.0, 3.0])
        task.prepare(["a", "b", "c"], {})
        hard = torch.nn.functional.one_hot(labels, 3).float()
        torch.testing.assert_close(task.loss(outputs, hard), task.loss(outputs, labels))
        torch.testing.assert_close(task.weight(hard), task.weight(labels))
        valid = torch.ones(4, dtype=torch.bool)
        torch.testing.assert_close(task.measure(outputs, hard, valid), task.measure(outputs, labels, valid))
    soft = torch.tensor([[0.5, 0.3, 0.2]]).expand(4, 3)
    expected = torch.nn.CrossEntropyLoss(reduction="sum")(outputs, soft)
    torch.testing.assert_close(Classify().loss(outputs, soft), expected)
    mixed = Classify().mixed(hard, lambda values: values.flip(0), torch.full((4,), 0.25))
    torch.testing.assert_close(
        Classify().loss(outputs, mixed), torch.nn.CrossEntropyLoss(reduction="sum")(outputs, 0.25 * hard + 0.75 * hard.flip(0))
    )


def test_class_weights(tmp_path: Path) -> None:
    """Balanced ones are scikit-learn's; the weight of mixed samples is that of their shares."""
    labels = np.array([0] * 6 + [1] * 3 + [2])
    task = Classify(class_weights="balanced")
    assert task.weighed and not Classify().weighed  # a step without weights does not wait for its last sample
    task.prepare(["a", "b", "c"], task.study(lambda most: labels, ["a", "b", "c"], {}))
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert task.weights is not None and task.weights.tolist() == pytest.approx(expected.tolist())
    targets, outputs = torch.tensor([0, 2]), torch.randn(2, 3)
    peer = torch.nn.CrossEntropyLoss(torch.tensor(expected, dtype=torch.float32))(outputs, targets)
    weight = task.weight(targets)
    assert weight is not None
    torch.testing.assert_close(task.loss(outputs, targets) / weight.float(), peer)
    mixed = task.mixed(targets, lambda values: values.flip(0), torch.tensor([0.75, 0.75]))
    assert float(task.weight(mixed) or 0) == pytest.approx(expected[0] + expected[2])
    for text in ("0.5\n1\n3\n", "[0.5, 1, 3]", '{"c": 3, "a": 0.5, "b": 1}'):
        (tmp_path / "weights").write_text(text)
        task = Classify(class_weights=str(tmp_path / "weights"))
        task.prepare(["a", "b", "c"], {})
        assert task.weights is not None and task.weights.tolist() == [0.5, 1.0, 3.0]
    # A model may have more outputs than the data has classes.
    assert torch.isfinite(task.loss(torch.randn(2, 5), targets)) and torch.isfinite(task.loss(torch.randn(2, 3), targets))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1.0, 2.0], "task.class_weights: 2 numbers, but the data has 3 classes"),
        ("1 2 x", "is no list of numbers"),
        ('{"a": 1, "b": 2, "d": 3}', "names 'd', which is no class"),
        ('{"a": 1, "b": 2}', "has no weight for class 'c'"),
        ("1 -2 3", "no finite number from 0 on"),
        (None, "cannot be read: No such file"),
    ],
)
def test_class_weights_that_do_not_fit(tmp_path: Path, weights: list[float] | str | None, said: str) -> None:
    if not isinstance(weights, list):
        file = tmp_path / "weights"
        if weights is not None:
            file.write_text(weights)
        weights = str(file)
    with pytest.raises(UserError, match=said):
        Classify(class_weights=weights).prepare(["a", "b", "c"], {})


def test_report() -> None:
    task, names = Classify(), ["a", 'b,"\n<script>', "c"]
    task.prepare(names, {})
    outputs = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    labels, valid = torch.tensor([0, 1, 1, 0]), torch.tensor([True, True, True, False])
    sums, rows = task.measure(outputs, labels, valid), task.rows(outputs, labels)[valid]
    metrics, report = task.compute(sums, 3, None), task.report(sums, 3, rows, names)
    assert metrics["top1"] == pytest.approx(2 / 3) and metrics["mean_class_top1"] == 0.75  # without the class of no sample
    assert [tuple(one.values()) for one in report["classes"]] == [("a", 1, 1.0), (names[1], 2, 0.5), ("c", 0, None)]
    assert report["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    many = [str(label) for label in range(21_000)]
    task.prepare(many, {})
    report = task.report(torch.zeros(3 + 42_000), 3, torch.tensor([[5.0, 20_999.0], [5.0, 20_999.0], [4.0, 4.0]]), many)
    assert report["confused"] == [["5", "20999", 2]] and "confusion" not in report


def test_a_model_without_a_head_is_named() -> None:
    with pytest.raises(UserError, match=r"returns \(7, 10\) for an image instead of a score for each class"):
        Classify().loss(torch.zeros(2, 7, 10), torch.tensor([0, 1]))
