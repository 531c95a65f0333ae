"""How much longer does a training step take with ``train.deterministic: true``?

One rank: ``python -m benchmarks.determinism_time``, on a GPU with ``--device cuda``. It writes
``benchmarks/results/determinism_time_DEVICE_1_rank.{json,md}``.
"""

from __future__ import annotations

import os

from torch import Tensor

from benchmarks.peers import Step, Work
from benchmarks.step_time import options, ours, race
from bigvision.runtime import deterministic, start
from bigvision.runtime.process import REPEATING_WORKSPACES, WORKSPACE


def main() -> None:
    """Measure, print the table and write it."""
    asked = options(str(__doc__).splitlines()[0]).parse_args()
    # cuBLAS reads it once, so both sides have it.
    os.environ.setdefault(WORKSPACE, REPEATING_WORKSPACES[0])

    def switched(step: Step) -> Step:
        def deterministically(images: Tensor, labels: Tensor) -> Tensor:
            with deterministic(True, asked.device):
                return step(images, labels)

        return deterministically

    with start(asked.device) as runtime:
        false, again, true = (ours(asked, runtime, Work(precision=asked.precision), "ddp") for _ in range(3))
        steps = {"false": false, "again": again, "true": switched(true)}
        race(asked, runtime, steps, "false", "train.deterministic: one step", f"determinism_time_{asked.device}")


if __name__ == "__main__":
    main()
