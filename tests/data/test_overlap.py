"""Validation data that is training data: the same files under other names and in other lists, and what only looks like it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photo_files import write_photos
from torch.utils.data import ConcatDataset, Subset, TensorDataset, random_split
from torchvision.datasets import ImageFolder

from bigvision.data import open_both
from bigvision.data.report import describe
from bigvision.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two folders a and b of 20 images in two classes each; the working directory is theirs."""
    for name in "ab":
        write_photos(tmp_path / name, {"cat": 10, "dog": 10})
    (tmp_path / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lists(train: str, val: str, *patterns: str) -> None:
    """Write a list of the images of a, and one of the images that *patterns* match."""
    for file, some in ((train, ["a/*/*.*"]), (val, patterns or ["a/*/*.*"])):
        images = [image for pattern in some for image in sorted(Path().glob(pattern))]
        separator = "," if file.endswith("csv") else "\t"
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text("".join(f"{image}{separator}{image.parent.name}\n" for image in images))


def parquet(file: str) -> None:
    module = pytest.importorskip("pyarrow.parquet")
    table = {"image": [{"bytes": b"x", "path": None}] * 8, "label": [0, 1] * 4}
    Path(file).parent.mkdir(exist_ok=True)
    module.write_table(pytest.importorskip("pyarrow").table(table), file)


def arrays(folder: str) -> None:
    Path(folder).mkdir(parents=True)
    np.save(f"{folder}/images.npy", np.zeros((8, 4, 4), np.uint8))
    np.save(f"{folder}/labels.npy", np.arange(8) % 2)


def npz(file: str, *parts: str) -> None:
    named: dict[str, Any] = {f"{part}images": np.zeros((8, 4, 4), np.uint8) for part in parts}
    np.savez(file, **named, **{f"{part}labels": np.arange(8) % 2 for part in parts})


def link(path: str, target: str) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).symlink_to(Path(target).absolute())


THE_SAME: dict[str, tuple[list[Callable[[], Any]], str, str]] = {
    "two lists": ([lambda: lists("one.csv", "two.csv")], "csv:one.csv", "csv:two.csv"),
    "two lists in a folder": ([lambda: lists("l/train.csv", "l/val.csv")], "csv:l", "csv:l/"),
    "with tabs": ([lambda: lists("l/train.tsv", "l/val.tsv")], "tsv:l", "tsv:l"),
    "a list of one and the other": ([lambda: lists("one.csv", "two.tsv")], "csv:one.csv", "tsv:two.tsv"),
    "another way to the images": ([lambda: lists("one.csv", "two.csv", "link/*/*.*")], "csv:one.csv", "csv:two.csv"),
    "half of it": ([lambda: lists("l/train.csv", "l/val.csv", "a/*/*.*", "b/*/*.*")], "csv:l", "csv:l"),
    "a list and its folder": ([lambda: lists("one.csv", "two.csv")], "csv:one.csv", "imagefolder:a"),
    "a list and a linked folder": ([lambda: lists("one.csv", "two.csv")], "imagefolder:link", "csv:one.csv"),
    "a folder in a mixture": ([lambda: lists("one.csv", "two.csv")], "imagefolder:b + csv:one.csv", "imagefolder:a"),
    "linked Parquet": ([lambda: parquet("p/0.parquet"), lambda: link("q/1.parquet", "p/0.parquet")], "parquet:p", "parquet:q"),
    "linked splits of Parquet": (
        [lambda: parquet("p/train-0.parquet"), lambda: link("p/val-0.parquet", "p/train-0.parquet")], "parquet:p", "parquet:p/"
    ),
    "Parquet, a file of a folder": (
        [lambda: parquet("p/0.parquet"), lambda: parquet("p/1.parquet")], "parquet:p", "parquet:p/0.parquet"
    ),
    "linked splits of arrays": ([lambda: arrays("x/train"), lambda: link("x/val", "x/train")], "arrays:x", "arrays:x"),
    "an array file linked": (
        [lambda: arrays("x"), lambda: shutil.copytree("x", "y"), lambda: Path("y/images.npy").unlink(),
         lambda: link("y/images.npy", "x/images.npy")], "arrays:x", "arrays:y",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", THE_SAME)
def test_the_same_files_are_refused(name: str) -> None:
    makers, train, val = THE_SAME[name]
    for make in makers:
        make()
    with pytest.raises(UserError, match=r"^data\.val: .* has [\d,]+ files that data\.train, .*, trains on, as '") as caught:
        open_both(train, val)
    assert "\n" not in str(caught.value)


def test_some_files_are_noted() -> None:
    lists("l/train.csv", "l/val.csv", "b/*/*.*", "a/cat/000.jpg")
    link("b/cat/zero.jpg", "a/dog/000.jpg")
    for train, val in (("csv:l", "csv:l"), ("csv:l/train.csv", "csv:l/val.csv"), ("imagefolder:a", "imagefolder:b")):
        lines = describe(*open_both(train, val))
        assert "are in the training data too, as '" in lines[-1]
        assert lines[-1].startswith("val: 1 of the 21 files")


def test_what_is_not_the_same() -> None:
    lists("l/train.csv", "l/val.csv", "b/*/*.*")
    npz("x.npz", "train_", "val_")
    arrays("y")
    link("z", "y")  # by resolved paths one dataset, which is divided
    Path("twice.csv").write_text("".join(f"{image},x\n" * 3 for image in Path().glob("a/*/*.*")))
    for train, val, counts in (
        ("csv:l", "csv:l", (20, 20)), ("arrays:x.npz", "arrays:x.npz", (8, 8)), ("arrays:y", "arrays:z/", (7, 1)),
        ("csv:twice.csv", "csv:./twice.csv", (54, 6)),
    ):  # fmt: skip
        one, other = open_both(train, val)
        assert (len(one), len(other)) == counts and not any("training data too" in note for note in other.notes)
    assert not {one.where(index) for index in range(54)} & {other.where(index) for index in range(6)}
    assert not open_both("csv:l/train.csv", "imagefolder:b")[1].notes


def tensors() -> TensorDataset:
    return TensorDataset(torch.zeros(20, 3, 8, 8, dtype=torch.uint8), torch.arange(20) % 2)


def test_objects_that_share_samples_are_not_both_trained_on_and_validated_on() -> None:
    whole, images = tensors(), [ImageFolder("a"), ImageFolder("./link/../a"), ImageFolder("b")]
    refused = [
        (Subset(whole, range(10)), Subset(whole, range(4, 12))),
        (whole, Subset(whole, range(5))),
        (ConcatDataset([whole, tensors()]), whole),
        (images[0], images[1]),
        (Subset(images[0], range(20)), ConcatDataset([images[1], images[2]])),
        (images[0], "imagefolder:a"),
        ("imagefolder:link", images[1]),
    ]
    for train, val in refused:
        with pytest.raises(UserError, match=r"files that data\.train"):
            open_both(train, val)
    # As people who want other transforms in training write it.
    apart = [Subset(images[0], range(0, 20, 2)), Subset(images[1], range(1, 20, 2))]
    for train, val in (apart, random_split(whole, [15, 5]), (images[0], images[2]), (whole, tensors())):
        assert not open_both(train, val)[1].notes
