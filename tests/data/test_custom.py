"""Datasets of the user's own, and torchvision's of image files."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.utils.data import ChainDataset, ConcatDataset, DataLoader, Subset, TensorDataset, random_split
from torchvision import datasets

from bigvision.data import MapStyle, UnreadableSample, eval_batches, open_source, transform
from bigvision.data.decode import open_picture
from bigvision.data.sources import open_both
from bigvision.data.sources.base import Opening
from bigvision.data.sources.custom import as_source
from bigvision.errors import UserError

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (8, 6, 3), dtype=np.uint8)


class Listed:
    """Items as they are given."""

    def __init__(self, items: list, **attributes) -> None:
        self.items = items
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


def shown(image) -> np.ndarray:
    return open_picture(image).pixels()


# MapStyle


def test_every_kind_of_image(tmp_path):
    picture = Image.fromarray(PIXELS)
    picture.save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    images = [picture, Image.open(tmp_path / "x.png"), PIXELS, PIXELS[:, ::-1][:, ::-1], tensor]
    images += [data, tmp_path / "x.png", str(tmp_path / "x.png")]
    source = MapStyle(Listed([(image, 1) for image in images]), ["a", "b"], name="mine")
    assert (len(source), source.name, source.style, source.channels) == (len(images), "mine", "photo", 3)
    for index in range(len(source)):
        image, label = source.read(index)
        assert label == 1 and (shown(image) == PIXELS).all(), index
    grey = [PIXELS[..., 0], PIXELS[..., :1], tensor[:1], Image.fromarray(PIXELS[..., 0])]
    source = MapStyle(Listed([(image, 0) for image in grey]), ["a"])
    assert source.name == "Listed"
    for index in range(len(source)):
        assert (shown(source.read(index).image) == PIXELS[..., :1]).all(), index


@pytest.mark.parametrize("label", [2, np.int64(2), np.uint8(2), torch.tensor(2)])
def test_every_kind_of_label(label):
    value = MapStyle(Listed([(PIXELS, label)]), ["a", "b", "c"]).read(0).label
    assert value == 2 and type(value) is int


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ((PIXELS.astype(np.float32), 0), "is ndarray of float32 \\(8, 6, 3\\); give"),
        ((PIXELS[..., :2], 0), "ndarray of uint8 \\(8, 6, 2\\)"),
        ((torch.zeros(3, 8, 6), 0), "Tensor of float32"),
        ((torch.zeros(8, 6, dtype=torch.uint8), 0), "Tensor of uint8 \\(8, 6\\)"),
        ((None, 0), "is NoneType"),
        ((PIXELS, 0.5), "label of sample 0 is float, not an integer"),
        ((PIXELS, "z"), "label of sample 0 is 'z', which is none of the 2 classes"),
        ((PIXELS, 2), "label of sample 0 is 2, but there are 2 classes"),
        ((PIXELS, -1), "is -1"),
        ((PIXELS, None), r"sample 0 has no label \(None\); remove"),
        ((PIXELS, float("nan")), r"sample 0 has no label \(nan\)"),
        ((PIXELS, ""), r"sample 0 has no label \(''\)"),
        ((PIXELS[..., None, :], 0), "ndarray of uint8 \\(8, 6, 1, 3\\)"),
    ],
)
def test_what_is_no_image_or_no_label(item, said):
    with pytest.raises((TypeError, ValueError), match=said):
        MapStyle(Listed([item]), ["a", "b"]).read(0)


def test_classes_and_labels():
    items = [(PIXELS, 0), (PIXELS, 2)]
    for name in ("targets", "labels", "_labels"):
        for labels in ([0, 2], np.array([0, 2]), torch.tensor([0, 2])):
            source = MapStyle(Listed([ValueError("must not be read")] * 2, **{name: labels}))
            assert source.classes == ["0", "1", "2"] and [source.label(0), source.label(1)] == [0, 2]
    assert MapStyle(Listed(items, classes=["x", "y", "z"])).classes == ["x", "y", "z"]
    assert MapStyle(Listed(items, classes=["x", "y", "z"]), ["p", "q", "r"]).classes == ["p", "q", "r"]
    # No attribute, or one that is something else: by reading.
    for attributes in ({}, {"targets": [0]}, {"labels": [[1], [2, 3]]}, {"targets": [1, 1], "target_transform": abs}):
        source = MapStyle(Listed(items, **attributes), ["x", "y", "z"])
        assert [source.label(0), source.label(1)] == [0, 2]
    with pytest.raises(UserError, match="neither classes nor targets"):
        MapStyle(Listed(items))
    with pytest.raises(UserError, match="has label 2, but labels are 0 to 1"):
        MapStyle(Listed(items, targets=[0, 2]), ["a", "b"])
    with pytest.raises(UserError, match="no samples"):
        MapStyle(Listed([]), ["a"])


def test_unreadable_and_other_errors(tmp_path):
    (tmp_path / "text.jpg").write_text("<html>")
    Image.fromarray(RANDOM.integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:5000])
    cut = Image.open(tmp_path / "cut.png")
    items = [OSError("disk\n gone"), SyntaxError("broken PNG file"), (tmp_path / "none.jpg", 1), (cut, 1)]
    source = MapStyle(Listed(items), ["a", "b"], name="mine")
    for index, said in enumerate(["^disk gone$", "^broken PNG", "none.jpg", "truncated"]):
        with pytest.raises(UnreadableSample, match=said):
            source.read(index)
    assert [source.label(index) for index in range(3)] == [0, 0, 0]
    assert source.where(2) == "mine, sample 2"
    for error in (KeyError("x"), RuntimeError("cuda"), ValueError("y")):
        with pytest.raises(type(error)):
            MapStyle(Listed([error]), ["a"]).read(0)


def test_in_place_of_a_name():
    dataset = Listed([(PIXELS, 0), (PIXELS, 1)], targets=[0, 1])
    source = open_source(dataset, "train")
    assert isinstance(source, MapStyle) and source.classes == ["0", "1"]
    assert open_source(source, "val", classes=["0", "1"]) is source
    assert open_source(dataset, "val", classes=["cat", "dog", "elk"]).classes == ["cat", "dog", "elk"]
    with pytest.raises(UserError, match=r"^data.val: the 2 classes of Listed are not the 3 of the training data"):
        open_source(Listed(dataset.items, classes=["x", "y"]), "val", classes=["a", "b", "c"])
    with pytest.raises(UserError, match=r"^some.key: int has no __len__"):
        as_source(3, Opening("train", "some.key"))  # type: ignore[arg-type]


def test_workers_read_the_users_dataset_as_the_rank_does():
    """What a worker reads is the same, a bad sample is one there, and what cannot be sent is said."""
    items = [(RANDOM.integers(0, 256, (8, 8, 3), dtype=np.uint8), index % 3) for index in range(9)]
    items[4] = OSError("gone")
    source = MapStyle(Listed(items), ["a", "b", "c"], name="mine")
    plain, options = transform("photo", 8, train=False, crop_pct=1.0), {"batch": 9, "rank": 0, "ranks": 1}
    for workers in (0, 1):
        with eval_batches(source, plain, workers=workers, **options) as batches:
            batch = next(batches)
        assert batch.valid.tolist() == [index != 4 for index in range(9)] and batch.labels[5] == 2
        assert (batch.images[8].permute(1, 2, 0).numpy() == items[8][0]).all()
        assert [(bad.where, bad.reason) for bad in batches.bad] == [("mine, sample 4", "gone")]
    lazy = MapStyle(Listed(items, transform=lambda image: image), ["a", "b", "c"], name="mine")
    assert lazy.read(0).label == 0
    with pytest.raises(UserError, match=r"^mine: it cannot be sent to worker processes \(.*lambda.*data.workers 0$"):
        eval_batches(lazy, plain, workers=1, **options)


# Rows that are dicts, wrappers and other people's datasets


def items(count: int = 6) -> list:
    return [(RANDOM.integers(0, 256, (8, 8, 3), dtype=np.uint8), index % 3) for index in range(count)]


def rows(image: str, label: str, **more) -> list[dict]:
    return [{"id": 7, image: pixels, label: value, **more} for pixels, value in items()]


@pytest.mark.parametrize(
    ("dataset", "columns"),
    [
        (rows("image", "label"), None),
        (rows("img", "Class"), None),
        (rows("image", "label", mask=PIXELS, labels=1), None),
        (rows("scan", "grade", photo=PIXELS), ("scan", "grade")),
        ([{"what": 1, "file": {"bytes": b"x", "path": None}}], None),
    ],
)
def test_rows_that_are_dicts(dataset, columns):
    source = open_source(MapStyle(Listed(dataset), ["a", "b", "c"], columns=columns), "train")
    label = columns[1] if columns else next(name for name in dataset[0] if name in ("label", "Class", "what"))
    assert [source.read(index).label for index in range(len(dataset))] == [row[label] for row in dataset]


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (
            rows("scan", "label"),
            "have the columns id, scan, label, of which none is known as the image; give",
        ),
        (rows("image", "fine_label", coarse_label=1), "fine_label or coarse_label may be the label; give MapStyle"),
        ([{"image": PIXELS, "label": 0.5}], "the label of sample 0 is float"),
        ([{"image": PIXELS, "label": [0, 1]}], "is list of 2, several labels for an image; use task.name: multilabel"),
        ([(PIXELS, 0, "x")], r"sample 0 is tuple of 3; it must be \(image, label\) or a dict"),
        ([PIXELS], "sample 0 is ndarray; it must be"),
        ([(torch.zeros(3, 8, 8), 0)], "Tensor of float32 .* take ToTensor and Normalize out of the dataset"),
        ([(PIXELS / 255, 0)], "ndarray of float64 .* take ToTensor"),
        ([(PIXELS.astype(np.int32), 0)], "ndarray of int32"),
        ([(PIXELS, "fox")], "is 'fox', which is none of the 3 classes"),
    ],
)
def test_the_first_sample_is_checked_before_the_run(dataset, said):
    state = torch.get_rng_state()
    with pytest.raises(UserError, match=said) as caught:
        open_source(Listed(dataset, classes=["a", "b", "c"]), "train")
    assert str(caught.value).startswith("data.train: ") and "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_that_are_listed_otherwise_than_read():
    with pytest.raises(UserError, match=r"sample 0 has label 0, but 1 in the labels that the dataset lists"):
        open_source(Listed([(PIXELS, 0), (PIXELS, 1)], targets=[1, 0]), "train")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([1, 2, 3], ["1", "2", "3"]),
        ([90000, 100, 90000], ["100", "90000"]),
        (["dog", "cat", "dog"], ["cat", "dog"]),
        ([True, False, True], ["False", "True"]),
        ([1.0, 0.0, 1.0], ["0", "1"]),
    ],
)
def test_labels_of_every_form(labels, classes):
    dataset = Listed([(PIXELS, label) for label in labels], targets=labels)
    train = open_source(dataset, "train")
    assert train.classes == classes and bool(train.notes) == (classes[0] in ("1", "100"))
    wanted = [classes.index(str(label).removesuffix(".0")) for label in labels]
    for source in (train, open_source(Listed(dataset.items), "val", classes=classes)):
        assert [source.read(index).label for index in range(3)] == [source.label(index) for index in range(3)] == wanted
    with pytest.raises(UserError, match=r"^data.val: Listed: .* (is not one of the|has label 7, but labels are 0 to 1)"):
        other = "fox" if isinstance(labels[0], str) else 7
        open_source(Listed([(PIXELS, other)], targets=[other]), "val", classes=classes)


def test_torch_wrappers_know_what_they_wrap(tmp_path):
    for index, name in enumerate(("ant", "bee", "ant", "cow")):
        photo(tmp_path / name / f"{index}.jpg", 50 * index)
    folder = datasets.ImageFolder(tmp_path)
    nested = Subset(Subset(folder, [3, 2, 1]), [0, 2])
    source = open_source(nested, "train")
    assert source.classes == ["ant", "bee", "cow"] and [source.label(0), source.label(1)] == [2, 0]
    assert source.read(0).label == 2 and isinstance(source.read(0).image, Image.Image)
    source = open_source(ConcatDataset([folder, nested]), "train")
    assert source.classes == folder.classes and [source.label(index) for index in range(6)] == [0, 0, 1, 2, 2, 0]
    assert [source.read(index).label for index in range(6)] == [0, 0, 1, 2, 2, 0]
    images = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8)
    tensors = TensorDataset(images, torch.arange(9) % 3 + 4)
    train, val = (open_source(part, "train") for part in random_split(tensors, [6, 3]))
    # Of all labels, whichever of them a part has.
    assert train.classes == val.classes == ["4", "5", "6"] and [len(train), len(val)] == [6, 3]
    assert all(one.read(index).label == one.label(index) for one in (train, val) for index in range(3))
    assert open_source(TensorDataset(images, torch.zeros(9, 1)), "train").label(3) == 0


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (
            ConcatDataset([Listed([(PIXELS, 0)], classes=["a"]), Listed([(PIXELS, 0)], classes=["b"])]),
            "joins datasets of other",
        ),
        (TensorDataset(torch.zeros(2, 3, 4, 4), torch.zeros(2)), "Tensor of float32 .* take ToTensor"),
        (TensorDataset(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)), "has 1 tensors; give TensorDataset"),
        (TensorDataset(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5)), "several labels for an image"),
        (TensorDataset(torch.zeros(2, 3, 4, 4), torch.tensor([0.5, 1])), "numbers that are no classes"),
        (Subset(Listed([(PIXELS, 0)]), [0]), "neither classes nor targets"),
        (DataLoader(Listed([(PIXELS, 0)])), "a DataLoader makes batches, which is done here; give its dataset"),
        (ChainDataset([]), "ChainDataset can only be iterated over"),
        ({"test": Listed([(PIXELS, 0)], targets=[0])}, "dict has test but no train"),
        ({"train": iter(())}, "has no __len__ and __getitem__"),
        (Listed([(PIXELS, 0)] * 3, targets=[1, 2, 3], classes=["a", "b", "c"]), "labels count from 0: subtract 1"),
        (Listed([(PIXELS, 0)], targets=[-1]), "has label -1, but"),
    ],
)
def test_datasets_that_are_refused(dataset, said):
    with pytest.raises(UserError, match=said) as caught:
        open_source(dataset, "train")
    assert str(caught.value).startswith("data.train: ") and "\n" not in str(caught.value)


def test_parts_by_name():
    parts = {
        name: Listed(items(count), targets=[index % 3 for index in range(count)]) for name, count in (("train", 6), ("test", 3))
    }
    assert (len(open_source(parts, "train")), len(open_source(parts, "val"))) == (6, 3)
    # Given as both, its parts are the training and the validation data; a single dataset is divided.
    assert [len(source) for source in open_both(parts, parts)] == [6, 3]
    assert [len(source) for source in open_both(parts["train"], parts["train"])] == [5, 1]


# torchvision's


def photo(path: Path, colour: int, suffix: str = "JPEG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (colour, 255 - colour, 128)).save(path, suffix)


def colours(source) -> list[int]:
    """What each image was painted with; JPEG keeps it nearly."""
    return [round(float(shown(source.read(index).image)[..., 0].mean()) / 10) * 10 for index in range(len(source))]


def food101(root: Path) -> None:
    for split, base in (("train", 0), ("test", 100)):
        listed = {name: [f"{name}/{split}{number}" for number in range(2)] for name in ("baklava", "apple_pie")}
        (root / "food-101/meta").mkdir(parents=True, exist_ok=True)
        (root / f"food-101/meta/{split}.json").write_text(json.dumps(listed))
        for place, name in enumerate(name for names in listed.values() for name in names):
            photo(root / f"food-101/images/{name}.jpg", base + 10 * place)


def oxford_pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    for split, base in (("trainval", 0), ("test", 100)):
        names = [("Abyssinian_1", 1), ("Abyssinian_2", 1), ("american_bulldog_10", 2), ("american_bulldog_11", 2)]
        names = [(f"{name}{base}", label) for name, label in names]
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        (folder / f"annotations/{split}.txt").write_text("".join(f"{name} {label} 1 1\n" for name, label in names))
        for place, (name, _) in enumerate(names):
            photo(folder / f"images/{name}.jpg", base + 10 * place)


def flowers102(root: Path) -> None:
    folder = root / "flowers-102"
    for number in range(1, 9):
        photo(folder / f"jpg/image_{number:05}.jpg", 10 * number - 10 if number < 5 else 10 * number + 50)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[2, 2, 1, 1, 2, 2, 1, 1]])})
    savemat(folder / "setid.mat", {"trnid": [[1, 2, 3, 4]], "valid": [[5, 6, 7, 8]], "tstid": [[9]]})
    files = {"imagelabels.mat": "label", "setid.mat": "setid"}
    found = {key: (name, hashlib.md5((folder / name).read_bytes()).hexdigest()) for name, key in files.items()}
    datasets.Flowers102._file_dict = datasets.Flowers102._file_dict | found


def dtd(root: Path) -> None:
    for split, base in (("train", 0), ("val", 100)):
        names = [f"{name}/{split}_{number}.jpg" for name in ("woven", "banded") for number in range(2)]
        (root / "dtd/dtd/labels").mkdir(parents=True, exist_ok=True)
        (root / f"dtd/dtd/labels/{split}1.txt").write_text("\n".join(names))
        for place, name in enumerate(names):
            photo(root / "dtd/dtd/images" / name, base + 10 * place)


def aircraft(root: Path) -> None:
    folder = root / "fgvc-aircraft-2013b/data"
    for split, base in (("train", 0), ("val", 100)):
        for place in range(4):
            photo(folder / f"images/{base + place:07}.jpg", base + 10 * place)
        lines = [f"{base + place:07} {'A320 neo' if place > 1 else 'B 737'}" for place in range(4)]
        (folder / f"images_variant_{split}.txt").write_text("\n".join(lines))
    (folder / "variants.txt").write_text("A320 neo\nB 737\n")


def imagenette(root: Path) -> None:
    for split, base in (("train", 0), ("val", 100)):
        for place in range(4):
            name = ("n01440764", "n02102040")[place // 2]
            photo(root / f"imagenette2/{split}/{name}/{name}_{place}.JPEG", base + 10 * place)


def country211(root: Path) -> None:
    for split, base in (("train", 0), ("valid", 100)):
        for place in range(4):
            photo(root / f"country211/{split}/{('AD', 'AE')[place // 2]}/{place}.jpg", base + 10 * place)


SPLIT = {
    "food101": (food101, ["apple_pie", "baklava"], [1, 1, 0, 0]),
    "oxford-pets": (oxford_pets, ["Abyssinian", "American Bulldog"], [0, 0, 1, 1]),
    "flowers102": (flowers102, ["pink primrose", "hard-leaved pocket orchid"], [1, 1, 0, 0]),
    "dtd": (dtd, ["banded", "woven"], [1, 1, 0, 0]),
    "aircraft": (aircraft, ["A320 neo", "B 737"], [1, 1, 0, 0]),
    "imagenette": (imagenette, ["tench", "English springer"], [0, 0, 1, 1]),
    "country211": (country211, ["AD", "AE"], [0, 0, 1, 1]),
}


@pytest.fixture
def restored(monkeypatch):
    """Puts torchvision's checksums back."""
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", datasets.Flowers102._file_dict)


