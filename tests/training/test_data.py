"""What a run does with its data: the same samples whoever reads them, mixed alike, and without those that cannot be read."""

from __future__ import annotations

import json
import random
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import bigvision
from bigvision import load_config
from bigvision.samples import from_bytes, to_bytes
from bigvision.training.evaluation import evaluate_checkpoint
from tests.cli.test_mistakes import refused
from tests.distributed import run_ranks
from tests.recipes import lines, recipe, run, write_recipe
from tests.training.test_resume import run_and_listen

MIXED = {"task": {"mixup": 0.8, "cutmix": 1.0}, "train": {"steps": 8, "global_batch": 24, "micro_batch": 4}}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    (found,) = run_ranks(run, 1, recipe(tmp_path_factory.mktemp("mixed"), **MIXED))
    return found


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (3, {"strategy": "ddp"}),
        pytest.param(4, {"strategy": "fsdp", "replicas": 2}, marks=pytest.mark.long),
        (2, {"strategy": "zero2"}),
        pytest.param(3, {"strategy": "pipeline"}, marks=pytest.mark.long),
        pytest.param(4, {"strategy": "pipeline", "stages": 2}, marks=pytest.mark.long),
    ],
    ids=["ddp", "fsdp", "zero2", "pipeline", "pipeline and fsdp"],
)
def test_mixed_samples_give_the_same_losses(tmp_path: Path, mixed: list[float], ranks: int, parallel: dict[str, Any]) -> None:
    found = run_ranks(run, ranks, recipe(tmp_path, parallel=parallel, **MIXED))[0]
    assert found == pytest.approx(mixed, rel=1e-5)


def test_mixing_changes_the_losses(tmp_path: Path, mixed: list[float]) -> None:
    (plain,) = run_ranks(run, 1, recipe(tmp_path, train=MIXED["train"]))
    assert all(abs(one - other) > 1e-4 for one, other in zip(plain, mixed))


def soft(plain: dict[str, Any]) -> tuple[list[float], list[str]]:
    """The losses of a task whose targets are several tensors of several types; and what its loss was given."""
    import torch.nn.functional as F

    from bigvision.tasks import Classify
    from bigvision.training import data

    class Soft(Classify):
        def collate(self, targets: Any) -> Any:
            labels = torch.tensor(targets)
            return {"shares": F.one_hot(labels, 10) * 0.9 + 0.01, "more": [labels[:, None] < 5, None, "text"]}

        def loss(self, outputs: torch.Tensor, targets: Any) -> torch.Tensor:
            mask, nothing, text = targets["more"]
            kinds.add(f"{targets['shares'].dtype} {mask.dtype} {nothing} {text} {len(mask) == len(outputs)}")
            losses = -(targets["shares"] * outputs.float().log_softmax(1)).sum(1)
            return (losses * (1 + mask[:, 0].float())).sum()

        def measure(self, outputs: torch.Tensor, targets: Any, valid: torch.Tensor) -> torch.Tensor:
            return super().measure(outputs, targets["shares"].argmax(1), valid)

        def rows(self, outputs: torch.Tensor, targets: Any) -> torch.Tensor:
            return super().rows(outputs, targets["shares"].argmax(1))

    kinds: set[str] = set()
    before, data.MESSAGE = data.MESSAGE, 100  # longer targets need a second message
    try:
        found = run(plain, task=Soft())
        return found, sorted(kinds)
    finally:
        data.MESSAGE = before


def test_targets_of_any_kind_reach_the_last_stage(tmp_path: Path) -> None:
    train = {"steps": 3, "micro_batch": 5}
    (expected, kinds), *_ = run_ranks(soft, 1, recipe(tmp_path / "whole", train=train))
    (found, none), (_, last) = run_ranks(soft, 2, recipe(tmp_path / "cut", train=train, parallel={"strategy": "pipeline"}))
    assert found == pytest.approx(expected, rel=1e-5) and kinds == last and none == []
    assert kinds == ["torch.float32 torch.bool None text True"]
    values = [line["val_top1"] for name in ("whole", "cut") for line in lines(tmp_path / name) if "val_top1" in line]
    assert values[0] == pytest.approx(values[1])


