"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from bigvision.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of step *step* (from 0) of *steps*: a linear warm-up from 0 to ``lr``, then constant, linear or cosine to 0.

    Cosine without restarts is that of SGDR (Loshchilov and Hutter 2017).
    """
    warmup = config.warmup if config.warmup >= 1 else config.warmup * steps
    if step + 1 < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, max(0.0, step - warmup) / max(1.0, steps - warmup))
    if config.schedule == "linear":
        return config.lr * (1.0 - progress)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
