"""Arrays in files."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from bigvision.data import eval_batches, open_source, transform
from bigvision.errors import UserError

RANDOM = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def write(folder: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    return folder


def refusal(path: Path, split: str = "train", **options) -> str:
    with pytest.raises(UserError) as caught:
        open_source(f"arrays:{path}", split, key="some.key", **options)
    message = str(caught.value)
    assert message.startswith("some.key: ") and "\n" not in message
    return message


def as_first(images: np.ndarray, layout: str) -> np.ndarray:
    """(N, 3, H, W) of any layout, for comparison."""
    if layout == "NHW":
        images = images[:, None]
    elif layout.endswith("C"):
        images = np.moveaxis(images, 3, 1)
    return np.broadcast_to(images, (len(images), 3, *images.shape[2:]))


LAYOUTS = {"NHW": (9, 8, 6), "NHWC": (9, 8, 6, 3), "NHW1C": (9, 8, 6, 1), "NCHW": (9, 3, 8, 6), "N1HW": (9, 1, 8, 6)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["npy", "fortran", "npz", "npz-compressed"])
@pytest.mark.parametrize("column", [False, True])
def test_every_layout_reads_the_same(tmp_path, layout, kind, column):
    images, labels = pixels(*LAYOUTS[layout]), np.arange(9) % 4
    given = labels[:, None] if column else labels.astype(np.uint8)
    if kind.startswith("npz"):
        path = tmp_path / "set.npz"
        (np.savez_compressed if "compressed" in kind else np.savez)(path, images=images, labels=given)
    else:
        path = write(tmp_path / "set", np.asfortranarray(images) if kind == "fortran" else images, given)
    source = open_source(f"arrays:{path}", "train", shared=False)
    assert len(source) == 9 and source.classes == ["0", "1", "2", "3"] and source.style == "tiny" and source.channels == 3
    wanted = as_first(images, layout)
    for index in range(9):
        image, label = source.read(index)
        assert label == labels[index] == source.label(index) and image.dtype == torch.uint8
        assert (image.numpy() == wanted[index]).all()


def test_large_images_are_photos(tmp_path):
    for side, style in ((63, "tiny"), (64, "photo")):
        path = write(tmp_path / str(side), pixels(2, side, 80), np.array([0, 1]))
        assert open_source(f"arrays:{path}", "train", shared=False).style == style


def test_a_tenth_is_held_out_and_hardly_moves(tmp_path):
    images = np.arange(200, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)

    def found(count: int, split: str, shared: bool = True) -> list[int]:
        source = open_source(
            f"arrays:{write(tmp_path / str(count), images[:count], np.zeros(count, int))}", split, shared=shared
        )
        return [int(source.read(index).image[0, 0, 0]) for index in range(len(source))]

    train, val = found(200, "train"), found(200, "val")
    assert len(val) == 20 and sorted(train + val) == list(range(200)) and train == sorted(train)
    assert val[-1] - val[0] > 100
    assert len(set(found(190, "val")) - set(val)) <= 1
    assert found(200, "val", shared=False) == list(range(200))
    assert (len(found(2, "train")), len(found(2, "val"))) == (1, 1)


@pytest.mark.parametrize("val", ["val", "validation", "test"])
def test_parts(tmp_path, val):
    train = pixels(12, 5, 5), np.arange(12) % 3
    held = pixels(4, 5, 5), np.array([0, 1, 0, 1])
    write(tmp_path / "train", *train), write(tmp_path / val, *held)
    np.savez(
        tmp_path / "x.npz", train_images=train[0], train_labels=train[1], **{f"{val}_images": held[0], f"{val}_labels": held[1]}
    )
    for path in (tmp_path, tmp_path / "x.npz"):
        first = open_source(f"arrays:{path}", "train")
        # Labels follow the training data's classes, of which validation lacks one.
        second = open_source(f"arrays:{path}", "val", classes=first.classes)
        assert (len(first), len(second), second.classes) == (12, 4, ["0", "1", "2"])
        for source, (images, labels) in ((first, train), (second, held)):
            for index in range(len(source)):
                assert (source.read(index).image[0].numpy() == images[index]).all() and source.label(index) == labels[index]


def test_a_training_part_alone(tmp_path):
    write(tmp_path / "train", pixels(30, 5, 5), np.arange(30) % 3)
    train, val = (open_source(f"arrays:{tmp_path}", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (27, 3)
    assert "but no val" in refusal(tmp_path, "val", shared=False)
    other = tmp_path / "other"
    write(other / "val", pixels(3, 5, 5), np.arange(3))
    assert "but no train" in refusal(other)
    assert len(open_source(f"arrays:{other}", "val", shared=False)) == 3


def test_classes(tmp_path):
    write(tmp_path / "named", pixels(3, 5, 5), np.array([0, 1, 0]))
    (tmp_path / "named/classes.txt").write_text("cat\nred fox \n")
    source = open_source(f"arrays:{tmp_path}/named", "train", shared=False)
    assert source.classes == ["cat", "red fox"]
    plain = write(tmp_path / "plain", pixels(3, 5, 5), np.array([0, 1, 0]))
    assert open_source(f"arrays:{plain}", "val", shared=False, classes=["a", "b", "c"]).classes == ["a", "b", "c"]
    with pytest.raises(UserError, match=r"class 'cat' in .*named by .*classes.txt', is not one of the 3"):
        open_source(f"arrays:{tmp_path}/named", "val", classes=["a", "b", "c"])
    assert "has label 1, but labels are 0 to 0" in refusal(plain, classes=["a"])
    # Numbers follow the training data by the names that are beside them, whose order is another.
    source = open_source(f"arrays:{tmp_path}/named", "val", shared=False, classes=["elk", "red fox", "cat"])
    assert source.classes == ["elk", "red fox", "cat"] and [source.label(index) for index in range(3)] == [2, 1, 2]
    one_hot = write(tmp_path / "hot", pixels(2, 5, 5), np.eye(2, dtype=int))
    (one_hot / "classnames.txt").write_text("cat\nelk\n")
    source = open_source(f"arrays:{one_hot}", "val", shared=False, classes=["elk", "red fox", "cat"])
    assert [source.label(index) for index in range(2)] == [2, 0]


def test_workers_map_the_file_themselves(tmp_path):
    """What is sent to a worker is small, also after reading, and reads the same."""
    from multiprocessing.reduction import ForkingPickler

    images = pixels(50, 100, 100)
    source = open_source(f"arrays:{write(tmp_path, images, np.arange(50) % 5)}", "train", shared=False)
    source.read(3)
    assert isinstance(source._images._mapped, np.memmap)
    assert len(bytes(ForkingPickler.dumps(source))) < 5000
    plain = transform("photo", 100, train=False, crop_pct=1.0)
    found = {}
    for workers in (0, 2):
        with eval_batches(source, plain, batch=20, rank=0, ranks=1, workers=workers) as batches:
            found[workers] = torch.cat([batch.images for batch in batches])[:50]
    assert torch.equal(found[0], found[2]) and (found[2][:, 0].numpy() == images).all()


def test_a_mistake_in_arrays_is_one_line_with_the_file(tmp_path):
    good, labels = pixels(6, 5, 5), np.arange(6)
    assert "no " in (message := refusal(tmp_path / "none")) and str(tmp_path / "none") in message
    folder = tmp_path / "f"
    folder.mkdir()
    assert "images.npy" in refusal(folder)
    np.save(folder / "images.npy", good)
    assert f"{folder}/labels.npy" in refusal(folder)
    for images, wrong, said in (
        (good.astype(np.float32), labels, "float32 (6, 5, 5); they must be uint8"),
        (good[0], labels, "uint8 (5, 5); they must be"),
        (pixels(6, 4, 5, 2), labels, "(6, 4, 5, 2); they must be"),
        (good, labels[:4], "6 images and 4 labels"),
        (good[:0], labels[:0], "0 images and 0 labels"),
        (good, labels * 0.5, "numbers that are no classes (0.5); use task.name: regress"),
        (good, np.zeros((6, 14), int), "several labels for an image (int64 (6, 14), not one-hot)"),
        (good, labels - 1, "has label -1, but labels are 0 or more"),
        (good, np.array(0), "int64 (); they must be"),
        (good[:1], labels[:1], "none can be held out"),
    ):
        assert said in refusal(write(folder, images, wrong))
    np.savez(tmp_path / "odd.npz", pictures=good)
    assert "it must have images and labels" in refusal(tmp_path / "odd.npz")
    assert "single array" in refusal(folder / "labels.npy")


def test_damage_and_pickles(tmp_path):
    write(tmp_path, pixels(6, 5, 5), np.arange(6))
    objects = io.BytesIO()
    np.save(objects, np.array([object()], dtype=object), allow_pickle=True)
    for content in (b"", b"what?", (tmp_path / "images.npy").read_bytes()[:-20], objects.getvalue()):
        (tmp_path / "images.npy").write_bytes(content)
        assert "cannot be read" in refusal(tmp_path)
    np.savez_compressed(tmp_path / "x.npz", images=pixels(99, 9, 9), labels=np.zeros(99, int))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    for changed in (data[:-30], data[:3000], data[:4000] + bytes(200) + data[4200:]):
        (tmp_path / "x.npz").write_bytes(changed)
        assert "cannot be read" in refusal(tmp_path / "x.npz")
