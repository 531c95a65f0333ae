"""What an evaluation counts: each sample once, and what cannot be read not at all, on any number of ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bigvision.data import BadSample
from bigvision.engine import Metrics
from bigvision.tasks import Task
from bigvision.training.data import BadSamples
from tests.cli.test_mistakes import refused
from tests.data.test_image_modes import jpeg
from tests.distributed import run_ranks
from tests.recipes import lines, recipe, run, write_recipe

CUT = jpeg()[:300]


def images(root: Path, files: dict[str, bytes | None]) -> str:
    """A folder of images; None is a good one."""
    for number, (name, content) in enumerate(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            pixels = np.random.default_rng(number).integers(0, 256, (36, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path, "PNG")
        else:
            path.write_bytes(content)
    return f"imagefolder:{root}"


def sections(tmp_path: Path, val: dict[str, bytes | None], **data: Any) -> dict[str, Any]:
    train = images(tmp_path / "train", {f"{name}/{number}.png": None for name in "ab" for number in range(4)})
    return {
        "data": {"train": train, "val": images(tmp_path / "val", val), **data},
        "train": {"steps": 1, "global_batch": 6, "micro_batch": 3},
    }


SETS: dict[str, tuple[dict[str, bytes | None], int]] = {
    "one sample": ({"a/0.png": None}, 0),
    "fewer samples than ranks": ({"a/0.png": None, "b/0.png": None}, 0),
    "the first one cut off": ({"a/0.jpg": CUT, "a/1.png": None}, 1),
    "the last one cut off": ({"a/0.png": None, "b/1.jpg": CUT}, 1),
}


@pytest.mark.parametrize("name", SETS)
def test_small_sets_and_damaged_images(tmp_path: Path, name: str) -> None:
    val, unreadable = SETS[name]
    found = {}
    for ranks in (1, 3):
        plain = recipe(tmp_path / f"out{ranks}", **sections(tmp_path, val, bad_budget=2))
        run_ranks(run, ranks, plain)
        (found[ranks],) = [line for line in lines(Path(plain["out"])) if "val_top1" in line]
        listed = tmp_path / f"out{ranks}/bad_samples.jsonl"
        assert len(listed.read_text().splitlines() if listed.exists() else []) == unreadable
    for key in ("val_loss", "val_top1", "val_top5"):
        assert found[3][key] == pytest.approx(found[1][key], rel=1e-5) and math.isfinite(found[1][key])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("count", [1, 3])
def test_a_set_without_a_readable_sample_is_one_line(tmp_path: Path, ranks: int, count: int) -> None:
    val: dict[str, bytes | None] = {f"a/{number}.jpg": CUT for number in range(count)}
    path = write_recipe(tmp_path, **sections(tmp_path, val, bad_budget=9))
    refused(["train", path], "data.val: none of its samples can be read, such as", ".jpg: ", ranks=ranks)


def test_a_sample_that_two_ranks_read_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = BadSample(0, "a", "cut"), BadSample(3, "b", "cut")
    monkeypatch.setattr("bigvision.training.data.gather_json", lambda found: [found, [list(one), list(other)]])
    bad = BadSamples(2, {"val": 5})
    assert bad.exchange("val", [one]) == 2 and bad.count("val") == 2
    assert bad.exchange("val", []) == 2 and bad.count("val") == 2, "another evaluation finds them again"


def evaluated(step: str, names: list[str]) -> list[Any]:
    """The metrics of a step folder and of a model's first weights, in micro-batches of one sample on each rank."""
    from tests.cli.test_mistakes import command

    flags = ["--train.micro_batch", "1", "--train.global_batch", "3", "--data.workers", "0", "--data.val", "synthetic:7x32"]
    flags += ["--parallel.device", "cpu", "--parallel.precision", "fp32", "--data.train", "synthetic:7x32"]
    subjects = [[step], *(["resnet10t", "--model.pretrained", "false", "--model.image_size", "32"] for _ in names)]
    found = [command(["eval", *subject, *flags]) for subject in subjects]
    return [(code, json.loads(out) if out else err) for code, out, err in found]


def test_batchnorm_evaluates_single_samples(tmp_path: Path) -> None:
    """Training on one would be refused; statistics are kept in an evaluation, also on ranks with one sample each."""
    plain = recipe(tmp_path, train={"steps": 1, "global_batch": 4, "micro_batch": None}, data={"val": "synthetic:7x32"})
    plain["model"] = {"name": "resnet10t", "image_size": 32}
    run_ranks(run, 1, plain)
    found = {ranks: run_ranks(evaluated, ranks, str(tmp_path / "step-00000001"), [""])[0] for ranks in (1, 2, 3)}
    for ranks, results in found.items():
        assert [code for code, _ in results] == [0, 0], (ranks, results)
        for (_, metrics), (_, expected) in zip(results, found[1]):
            assert metrics == pytest.approx(expected, rel=1e-5)


def test_metrics_of_nothing() -> None:
    nothing = Metrics(Task(), torch.zeros(1, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    assert math.isnan(nothing.means()["loss"])
    some = Metrics(Task(), torch.ones(1, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64))
    assert (nothing + some).means() == {"loss": 0.25}