def test_targets_as_bytes() -> None:
    targets = {
        "mask": torch.arange(12).view(2, 2, 3) % 2 == 0, "box": (torch.rand(2, 0, 4), [torch.tensor(3.0, dtype=torch.float64)]),
        "half": torch.rand(3, dtype=torch.bfloat16), "array": np.arange(4, dtype=np.int16), "words": ["é", 1.5, True, None],
    }  # fmt: skip
    found = from_bytes(to_bytes(targets).numpy())
    for name in ("mask", "half", "array"):
        expected = torch.as_tensor(targets[name])
        assert torch.equal(found[name], expected) and found[name].dtype == expected.dtype
    empty, [scalar] = found["box"]
    assert empty.shape == (2, 0, 4) and scalar.shape == () and scalar.dtype == torch.float64
    assert isinstance(found["box"], tuple) and found["words"] == targets["words"]
    with pytest.raises(TypeError, match="not a set"):
        to_bytes({"odd": {1}})


def seen_by_the_watchdog(plain: dict[str, Any]) -> tuple[set[bool], set[bool]]:
    """Whether it has this rank wait for data while a micro-batch is asked for, and while one is passed through the model."""
    from bigvision.data import loader
    from bigvision.engine import Engine
    from bigvision.runtime import Watchdog

    watches: list[Watchdog] = []
    asked, passed = set[bool](), set[bool]()
    enter, following, inputs = Watchdog.__enter__, loader.Batches.__next__, Engine._inputs

    def noted(found: set[bool], inner: Any) -> Any:
        def call(*args: Any) -> Any:
            if watches[-1].board.at.phase == "step":
                found.add(watches[-1].board.at.data)
            return inner(*args)

        return call

    with (
        mock.patch.object(Watchdog, "__enter__", lambda self: watches.append(self) or enter(self)),
        mock.patch.object(loader.Batches, "__next__", noted(asked, following)),
        mock.patch.object(Engine, "_inputs", noted(passed, inputs)),
    ):
        run(plain)
    return asked, passed


def test_each_micro_batch_is_waited_for(tmp_path: Path) -> None:
    plain = recipe(tmp_path, train={"steps": 2, "global_batch": 12, "micro_batch": 4})
    assert run_ranks(seen_by_the_watchdog, 1, plain) == [({True}, {False})]


def test_pairs_that_would_be_cut(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, task={"mixup": 0.8})
    refused(["train", path, "--train.micro_batch", "5"], "task.mixup", "micro-batches of 5", "multiples of 2")


