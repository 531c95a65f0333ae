"""How long does a training step under ZeRO take, over a plain ``deepspeed.initialize`` loop of the same model?

DeepSpeed is told the same on both sides. Run it with ``make bench``; it writes
``benchmarks/results/zero_time_DEVICE_STAGE_N_ranks.{json,md}``.
"""

from __future__ import annotations

import argparse

from benchmarks.harness import Side, compare
from benchmarks.peers import Step, Work, batch, plain_deepspeed
from benchmarks.step_time import configuration, fresh, mean_over_ranks, options, ours
from bigvision.engine.zero_settings import deepspeed_settings
from bigvision.models import find_blocks
from bigvision.runtime import Runtime, start


def main() -> None:
    """Measure each stage, print the tables and write them."""
    parser = options(str(__doc__).splitlines()[0])
    parser.add_argument("--stages", default="123")
    asked = parser.parse_args()
    with start(asked.device) as runtime:
        for stage in asked.stages:
            measure(asked, runtime, f"zero{stage}")


def measure(asked: argparse.Namespace, runtime: Runtime, strategy: str) -> None:
    """Build ours and two peers from the same seed, check that their first losses agree, and time them."""
    work = Work(precision=asked.precision)
    batch_here = batch(asked.batch, seed=runtime.rank, image_size=asked.image_size)
    images, labels = (tensor.to(runtime.device) for tensor in batch_here)

    def peer() -> Step:
        model = fresh(asked, runtime)
        sizes = [block.parameters for block in find_blocks(model)]
        config = configuration(asked, work, runtime.world_size, strategy)
        total = sum(parameter.numel() for parameter in model.parameters())
        settings = deepspeed_settings(config, runtime.world_size, runtime.device, total, max(sizes))
        return plain_deepspeed(model, settings, work, runtime.device)

    baseline = f"deepspeed {strategy}"
    # Ours first: it makes DeepSpeed forget what it counted for earlier models.
    steps: dict[str, Step] = {f"bigvision {strategy}": ours(asked, runtime, work, strategy), baseline: peer(), "again": peer()}
    first = {name: mean_over_ranks(step(images, labels), runtime) for name, step in steps.items()}
    tolerance = 1e-5 if asked.precision == "fp32" else 2e-2
    assert max(first.values()) - min(first.values()) < tolerance * first[baseline], first

    def side(step: Step) -> Side:
        return lambda: step(images, labels)

    control = side(steps.pop("again"))
    ranks = f"{runtime.world_size} rank{'s' * (runtime.world_size > 1)}"
    report = compare(
        f"One training step under {strategy}, {asked.model} {asked.options} at {asked.image_size} px, "
        f"batch {asked.batch} per rank, {asked.precision}, {ranks}",
        {name: side(step) for name, step in steps.items()},
        baseline,
        control,
        rounds=asked.rounds,
        device=runtime.device,
    )
    if runtime.is_main:
        print(report.table())
    report.write(asked.results / f"zero_time_{asked.device}_{strategy}_{ranks.replace(' ', '_')}")


if __name__ == "__main__":
    main()
