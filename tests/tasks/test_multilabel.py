"""Several labels for each image: losses and metrics equal those of timm and torchmetrics."""

from __future__ import annotations

import pytest
import torch
from timm.loss import AsymmetricLossMultiLabel
from torchmetrics.functional.classification import multilabel_average_precision, multilabel_f1_score

from bigvision.tasks import Multilabel


def drawn(samples: int = 200, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, many of which tie, and labels of which the last class has none."""
    draw = torch.Generator().manual_seed(0)
    outputs = (torch.randn(samples, classes, generator=draw) * 4).round() / 4
    targets = (torch.rand(samples, classes, generator=draw) < torch.linspace(0.5, 0.05, classes)).to(torch.uint8)
    targets[:, -1] = 0
    return outputs, targets


def test_losses() -> None:
    outputs, targets = drawn()
    found = Multilabel().loss(outputs, targets)
    expected = torch.nn.BCEWithLogitsLoss()(outputs, targets.float()) * len(outputs)
    torch.testing.assert_close(found, expected)
    peer = AsymmetricLossMultiLabel(gamma_neg=4, gamma_pos=0, clip=0.05)
    outputs = (outputs * 3).requires_grad_()
    found, expected = Multilabel("asymmetric").loss(outputs, targets), peer(outputs, targets) * len(outputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, outputs)[0], torch.autograd.grad(expected, outputs)[0])


def test_the_asymmetric_loss_of_certain_outputs_is_finite_and_falls() -> None:
    outputs = torch.tensor([[60.0, -60.0], [-60.0, 60.0]], requires_grad=True)
    loss = Multilabel("asymmetric").loss(outputs, torch.tensor([[1, 0], [1, 0]]))
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all() and gradient[1, 0] < 0


def test_metrics_are_those_of_torchmetrics() -> None:
    outputs, targets = drawn()
    task = Multilabel()
    task.prepare([str(label) for label in range(7)], {})
    valid = torch.ones(len(outputs), dtype=torch.bool)
    sums, rows = task.measure(outputs, targets, valid), task.rows(outputs, targets)
    found = task.compute(sums, len(outputs), rows)
    scores, long = outputs.sigmoid(), targets.long()
    # The last class, which no sample has, counts as 0.
    expected = {
        "map": multilabel_average_precision(scores.double(), long, 7, "macro"),
        "f1": multilabel_f1_score(scores, long, 7, average="macro"),
        "f1_micro": multilabel_f1_score(scores, long, 7, average="micro"),
    }
    assert {name: found[name] for name in expected} == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-6)
    classes = task.report(sums, len(outputs), rows, list("abcdefg"))["classes"]
    each = multilabel_average_precision(scores.double(), long, 7, None)
    assert [one["average_precision"] for one in classes[:-1]] == pytest.approx(each[:-1].tolist(), rel=1e-6)
    assert classes[-1] == {"class": "g", "samples": 0, "average_precision": None, "f1": 0.0}


def test_mixed_labels_are_shares_and_predictions_are_named() -> None:
    task = Multilabel()
    task.prepare(["a", "b"], {})
    targets = torch.tensor([[1, 0], [1, 1]], dtype=torch.uint8)
    mixed = task.mixed(targets, lambda values: values.flip(0), torch.tensor([0.75, 0.75]))
    assert mixed.tolist() == [[1.0, 0.25], [1.0, 0.75]]
    rows = task.predict(torch.tensor([[0.9, 0.8], [0.1, 0.2]]), ["a", "b"])
    assert [row["prediction"] for row in rows] == ["a|b", ""] and [row["label1"] for row in rows] == ["a", "b"]
