"""The exponential moving average of the weights (EMA; Polyak and Juditsky 1992), over the fragments of this rank."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from bigvision.config import EmaConfig
from bigvision.engine.state import BUCKET, RUNNING, average, is_frozen
from bigvision.fragments import Fragment
from bigvision.runtime import Runtime

Pair = tuple[Tensor, Tensor]  # averaged values and the live ones that they follow


def never_averaged(module: nn.Module) -> set[str]:
    """The names of what no average follows, since it never changes: what is frozen, and running statistics of frozen norms."""
    frozen = {name for name, parameter in module.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    return frozen | {f"{path}.{name}" for path, part in module.named_modules() if is_frozen(part) for name in RUNNING}


class Ema:
    """Averages what this rank holds of the model; nothing is communicated in a step, and the host never waits.

    Averaged is what timm's ModelEmaV3 averages: trainable parameters and floating-point buffers, such as BatchNorm's running
    statistics. What is frozen and what counts has no average: in an evaluation and in an export it is the model's own.
    """

    def __init__(self, config: EmaConfig, fragments: Iterable[Fragment], frozen: Collection[str], runtime: Runtime) -> None:
        """Args:
        fragments: of the group "model", whose values stay where they are in memory.
        frozen: names of tensors that never change.
        """
        assert config.decay is not None
        self.decay, self.every, self.warmup, self.runtime = config.decay, config.every, config.warmup, runtime
        self.updates = torch.zeros((), dtype=torch.float64, device=runtime.device)  # those of skipped steps do not count
        self.held: list[Fragment] = []
        self.pairs: dict[tuple[int, int], Pair] = {}  # by the live memory: tied tensors have one average
        for fragment in fragments:
            live = fragment.values
            if fragment.name not in frozen and live.is_floating_point():
                averaged, _ = self.pairs.setdefault((live.data_ptr(), live.numel()), (live.clone(), live))
                self.held.append(replace(fragment, group="ema", values=averaged))
        self.buckets = list(_buckets(pair for pair in self.pairs.values() if pair[1].numel()))

    @torch.no_grad()
    def update(self, skipped: Tensor, step: int) -> None:
        """Follow the weights after *step*; *skipped*, 0-D and on the device, is 1 where the step has not changed them."""
        if step % self.every:
            return
        taken, decay = 1.0 - skipped.double(), torch.full_like(self.updates, self.decay)
        if self.warmup:
            # Of TensorFlow's ExponentialMovingAverage(num_updates): early averages would else be mostly the first weights.
            decay = torch.minimum(decay, (1.0 + self.updates) / (10.0 + self.updates))
        weight = taken * (1.0 - decay)
        self.updates += taken
        for averaged, live in self.buckets:
            # Not torch._foreach_lerp_, whose weight is a number on the host or one tensor of full size for each.
            difference = torch._foreach_sub(live, averaged)
            torch._foreach_mul_(difference, weight.to(live[0].device, live[0].dtype))
            torch._foreach_add_(averaged, difference)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages and the weights, bit for bit; the second time they are back. Then refresh what derives from
        the weights."""
        for averaged, live in self.buckets:
            before = [values.clone() for values in live]
            torch._foreach_copy_(live, averaged)
            torch._foreach_copy_(averaged, before)

    def synchronize(self) -> None:
        """Replace averages of running statistics, which each data-parallel rank has its own of, by their mean."""
        average([f.values for f in self.held if f.name.rpartition(".")[2] in RUNNING and f.values.numel()], self.runtime)

    def fragments(self) -> Iterator[Fragment]:
        """Yield live views of the averages; writing to them restores."""
        yield from self.held

    def restored(self, updates: int | None) -> None:
        """Go on after so many *updates*; None: the checkpoint had no averages, and these begin at its weights."""
        self.updates.fill_(updates or 0)
        if updates is None:
            for averaged, live in self.buckets:
                torch._foreach_copy_(averaged, live)


def _buckets(pairs: Iterable[Pair]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """*pairs* as lists for foreach calls, each of one device and type and of few numbers: a call needs as much memory again."""
    found: dict[tuple[torch.device, torch.dtype], list[Pair]] = {}
    for averaged, live in pairs:
        found.setdefault((live.device, live.dtype), []).extend(zip(averaged.split(BUCKET), live.split(BUCKET)))
    for alike in found.values():
        bucket: list[Pair] = []
        for pair in alike:
            if bucket and sum(live.numel() for _, live in bucket) + pair[1].numel() > BUCKET:
                yield [one for one, _ in bucket], [other for _, other in bucket]
                bucket = []
            bucket.append(pair)
        yield [one for one, _ in bucket], [other for _, other in bucket]
