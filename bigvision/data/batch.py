"""Batches: samples of one rank, their arithmetic on the device, and how they are mixed.

Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) mix samples of the stream in pairs: with *apart* 1 the first with the
second, the third with the fourth, and so on; with repeated augmentation *apart* is the number of repetitions, so that no
image meets itself. Pairs, not whole batches, because they lie on one rank whatever the number of ranks. How a pair is mixed
follows from (seed, its place in the stream), and is applied on the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigvision.samples import Targets, concatenate, each_tensor, seed_from


@dataclass
class Batch:
    """Samples of one rank. Images stay uint8 until they are on the device: a quarter of the bytes to move."""

    images: Tensor
    """uint8 (B, C, H, W), in memory often pixel by pixel (channels last), as they were decoded"""
    targets: Targets
    """for classification int64 (B,)"""
    ids: Tensor
    """int64 (B,), each sample's index in its source"""
    valid: Tensor
    """bool (B,), False for the padding at the end of an evaluation and for what could not be read"""
    mix: Mix | None = None
    """How samples are mixed in pairs, in training"""

    waited = 0.0
    """Seconds that its user waited for it since it began: it is here already. See `StepBatch`."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> Targets:
        """The targets, as classification calls them."""
        return self.targets

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on *device*. The copy to a CUDA device does not wait for the device."""
        device = torch.device(device)
        # Only a copy from pinned memory is asynchronous. Pinning what the loader has pinned already costs nothing.
        source = self.pin_memory() if device.type == "cuda" and self.images.device.type == "cpu" else self
        return source._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (`DataLoader` calls this in its pinning thread)."""
        return self._map(Tensor.pin_memory)

    def split(self, size: int) -> list[Batch]:
        """Return consecutive micro-batches of *size* samples, views of this batch; the last may be shorter."""
        if self.mix is not None and size % (2 * self.mix.apart) and size < len(self):
            raise ValueError(f"micro-batches of {size} would cut a pair of mixed samples")
        return [self._map(lambda tensor: tensor[begin : begin + size]) for begin in range(0, len(self), size)]  # noqa: B023

    def whole(self) -> Batch:
        """This batch; see `StepBatch`."""
        return self

    def inputs(
        self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, buffer: Tensor | None = None,
        channels_last: bool = False,
    ) -> Tensor:  # fmt: skip
        """What the model gets: the images normalised, and mixed; float32 (B, C, H, W), perhaps in *buffer*.

        Images that are floating-point numbers already are taken as they are.

        Args:
            buffer: a float32 tensor that nobody needs any more, for the result if it has its shape and layout.
            channels_last: how the result lies in memory.
        """
        layout = torch.channels_last if channels_last else torch.contiguous_format
        if buffer is None or buffer.shape != self.images.shape or not buffer.is_contiguous(memory_format=layout):
            buffer = torch.empty(self.images.shape, device=self.images.device, memory_format=layout)
        images = buffer.copy_(self.images) if self.images.is_floating_point() else normalize(self.images, mean, std, buffer)
        return images if self.mix is None else self.mix.images(images)

    def tensors(self) -> list[Tensor]:
        """All tensors of the batch."""
        found: list[Tensor] = []
        self._map(lambda tensor: found.append(tensor) or tensor)
        return found

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        mix = self.mix.map(change) if self.mix is not None else None
        targets = each_tensor(change, self.targets)
        return Batch(change(self.images), targets, change(self.ids), change(self.valid), mix)


class StepBatch:
    """A rank's samples of one step, as micro-batches that are taken from the loader when they are needed.

    The step so begins when the first of them is there, and never are all of them in memory.
    """

    def __init__(self, parts: Iterator[Batch], samples: int, micro_batch: int) -> None:
        """Takes the first of *parts*, the loader's, of which as many are taken as make up *samples*, of *micro_batch* each."""
        self.waited = 0.0
        """Seconds that were spent waiting for micro-batches, so far."""
        self._parts, self._samples, self._micro_batch = parts, samples, micro_batch
        self._left, self._ids = samples, []
        self._first: Batch | None = self._next()

    def __len__(self) -> int:
        return self._samples

    def split(self, size: int) -> Iterator[Batch]:
        """The micro-batches, each once, as they arrive; of *size* samples, which is what the loader was asked for."""
        if size != self._micro_batch:
            raise ValueError(f"micro-batches of {size} were asked for, but the loader makes some of {self._micro_batch}")
        while self._first is not None or self._left:
            part, self._first = self._next() if self._first is None else self._first, None
            yield part

    def whole(self) -> Batch:
        """All samples in one batch."""
        return join(list(self.split(self._micro_batch)))

    def finish(self) -> None:
        """Take what nobody has taken from the loader."""
        self._first = None
        while self._left:
            self._next()

    @property
    def ids(self) -> Tensor:
        """Of the samples that have arrived."""
        return torch.cat(self._ids)

    def _next(self) -> Batch:
        began = time.perf_counter()
        part = next(self._parts)
        self.waited += time.perf_counter() - began
        self._left -= len(part)
        self._ids.append(part.ids)
        return part


