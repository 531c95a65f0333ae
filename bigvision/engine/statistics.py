"""Running statistics (BatchNorm's), which a forward pass moves before anyone knows whether its numbers are finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

RUNNING = ("running_mean", "running_var")


class Statistics:
    """Those of this rank's part of the model, and how they were before the step."""

    def __init__(self, parts: Sequence[nn.Module], device: torch.device) -> None:
        modules = [module for part in parts for module in part.modules()]

        def found(*names: str) -> list[Tensor]:
            buffers = [module._buffers.get(name) for module in modules for name in names]
            return [buffer for buffer in buffers if buffer is not None]

        self.running = found(*RUNNING)
        # Lists of one format each, which the device copies in one go.
        self.live = [tensors for tensors in (self.running, found("num_batches_tracked")) if tensors]
        self.kept = [[tensor.clone() for tensor in tensors] for tensors in self.live]
        self.none = torch.ones((), dtype=torch.bool, device=device)

    def keep(self) -> None:
        """Remember them as they are now."""
        for kept, live in zip(self.kept, self.live):
            torch._foreach_copy_(kept, live)

    def restore(self) -> None:
        """Make them what they were when they were last kept."""
        for kept, live in zip(self.kept, self.live):
            torch._foreach_copy_(live, kept)

    def finite(self) -> Tensor:
        """Whether all are finite: bool and 0-D, on the device. A variance may overflow where outputs, divided by it, do not."""
        if not self.running:
            return self.none
        return torch.stack(torch._foreach_norm(self.running, ord=math.inf)).isfinite().all()
