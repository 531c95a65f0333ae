"""How long does a training step under ZeRO take, over a plain ``deepspeed.initialize`` loop of the same model?

DeepSpeed is told the same on both sides. Run it with ``make bench``; it writes
``benchmarks/results/zero_time_DEVICE_STAGE_N_ranks.{json,md}``.
"""

from __future__ import annotations

import argparse

from benchmarks.peers import Step, Work, plain_deepspeed
from benchmarks.step_time import configuration, fresh, options, ours, race
from bigvision.config import deepspeed_settings
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
    """Build ours and two peers from the same seed and race them."""
    work = Work(precision=asked.precision)

    def peer() -> Step:
        model = fresh(asked, runtime)
        sizes = [block.parameters for block in find_blocks(model)]
        config = configuration(asked, work, runtime.world_size, strategy)
        total = sum(parameter.numel() for parameter in model.parameters())
        settings = deepspeed_settings(config, runtime.world_size, runtime.device.type, total, max(sizes))
        return plain_deepspeed(model, settings, work, runtime.device)

    baseline = f"deepspeed {strategy}"
    # Ours first: it makes DeepSpeed forget what it counted for earlier models.
    steps: dict[str, Step] = {f"bigvision {strategy}": ours(asked, runtime, work, strategy), baseline: peer(), "again": peer()}
    race(asked, runtime, steps, baseline, f"One training step under {strategy}", f"zero_time_{asked.device}_{strategy}")


if __name__ == "__main__":
    main()