def with_a_wide_image(plain: dict[str, Any]) -> tuple[list[float], Any, Any]:
    """The losses of a run, what evaluating its checkpoint gives, and the shape of what `bigvision.Engine` takes."""
    found = run(plain)
    folder = next(Path(plain["out"]).glob("step-*"))
    metrics = evaluate_checkpoint(folder, load_config(plain))
    keys = {"num_classes": 10, "steps": 1, "global_batch": 6, "image_size": (48, 32), "out": plain["out"] + "-own"}
    with bigvision.Engine({key: plain[key] for key in ("model", "parallel")}, **keys) as engine:
        images = torch.zeros(6 // engine.runtime.data_ranks, 3, *engine.image_size, dtype=torch.uint8)
        loss = float(engine.train_step(images, torch.zeros(len(images), dtype=torch.int64)).loss)
    return found, metrics, (engine.image_size, loss)


@pytest.mark.long
def test_images_that_are_not_square(tmp_path: Path) -> None:
    found = {}
    for name, ranks, parallel in (("ddp", 1, {}), ("fsdp", 2, {"strategy": "fsdp"}), ("pipeline", 2, {"strategy": "pipeline"})):
        plain = recipe(
            tmp_path / name, parallel=parallel, data={"train": "synthetic:53x40", "val": "synthetic:7x40"},
            task={"mixup": 0.8, "cutmix": 1.0}, train={"steps": 3, "micro_batch": 6},
        )  # fmt: skip
        plain["model"] = plain["model"] | {"image_size": [48, 32]}
        found[name] = run_ranks(with_a_wide_image, ranks, plain)[0]
        card = json.loads(next((tmp_path / name).glob("step-*/config.json")).read_text())
        assert card["pretrained_cfg"]["input_size"] == [3, 48, 32]
    for name in ("fsdp", "pipeline"):
        assert found[name][0] == pytest.approx(found["ddp"][0], rel=1e-5)
        assert found[name][1] == pytest.approx(found["ddp"][1], rel=1e-5)
        assert found[name][2][0] == (48, 32) and found[name][2][1] == pytest.approx(found["ddp"][2][1], rel=1e-5)


@pytest.mark.parametrize(
    "mixing", [{"mixup": 0.8}, pytest.param({"cutmix": 1.0}, marks=pytest.mark.long)], ids=["mixup", "cutmix"]
)
def test_mixing_is_switched_on_in_the_middle(tmp_path: Path, mixing: dict[str, float]) -> None:
    """After 21 samples, which are no whole pairs, with another global batch, and with repetitions."""
    before = recipe(tmp_path / "run", train={"steps": 3, "global_batch": 7, "micro_batch": 3}, checkpoint={"every": 3})
    run_ranks(run, 1, before)
    found = []
    for ranks in (1, 2):
        shutil.copytree(tmp_path / "run", tmp_path / f"{ranks}")
        after = recipe(
            tmp_path / f"{ranks}", task=mixing, data={"repeats": 2}, train={"steps": 6, "global_batch": 16, "micro_batch": 4}
        )  # fmt: skip
        found.append(run_ranks(run, ranks, after)[0])
    assert found[1] == pytest.approx(found[0], rel=1e-5) and len(found[0]) == 6


# The ids of a run


def trace(path: Path) -> dict[int, list[int]]:
    """The ids of each step, the ranks' parts put together."""
    found: dict[int, dict[int, list[int]]] = {}
    for text in path.read_text().splitlines():
        line = json.loads(text)
        found.setdefault(line["step"], {})[line["rank"]] = line["ids"]
    return {step: [id for rank in sorted(parts) for id in parts[rank]] for step, parts in found.items()}


SPECS: list[Any] = [pytest.param(spec, marks=pytest.mark.long) for spec in ("synthetic:53x32", "digits")]
SPECS += ["0.7*synthetic:31x32 + 0.3*synthetic:9x32"]


@pytest.mark.parametrize("spec", SPECS)
def test_ids_are_the_same_on_any_ranks_and_across_stops(tmp_path: Path, spec: str) -> None:
    data = {"train": spec, "val": spec}
    (_,) = run_ranks(run, 1, recipe(tmp_path / "one", data=data | {"trace": str(tmp_path / "a")}, train={"steps": 12}))
    whole = trace(tmp_path / "a")
    assert sorted(whole) == list(range(1, 13))
    steps = [*sorted(random.Random(spec).sample(range(1, 12), 3)), 12]
    for number, step in enumerate(steps):
        # Several stops, also within an epoch, each time on other ranks and workers.
        plain = recipe(
            tmp_path / "other", data=data | {"trace": str(tmp_path / "b"), "workers": number % 2}, train={"steps": step}
        )  # fmt: skip
        run_ranks(run, (2, 3, 1, 4)[number], plain)
    assert trace(tmp_path / "b") == whole


def test_the_stages_of_a_pipeline_say_it_once(tmp_path: Path) -> None:
    plain = recipe(tmp_path, data={"trace": str(tmp_path / "t")}, parallel={"strategy": "pipeline"}, train={"steps": 2})
    run_ranks(run, 2, plain)
    assert [json.loads(line)["rank"] for line in (tmp_path / "t").read_text().splitlines()] == [0, 0]


# Bad files


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def write_folder(root: Path, good: int) -> tuple[set[str], int]:
    """Two classes of images, some of them odd and some bad; returns the names of the bad ones, and how many files there are."""
    pixels = np.random.default_rng(0)
    for number in range(good):
        folder = root / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        values = pixels.integers(0, 256, (36, 40, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{number:05}.jpg", quality=60)
    image = Image.fromarray(values)
    # Odd, and fine.
    image.convert("CMYK").save(root / "a/cmyk.jpg")
    Image.fromarray(np.full((36, 40), 40_000, dtype=np.uint16)).save(root / "a/deep.png")
    image.convert("P").save(root / "a/palette.gif", transparency=3)
    image.save(root / "b/animated.gif", save_all=True, append_images=[image.rotate(90), image])
    image.save(root / "b/really_a.png.jpg", "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(root / "b/turned.jpg", exif=exif)
    # Bad.
    whole = (root / "a/00000.jpg").read_bytes()
    (root / "a/truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "b/corrupt.jpg").write_bytes(whole[:2] + bytes(reversed(whole[2:])))
    (root / "a/empty.jpg").write_bytes(b"")
    (root / "b/text.jpg").write_text("<html>404 Not Found</html>")
    (root / "a/missing.jpg").symlink_to(root / "nowhere.jpg")
    huge = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    (root / "b/huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", huge) + chunk(b"IDAT", zlib.compress(b"\0" * 99)))
    shutil.copy(root / "a/truncated.jpg", root / "b/truncated.jpeg")
    bad = {"truncated.jpg", "corrupt.jpg", "empty.jpg", "text.jpg", "missing.jpg", "huge.png", "truncated.jpeg"}
    return bad, good + 6 + len(bad)


@pytest.mark.parametrize("ranks", [3, pytest.param(1, marks=pytest.mark.long)])
def test_one_percent_of_bad_files(tmp_path: Path, ranks: int) -> None:
    bad, files = write_folder(tmp_path / "data", 700)
    assert len(bad) == pytest.approx(0.01 * files, rel=0.05)
    write_folder(tmp_path / "val", 700)
    train, val = f"imagefolder:{tmp_path}/data", f"imagefolder:{tmp_path}/val"
    plain = recipe(
        tmp_path / "out", data={"train": train, "val": val, "workers": 1}, parallel={"strategy": "fsdp"},
        train={"steps": None, "epochs": 1.2, "global_batch": 96, "micro_batch": 32}, monitor={"every": 2},
    )  # fmt: skip
    (said, *_) = [said for _, said in run_ranks(run_and_listen, ranks, plain)]
    listed = [json.loads(line) for line in (tmp_path / "out/bad_samples.jsonl").read_text().splitlines()]
    assert all(line["reason"] for line in listed)
    for split in ("train", "val"):
        assert sorted(Path(line["where"]).name for line in listed if line["split"] == split) == sorted(bad)
    assert f"{len(bad)} of {files} samples of data.train and {len(bad)} of {files} samples of data.val" in said
    assert [line["bad_samples"] for line in lines(tmp_path / "out") if "loss" in line][-1] == len(bad)
    # A run that goes on knows them, and counts none twice.
    run_ranks(run, 2, plain | {"train": plain["train"] | {"epochs": 2.4}})
    assert len((tmp_path / "out/bad_samples.jsonl").read_text().splitlines()) == 2 * len(bad)


def test_too_many_bad_files_are_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", 60)
    write_folder(tmp_path / "val", 60)
    train, val = f"imagefolder:{tmp_path}/data", f"imagefolder:{tmp_path}/val"
    path = write_recipe(tmp_path, data={"train": train, "val": val}, monitor={"every": 1, "progress": False})
    said = ("data.bad_budget: 3 allows 3 of 73 samples of data.train", "such as", "fix them")
    refused(["train", path, "--data.bad_budget", "3", "--train.steps", "9"], *said, ranks=2)


def test_the_stages_of_a_pipeline_agree_on_what_stands_in_for_a_bad_file(tmp_path: Path) -> None:
    """The last stage has the labels and never saw the image."""
    bad, files = write_folder(tmp_path / "data", 40)
    write_folder(tmp_path / "val", 40)
    train, val = f"imagefolder:{tmp_path}/data", f"imagefolder:{tmp_path}/val"
    found = []
    for name, ranks, parallel in (("one", 1, {"strategy": "ddp"}), ("two", 2, {"strategy": "pipeline"})):
        plain = recipe(
            tmp_path / name, data={"train": train, "val": val, "bad_budget": 0.2}, parallel=parallel,
            train={"steps": 5, "micro_batch": 6},
        )  # fmt: skip
        found.append(run_ranks(run, ranks, plain)[0])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    both = [[line["bad_samples"] for line in lines(tmp_path / name) if "bad_samples" in line] for name in ("one", "two")]
    assert both[0] == both[1] and both[0][-1] == len(bad) and files == 40 + 6 + len(bad)
