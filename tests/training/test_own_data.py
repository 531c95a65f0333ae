"""A run on datasets that the caller has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigvision.tasks import Classify
from tests.distributed import run_ranks
from tests.recipes import losses, recipe


class Pets:
    """Noise, as a user's map-style dataset."""

    def __init__(self, length: int) -> None:
        self.classes = ["cat", "dog", "elk"]
        self.targets = [index % 3 for index in range(length)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = np.random.default_rng(index).integers(0, 256, (3, 40, 36), dtype=np.uint8)
        return torch.from_numpy(pixels), self.targets[index]


def run_on_pets(plain: dict[str, Any]) -> tuple[list[float], dict[str, float]]:
    from bigvision import load_config, train

    result = train(load_config(plain), data=Pets(40), val=Pets(7))
    return losses(Path(plain["out"])), result.metrics


def test_own_datasets_train_and_resume_on_any_ranks(tmp_path: Path) -> None:
    whole = run_ranks(run_on_pets, 1, recipe(tmp_path / "one", train={"steps": 6}))[0]
    assert len(whole[0]) == 6 and set(whole[1]) == set(Classify.metrics)
    run_ranks(run_on_pets, 3, recipe(tmp_path / "two", data={"workers": 1}, train={"steps": 3}))
    found = run_ranks(run_on_pets, 2, recipe(tmp_path / "two", parallel={"strategy": "fsdp"}, train={"steps": 6}))[0]
    assert found[0] == pytest.approx(whole[0], rel=1e-5)
    assert "train: python:Pets" in (tmp_path / "two/run.yaml").read_text()


def test_the_data_of_such_a_run_has_to_be_named_to_read_it_again(tmp_path: Path) -> None:
    from bigvision import load_config, train
    from bigvision.errors import UserError

    run_ranks(run_on_pets, 1, recipe(tmp_path, train={"steps": 1}))
    with pytest.raises(UserError, match=r"data.train: the data of this run was given from Python \(Pets\)"):
        train(load_config(str(tmp_path / "run.yaml")))
    with pytest.raises(UserError, match="none to validate on: give val"):
        train(load_config(recipe(tmp_path)), data=Pets(3))
