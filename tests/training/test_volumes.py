"""Training on volumes: any number of channels, through augmentation, evaluation and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tests.distributed import run_ranks
from tests.recipes import MODELS, lines, losses, recipe, run


def plain(out: Path, data: Path, steps: int, channels: int = 5, **keys: Any) -> dict[str, Any]:
    """A run on slices of *data*; *keys* are of the section ``data``."""
    spec = f"volumes:{data}?slices=5&stride=4"
    model = MODELS["vit"] | {"options": MODELS["vit"]["options"] | {"in_chans": channels}}
    return recipe(
        out, data={"train": spec, "val": spec, "erase": 0.5, **keys},
        train={"steps": steps, "global_batch": 6, "micro_batch": 3}, optim={"schedule": "constant"},
    ) | {"model": model}  # fmt: skip


def test_volumes_are_trained_on_evaluated_and_resumed(tmp_path: Path) -> None:
    from bigvision.data.sources.volumes import write_examples

    write_examples(tmp_path / "data", volumes=6, size=16)
    run_ranks(run, 1, plain(tmp_path / "whole", tmp_path / "data", 4))
    run_ranks(run, 1, plain(tmp_path / "parts", tmp_path / "data", 2))
    first = losses(tmp_path / "parts")
    run_ranks(run, 1, plain(tmp_path / "parts", tmp_path / "data", 4))
    assert len(first) == 2 and losses(tmp_path / "parts") == losses(tmp_path / "whole")
    evaluated = [line for line in lines(tmp_path / "whole") if any("top1" in key for key in line)]
    assert evaluated
    model = timm.create_model(f"local-dir:{tmp_path}/whole/step-00000004", pretrained=True).eval()
    assert model(torch.zeros(1, 5, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize(
    ("channels", "keys", "said"),
    [
        (3, {}, "model.options.in_chans: 3, but the images have 5 channels: use 5"),
        (5, {"policy": "randaugment"}, "data.policy: randaugment is for RGB images, but these have 5 channels"),
        (5, {"jitter": 0.3}, "data.jitter: 0.3 is for RGB images"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, channels: int, keys: dict[str, Any], said: str) -> None:
    from bigvision.data.sources.volumes import write_examples

    write_examples(tmp_path / "data", volumes=2, size=8)
    with pytest.raises(AssertionError, match=said):
        run_ranks(run, 1, plain(tmp_path / "out", tmp_path / "data", 1, channels, **keys))
