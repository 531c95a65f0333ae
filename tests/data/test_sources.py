import builtins
import gzip
import hashlib
import io
import os
import pickle
import shutil
import struct
from urllib.error import URLError

import numpy as np
import pytest
import torch
from photo_files import write_photos
from PIL import Image
from torchvision import datasets

from bigvision.data import DATASETS, UnreadableSample, check_source, open_source
from bigvision.data.decode import open_picture
from bigvision.data.sources import FILES
from bigvision.errors import UserError


def refusal(spec: str, split: str = "train", **options) -> str:
    with pytest.raises(UserError) as caught:
        open_source(spec, split, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    assert message.startswith(options.get("key") or f"data.{split}: ")
    return message


def names(source) -> list[str]:
    return [source.path(index).removeprefix(source.root + "/") for index in range(len(source))]


# Names


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("digit", "unknown dataset 'digit'; did you mean 'digits'?"),
        ("zzz", "known are digits, imagefolder"),
        ("", "known are"),
        ("digits:3", "digits takes nothing after its name"),
        ("imagefolder", "write imagefolder:PATH"),
        ("imagefolder:", "write imagefolder:PATH"),
        ("synthetic:0", "not synthetic:SAMPLES"),
        ("synthetic:axb", "not synthetic:SAMPLES"),
        ("synthetic:12x", "not synthetic:SAMPLES"),
    ],
)
def test_wrong_names(spec, said):
    assert said in refusal(spec)
    with pytest.raises(UserError, match=r"^some\.key: "):
        check_source(spec, key="some.key")


def test_a_bare_folder_is_pointed_at_imagefolder(photos):
    assert f"did you mean 'imagefolder:{photos}'?" in refusal(str(photos))


def test_a_name_is_checked_without_opening_the_data(photos, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise AssertionError(f"opened {path}")

    with monkeypatch.context() as patched:
        for module, name in ((builtins, "open"), (os, "scandir"), (os, "listdir"), (os, "stat")):
            patched.setattr(module, name, refuse)
        for name in DATASETS:
            check_source(name + (f":{photos}" if name in FILES else ""), key="data.train")
        with pytest.raises(AssertionError, match="opened"):
            open_source(f"imagefolder:{photos}", "train")


# In memory


def test_digits():
    train, val = open_source("digits", "train"), open_source("digits", "val")
    assert (len(train), len(val)) == (1437, 360)
    assert train.classes == [str(digit) for digit in range(10)] and train.style == "digit"
    image, label = train.read(0)
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8 and isinstance(label, int)
    assert torch.stack([train.read(index).image for index in range(9)]).max() == 255
    for source in (train, val):
        counts = np.bincount([source.read(index).label for index in range(len(source))])
        assert counts.min() > 0.09 * len(source) and counts.max() < 0.11 * len(source)
    # The samples that scikit-learn's own functions give, as in runs of earlier versions.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, target = load_digits(return_X_y=True)
    parts = train_test_split(range(len(target)), test_size=0.2, random_state=0, stratify=target)
    images = torch.from_numpy(pixels).mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
    for source, indices in zip((train, val), map(sorted, parts)):
        assert [source.label(index) for index in range(len(source))] == target[indices].tolist()
        assert torch.equal(torch.stack([source.read(index).image for index in range(len(source))]), images[indices])


def test_synthetic_data_is_the_same_at_every_start():
    source = open_source("synthetic:12x20", "train")
    assert len(source) == 12 and len(source.classes) == 10
    assert source.read(3).image.shape == (3, 20, 20) and source.read(11).label == 1
    assert torch.equal(source.read(3).image, open_source("synthetic:99x20", "val").read(3).image)
    assert not torch.equal(source.read(3).image, source.read(4).image)
    assert open_source("synthetic", "train").read(0).image.shape == (3, 224, 224)
    assert len(open_source("synthetic:5", "train")) == 5


# Torchvision


def write_idx(folder, images: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True)
    for part, array in images.items():
        header = struct.pack(">IIII", 0x803, *array.shape)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + array.tobytes())
    for part, array in labels.items():
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(array)) + array.tobytes())


