"""Folders of images as people have them: the right classes and counts, or one line that names what they could mean."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from bigvision.data import Source, open_both, open_source
from bigvision.data.splits import split_name
from bigvision.errors import UserError

CAT_DOG = {"cat": 6, "dog": 4}
NOT_IMAGES = (".txt", ".gif.txt", ".db", ".csv", ".xml", ".DS_Store", ".ini")


def write(root: Path, tree: dict[str, int | str]) -> Path:
    """Make files: "cat" with 6 is cat/0.jpg to cat/5.jpg, 0 an empty folder, a text the target of a link."""
    for name, what in tree.items():
        path = root / name
        if isinstance(what, str):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(what)
        elif path.name.endswith((".jpg", *NOT_IMAGES)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        else:
            path.mkdir(parents=True, exist_ok=True)
            for number in range(what):
                (path / f"{number}.jpg").write_bytes(b"")
    return root


def below(folder: str, classes: dict[str, int]) -> dict[str, int]:
    return {f"{folder}/{name}": count for name, count in classes.items()}


def splits(train: str, val: str) -> dict[str, int]:
    return below(train, CAT_DOG) | below(val, {"cat": 2, "dog": 1})


def counts(source: Source) -> dict[str, int]:
    found = Counter(source.classes[source.label(index)] for index in range(len(source)))
    return {name: found[name] for name in source.classes}


SPLIT = (CAT_DOG, {"cat": 2, "dog": 1})
HELD = ({"cat": 5, "dog": 3}, {"cat": 1, "dog": 1})
RIGHT = {
    # split names
    "lower case": (splits("train", "val"), *SPLIT),
    "upper case": (splits("TRAIN", "VAL"), *SPLIT),
    "capitals": (splits("Train", "Test"), *SPLIT),
    "training and testing": (splits("training", "testing"), *SPLIT),
    "train_set and test_set": (splits("train_set", "test_set"), *SPLIT),
    "TrainImages and ValidationImages": (splits("TrainImages", "ValidationImages"), *SPLIT),
    "years": (splits("train2017", "val2017"), *SPLIT),
    "train and dev": (splits("train", "dev"), *SPLIT),
    "a name before": (splits("pets_train", "pets_eval"), *SPLIT),
    "val before test": (splits("train", "val") | below("test", {"cat": 9, "dog": 9}), *SPLIT),
    "Valid before Test": (splits("Train", "Valid") | below("Test", {"cat": 9, "dog": 9}), *SPLIT),
    "a test split without classes": (below("train", CAT_DOG) | {"test": 5}, *HELD),
    "a folder beside the splits": (splits("train", "val") | {"unlabeled": 3, "docs/a.txt": 1}, *SPLIT),
    "alike with others beside": (splits("Train", "Test") | {"background": 3}, *SPLIT),
    # stray files
    "a stray image beside the classes": (splits("train", "val") | {"train/x.jpg": 1, "val/y.jpg": 1}, *SPLIT),
    "a stray image above": (CAT_DOG | {"logo.jpg": 1, "readme.txt": 1}, *HELD),
    "left by systems": (
        splits("train", "val") | {"__MACOSX/train/cat": 3, "train/__MACOSX": 2, "train/cat/Thumbs.db": 1, "val/desktop.ini": 1,
                                  ".ipynb_checkpoints": 2, "train/.ipynb_checkpoints": 2, "train/cat/@eaDir": 4,
                                  "train/cat/.DS_Store": 1}, *SPLIT,
    ),
    # nested
    "an archive level deeper": (below("pets", splits("train", "val")), *SPLIT),
    "two levels deeper": (below("pets/pets", splits("Train", "Val")), *SPLIT),
    "with a note beside": (below("pets", splits("train", "val")) | {"readme.txt": 1, "__MACOSX/pets": 2}, *SPLIT),
    "classes a level deeper": (below("pets", CAT_DOG), *HELD),
    "classes two levels deeper": (below("pets/pets", CAT_DOG), *HELD),
    "each split a level deeper": (splits("train/train", "test/test"), *SPLIT),
    "images/ around the splits": (below("images", splits("train", "val")) | {"labels/train/a.txt": 1}, *SPLIT),
    "images/ in the splits": (splits("train/images", "val/images") | {"train/labels/0.txt": 1}, *SPLIT),
    "images/ beside labels": (below("images", CAT_DOG) | {"labels/cat/0.txt": 1, "labels/dog": 0}, *HELD),
    "as the archive of a challenge has it": (
        below("Data/CLS-LOC", splits("train", "val")) | {"Data/CLS-LOC/test": 5, "ImageSets/a.txt": 1, "Annotations/a.xml": 1},
        *SPLIT,
    ),
    "images/ beside an empty folder": (below("images", CAT_DOG) | {"new": 0}, *HELD),
    "images/ in the classes": ({"cat/images": 6, "dog/images": 4}, *HELD),
    # flat
    "flat": (CAT_DOG, *HELD),
    "flat with labels beside": (CAT_DOG | {"labels/a.txt": 1, "Annotations/b.xml": 1}, *HELD),
    "deep": ({"cat/a/b": 6, "dog/c": 1, "dog/d": 3}, *HELD),
    "one class": ({"cat": 6}, {"cat": 5}, {"cat": 1}),
    "one class with folders": ({"cat": 4, "cat/more": 2}, {"cat": 5}, {"cat": 1}),
    "one class in splits": ({"train/cat": 6, "val/cat": 2}, {"cat": 6}, {"cat": 2}),
    "numbers and apples": ({"0": 6, "10": 4, "2/deep": 4, ".git/x": 1, "2/._0.jpg": 1}, {"0": 5, "10": 3, "2": 3}, None),
    "unicode and spaces": ({"小猫": 6, "ümläut é": 4, " lead": 6}, {" lead": 5, "ümläut é": 3, "小猫": 5}, None),
    "other forms of unicode": ({"train/e\u0301te": 6, "val/\u00e9te": 2}, {"e\u0301te": 6}, {"e\u0301te": 2}),
    "classes named like splits": ({"train": 6, "test": 4, "tram": 4}, {"test": 3, "train": 5, "tram": 3}, None),
    "a class with folders named like a split": ({"Training/gym": 6, "match": 4}, {"Training": 5, "match": 3}, None),
    # classes, then splits
    "splits in the classes": ({"cat/train": 6, "cat/val": 2, "dog/train": 4, "dog/val": 1}, *SPLIT),
    "Splits in the classes": ({"cat/Train": 6, "cat/Test": 2, "dog/training": 4, "dog/testing": 1}, *SPLIT),
    # links
    "a linked split": (below("../elsewhere", CAT_DOG) | {"train": "../elsewhere", "val/cat": 2, "val/dog": 1}, *SPLIT),
    "linked classes": ({"../elsewhere/x": 6, "cat": "../elsewhere/x", "dog": 4}, *HELD),
    "a link to all of it": (CAT_DOG | {"all": ".", "above": "..", "dog/all": "../../root"}, *HELD),
    "circular links": (CAT_DOG | {"cat/up": "..", "cat/self": ".", "dog/other": "../cat/up"}, *HELD),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_layouts(tmp_path: Path, name: str) -> None:
    tree, train, val = RIGHT[name]
    root = write(tmp_path / "root", tree)
    first = open_source(f"imagefolder:{root}", "train")
    second = open_source(f"imagefolder:{root}", "val", classes=first.classes)
    assert counts(first) == train and list(counts(first)) == sorted(train)
    if val is not None:
        assert counts(second) == val
    assert counts(open_source(f"imagefolder:{root}", "val")) == counts(second)
    assert not {first.where(index) for index in range(len(first))} & {second.where(index) for index in range(len(second))}


AMBIGUOUS = {
    "folds": (below("fold0", CAT_DOG) | below("fold1", CAT_DOG), "fold0, fold1 as classes or cat, dog, which are in each of"),
    "folds with splits": (splits("1/train", "1/val") | splits("2/train", "2/val"), "or cat, dog, which are in each of them"),
    "domains": (below("train", below("art", CAT_DOG) | below("photo", CAT_DOG | {"elk": 2})), "photo as classes or cat, dog"),
    "both cases": (splits("train", "val") | below("Train", CAT_DOG), "Train/ or train/ as a split"),
    "both cases of val": (splits("train", "val") | below("VAL", CAT_DOG), "VAL/ or val/ as a split"),
    "two words for one": (splits("train", "val") | below("training", CAT_DOG), "train/ or training/ as a split"),
    "dev and test": (splits("train", "dev") | below("test", CAT_DOG), "dev/ or test/ as a split"),
    "two datasets": (splits("a_train", "a_val") | splits("b_train", "b_val"), "root/a_train or"),
    "train among classes": ({"train/steam": 2, "train/diesel": 2, "bus": 2}, "bus, train as classes or train/ as a split"),
    "many images beside the classes": (below("train", CAT_DOG) | {"train": 5}, "train as classes or train/ as a split"),
    "splits without classes": ({"train": 3, "val": 2}, "splits without class folders, or the classes train, val"),
    "images/train without classes": ({"images/train": 3, "images/val": 2, "labels/train/a.txt": 1}, "splits without class"),
    "images and labels": (below("images", CAT_DOG) | below("labels", CAT_DOG), "or the classes in images/"),
    "images and segmentations": (below("images", CAT_DOG) | {"parts": 3}, "images, parts as classes or the classes in images/"),
    "photos twice": (below("images", CAT_DOG) | below("photos", CAT_DOG), "or imagefolder:{root}/photos"),
    "labels with images": (CAT_DOG | {"labels": 2}, "could be a class or describe the others"),
    "detection": ({"train/images": 3, "train/labels/0.txt": 1, "val/images": 1, "val/labels/0.txt": 1}, "is not read"),
    "a folder of classes and an empty one": ({"cat/a": 2, "cat/b": 2, "dog": 0}, "cat as a class or a, b as classes"),
    "splits in one class alone": ({"cat/train": 2, "cat/val": 2, "dog": 3}, "splits in each class or folders of one class"),
    "an empty class": (CAT_DOG | {"elk": 0}, "class folder '{root}/elk' holds no image"),
    "an empty class in a split": (splits("train", "val") | {"train/elk": 0}, "class folder '{root}/train/elk' holds no image"),
    "an empty split": (below("train", CAT_DOG) | {"val/cat": 0}, None),
    "no class folder": ({"a.jpg": 1}, "holds no class folder"),
    "one class twice": (CAT_DOG | {"dog2": "dog"}, "one class as 'dog' and 'dog2'"),
    "one name in two forms": ({"e\u0301te": 2, "\u00e9te": 2}, "remove one of them"),
    "only a validation split": (below("Val", CAT_DOG), "has Val/ but no train/"),
}  # fmt: skip


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_layouts_that_are_refused(tmp_path: Path, name: str) -> None:
    tree, said = AMBIGUOUS[name]
    root = write(tmp_path / "root", tree)
    with pytest.raises(UserError) as caught:
        train = open_source(f"imagefolder:{root}", "train")
        open_source(f"imagefolder:{root}", "val", classes=train.classes)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("data.")
    assert (said or "val/cat' holds no image").replace("{root}", str(root)) in str(caught.value)


def test_a_list_of_classes_settles_what_is_ambiguous(tmp_path: Path) -> None:
    root = write(tmp_path / "root", {"train/steam": 2, "train/diesel": 2, "bus": 3, "labels": 1})
    (tmp_path / "classes.txt").write_text("bus\ntrain\nlabels\n")
    source = open_source(f"imagefolder:{root}", "train", shared=False, class_file=str(tmp_path / "classes.txt"))
    assert counts(source) == {"bus": 3, "train": 4, "labels": 1}
    # The folder that the message names is one that works.
    assert counts(open_source(f"imagefolder:{root}/train", "train", shared=False)) == {"diesel": 2, "steam": 2}
    # Validation data keep the training data's reading: one class, whatever folders are in it.
    val = write(tmp_path / "val", {"cat/in": 1, "cat/out": 2})
    assert counts(open_source(f"imagefolder:{val}", "val", shared=False, classes=["cat", "dog"])) == {"cat": 3, "dog": 0}


def test_what_is_passed_over_is_counted(tmp_path: Path) -> None:
    tree = splits("train", "val") | {"train/cat/a.gif.txt": 1, "train/dog/b.gif.txt": 1, "train/dog/c.txt": 1, "train/x.jpg": 1,
                                     "train/dog/.DS_Store": 1, "train/cat/loop": "..", "extra": 2, "val/y.csv": 1}  # fmt: skip
    root = write(tmp_path / "root", tree)
    os.mkfifo(root / "train/cat/pipe.jpg")  # opening it would wait for ever
    train, val = (open_source(f"imagefolder:{root}", split) for split in ("train", "val"))
    assert counts(train) == CAT_DOG and train.location == f"{root}/train"
    assert dict(train.passed_over) == {
        "folders beside": (1, "extra/"),
        "in no class folder": (1, "train/x.jpg"),
        "a circular link": (1, "train/cat/loop"),
        ".gif.txt": (2, "train/cat/a.gif.txt"),
        ".txt": (1, "train/dog/c.txt"),
        "hidden": (1, "train/dog/.DS_Store"),
        "of no regular file": (1, "train/cat/pipe.jpg"),
    }
    assert dict(val.passed_over) == {".csv": (1, "val/y.csv")}


def test_classes_that_look_alike_are_noted(tmp_path: Path) -> None:
    for number, (one, other) in enumerate((("Cat", "cat"), ("cat", "cat "))):
        root = write(tmp_path / str(number), {one: 3, other: 3, "elk": 3})
        train, val = open_both(f"imagefolder:{root}", f"imagefolder:{root}")
        assert len(train.classes) == 3 and f"{one!r} and {other!r} are two" in train.notes[0] and val.notes == ()


@pytest.mark.parametrize(
    ("name", "found"),
    [("Train", ("train", "")), ("TRAIN-set", ("train", "")), ("trainset", ("train", "")), ("testImages", ("test", "")),
     ("valid", ("val", "")), ("seg_train", ("train", "seg")), ("trainval", ("train", "")),
     ("train_station", ("train", "station")),
     ("train_val", None), ("training day", ("train", "day")), ("trains", None), ("contest", None), ("latest", None)],
)  # fmt: skip
def test_names_of_splits(name: str, found: tuple[str, str] | None) -> None:
    assert split_name(name) == found


@pytest.mark.parametrize(
    ("given", "suggested"), [("petz", "pets"), ("petz/train", "pets/train"), ("pets/trian", "pets/train"), ("PETS", "pets")]
)
def test_a_missing_folder(tmp_path: Path, given: str, suggested: str) -> None:
    write(tmp_path / "pets", splits("train", "val"))
    with pytest.raises(UserError, match=f"no folder '{tmp_path}/{given}'; did you mean '{tmp_path}/{suggested}'"):
        open_source(f"imagefolder:{tmp_path}/{given}", "train")


def test_the_home_folder_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "pets", CAT_DOG)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATASETS", str(tmp_path))
    monkeypatch.delenv("SCRATCHES", raising=False)
    for spec in ("imagefolder:~/pets", "imagefolder:$DATASETS/pets", "imagefolder:${DATASETS}/pets"):
        assert open_source(spec, "train").location == f"{tmp_path}/pets"
    with pytest.raises(UserError, match=r"data.train: \$SCRATCHES/pets: the environment variable SCRATCHES is not set"):
        open_source("imagefolder:$SCRATCHES/pets", "train")
