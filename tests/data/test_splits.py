"""Training and validation data by their resolved paths, and what a run reports of them at the start."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from photo_files import write_photos

from bigvision.config import load_config
from bigvision.data import Source, check_source, open_both, open_source
from bigvision.data.report import describe
from bigvision.errors import UserError
from bigvision.tasks import Classify
from bigvision.training.data import open_data


def files(source: Source) -> set[str]:
    return {os.path.realpath(source.where(index)) for index in range(len(source))}


@pytest.fixture
def pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two flat folders a and b of 20 images in two classes each, and c with splits; the working directory is theirs."""
    for name in ("a", "b", "c/train", "c/val"):
        write_photos(tmp_path / name, {"cat": 10, "dog": 10})
    (tmp_path / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("train", "val", "counts"),
    [
        ("a", "a", (18, 2)),
        ("a", "a/", (18, 2)),
        ("a", "./a", (18, 2)),
        ("b/../a", "a", (18, 2)),
        ("a", "{here}/a", (18, 2)),
        ("link", "a", (18, 2)),
        ("a", "b", (20, 20)),
        ("a + b", "a", (38, 2)),
        ("a", "a/ + b", (18, 22)),
        ("0.7*a + 0.3*b", "b + 2*link", (36, 4)),
        ("c", "c/", (20, 20)),
        ("c/train", "c/val", (20, 20)),
        ("c", "c/val", (20, 20)),
        ("c + a", "c", (40, 20)),
    ],
)
def test_paths_are_compared_not_text(pets: Path, train: str, val: str, counts: tuple[int, int]) -> None:
    def named(text: str) -> str:
        parts = [part.rpartition("*") for part in text.replace("{here}", str(pets)).split(" + ")]
        return " + ".join(f"{weight}{star}imagefolder:{path}" for weight, star, path in parts)

    found = open_both(named(train), named(val))
    assert (len(found[0]), len(found[1])) == counts
    assert not files(found[0]) & files(found[1])
    if " + " not in train + val and train == "a" == val.strip("./"):
        assert files(found[1]) == files(open_source("imagefolder:a", "val")), "as ever"


@pytest.mark.parametrize("case", ["inside", "around", "a linked split", "shards", "a pattern", "other options"])
def test_data_in_both_is_refused(pets: Path, case: str) -> None:
    train, val = "imagefolder:a", "imagefolder:b"
    if case == "inside":
        train, val = "imagefolder:a", "imagefolder:a/nested"
        write_photos(pets / "a/nested", {"cat": 2, "dog": 2})
        (pets / "a/nested").rename(pets / "a/cat/nested")
        val = "imagefolder:a/cat/nested"
    elif case == "around":
        train, val = "imagefolder:pack/a", "imagefolder:pack"
        (pets / "pack").mkdir()
        (pets / "a").rename(pets / "pack/a")
    elif case == "a linked split":
        train = val = "imagefolder:d"
        (pets / "d").mkdir()
        (pets / "d/train").symlink_to("../a")
        (pets / "d/val").symlink_to("../a")
    else:
        for number in range(3):
            write_tar(pets / f"tars/{number}.tar", {f"{number}{n}.{kind}": b"1" for n in range(9) for kind in ("jpg", "cls")})
        train, val = "webdataset:tars/{0,1}.tar", "webdataset:tars/*.tar"
        if case == "shards":
            val = "webdataset:tars"
        if case == "other options":  # other patterns for the same files are the same data
            held = open_both("webdataset:tars/{0..2}.tar", "webdataset:tars/?.tar", first=True)
            assert (len(held[0]), len(held[1])) == (24, 3)
    with pytest.raises(UserError, match=r"^data\.val: .* has [\d,]+ files that data\.train, .*, trains on, as '") as caught:
        open_both(train, val)
    assert "\n" not in str(caught.value)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