@pytest.mark.parametrize(("name", "folder", "style"), [("mnist", "MNIST", "digit"), ("fashion-mnist", "FashionMNIST", "tiny")])
def test_mnist(tmp_path, name, folder, style):
    pixels = np.random.default_rng(0)
    images = {part: pixels.integers(0, 256, (n, 28, 28), dtype=np.uint8) for part, n in (("train", 6), ("t10k", 3))}
    labels = {part: np.arange(len(array), dtype=np.uint8) for part, array in images.items()}
    write_idx(tmp_path / folder / "raw", images, labels)
    for split, part in (("train", "train"), ("val", "t10k")):
        source = open_source(name, split, root=str(tmp_path))
        assert len(source) == len(images[part]) and len(source.classes) == 10 and source.style == style
        for index in range(len(source)):
            image, label = source.read(index)
            assert label == index and image.shape == (3, 28, 28)
            assert (image.numpy() == images[part][index]).all()


def test_damaged_mnist(tmp_path):
    image = np.zeros((2, 28, 28), np.uint8)
    write_idx(tmp_path / "MNIST/raw", {"train": image, "t10k": image}, {"train": image[:, 0, 0], "t10k": image[:, 0, 0]})
    file = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    message = refusal("mnist", root=str(tmp_path))
    assert "damaged" in message and str(tmp_path / "MNIST/raw") in message