@pytest.mark.parametrize("name", SPLIT)
def test_published_splits(tmp_path, restored, name):
    write, classes, labels = SPLIT[name]
    write(tmp_path)
    train, val = (open_source(name, split, root=str(tmp_path), first=False) for split in ("train", "val"))
    assert train.classes == val.classes and train.classes[:2] == classes and train.style == "photo"
    assert colours(train) == [0, 10, 20, 30] and colours(val) == [100, 110, 120, 130]
    for source in (train, val):
        assert [source.read(index).label for index in range(4)] == labels == [source.label(index) for index in range(4)]
    damaged = Path(train.where(2))
    assert tmp_path in damaged.parents
    damaged.unlink()
    with pytest.raises(UnreadableSample):
        train.read(2)
    assert train.label(2) == labels[2]


def eurosat(root: Path) -> None:
    for place in range(20):
        photo(root / f"eurosat/2750/{('Forest', 'River')[place // 10]}/{place:02}.jpg", 10 * place)


def caltech101(root: Path) -> None:
    objects = "caltech101/101_ObjectCategories"
    for place in range(20):
        photo(root / objects / ("ant", "bass")[place // 10] / f"image_{place % 10 + 1:04}.jpg", 10 * place)
    photo(root / objects / "BACKGROUND_Google/image_0001.jpg", 250)


@pytest.mark.parametrize(("name", "write"), [("eurosat", eurosat), ("caltech101", caltech101)])
def test_a_tenth_is_held_out_where_nothing_is_published(tmp_path, name, write):
    write(tmp_path)
    train, val = (open_source(name, split, root=str(tmp_path), first=False) for split in ("train", "val"))
    assert len(train.classes) == 2 and len(val) == 2
    assert sorted(colours(train) + colours(val)) == [10 * place for place in range(20)]
    for source in (train, val):
        for index, colour in enumerate(colours(source)):
            assert source.read(index).label == source.label(index) == colour // 100
            assert shown(Image.open(source.where(index)))[..., 0].mean() == pytest.approx(colour, abs=5)


def test_svhn(tmp_path, monkeypatch):
    images, parts = RANDOM.integers(0, 256, (32, 32, 3, 6), dtype=np.uint8), {}
    for split, labels in (("train", [1, 2, 10, 9, 3, 4]), ("test", [10, 1, 1, 1, 1, 5])):
        file = tmp_path / f"{split}_32x32.mat"
        savemat(file, {"X": images, "y": np.array(labels)[:, None]})
        parts[split] = ["", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", parts)
    train, val = (open_source("svhn", split, root=str(tmp_path), first=False) for split in ("train", "val"))
    assert [train.label(index) for index in range(6)] == [1, 2, 0, 9, 3, 4] and val.label(0) == 0
    assert train.style == "digit" and train.classes == [str(label) for label in range(10)]
    assert (shown(train.read(3).image) == images[..., 3]).all()


@pytest.mark.parametrize("named", [True, False])
def test_stl10(tmp_path, monkeypatch, named):
    folder, classes = tmp_path / "stl10_binary", [f"class {label}" for label in range(10)]
    folder.mkdir()
    images = RANDOM.integers(0, 256, (3, 3, 96, 96), dtype=np.uint8)
    for file in ("train_X.bin", "test_X.bin", "unlabeled_X.bin"):
        images.tofile(folder / file)
    for file in ("train_y.bin", "test_y.bin"):
        np.array([1, 10, 5], dtype=np.uint8).tofile(folder / file)
    if named:
        (folder / "class_names.txt").write_text("\n".join(classes))
    for listed in ("train_list", "test_list"):
        files = [[name, hashlib.md5((folder / name).read_bytes()).hexdigest()] for name, _ in getattr(datasets.STL10, listed)]
        monkeypatch.setattr(datasets.STL10, listed, files)
    source = open_source("stl10", "val", root=str(tmp_path), first=False)
    assert source.classes == (classes if named else [str(label) for label in range(10)]) and source.style == "photo"
    assert [source.label(index) for index in range(3)] == [0, 9, 4]
    assert (shown(source.read(2).image) == images[2].transpose(2, 1, 0)).all()


@pytest.mark.parametrize("name", [*SPLIT, "eurosat", "caltech101", "svhn", "stl10"])
def test_missing_files(tmp_path, name):
    with pytest.raises(UserError, match=rf"^data.train: {name} is not complete in '{tmp_path}.*put its files there"):
        open_source(name, "train", root=str(tmp_path), first=False)
    assert list(tmp_path.iterdir()) == []


def test_lists_that_lead_elsewhere_and_damaged_ones(tmp_path):
    food101(tmp_path)
    (tmp_path / "food-101/meta/train.json").write_text(json.dumps({"apple_pie": ["../../../secret"]}))
    with pytest.raises(UserError, match=r"lists '.*secret.jpg', which is not in"):
        open_source("food101", "train", root=str(tmp_path), first=False)
    (tmp_path / "food-101/meta/train.json").write_text("{")
    with pytest.raises(UserError, match=r"files of food101 in .* are damaged"):
        open_source("food101", "train", root=str(tmp_path), first=False)
