"""What frozen features and a teacher are good for, on digits and two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigvision.data import open_source
from tests.distributed import run_ranks
from tests.recipes import lines, recipe, run
from tests.tasks.test_embed import evaluated

pytestmark = pytest.mark.long

MODEL = {"name": "test_resnet", "image_size": 32}
FEW = 100
"""Training images that the students have."""


def top1(plain: dict[str, Any]) -> float:
    """Train on two ranks, and return the accuracy on the validation data."""
    run_ranks(run, 2, plain)
    return next(line["val_top1"] for line in reversed(lines(Path(plain["out"]))) if "val_top1" in line)


def plan(out: Path, data: str, steps: int, **sections: Any) -> dict[str, Any]:
    sections = {"data": {"train": data, "val": "digits", "augment": False}, "optim": {"lr": 5e-3, "warmup": 20}} | sections
    train = {"steps": steps, "global_batch": 50, "micro_batch": None}
    return recipe(out, train=train, parallel={"strategy": "fsdp"}, monitor={"every": 100}, **sections) | {"model": MODEL}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step folder of a model that has learned from all images."""
    out = tmp_path_factory.mktemp("teacher")
    assert top1(plan(out, "digits", 150)) > 0.95
    return out / "step-00000150"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first of the training digits."""
    source = open_source("digits", "train")
    images = np.stack([np.asarray(source.read(index).image) for index in range(FEW)]).transpose(0, 2, 3, 1)
    path = tmp_path_factory.mktemp("few") / "digits.npz"
    np.savez(path, images=images, labels=np.array([source.label(index) for index in range(FEW)]))
    return f"arrays:{path}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, few: str) -> float:
    """The accuracy of a student without a teacher."""
    return top1(plan(tmp_path_factory.mktemp("alone"), few, 60))


@pytest.mark.parametrize("kind", ["logits", "tokens", "features"])
def test_a_student_with_a_teacher_beats_one_without(tmp_path: Path, teacher: Path, few: str, alone: float, kind: str) -> None:
    task = {"teacher": str(teacher), "distill": kind, "distill_weight": 0.9}
    taught = top1(plan(tmp_path, few, 60, task=task))
    assert taught > alone + 0.03, (taught, alone)


def test_a_probe_of_learned_features_beats_a_head_on_random_ones(tmp_path: Path, teacher: Path) -> None:
    plain = plan(tmp_path, "digits", 150)
    head = top1(plain | {"model": plain["model"] | {"trainable": "head"}})
    probe = run_ranks(evaluated, 2, str(teacher), {}, "--data.train", "digits", "--data.val", "digits")[0]
    assert probe["probe_top1"] > head + 0.1 and probe["knn_top1"] > head, (probe, head)
