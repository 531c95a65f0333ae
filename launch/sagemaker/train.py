"""The entry in SageMaker's container. Hyperparameters come as ``--key value``, and so does the recipe: ``--recipe FILE``."""

from __future__ import annotations

import sys

from bigvision.signals import SIGNALS

CHECKPOINTS = "/opt/ml/checkpoints"
"""What SageMaker copies to and from the bucket of ``checkpoint_config``."""


def arguments(given: list[str]) -> list[str]:
    """*given* as ``launch/train.py`` takes it: the recipe first, and ``--out`` where checkpoints outlive the instance."""
    rest = list(given)
    recipe = []
    if "--recipe" in rest[:-1]:
        at = rest.index("--recipe")
        recipe = [rest[at + 1]]
        del rest[at : at + 2]
    if not any(argument == "--out" or argument.startswith("--out=") for argument in rest):
        rest += ["--out", CHECKPOINTS]
    return [*recipe, *rest]


if __name__ == "__main__":
    SIGNALS.listen()
    from bigvision.cli import main

    sys.exit(main(["train", *arguments(sys.argv[1:])]))
