"""How good frozen features are: nearest neighbours and a linear probe on what a backbone returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigvision.errors import UserError
from bigvision.tasks.base import Features, Share, Task

TEMPERATURE = 0.07
"""Of the neighbours' votes, as in DINO (Caron et al. 2021)."""
PENALTIES = tuple(10.0**power for power in range(0, -8, -1))
"""Weight decays of the probe among which the held-out training features choose, in this order."""
HOLDOUT = 5
"""One in so many training features is held out for that."""
ITERATIONS = 100
"""Of L-BFGS, for each weight decay."""
ROWS, COLUMNS = 1024, 1 << 16
"""Features that are compared, or passed through the probe, at a time: the numbers do not depend on the number of ranks."""


class Embed(Task):
    """k nearest neighbours and a linear probe of a frozen model's features; nothing is trained but the probe.

    The features are what timm's models return without a classifier.
    """

    target = "label"
    metrics = ("knn_top1", "knn_top5", "probe_top1", "probe_top5")
    learns = False

    def __init__(self, k: int = 20) -> None:
        self.k = k

    def outputs(self, classes: Sequence[str]) -> None:
        return None

    def scores(self, outputs: Any) -> Tensor:
        """Return the features, fp32 (B, width)."""
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            found = f"a tensor {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise UserError(f"task.name: embed needs a vector for each image, but the model returns {found}: use another model")
        return outputs.float()

    def predict(self, scores: Tensor, classes: Sequence[str], top: int = 1) -> list[dict[str, Any]]:
        """Return the features of each sample, a column for each number."""
        names = [f"feature{number}" for number in range(scores.shape[1])]
        return [dict(zip(names, values)) for values in scores.tolist()]

    def compare(self, train: Features, val: Features, classes: int, share: Share) -> dict[str, float]:
        if not torch.isfinite(train.values).all() or not torch.isfinite(val.values).all():
            raise UserError("task.name: embed, but some features are not finite: use parallel.precision fp32, or another model")
        found = torch.cat([neighbours(train, val, classes, self.k, share), probe(train, val, classes, share)])
        return dict(zip(self.metrics, (found / len(val.labels)).tolist(), strict=True))


def hits(scores: Tensor, labels: Tensor) -> Tensor:
    """Return how many labels are among the first and the first five *scores* (B, classes): float64 (2,).

    A label that ties with others counts as the share of them that is left to it; without any vote it is a miss.
    """
    own = scores.gather(1, labels[:, None])
    ahead, alike = (scores > own).sum(1).double(), (scores == own).sum(1).double()
    known = own[:, 0] > -math.inf
    return torch.stack([(((k - ahead) / alike).clamp(0, 1) * known).sum() for k in (1, 5)])


# Nearest neighbours.


def neighbours(train: Features, val: Features, classes: int, k: int, share: Share) -> Tensor:
    """Return the :func:`hits` of votes of the *k* nearest training features by the cosine, each with exp(cosine / 0.07)."""
    k, found = min(k, len(train.labels)), torch.zeros(2, dtype=torch.float64, device=share.device)
    labels = train.labels.to(share.device)
    for part in share.parts(len(val.labels), ROWS):
        queries = F.normalize(val.values[part].to(share.device), dim=1)
        best, places = queries.new_empty(len(queries), 0), labels.new_empty(len(queries), 0)
        for begin in range(0, len(labels), COLUMNS):
            near = queries @ F.normalize(train.values[begin : begin + COLUMNS].to(share.device), dim=1).T
            here = torch.arange(begin, begin + near.shape[1], device=share.device).expand_as(near)
            best, chosen = torch.cat([best, near], 1).topk(min(k, best.shape[1] + near.shape[1]), dim=1)
            places = torch.cat([places, here], 1).gather(1, chosen)
            share.beat()
        votes = torch.zeros(len(queries), classes, dtype=torch.float64, device=share.device)
        votes.scatter_add_(1, labels[places], (best.double() / TEMPERATURE).exp())
        found += hits(votes.masked_fill(votes == 0, -math.inf), val.labels[part].to(share.device))
    share.total(found)
    return found.cpu()