class Own:
    classes = ("a", "b")

    def __init__(self, length: int) -> None:
        self.targets = [index % 2 for index in range(length)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.full((8, 8), index, dtype=np.uint8), index % 2


def test_one_object_for_both() -> None:
    own = Own(30)
    train, val = open_both(own, own)
    pixels = [{int(source.read(index).image[0, 0, 0]) for index in range(len(source))} for source in (train, val)]  # type: ignore[index]
    assert (len(train), len(val)) == (27, 3) and not pixels[0] & pixels[1]
    assert [len(source) for source in open_both(own, Own(4))] == [30, 4]
    with pytest.raises(UserError, match="none can be held out"):
        open_both(*[Own(1)] * 2)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("s3://bucket/pets", "s3:// is not supported: download it, or mount it"),
        ("imagefolder:gs://bucket/pets", "gs:// is not supported"),
        ("webdataset:https://host/x-{000..009}.tar", "https:// is not supported"),
        ("0.5*imagefolder:S3://b/p + digits", "S3:// is not supported"),
        ("hf://datasets/ylecun/mnist", "hf download ylecun/mnist --repo-type dataset --local-dir mnist, and give parquet:m"),
        ("https://huggingface.co/datasets/ylecun/mnist", "hf download ylecun/mnist"),
        ("parquet:hf://datasets/ylecun/mnist", "hf download ylecun/mnist"),
        ("ylecun/mnist", "is no folder here; if it is a dataset of the Hugging Face Hub, download it with: hf download ylecun"),
    ],
)
def test_what_is_not_on_this_machine(spec: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_source(spec, key="data.train")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_other_places_where_data_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars/a.tar", {"a.jpg": b"1", "a.cls": b"1"})
    for options in ({"spec": "cifar10", "root": "s3://bucket"}, {"spec": "digits", "class_file": "https://host/classes.txt"}):
        with pytest.raises(UserError, match=r"^data\.(root|classes): .* is not supported"):
            open_source(**options, split="train")
    with pytest.raises(UserError, match=f"no file '{tmp_path}/tarz/a.tar'; did you mean '{tmp_path}/tars/a.tar'"):
        open_source(f"webdataset:{tmp_path}/tarz/a.tar", "train")


@pytest.mark.parametrize("names", [("Train", "Validation"), ("training", "dev"), ("TRAIN", "testing")])
@pytest.mark.parametrize("layout", ["{}/0.tar", "x-{}-0.tar", "archive/{}/0.tar"])
def test_splits_of_shards_in_any_spelling(tmp_path: Path, names: tuple[str, str], layout: str) -> None:
    for name, count in zip(names, (9, 4)):
        members = {f"{number}.{kind}": b"1" for number in range(count) for kind in ("jpg", "cls")}
        write_tar(tmp_path / layout.format(name), members)
    train, val = open_both(f"webdataset:{tmp_path}", f"webdataset:{tmp_path}/")
    assert (len(train), len(val)) == (9, 4)


# The report


def test_the_report_of_a_folder(pets: Path) -> None:
    (pets / "c/train/cat/a.gif.txt").write_text("")
    (pets / "c/train/cat/b.gif.txt").write_text("")
    (pets / "c/train/dog/.hidden").write_text("")
    write_photos(pets / "more", {"x": 1}, size=(64, 48))
    (pets / "more/x/000.jpg").rename(pets / "c/train/cat/000.jpg")
    assert describe(*open_both("imagefolder:c", "imagefolder:c")) == [
        "train: 20 images in 2 classes (c/train), 3 passed over: 2 .gif.txt, 1 hidden (as train/cat/a.gif.txt); "
        "val: 20 images (c/val)",
        "classes: cat, dog; images of 40x30 to 64x48 pixels",
    ]
    held = describe(*open_both("imagefolder:a + imagefolder:b", "imagefolder:a"))
    assert held[0] == "train: 38 images in 2 classes (a + b); val: 2 images (a)"


def test_the_report_of_shards(tmp_path: Path) -> None:
    members = {"0.jpg": b"x", "0.cls": b"1", "0.txt": b"a cat", "0.mask.png": b"y", "1.txt": b"no image", ".hidden": b""}
    write_tar(tmp_path / "0.tar", members)
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        for name in ("a.jpg", "a.cls", "b.jpg"):
            entry = tarfile.TarInfo(name)
            entry.size = 1
            if name == "b.jpg":
                entry.size, entry.type, entry.linkname = 0, tarfile.LNKTYPE, "a.jpg"
            tar.addfile(entry, io.BytesIO(b"1"))
    (tmp_path / "notes.md").write_text("")
    for _ in range(2):  # from the tar files, then from their indexes
        source = open_source(f"webdataset:{tmp_path}", "train", shared=False, first=True)
        assert dict(source.passed_over) == {
            ".md": (1, "notes.md"), ".txt": (1, "0.txt"), ".mask.png": (1, "0.mask.png"), "without an image": (1, "1.txt"),
            "hidden": (1, ".hidden"), "links": (1, "b.jpg"),
        }  # fmt: skip
        assert (source.key(1), source.size(1)) == (b"a", 1)
    # The splits in one folder: what is beside them is counted once.
    (tmp_path / "0.tar").rename(tmp_path / "train-0.tar")
    (tmp_path / "1.tar").rename(tmp_path / "val-0.tar")
    assert open_source(f"webdataset:{tmp_path}", "val", first=True).passed_over[".md"] == (1, "notes.md")


@pytest.mark.parametrize(
    ("spec", "first"),
    [("digits", "train: 1,437 images in 10 classes (digits); val: 360 images (digits)"),
     ("synthetic:5x8", "train: 5 images in 10 classes (synthetic:5x8); val: 5 images (synthetic:5x8)"),
     (Own(30), "train: 27 images in 2 classes (Own); val: 3 images (Own)"),
     ("arrays:x", "train: 9 images in 2 classes (x); val: 1 image (x)"),
     ("arrays:x.npz", "train: 9 images in 2 classes (x.npz); val: 1 image (x.npz)")],
)  # fmt: skip
def test_the_report_of_other_sources(spec: Any, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parts = {"images": np.zeros((10, 4, 8), np.uint8), "labels": np.arange(10) % 2}
    np.savez("x.npz", **parts)
    (tmp_path / "x").mkdir()
    for name, values in parts.items():
        np.save(f"x/{name}.npy", values)
    lines = describe(*open_both(spec, spec))
    size = "" if isinstance(spec, Own) else "; images of 8x4 pixels" if "arrays" in spec else "; images of 8x8 pixels"
    assert lines[0] == first and lines[1].endswith(size) and ("pixels" in lines[1]) == bool(size)


def test_names_that_no_terminal_takes(tmp_path: Path) -> None:
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9\nnew")
    os.mkdir(folder)
    for number in range(2):
        with open(os.path.join(folder, b"%d.jpg" % number), "wb"):
            pass
    lines = describe(*open_both(f"imagefolder:{tmp_path}", f"imagefolder:{tmp_path}"))
    assert lines[1] == "classes: caf??new"
    "\n".join(lines).encode()


def test_rank_0_reports_once(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigvision.training.data.all_or_none", lambda function: function())
    config = load_config({"data": {"train": "imagefolder:c", "val": "imagefolder:c"}})
    said: list[str] = []
    for main in (True, False):
        runtime: Any = SimpleNamespace(is_main=main, rank=0 if main else 1)
        open_data(config, runtime, Classify(), say=said.append)
    assert [line.partition(":")[0] for line in said] == ["train", "classes"]
