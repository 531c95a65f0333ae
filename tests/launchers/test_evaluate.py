"""`bigvision eval MODEL`: which label each class of the validation data has."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bigvision.config import load_config
from bigvision.data import Source
from bigvision.errors import UserError
from bigvision.launchers import evaluate


def evaluated(root: Path | str, **model: Any) -> tuple[Source, int]:
    config = load_config(
        {
            "model": {"name": "resnet18", "pretrained": True} | model,
            "data": {"train": f"imagefolder:{root}", "val": f"imagefolder:{root}"},
        }
    )
    return evaluate._open(config, True)


def folders(root: Path, names: Iterable[str]) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "x.png")
    return root


def test_images_have_the_labels_of_the_models_outputs(tmp_path: Path) -> None:
    val, outputs = evaluated(folders(tmp_path / "part", ["n01440764", "n02102040", "n03888257"]))
    assert outputs == 1000 and [val.label(index) for index in range(3)] == [0, 217, 701]
    # Sorted as texts, 10 is before 2.
    numbers, _ = evaluated(folders(tmp_path / "numbers", map(str, range(12))), num_classes=12, pretrained=False)
    assert all(numbers.where(index).split("/")[-2] == str(numbers.label(index)) for index in range(12))
    for number, (names, said) in enumerate((
        (["tench", "shark"], "2 classes, but resnet18 has 1000 outputs .'shark' is none of 'n01440764'"),
        ([f"{number:04}a" for number in range(1000)], "1000 classes, but .*in the order of the outputs"),
        (list(map(str, range(1, 1001))), "'1' is none of"),
    )):  # fmt: skip
        with pytest.raises(UserError, match=said):
            evaluated(folders(tmp_path / f"other{number}", names))


def test_images_have_the_labels_of_the_weights(tmp_path: Path) -> None:
    """A run and an export write the classes beside the weights: validation data may have some of them, in any order."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps({"label_names": ["elk", "cat", "dog", "ape"]}))
    root = folders(tmp_path / "val", ["ape", "cat"])
    (tmp_path / "val.csv").write_text("val/cat/x.png,cat\nval/ape/x.png,ape\n")
    (tmp_path / "numbers.csv").write_text("val/cat/x.png,1\nval/ape/x.png,3\n")
    for number, weights in enumerate(("run", "run/model.safetensors", "run/model.safetensors?prefix=ema.")):
        options = {"pretrained": False, "weights": str(tmp_path / weights)}
        for spec in (root, f"{root} + csv:{tmp_path}/val.csv", f"{root} + csv:{tmp_path}/numbers.csv"):
            val, outputs = evaluated(spec, **options)
            assert outputs == 4 and sorted({val.label(index) for index in range(len(val))}) == [1, 3]
        with pytest.raises(UserError, match=r"class .fox. in .* is not a class of the training data"):
            evaluated(folders(tmp_path / f"other{number}", ["cat", "fox"]), **options)