def join(parts: Sequence[Batch]) -> Batch:
    """One batch of all samples of *parts*."""
    if len(parts) == 1:
        return parts[0]
    mixes = [part.mix for part in parts if part.mix is not None]
    images, ids, valid = (torch.cat([getattr(part, name) for part in parts]) for name in ("images", "ids", "valid"))
    return Batch(images, concatenate([part.targets for part in parts]), ids, valid, Mix.join(mixes) if mixes else None)


def normalize(
    images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, buffer: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Return ``(images / 255 - mean) / std`` per channel, float32.

    Args:
        images: uint8 (B, C, H, W) on any device.
        mean, std: one value per channel, for images scaled to 0..1 (timm's ``mean`` and ``std``); as tensors they
            are best on the images' device already.
        buffer: a float32 tensor that nobody needs any more, for the result if it has its shape.
    """
    offset, scale = (torch.as_tensor(value, device=images.device).mul(255).view(-1, 1, 1) for value in (mean, std))
    if buffer is None or buffer.shape != images.shape:
        buffer = torch.empty(images.shape, device=images.device)
    # On a CPU one image after the other, whose numbers stay in its cache from one operation to the next.
    parts = zip(buffer, images) if buffer.device.type == "cpu" else [(buffer, images)]
    for part, image in parts:
        part.copy_(image).sub_(offset).div_(scale)
    return buffer


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

    def partners(self, values: Tensor) -> Tensor:
        """Each sample's partner in its place."""
        return values.unflatten(0, (-1, 2, self.apart)).flip(1).flatten(0, 2)

    @classmethod
    def join(cls, parts: Sequence[Mix]) -> Mix:
        """Those of consecutive samples."""
        weight, box, share = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "box", "share"))
        return cls(weight, box, share, parts[0].apart)

    def map(self, change: Callable[[Any], Any]) -> Mix:
        return Mix(change(self.weight), change(self.box), change(self.share), self.apart)


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
    origin: int = 0
    """The sample of the stream from which on pairs are counted"""

    def draw(self, start: int, count: int, height: int, width: int) -> Mix:
        """For the samples ``start..start+count-1`` of the stream, images of *height* x *width*."""
        groups = np.arange(start - self.origin, start - self.origin + count) // self.every
        drawn = {int(group): self._one(int(group), height, width) for group in np.unique(groups)}
        weight, box, share = zip(*(drawn[int(group)] for group in groups))
        return Mix(torch.tensor(weight), torch.tensor(box), torch.tensor(share), self.apart)

    def _one(self, group: int, height: int, width: int) -> tuple[float, tuple[int, int, int, int], float]:
        random = np.random.default_rng(seed_from("mix", self.seed, group))
        if not self.cutmix or (self.mixup and random.random() < 0.5):
            share = float(random.beta(self.mixup, self.mixup))
            return share, (0, 0, 0, 0), share
        share = np.sqrt(1 - random.beta(self.cutmix, self.cutmix))
        row, column = random.integers(0, (height, width)).tolist()
        down, across = int(height * share) // 2, int(width * share) // 2
        box = max(0, row - down), max(0, column - across), min(height, row + down), min(width, column + across)
        # What was cut off at the border is not the partner's.
        return 1.0, box, 1 - (box[2] - box[0]) * (box[3] - box[1]) / (height * width)