@pytest.mark.parametrize(("name", "opener"), [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)])
def test_cifar(tmp_path, monkeypatch, name, opener):
    # torchvision accepts only the published files, by MD5; the test's small ones are put in their place.
    folder = tmp_path / opener.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0)
    key, classes = ("labels", 10) if name == "cifar10" else ("fine_labels", 100)
    written: dict[str, np.ndarray] = {}

    def write(file: str, value: dict) -> str:
        (folder / file).write_bytes(pickle.dumps(value))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    def listed(files: list) -> list:
        for file, _ in files:
            written[file] = pixels.integers(0, 256, (4, 3072), dtype=np.uint8)
        return [[file, write(file, {"data": written[file], key: [0, 1, 2, 3]})] for file, _ in files]

    monkeypatch.setattr(opener, "train_list", listed(opener.train_list))
    monkeypatch.setattr(opener, "test_list", listed(opener.test_list))
    meta = dict(opener.meta)
    meta["md5"] = write(meta["filename"], {meta["key"]: [f"class {label}" for label in range(classes)]})
    monkeypatch.setattr(opener, "meta", meta)

    for split, files in (("train", opener.train_list), ("val", opener.test_list)):
        source = open_source(name, split, root=str(tmp_path))
        wanted = np.concatenate([written[file] for file, _ in files]).reshape(-1, 3, 32, 32)
        assert len(source) == len(wanted) and len(source.classes) == classes and source.style == "tiny"
        for index in range(len(source)):
            image, label = source.read(index)
            assert label == index % 4 and (image.numpy() == wanted[index]).all()
    file = folder / opener.train_list[0][0]
    file.write_bytes(file.read_bytes()[:-1])
    assert str(folder) in refusal(name, root=str(tmp_path))


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_missing_files_and_no_network(tmp_path, monkeypatch, capfd, name):
    message = refusal(name, root=str(tmp_path))
    assert str(tmp_path) in message and "put its files there" in message
    assert list(tmp_path.iterdir()) == []

    def unreachable(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    message = refusal(name, root=str(tmp_path), first=True)
    assert "could not be downloaded" in message and "no route" in message and str(tmp_path) in message
    assert capfd.readouterr().out == ""


def test_download(tmp_path, monkeypatch):
    image = np.zeros((2, 28, 28), np.uint8)
    write_idx(tmp_path / "served", {"train": image, "t10k": image}, {"train": image[:, 0, 0], "t10k": image[:, 0, 0]})
    fetched = []

    class Response(io.BytesIO):
        url, length = None, 0

    def serve(request):
        name = request.full_url.rpartition("/")[2]
        fetched.append(name)
        return Response(gzip.compress((tmp_path / "served" / name.removesuffix(".gz")).read_bytes()))

    monkeypatch.setattr("urllib.request.urlopen", serve)
    monkeypatch.setattr(datasets.MNIST, "resources", [(name, None) for name, _ in datasets.MNIST.resources])
    root = str(tmp_path / "root")
    assert len(open_source("mnist", "train", root=root, first=True)) == 2
    assert len(set(fetched)) == 4 and len(fetched) == 8  # each is asked for redirects first
    assert len(open_source("mnist", "val", root=root, first=True)) == 2
    assert len(fetched) == 8


# Folders


def test_a_folder_of_classes_is_split_by_class(photos):
    train, val = (open_source(f"imagefolder:{photos}", split) for split in ("train", "val"))
    assert train.classes == val.classes == ["cat", "dog", "elk"] and train.style == "photo"
    count = [np.bincount([source.read(i).label for i in range(len(source))]).tolist() for source in (train, val)]
    assert count == [[18, 27, 4], [2, 3, 1]]
    every = sorted(str(file.relative_to(photos)) for file in photos.rglob("*.*"))
    assert sorted(names(train) + names(val)) == every
    assert names(train) == sorted(names(train))


def test_a_folder_named_once_is_used_whole(photos):
    assert len(open_source(f"imagefolder:{photos}", "train", shared=False)) == 55
    assert len(open_source(f"imagefolder:{photos}", "val", shared=False)) == 55


def test_the_split_does_not_depend_on_where_the_folder_is_and_hardly_on_new_files(photos, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    before = names(open_source(f"imagefolder:{photos}", "val"))
    assert names(open_source(f"imagefolder:{copy}", "val")) == before
    shutil.copy(copy / "dog/001.png", copy / "dog/new.png")
    assert len(set(before) - set(names(open_source(f"imagefolder:{copy}", "val")))) <= 1


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_split_folders(tmp_path, val):
    write_photos(tmp_path / "train", {"a": 3, "b": 2, "c": 1})
    write_photos(tmp_path / val, {"a": 1, "c": 2})
    train, held = (open_source(f"imagefolder:{tmp_path}", split) for split in ("train", "val"))
    assert (len(train), len(held)) == (6, 3)
    # Labels follow the training folder's classes, also when validation lacks one.
    assert held.classes == ["a", "b", "c"]
    assert [held.read(index).label for index in range(3)] == [0, 2, 2]


def test_train_folder_alone(tmp_path):
    write_photos(tmp_path / "train", {"a": 10, "b": 10})
    train, val = (open_source(f"imagefolder:{tmp_path}", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (18, 2)
    assert "has train/ but no val/" in refusal(f"imagefolder:{tmp_path}", "val", shared=False)


def test_val_folder_alone(tmp_path):
    write_photos(tmp_path / "val", {"a": 1, "b": 1})
    assert "has val/ but no train/" in refusal(f"imagefolder:{tmp_path}", "train")
    assert len(open_source(f"imagefolder:{tmp_path}", "val", shared=False)) == 2


def test_classes_named_like_splits(tmp_path):
    write_photos(tmp_path, {"train": 10, "test": 10, "tram": 10, "train/night": 3})
    assert open_source(f"imagefolder:{tmp_path}", "train").classes == ["test", "train", "tram"]


def test_nested_hidden_and_foreign_files(tmp_path):
    write_photos(tmp_path, {"a/deep": 2, "b": 2})
    (tmp_path / "a/notes.txt").write_text("no image")
    (tmp_path / "b/._000.jpg").write_text("a resource fork")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "readme.txt").write_text("")
    Image.new("RGB", (4, 4)).save(tmp_path / "b" / "ümläut é.JPEG")
    source = open_source(f"imagefolder:{tmp_path}", "train", shared=False)
    assert source.classes == ["a", "b"]
    assert names(source) == ["a/deep/000.jpg", "a/deep/001.png", "b/000.jpg", "b/001.png", "b/ümläut é.JPEG"]
    assert open_picture(source.read(4).image).pixels().shape == (4, 4, 3)


def test_folder_mistakes(tmp_path):
    assert "no folder" in refusal(f"imagefolder:{tmp_path}/none")
    (tmp_path / "file.jpg").write_text("")
    assert "is not a folder" in refusal(f"imagefolder:{tmp_path}/file.jpg")
    assert "holds no class folder" in refusal(f"imagefolder:{tmp_path}")
    write_photos(tmp_path / "some", {"a": 2})
    (tmp_path / "some/b").mkdir()
    (tmp_path / "some/b/x.xcf").write_text("")
    message = refusal(f"imagefolder:{tmp_path}/some")
    assert str(tmp_path / "some/b") in message and "holds no image" in message
    write_photos(tmp_path / "single", {"a": 1, "b": 1})
    assert "none can be held out" in refusal(f"imagefolder:{tmp_path}/single", "val")


def test_a_folder_that_may_not_be_listed(photos, monkeypatch):
    listing = os.scandir

    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert f"cannot list '{photos}/dog': Permission denied" in refusal(f"imagefolder:{photos}")


def test_classes_of_the_training_data(tmp_path):
    write_photos(tmp_path, {"b": 2, "d": 1})
    spec = f"imagefolder:{tmp_path}"
    val = open_source(spec, "val", shared=False, classes=["a", "b", "c", "d"])
    assert [val.read(index).label for index in range(3)] == [1, 1, 3]
    assert "class 'd'" in refusal(spec, "val", shared=False, classes=["a", "b"])
    assert "10 classes" in refusal("digits", "val", classes=["a", "b"])
    open_source("digits", "val", classes=open_source("digits", "train").classes)


# Decoding


def read_one(tmp_path, image: Image.Image, name: str, **options) -> Image.Image:
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / name, **options)
    picture = open_picture(open_source(f"imagefolder:{tmp_path}", "train", shared=False).read(0).image)
    pixels = picture.pixels()
    assert pixels.dtype == np.uint8 and pixels.shape == (picture.height, picture.width, 3)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("mode", "colour", "name", "wanted"),
    [
        ("L", 90, "x.png", (90, 90, 90)),
        ("LA", (90, 10), "x.png", (90, 90, 90)),
        ("RGBA", (10, 20, 30, 40), "x.png", (10, 20, 30)),
        ("1", 1, "x.png", (255, 255, 255)),
        ("P", 0, "x.gif", None),
        ("CMYK", (0, 0, 0, 255), "x.tif", (0, 0, 0)),
        ("I;16", 90 * 256, "x.png", (90, 90, 90)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, colour, name, wanted):
    result = read_one(tmp_path, Image.new(mode, (6, 4), colour), name)
    assert result.size == (6, 4)
    assert wanted is None or result.getpixel((0, 0)) == wanted


def test_exif_orientation(tmp_path):
    image = Image.new("RGB", (40, 20), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter, clockwise
    result = read_one(tmp_path, image, "x.jpg", exif=exif)
    assert result.size == (20, 40)
    assert result.getpixel((10, 5)) < (50, 50, 50) and result.getpixel((10, 35)) > (200, 200, 200)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_unreadable_files(tmp_path, damage, suffix):
    write_photos(tmp_path, {"a": 4}, size=(200, 200))
    file = tmp_path / "a" / ("002.jpg" if suffix == "jpg" else "003.png")
    content = {"truncated": file.read_bytes()[:2000], "empty": b"", "text": b"<html>404</html>"}[damage]
    file.write_bytes(content)
    source = open_source(f"imagefolder:{tmp_path}", "train", shared=False)
    index = names(source).index(f"a/{file.name}")
    with pytest.raises(UnreadableSample) as caught:
        open_picture(source.read(index).image).pixels()
    assert str(caught.value) and "\n" not in str(caught.value)
    assert source.where(index) == str(file)
