"""A batch of images, and its arithmetic on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Batch:
    """Samples of one rank. Images stay uint8 until they are on the device: a quarter of the bytes to move."""

    images: Tensor
    """uint8 (B, 3, H, W)"""
    labels: Tensor
    """int64 (B,)"""
    ids: Tensor
    """int64 (B,), each sample's index in its source"""
    valid: Tensor
    """bool (B,), False for the padding at the end of an evaluation"""

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
        parts = zip(*(tensor.split(size) for tensor in (self.images, self.labels, self.ids, self.valid)))
        return [Batch(*part) for part in parts]

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(change(self.images), change(self.labels), change(self.ids), change(self.valid))


def normalize(
    images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return ``(images / 255 - mean) / std`` per channel.

    Args:
        images: uint8 (B, C, H, W) on any device.
        mean, std: one value per channel, for images scaled to 0..1 (timm's ``mean`` and ``std``); as tensors they
            are best on the images' device already.
        dtype: of the result (B, C, H, W). The arithmetic is fp32 whatever it is.
    """
    offset, scale = (torch.as_tensor(value, device=images.device).mul(255).view(-1, 1, 1) for value in (mean, std))
    return images.to(torch.float32).sub_(offset).div_(scale).to(dtype)
