"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), the same on any number of ranks.

Samples of the stream are mixed in pairs: with *apart* 1 the first with the second, the third with the fourth, and so on;
with repeated augmentation *apart* is the number of repetitions, so that no image meets itself. Pairs, not whole batches,
because they lie on one rank whatever the number of ranks. How a pair is mixed follows from (seed, its place in the stream),
and is applied on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bigvision.seeds import seed_from


@dataclass
class Mix:
    """How each sample of a batch is mixed with its partner."""

    weight: Tensor
    """float32 (B,), of the sample's own pixels outside of the box"""
    box: Tensor
    """int64 (B, 4): top, left, bottom and right of what is the partner's; empty for mixup"""
    share: Tensor
    """float32 (B,), of the sample's own label"""
    apart: int

    def images(self, images: Tensor) -> Tensor:
        """Mix float images (B, C, H, W)."""
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device).view(1, 1, height, 1)
        columns = torch.arange(width, device=images.device).view(1, 1, 1, width)
        top, left, bottom, right = (side.view(-1, 1, 1, 1) for side in self.box.unbind(1))
        inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
        weight = self.weight.view(-1, 1, 1, 1).to(images.dtype)
        other = self.partners(images)
        return torch.where(inside, other, images * weight + other * (1 - weight))

    def targets(self, labels: Tensor) -> Tensor:
        """float64 (B, 3): each sample's label, its partner's, and the share of its own."""
        return torch.stack([labels.double(), self.partners(labels).double(), self.share.double()], dim=1)

    def partners(self, values: Tensor) -> Tensor:
        """Each sample's partner in its place."""
        return values.unflatten(0, (-1, 2, self.apart)).flip(1).flatten(0, 2)

    def map(self, change: Callable[[Tensor], Tensor]) -> Mix:
        return Mix(change(self.weight), change(self.box), change(self.share), self.apart)

    def split(self, size: int) -> list[Mix]:
        """Those of consecutive micro-batches of *size* samples, which must hold whole pairs."""
        assert size % (2 * self.apart) == 0 or size >= len(self.share), "a pair would be cut"
        parts = zip(self.weight.split(size), self.box.split(size), self.share.split(size))
        return [Mix(weight, box, share, self.apart) for weight, box, share in parts]


@dataclass(frozen=True)
class Mixer:
    """Draws how samples are mixed."""

    seed: int
    mixup: float
    """Parameter of the Beta distribution; 0 does not mix."""
    cutmix: float
    """Likewise; with both, each pair gets one of them."""
    every: int = 2
    """Consecutive samples that are mixed alike: 2 * *apart* for each pair by itself, a global batch for all of its pairs."""
    apart: int = 1

    def draw(self, start: int, count: int, height: int, width: int) -> Mix:
        """For the samples ``start..start+count-1`` of the stream, images of *height* x *width*; both end with whole pairs."""
        groups = np.arange(start, start + count) // self.every
        drawn = {int(group): self._one(int(group), height, width) for group in np.unique(groups)}
        weight, box, share = zip(*(drawn[int(group)] for group in groups))
        return Mix(torch.tensor(weight), torch.tensor(box), torch.tensor(share), self.apart)

    def _one(self, group: int, height: int, width: int) -> tuple[float, tuple[int, int, int, int], float]:
        random = np.random.default_rng(seed_from("mix", self.seed, group))
        if not self.cutmix or (self.mixup and random.random() < 0.5):
            share = float(random.beta(self.mixup, self.mixup))
            return share, (0, 0, 0, 0), share
        share = np.sqrt(1 - random.beta(self.cutmix, self.cutmix))
        (row, column), down, across = (
            random.integers(0, (height, width)).tolist(),
            int(height * share) // 2,
            int(width * share) // 2,
        )
        box = max(0, row - down), max(0, column - across), min(height, row + down), min(width, column + across)
        # What was cut off at the border is not the partner's.
        return 1.0, box, 1 - (box[2] - box[0]) * (box[3] - box[1]) / (height * width)
