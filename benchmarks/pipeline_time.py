"""How much of the ideal a pipeline's step reaches, and what its schedules keep of activations.

With m micro-batches on p ranks, at most ``m / (m + p - 1)`` of the ranks' time is spent in passes (Huang et al. 2019). What
the passes themselves take is timed in the same rounds: all ranks run their own stages on m micro-batches at the same time,
and send nothing. Activations are counted: the most bytes that autograd keeps at any time, without parameters. Run it with
``make bench``; it writes ``benchmarks/results/pipeline_time_*.{json,md}``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.peers import Work, batch
from benchmarks.step_time import configuration, options
from bigvision.config import load_config
from bigvision.data import Batch
from bigvision.engine.pipeline import PipelineEngine
from bigvision.pipeline.cutting import Spec
from bigvision.runtime import Runtime, start
from bigvision.training.build import build_model

SCHEDULES = ("gpipe", "1f1b")
COUNTS = (4, 8, 16)


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES)
    parser.set_defaults(batch=4, model="vit_small_patch16_224", image_size=64, options="{patch_size: 8, depth: 12}")
    asked = parser.parse_args()
    with start(asked.device, stages=None) as runtime:
        rows = [measure(asked, runtime, schedule, count) for schedule in asked.schedules for count in COUNTS]
        if runtime.is_main:
            write(asked, rows, runtime.world_size)


def measure(asked: argparse.Namespace, runtime: Runtime, schedule: str, count: int) -> dict[str, Any]:
    """Race the schedule of *count* micro-batches, of ``--batch`` images each, with its passes alone."""
    plain = configuration(asked, Work(precision=asked.precision), 1, "pipeline").to_dict()
    plain["parallel"] |= {"schedule": schedule, "microbatches": count}
    plain["train"] |= {"global_batch": asked.batch * count}
    engine, _, _ = build_model(load_config(plain), 10, runtime, steps=9, say=lambda text: None)
    assert isinstance(engine, PipelineEngine)
    images, labels = batch(asked.batch * count, image_size=asked.image_size)
    whole = Batch(images, labels, labels, torch.ones_like(labels, dtype=torch.bool))

    def step() -> None:
        engine._passes(whole, 1.0 / len(whole))
        engine.stepper.optimizer.zero_grad(set_to_none=True)

    alone = passes_alone(engine, whole, count)
    most = peak_activations(engine, step)
    ratios = []
    for round_ in range(asked.rounds + 3):
        times = [timed(side) for side in ((step, alone) if round_ % 2 else (alone, step))]
        taken, work = times if round_ % 2 else times[::-1]
        if round_ >= 3:  # the first ones allocate
            ratios.append([taken, work])
    gathered: list[Any] = [torch.zeros(len(ratios), 2, dtype=torch.float64) for _ in range(runtime.world_size)]
    dist.all_gather(gathered, torch.tensor(ratios, dtype=torch.float64))
    peaks = [torch.zeros((), dtype=torch.float64) for _ in gathered]
    dist.all_gather(peaks, torch.tensor(float(most), dtype=torch.float64))
    ideal = count / (count + runtime.world_size - 1)
    # A round's passes are the mean over the ranks, its step the slowest rank's.
    reached = [
        statistics.mean(float(rank[n, 1]) for rank in gathered) / max(float(rank[n, 0]) for rank in gathered)
        for n in range(len(ratios))
    ]  # fmt: skip
    engine.close()
    middle = statistics.median(reached)
    quartiles = statistics.quantiles(reached, n=4)
    return {
        "schedule": schedule, "microbatches": count, "ideal": ideal, "reached": middle, "share": middle / ideal,
        "quartiles": [quartiles[0] / ideal, quartiles[2] / ideal], "activations": [float(peak) for peak in peaks],
    }  # fmt: skip


def timed(side: Callable[[], None]) -> float:
    dist.barrier()
    begin = time.perf_counter()
    side()
    return time.perf_counter() - begin


def passes_alone(engine: PipelineEngine, whole: Batch, count: int) -> Callable[[], None]:
    """The forward and backward passes of this rank's stages on as many micro-batches, with inputs that were there before."""
    size = len(whole) // count
    last = engine.placement.stages - 1
    labels = whole.labels.split(size)
    images = torch.randn(size, *engine.input_shape)
    _, height, width = engine.input_shape
    sends = engine.plan.sends[True, (height, width)]

    def run() -> None:
        engine.passes = dict.fromkeys(engine.stages, 0)
        for number, stage in engine.stages.items():
            inputs = [filled(sends[number - 1], size) if number else (images,) for _ in labels]
            for received, targets in zip(inputs, labels):
                outputs = stage(*received)
                if number == last:
                    engine._loss(outputs, targets).backward()
                else:
                    torch.autograd.backward(outputs, [torch.ones_like(sent) for sent in outputs])
        engine.stepper.optimizer.zero_grad(set_to_none=True)

    return run


def filled(specs: tuple[Spec, ...], samples: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(spec.sizes(samples), requires_grad=spec.requires_grad) for spec in specs)


class _Kept:
    """A tensor that autograd keeps; its storage counts while any such object lives."""

    uses: ClassVar[Counter[int]] = Counter()
    now: ClassVar[int] = 0
    most: ClassVar[int] = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.size = tensor, tensor.untyped_storage().nbytes()
        self.place = tensor.untyped_storage().data_ptr()
        if not _Kept.uses[self.place]:
            _Kept.now += self.size
            _Kept.most = max(_Kept.most, _Kept.now)
        _Kept.uses[self.place] += 1

    def __del__(self) -> None:
        _Kept.uses[self.place] -= 1
        if not _Kept.uses[self.place]:
            _Kept.now -= self.size


def peak_activations(engine: PipelineEngine, step: Callable[[], None]) -> int:
    """The most bytes kept for the backward pass during *step*."""
    own = {parameter.untyped_storage().data_ptr() for part in engine.parts for parameter in part.parameters()}
    _Kept.uses.clear()
    _Kept.now = _Kept.most = 0

    def pack(tensor: Tensor) -> Any:
        plain = isinstance(tensor, nn.Parameter) or tensor.untyped_storage().data_ptr() in own
        return tensor if plain else _Kept(tensor.detach())

    with saved_tensors_hooks(pack, lambda kept: kept.tensor if isinstance(kept, _Kept) else kept):
        step()
    return _Kept.most


def write(asked: argparse.Namespace, rows: list[dict[str, Any]], ranks: int) -> None:
    """Print the table and write it."""
    lines = [
        f"## A pipeline's passes, {asked.model} {asked.options} at {asked.image_size} px, micro-batches of {asked.batch}, "
        f"{asked.precision}, {ranks} ranks",
        "",
        "| schedule | micro-batches | ideal m/(m+p-1) | reached | of the ideal (quartiles) | activations of each rank, MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        low, high = row["quartiles"]
        kept = ", ".join(f"{size / 2**20:.1f}" for size in row["activations"])
        lines.append(
            f"| {row['schedule']} | {row['microbatches']} | {row['ideal']:.3f} | {row['reached']:.3f} | "
            f"{row['share']:.3f} ({low:.3f} to {high:.3f}) | {kept} |"
        )
    lines += ["", f"{asked.rounds} rounds."]
    text = "\n".join(lines) + "\n"
    print(text)
    asked.results.mkdir(parents=True, exist_ok=True)
    stem = asked.results / f"pipeline_time_{asked.device}_{ranks}_ranks"
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
