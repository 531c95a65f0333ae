"""Which recipe a command runs, and that it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bigvision
from bigvision.launchers import ray
from bigvision.launchers.commands import default_recipe, take_recipe
from tests.cli.test_mistakes import command

DIGITS = str(default_recipe())


@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        ([], DIGITS),
        (["--parallel.deepspeed", "ds_configs/zero2.json"], DIGITS),
        (["--train.steps=5", "--model.drop_path", "0.1"], DIGITS),
        (["--model.name", "resnet18"], None),
        (["--train.steps", "5", "--data.train=imagefolder:pets"], None),
        (["--data.val", "digits"], None),
        (["my.yaml", "--model.name", "resnet18"], "my.yaml"),
    ],
)
def test_a_model_or_data_without_a_recipe_is_not_the_digits(arguments: list[str], recipe: str | None) -> None:
    taken, flags, note = take_recipe(arguments)
    assert taken == recipe and flags == arguments[arguments[:1] == ["my.yaml"] :]
    assert (note is None) == (recipe == "my.yaml")


def test_the_command_says_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = command(["train", "--model.name", "resnet18", "--data.train", "imagefolder:pets", "--print-config"])
    assert code == 0 and "# recipe: none, since --model.name is given" in out, err
    assert "\nout: checkpoints/pets-resnet18 " in out and "# out: checkpoints/pets-resnet18\n" in out
    words = " ".join(out.split())
    assert "image_size: null # default" in words and "precision: bf16 # default" in words and "lr: 0.001 # default" in words
    assert "val: imagefolder:pets # data.train" in words
    code, out, err = command(["train", "--deepspeed", "ds_configs/zero2.json", "--print-config"])
    assert code == 0 and f"# recipe: {DIGITS}\n" in out and "\nout: checkpoints/digits " in out, err
    assert f"parallel.strategy: zero2 (ds_configs/zero2.json) takes the place of fsdp ({DIGITS})" in out
    second = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert command(["train", "--print-config"], second)[:2] == (0, "")
    code, out, _ = command(["train", "recipes/digits.yaml", "--print-config"], {"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert out.startswith(
        "# parallel.precision: bf16 (ACCELERATE_MIXED_PRECISION) takes the place of fp32 (recipes/digits.yaml)"
    )
    given: list[Any] = []
    monkeypatch.setattr(ray, "train", lambda *those: given.extend(those) or bigvision.Result(1, Path("x")))
    code, out, err = command(["ray", "--model.name", "resnet18", "--data.train", "cifar10"])
    assert code == 0 and "recipe: none" in out and given[0].out == "checkpoints/cifar10-resnet18", err
    origins = given[2]
    assert (origins["model.name"], origins["optim.lr"]) == ("flag", "default"), "for the report"