# The linear probe.


def probe(train: Features, val: Features, classes: int, share: Share) -> Tensor:
    """Return the :func:`hits` of a logistic regression on *train*, whose features are made to have mean 0 and variance 1.

    Of the `PENALTIES` the one is taken that has most hits on held-out training features, the largest among equal ones, and all
    of *train* is fitted with it.
    """
    mean, std = _moments(train.values)
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))
    held, kept = order[: len(order) // HOLDOUT], order[len(order) // HOLDOUT :]
    penalty = PENALTIES[0]
    if len(held):
        chosen, rest = (_Rows(train, places, mean, std, share) for places in (held, kept))
        weights = torch.zeros(train.values.shape[1] + 1, classes, dtype=torch.float64, device=share.device)
        most = -1.0
        for tried in PENALTIES:
            weights = rest.fitted(weights, tried)
            if (top1 := float(chosen.hits(weights)[0])) > most:
                penalty, most = tried, top1
    everything = _Rows(train, order, mean, std, share)
    start = torch.zeros(train.values.shape[1] + 1, classes, dtype=torch.float64, device=share.device)
    return _Rows(val, torch.arange(len(val.labels)), mean, std, share).hits(everything.fitted(start, penalty)).cpu()


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature, float64; 1 in the place of a deviation that is 0."""
    parts = values.split(COLUMNS)
    mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / len(values)
    variance = torch.stack([(part.double() - mean).square().sum(0) for part in parts]).sum(0) / len(values)
    # What a constant feature's rounding leaves is no variation.
    return mean, torch.where(variance.sqrt() > 1e-6 * mean.abs(), variance.sqrt(), 1.0)


class _Rows:
    """This rank's share of the features of some samples."""

    def __init__(self, features: Features, places: Tensor, mean: Tensor, std: Tensor, share: Share) -> None:
        self.share, self.count = share, len(places)
        mine = places[share.rank :: share.ranks]
        values = (features.values[mine].double() - mean) / std
        # The column of ones is for the bias.
        self.values = torch.cat([values, values.new_ones(len(values), 1)], 1).to(share.device)
        self.labels = features.labels[mine].to(share.device)

    def fitted(self, weights: Tensor, penalty: float) -> Tensor:
        """Return the weights (width + 1, classes) of the least mean cross-entropy plus *penalty* / 2 times their squared norm,
        but for the bias; found by L-BFGS from *weights* on, in float64."""
        weights = weights.clone().requires_grad_()
        search = torch.optim.LBFGS(
            [weights], max_iter=ITERATIONS, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            numbers = torch.zeros(weights.numel() + 1, dtype=torch.float64, device=weights.device)
            for values, labels in zip(self.values.split(8 * ROWS), self.labels.split(8 * ROWS)):
                loss = F.cross_entropy(values @ weights, labels, reduction="sum") / self.count
                (gradient,) = torch.autograd.grad(loss, weights)
                numbers += torch.cat([loss.detach()[None], gradient.flatten()])
            self.share.total(numbers)
            self.share.beat()
            decayed = weights.detach().clone()
            decayed[-1] = 0.0
            weights.grad = numbers[1:].view_as(weights) + penalty * decayed
            return numbers[0] + penalty / 2 * decayed.square().sum()

        search.step(closure)
        return weights.detach()

    def hits(self, weights: Tensor) -> Tensor:
        """Return the :func:`hits` of all ranks' rows."""
        found = torch.zeros(2, dtype=torch.float64, device=weights.device)
        for values, labels in zip(self.values.split(8 * ROWS), self.labels.split(8 * ROWS)):
            found += hits(values @ weights, labels)
        self.share.total(found)
        return found
