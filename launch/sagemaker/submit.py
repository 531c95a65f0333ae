"""Hands a run to SageMaker, from the project's folder, with `pip install sagemaker` (3) and AWS credentials.

python launch/sagemaker/submit.py --image IMAGE --role ROLE --bucket s3://BUCKET/RUN [--instance ml.p5.48xlarge] [--recipe FILE]
    [-- --train.epochs 5 ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of SageMaker's ModelTrainer."""
    from sagemaker.core.shapes import CheckpointConfig, StoppingCondition  # pyright: ignore[reportMissingImports]
    from sagemaker.train.configs import Compute, SourceCode  # pyright: ignore[reportMissingImports]
    from sagemaker.train.distributed import Torchrun  # pyright: ignore[reportMissingImports]

    seconds = int(options.hours * 3600)
    return {
        "training_image": options.image,
        "role": options.role,
        "base_job_name": "bigvision",
        "source_code": SourceCode(
            source_dir=str(ROOT), requirements="launch/sagemaker/requirements.txt", entry_script="launch/sagemaker/train.py",
            ignore_patterns=[".git", ".venv", "__pycache__", "checkpoints"],
        ),
        # As many ranks as the instance has GPUs, under torchrun.
        "distributed": Torchrun(),
        "compute": Compute(
            instance_type=options.instance, instance_count=1, volume_size_in_gb=options.disk,
            enable_managed_spot_training=options.spot,
        ),
        "stopping_condition": StoppingCondition(
            max_runtime_in_seconds=seconds, **({"max_wait_time_in_seconds": 2 * seconds} if options.spot else {})
        ),
        "checkpoint_config": CheckpointConfig(s3_uri=options.bucket),
        "hyperparameters": hyperparameters(options.recipe, options.flags),
    }  # fmt: skip


def hyperparameters(recipe: str, flags: list[str]) -> dict[str, str]:
    """Flags of bigvision as SageMaker takes them: names and values.

    Raises:
        SystemExit: a flag has no value.
    """
    pairs = [flag for word in flags for flag in (word.split("=", 1) if word.startswith("--") and "=" in word else [word])]
    names, values = pairs[::2], pairs[1::2]
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        sys.exit("error: flags behind -- come in pairs: --train.epochs 5")
    return {"recipe": recipe} | {name.removeprefix("--"): value for name, value in zip(names, values)}


def main() -> None:
    """Parse the command line and hand the run over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, words in (
        ("image", "a training container with torch 2.11 or newer"),
        ("role", "the IAM role of the job"),
        ("bucket", "where checkpoints go, and from where the run goes on: s3://BUCKET/RUN"),
    ):
        parser.add_argument(f"--{name}", required=True, help=words)
    parser.add_argument("--instance", default="ml.p5.48xlarge")
    parser.add_argument("--disk", type=int, default=200, help="GB for data and checkpoints")
    parser.add_argument("--hours", type=float, default=24.0, help="the longest that the run may take")
    parser.add_argument(
        "--spot", action="store_true", help="on spare capacity that may be taken away; the run goes on by itself"
    )
    parser.add_argument("--recipe", default="recipes/digits.yaml")
    parser.add_argument("flags", nargs="*", help="flags of bigvision, behind --")
    options = parser.parse_args()
    from sagemaker.train import ModelTrainer  # pyright: ignore[reportAttributeAccessIssue, reportMissingImports]

    ModelTrainer(**describe(options)).train(wait=False)


if __name__ == "__main__":
    main()
