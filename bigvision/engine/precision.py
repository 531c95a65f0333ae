"""What is computed in which number format. Master weights, gradient reduction and optimizer state are always fp32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Products in *precision*; norms, softmax and losses stay fp32 where torch deems it necessary."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=COMPUTE_DTYPES[precision])


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018); 1 and constant for the other formats."""

    growth_interval = 2000

    def __init__(self, precision: str) -> None:
        self.dynamic = precision == "fp16"
        self.value = 2.0**16 if self.dynamic else 1.0
        self.good_steps = 0

    @property
    def may_fall(self) -> bool:
        return self.dynamic and self.value > 1.0

    def update(self, overflowed: bool) -> None:
        """Halve the scale after an overflow; double it after :attr:`growth_interval` steps without one."""
        if overflowed:
            self.value, self.good_steps = max(1.0, self.value / 2), 0
        elif self.dynamic:
            self.good_steps += 1
            if self.good_steps == self.growth_interval:
                self.value, self.good_steps = self.value * 2, 0
