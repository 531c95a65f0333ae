"""How long does a training step take, over the same step written by hand?

On one rank against a plain PyTorch loop, on several against plain ``fully_shard`` with the same units; Accelerate's loop
beside both. Run it with ``make bench``; it writes ``benchmarks/results/step_time_N_ranks.{json,md}``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import Side, compare
from benchmarks.peers import Step, Work, accelerate_loop, batch, hand_written, plain_fully_shard
from bigvision import load_config
from bigvision.data import Batch
from bigvision.models import find_blocks
from bigvision.runtime import Runtime, start
from bigvision.training.build import build_model

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure, print the table and write it."""
    asked = options(str(__doc__).splitlines()[0]).parse_args()
    with start(asked.device) as runtime:
        measure(asked, runtime)


def options(description: str) -> argparse.ArgumentParser:
    """What a measurement of steps can be asked for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--options", default="{patch_size: 4}")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16, help="per rank")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def measure(asked: argparse.Namespace, runtime: Runtime) -> None:
    """Build every side from the same seed and race them."""
    threads = torch.get_num_threads()
    work = Work(precision=asked.precision)
    alone = runtime.world_size == 1
    baseline = "hand-written" if alone else "fully_shard"

    def peer() -> Step:
        model = fresh(asked, runtime)
        if alone:
            return hand_written(model, work, runtime.device)
        paths = [block.path for block in find_blocks(model)]
        return plain_fully_shard(model, [model.get_submodule(path) for path in paths], work, runtime.device)

    steps: dict[str, Step] = {baseline: peer(), "again": peer()}
    for strategy in ("ddp",) if alone else ("fsdp", "ddp"):
        steps[f"bigvision {strategy}"] = ours(asked, runtime, work, strategy)
    steps["accelerate" if alone or asked.device == "cuda" else "accelerate (ddp)"] = accelerate_loop(
        fresh(asked, runtime), work, runtime.device
    )
    # Creating an Accelerator may change the number.
    torch.set_num_threads(threads)

    race(asked, runtime, steps, baseline, "One training step", f"step_time_{asked.device}")


def race(asked: argparse.Namespace, runtime: Runtime, steps: dict[str, Step], baseline: str, question: str, stem: str) -> None:
    """Check that the first losses of all *steps* agree, time them beside each other, print the table and write it.

    Args:
        steps: by name; among them the *baseline*, and "again", its control.
    """
    images, labels = (
        tensor.to(runtime.device) for tensor in batch(asked.batch, seed=runtime.rank, image_size=asked.image_size)
    )
    first = {name: mean_over_ranks(step(images, labels), runtime) for name, step in steps.items()}
    tolerance = 1e-5 if asked.precision == "fp32" else 2e-2
    assert max(first.values()) - min(first.values()) < tolerance * first[baseline], first

    def side(step: Step) -> Side:
        return lambda: step(images, labels)

    ranks = f"{runtime.world_size} rank{'s' * (runtime.world_size > 1)}"
    report = compare(
        f"{question}, {asked.model} {asked.options} at {asked.image_size} px, batch {asked.batch} per rank, "
        f"{asked.precision}, {ranks}",
        {name: side(step) for name, step in steps.items() if name != "again"},
        baseline,
        side(steps["again"]),
        rounds=asked.rounds,
        device=runtime.device,
    )
    if runtime.is_main:
        print(report.table())
    report.write(asked.results / f"{stem}_{ranks.replace(' ', '_')}")


def configuration(asked: argparse.Namespace, work: Work, world_size: int, strategy: str) -> Any:
    """bigvision's configuration of the same work."""
    import yaml

    return load_config(
        {
            "model": {"name": asked.model, "image_size": asked.image_size, "options": yaml.safe_load(asked.options)},
            "optim": {"lr": work.lr, "weight_decay": work.weight_decay, "clip": work.clip, "warmup": work.warmup},
            "parallel": {"strategy": strategy, "precision": asked.precision, "device": asked.device},
            "train": {"global_batch": asked.batch * world_size},
        }
    )


def fresh(asked: argparse.Namespace, runtime: Runtime) -> torch.nn.Module:
    """The model as timm builds it, with the seed's values."""
    from bigvision.models import blueprint

    config = configuration(asked, Work(), runtime.world_size, "ddp")
    plan = blueprint(config.model, 10)
    model = plan.module.to_empty(device="cpu")
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in plan.tensors(config.seed):
            state[name].copy_(tensor)
    return model.train()


def ours(asked: argparse.Namespace, runtime: Runtime, work: Work, strategy: str) -> Step:
    """One call of ``engine.train_step``."""
    config = configuration(asked, work, runtime.world_size, strategy)
    engine, _, _ = build_model(config, 10, runtime, steps=work.steps, say=print)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        every = torch.ones_like(labels, dtype=torch.bool)
        return engine.train_step(Batch(images, labels, labels, every)).loss

    return step


def mean_over_ranks(loss: Tensor, runtime: Runtime) -> float:
    """The mean of every rank's loss."""
    total = loss.detach().double().clone()
    dist.all_reduce(total)
    return total.item() / runtime.world_size


if __name__ == "__main__":
    main()
