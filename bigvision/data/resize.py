"""Resizing pixels into memory that is there already."""

from __future__ import annotations

import platform

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

_IN_PLACE = {
    InterpolationMode.BILINEAR: getattr(torch.ops.aten._upsample_bilinear2d_aa, "out", None),
    InterpolationMode.BICUBIC: getattr(torch.ops.aten._upsample_bicubic2d_aa, "out", None),
}
"""What `torch.nn.functional.interpolate` calls, but to an output of ours: no memory to get, nothing to copy."""


def resize_into(room: Tensor, pixels: Tensor, size: tuple[int, int], mode: InterpolationMode) -> None:
    """Resize *pixels*, uint8 (1, C, H, W), to *size*, antialiased, and put their middle into *room*, (C, h, w).

    Each pixel is what torchvision's v2 functions make it.
    """
    operator = _IN_PLACE.get(mode) if _native(mode) else None
    if operator is not None and size == tuple(room.shape[1:]) and size != tuple(pixels.shape[2:]):
        if pixels.stride(1) != 1:
            # From planes it cannot write pixel by pixel: an assertion of its own fails.
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        operator(pixels, size, False, None, None, out=room.unsqueeze(0))
        return
    resized = F.resize_image(pixels, list(size), interpolation=mode, antialias=True)
    room.copy_(F.center_crop_image(resized, list(room.shape[1:]))[0])


def _native(mode: InterpolationMode) -> bool:
    """Whether torchvision has PyTorch resize bytes as they are; elsewhere it goes through floats, which round otherwise."""
    wide = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or platform.machine() in ("aarch64", "arm64")
    return wide or mode != InterpolationMode.BILINEAR
