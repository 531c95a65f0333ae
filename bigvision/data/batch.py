"""A batch of images, and its arithmetic on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigvision.data.mixing import Mix


@dataclass
class Batch:
    """Samples of one rank. Images stay uint8 until they are on the device: a quarter of the bytes to move."""

    images: Tensor
    """uint8 (B, C, H, W), in memory often pixel by pixel (channels last), as they were decoded"""
    labels: Tensor
    """int64 (B,)"""
    ids: Tensor
    """int64 (B,), each sample's index in its source"""
    valid: Tensor
    """bool (B,), False for the padding at the end of an evaluation and for what could not be read"""
    mix: Mix | None = None
    """How samples are mixed in pairs, in training"""

    def __len__(self) -> int:
        return len(self.labels)

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
        parts = list(zip(*(tensor.split(size) for tensor in (self.images, self.labels, self.ids, self.valid))))
        mixes = self.mix.split(size) if self.mix is not None else [None] * len(parts)
        return [Batch(*part, mix=mix) for part, mix in zip(parts, mixes)]

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

    def targets(self) -> Tensor:
        """What the task's loss gets: the labels, or of mixed samples what :meth:`Mix.targets` says."""
        return self.labels if self.mix is None else self.mix.targets(self.labels)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        mix = self.mix.map(change) if self.mix is not None else None
        return Batch(change(self.images), change(self.labels), change(self.ids), change(self.valid), mix)


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
