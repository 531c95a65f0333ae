import json
import os
import pickle
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_shards import check_batches, jpeg, open_below

from bigvision.data import UnreadableSample, open_source, workers
from bigvision.data.sources import arrow as module
from bigvision.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

Rows = list[tuple[bytes | None, int | str]]


def rows(count: int, seed: int = 0) -> Rows:
    return [(jpeg(seed + number, (9 + number % 7, 8 + number % 5)), number % 3) for number in range(count)]


def write(path: Path, data: Rows, names: list[str] | None = None, *, struct=True, group=4, paths=None, **more) -> Path:
    """Write rows as the Hub does: images in a struct, the classes' names in the schema."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [image for image, _ in data]
    if struct:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        column = pa.array([{"bytes": image, "path": paths[n] if paths else None} for n, image in enumerate(images)], kind)
    else:
        column = pa.array(images, more.pop("kind", pa.binary()))
    labels = pa.array([label for _, label in data], None if data else pa.int64())
    table = pa.table({"other": pa.nulls(len(data)), "image": column, "label": labels})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=group, **more)
    return path


def contents(source) -> Rows:
    """All rows, read in a random order, after checking what else a source promises."""
    found = {}
    for index in random.Random(0).sample(range(len(source)), len(source)):
        image, label = source.read(index)
        assert type(image) is bytes and source.label(index) == label
        assert os.path.isfile(source.where(index).rpartition(": row ")[0])
        found[index] = image, label
    return [found[index] for index in range(len(source))]


def opened(path, split="train", **options):
    return open_source(f"parquet:{path}", split, **{"shared": False, **options})


def refusal(path, split="train", **options) -> str:
    with pytest.raises(UserError) as caught:
        opened(path, split, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 and message.startswith(f"data.{split}: ")
    return message


# Reading


@pytest.mark.parametrize("group", [1, 4, 100])
def test_every_row_is_what_was_written(tmp_path, group):
    wanted = rows(9), rows(1, 9), [], rows(13, 10)
    for number, part in enumerate(wanted):
        write(tmp_path / f"{number}.parquet", part, ["ant", "bee", "cow"], group=group)
    source = opened(tmp_path)
    assert contents(source) == [row for part in wanted for row in part]
    assert source.classes == ["ant", "bee", "cow"] and source.style == "photo" and source.channels == 3
    assert source.where(9) == f"{tmp_path}/1.parquet: row 0" and source.where(22) == f"{tmp_path}/3.parquet: row 12"


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_images_in_a_plain_binary_column_are_read(tmp_path, kind, compression):
    write(tmp_path / "x.parquet", rows(9), struct=False, kind=kind, compression=compression)
    source = opened(tmp_path)
    assert contents(source) == rows(9) and source.classes == ["0", "1", "2"]


def test_labels_that_are_names(tmp_path):
    write(tmp_path / "x.parquet", [(b"1", "dog"), (b"2", "cat"), (b"3", "elk"), (b"4", "dog")])
    source = opened(tmp_path)
    assert source.classes == ["cat", "dog", "elk"] and [label for _, label in contents(source)] == [1, 0, 2, 1]
    assert [label for _, label in contents(opened(tmp_path, classes=["elk", "dog", "fox", "cat"]))] == [1, 3, 0, 1]
    assert "class 'elk'" in refusal(tmp_path, classes=["cat", "dog"])
    (tmp_path / "classes.txt").write_text("elk\ndog\ncat\n")
    assert [label for _, label in contents(opened(tmp_path))] == [1, 2, 0, 1]


def test_numbers_follow_the_names_of_the_training_data(tmp_path):
    write(tmp_path / "x.parquet", [(b"x", 0), (b"x", 1)], ["1", "0", "unused"])
    assert [label for _, label in contents(opened(tmp_path))] == [0, 1]
    # Another order of the same names: "1" is theirs 0 and ours 1.
    assert [label for _, label in contents(opened(tmp_path, classes=["0", "1"]))] == [1, 0]
    assert "class '1'" in refusal(tmp_path, classes=["0", "2"])
    # Without names numbers are labels already.
    write(tmp_path / "plain/x.parquet", [(b"x", 0), (b"x", 1)])
    assert [label for _, label in contents(opened(tmp_path / "plain", classes=["1", "0"]))] == [0, 1]


def test_a_name_of_two_classes(tmp_path):
    names = ["crane", "maillot", "crane"]
    write(tmp_path / "x.parquet", rows(9), names)
    assert contents(opened(tmp_path)) == rows(9) == contents(opened(tmp_path, classes=names))
    assert "names a class twice" in refusal(tmp_path, classes=["maillot", "crane"])


def test_images_in_files_beside(tmp_path):
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    (folder / "images/a.jpg").write_bytes(b"inside")
    (tmp_path / "secret.jpg").write_bytes(b"outside")
    os.symlink(tmp_path / "secret.jpg", folder / "link.jpg")
    os.mkfifo(folder / "pipe.jpg")
    inside = ["images/a.jpg", str(folder / "images/a.jpg"), "images/../images/a.jpg"]
    outside = [str(tmp_path / "secret.jpg"), "../secret.jpg", "link.jpg", "pipe.jpg", "images", "none.jpg", "a\0b", ""]
    write(folder / "x.parquet", [(None, 0)] * 11, paths=inside + outside)
    source = opened(folder)
    assert [source.read(index).image for index in range(3)] == [b"inside"] * 3
    for index in range(3, 11):
        with pytest.raises(UnreadableSample) as caught:
            source.read(index)
        assert "\n" not in str(caught.value) and source.label(index) == 0


def test_rows_without_an_image(tmp_path):
    write(tmp_path / "x.parquet", [(None, 0), (b"x", 1)])
    write(tmp_path / "y.parquet", [(None, 0), (b"x", 1)], struct=False)
    source = opened(tmp_path)
    for index in (0, 2):
        with pytest.raises(UnreadableSample, match="no image"):
            source.read(index)
    assert source.read(1).image == source.read(3).image == b"x"


# Labels of every type


def with_labels(path: Path, labels, kind=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    column = labels if isinstance(labels, (pa.Array, pa.ChunkedArray)) else pa.array(labels, kind)
    pq.write_table(pa.table({"image": [b"x"] * len(column), "label": column}), path, row_group_size=2)
    return path


@pytest.mark.parametrize(
    ("labels", "kind", "classes", "values"),
    [
        ([True, False, True], None, ["False", "True"], [1, 0, 1]),
        *(([0, 2, 1], getattr(pa, f"{sign}int{bits}")(), ["0", "1", "2"], [0, 2, 1]) for sign in ("", "u") for bits in (8, 64)),
        ([0.0, 1.0, 0.0], pa.float16(), ["0", "1"], [0, 1, 0]),
        ([0, 1, 0], pa.float64(), ["0", "1"], [0, 1, 0]),
        ([0, 1, 0], pa.decimal128(5, 2), ["0", "1"], [0, 1, 0]),
        (["b", "a", "b"], pa.large_string(), ["a", "b"], [1, 0, 1]),
        (["b", "a", "b"], pa.string_view(), ["a", "b"], [1, 0, 1]),
        (["1", "0", "1"], None, ["0", "1"], [1, 0, 1]),
        ([b"b", b"a", b"b"], None, ["a", "b"], [1, 0, 1]),
        (["low", "high", "low"], pa.dictionary(pa.int8(), pa.string()), ["high", "low"], [1, 0, 1]),
        ([1, 0, 1], pa.dictionary(pa.int32(), pa.int64()), ["0", "1"], [1, 0, 1]),
        ([3, 1, 2], pa.int16(), ["1", "2", "3"], [2, 0, 1]),
        ([90000, 100, 100], None, ["100", "90000"], [1, 0, 0]),
        ([2**64 - 1, 100, 100], pa.uint64(), ["100", str(2**64 - 1)], [1, 0, 0]),
    ],
)
def test_every_type_of_label(tmp_path, labels, kind, classes, values):
    with_labels(tmp_path / "x.parquet", labels, kind)
    source = opened(tmp_path)
    assert source.classes == classes and [source.label(row) for row in range(3)] == values
    assert bool(source.notes) == (classes[0] not in ("0", "False", "a", "high"))
    # Validation data of fewer classes, and in another file of another width.
    with_labels(tmp_path / "val/y.parquet", labels[1:2], kind)
    assert opened(tmp_path / "val", "val", classes=classes).label(0) == values[1]


def test_files_of_other_label_types_agree(tmp_path):
    with_labels(tmp_path / "0.parquet", [1, 3], pa.int8())
    with_labels(tmp_path / "1.parquet", pa.array([2, 1]).dictionary_encode())
    with_labels(tmp_path / "2.parquet", ["3"])
    source = opened(tmp_path)
    assert source.classes == ["1", "2", "3"] and [source.label(row) for row in range(5)] == [0, 2, 1, 0, 2]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (pa.array([[1], [2, 3]]), "has several labels for an image (list<"),
        (pa.array([[1, 2]], pa.list_(pa.int8(), 2)), "has several labels for an image (fixed_size_list<"),
        (pa.array([{"a": 1}]), "its labels are struct<a: int64>; they must be whole numbers or names"),
        (pa.array([0.25, 3.0]), "numbers that are no classes (0.25)"),
        (pa.array([1, 2], pa.timestamp("s")), "are datetime; use whole numbers or names"),
        (pa.array([None, None]), "has no labels"),
        (pa.array(["a", None, None]), "row 1 of "),
        (pa.array([0.0, float("nan")]), "row 1 of "),
        (pa.array(["a", ""]), "row 1 of "),
        (pa.array(["a", None]).dictionary_encode(), "row 1 of "),
        (pa.array([-1, -1]), "has label -1"),
    ],
)
def test_labels_that_are_refused(tmp_path, labels, said):
    with_labels(tmp_path / "x.parquet", labels)
    assert said in refusal(tmp_path)


def test_a_column_twice(tmp_path):
    table = pa.Table.from_arrays([pa.array([b"x"]), pa.array([0]), pa.array([1])], names=["image", "label", "label"])
    pq.write_table(table, tmp_path / "x.parquet")
    assert "has 2 columns 'label'; rename all but one" in refusal(tmp_path)


# What is read when


class Counter:
    """Counts the row groups that are read, and their columns."""

    def __init__(self, monkeypatch) -> None:
        self.calls: list[int] = []
        read = pq.ParquetFile.read_row_group

        def counted(file, group, columns, **options):
            assert columns == ["image"]
            self.calls.append(group)
            return read(file, group, columns=columns, **options)

        monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)


def test_row_groups_are_kept_within_bounds(tmp_path, monkeypatch):
    data = [(bytes([number]) * 1000, 0) for number in range(20)]
    write(tmp_path / "x.parquet", data)
    counter = Counter(monkeypatch)
    source = opened(tmp_path)
    for index in range(20):
        assert source.read(index).image == data[index][0]
    assert counter.calls == [0, 1, 2, 3, 4]
    assert contents(source) == data and len(counter.calls) == 5
    # Two groups of 4 kB each fit, and the one that was used last stays.
    monkeypatch.setattr(module, "CACHE", 10_000)
    source, counter.calls = opened(tmp_path), []
    for index in (0, 4, 1, 8, 2, 5):
        assert source.read(index).image == data[index][0]
    assert counter.calls == [0, 1, 2, 1]
    monkeypatch.setattr(module, "CACHE", 0)
    source, counter.calls = opened(tmp_path), []
    for index in (0, 1, 4, 0):
        assert source.read(index).image == data[index][0]
    assert counter.calls == [0, 1, 0]


def test_labels_are_known_without_images(tmp_path, monkeypatch):
    write(tmp_path / "x.parquet", rows(9))
    counter = Counter(monkeypatch)
    source = opened(tmp_path)
    assert [source.label(index) for index in range(9)] == [label for _, label in rows(9)] and counter.calls == []


def test_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(module.Parquet, "most", 2)
    for number in range(5):
        write(tmp_path / f"{number}.parquet", rows(3, 3 * number))
    source = opened(tmp_path)
    assert open_below(tmp_path) == 0
    assert contents(source) == [row for number in range(5) for row in rows(3, 3 * number)]
    assert open_below(tmp_path) == 2


def test_workers_get_a_source_without_its_open_files(tmp_path):
    write(tmp_path / "x.parquet", rows(31))
    source = opened(tmp_path, shared=True)
    small = len(pickle.dumps(source))
    wanted = contents(source)
    dumped = pickle.dumps(source)
    assert len(dumped) == small  # neither files nor row groups
    copy = pickle.loads(dumped)  # noqa: S301
    assert contents(copy) == wanted and copy.classes == source.classes and copy.where(1) == source.where(1)


def test_batches_do_not_depend_on_workers_and_go_on_after_a_resume(tmp_path):
    write(tmp_path / "x.parquet", rows(7))
    write(tmp_path / "y.parquet", rows(14, 7))
    check_batches(opened(tmp_path))


# Splits


@pytest.mark.parametrize(
    "layout", ["data/{}-00000-of-00002.parquet", "{}/0000.parquet", "{}.parquet", "data/{}-00000-of-00001-0a1b2c3d.parquet"]
)
@pytest.mark.parametrize("val", ["validation", "test"])
def test_splits_by_name_and_folder(tmp_path, layout, val):
    write(tmp_path / layout.format("train"), rows(8))
    write(tmp_path / layout.format(val), rows(3, 8))
    for shared in (True, False):
        assert contents(opened(tmp_path, shared=shared)) == rows(8)
        assert contents(opened(tmp_path, "val", shared=shared)) == rows(3, 8)


def test_a_tenth_of_each_class_is_held_out(tmp_path):
    write(tmp_path / "x.parquet", rows(30))
    write(tmp_path / "y.parquet", rows(31, 30))
    train, val = (opened(tmp_path, split, shared=True) for split in ("train", "val"))
    where = [[source.where(index) for index in range(len(source))] for source in (train, val)]
    every = [f"{tmp_path}/{name}.parquet: row {row}" for name, count in (("x", 30), ("y", 31)) for row in range(count)]
    assert sorted(where[0] + where[1]) == sorted(every)
    assert np.bincount([label for _, label in contents(val)]).tolist() == [2, 2, 2]
    written = dict(zip(every, [*rows(30), *rows(31, 30)]))
    for source, places in zip((train, val), where):
        assert contents(source) == [written[place] for place in places]
    (tmp_path / "y.parquet").unlink()
    write(tmp_path / "other/z.parquet", rows(3))
    assert "none can be held out" in refusal(tmp_path / "other", "val", shared=True)


def test_files_and_patterns(tmp_path):
    for number in range(12):
        write(tmp_path / f"train-{number:05}-of-00012.parquet", rows(1, number))
    assert contents(opened(tmp_path / "train-{00003..00005}-of-00012.parquet")) == [*rows(1, 3), *rows(1, 4), *rows(1, 5)]
    assert len(opened(tmp_path / "*.parquet", "val")) == 12 and len(opened(tmp_path / "train-00001-of-00012.parquet")) == 1
    assert "no file matches" in refusal(tmp_path / "test-*.parquet")
    assert "has train but no val" in refusal(tmp_path, "val")


# Mistakes and damage


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"scan": [b"x"], "label": [0]}, "has the columns scan, label, of which none is known as the image; add ?image=NAME"),
        ({"image": [b"x"], "grade": [0]}, "has the columns image, grade, of which none is known as the label"),
        ({"img": [b"x"], "jpg": [b"x"], "label": [0]}, "of which img or jpg may be the image; add ?image=NAME to the path"),
        ({"image": ["x"], "label": [0]}, "its images are string"),
        ({"image": [{"path": "x"}], "label": [0]}, "its images are struct<path: string>"),
        ({"image": [b"x"], "label": [0.5]}, "numbers that are no classes (0.5); use task.name: regress"),
        ({"image": [b"x", b"y"], "label": [0, None]}, "row 1"),
        ({"image": [b"x"], "label": [-1]}, "has label -1"),
        ({"image": [b"x", b"x"], "label": ["1", "cat"]}, "numbers (1) and names ('cat')"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "no rows"),
    ],
)
def test_files_that_are_not_as_described(tmp_path, table, said):
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    assert said in refusal(tmp_path) and str(tmp_path) in refusal(tmp_path)


def test_class_names_that_do_not_fit(tmp_path):
    write(tmp_path / "x.parquet", rows(3), ["a", "b"])
    assert "has label 2, but labels are 0 to 1" in refusal(tmp_path)
    write(tmp_path / "x.parquet", rows(3), ["a", "b", "c"])
    write(tmp_path / "y.parquet", rows(3), ["a", "c", "b"])
    assert "names other classes than" in refusal(tmp_path)


def test_damage_in_a_parquet_file_is_named_and_in_an_image_makes_it_unreadable(tmp_path):
    path = write(tmp_path / "x.parquet", rows(9), compression="zstd")
    data = path.read_bytes()
    for content in (b"", b"PAR1", data[:-1], data[:100], data[: len(data) // 2] + bytes(len(data) // 2), b"<html>404</html>"):
        path.write_bytes(content)
        assert f"{str(path)!r} cannot be read" in refusal(path)
    # Damage within the images is found when they are read.
    start = pq.ParquetFile(write(path, rows(9), compression="zstd")).metadata.row_group(1).column(1).data_page_offset
    path.write_bytes(data[:start] + b"\xff" * 300 + data[start + 300 :])
    source = opened(path)
    assert source.read(0).image == rows(9)[0][0]
    with pytest.raises(UnreadableSample) as caught:
        source.read(5)
    assert "\n" not in str(caught.value)


def test_a_file_that_changes(tmp_path):
    path = write(tmp_path / "x.parquet", rows(9))
    source = opened(path)
    write(path, rows(12))
    with pytest.raises(UnreadableSample, match="has changed"):
        source.read(0)
    path.unlink()
    with pytest.raises(UnreadableSample, match="No such file"):
        source.read(0)


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install 'bigvision[parquet]'" in refusal(tmp_path)


# Columns by other names

FEATURES = {
    "cifar100": {"img": "Image", "fine_label": "ClassLabel", "coarse_label": "ClassLabel"},
    "food": {"picture_of_it": "Image", "dish": "ClassLabel", "price": "Value"},
    "plain": {"jpg": None, "cls": None},
    "ours": {"image": "Image", "mask": "Image", "label": "Value", "kind": "ClassLabel"},
}


def write_named(path: Path, features: dict[str, str | None]) -> Path:
    """Nine rows; each column of labels has other classes."""
    columns, noted = {}, {}
    for place, (name, kind) in enumerate(features.items()):
        if kind == "Image" or name == "jpg":
            columns[name] = [{"bytes": image, "path": None} for image, _ in rows(9, seed=place)]
        else:
            columns[name] = [row % (place + 1) for row in range(9)]
        names = {"names": [f"{name} {number}" for number in range(place + 1)]} if kind == "ClassLabel" else {}
        noted[name] = {"_type": kind} | names
    table = pa.table(columns)
    if None not in features.values():
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": noted}})})
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize(
    ("name", "asked", "image", "label"),
    [
        ("cifar100", "?label=fine_label", 0, 1),
        ("cifar100", "?image=img&label=coarse_label", 0, 2),
        ("food", "", 0, 1),
        ("food", "?label=price", 0, 2),
        ("plain", "", 0, 1),
        ("ours", "", 0, 2),
        ("ours", "?image=mask&label=kind", 1, 3),
    ],
)
def test_columns_by_other_names(tmp_path, name, asked, image, label):
    write_named(tmp_path / "x.parquet", FEATURES[name])
    for path in (tmp_path, tmp_path / "x.parquet", tmp_path / "?.parquet"):
        source = opened(f"{path}{asked}")
        assert contents(source) == [(rows(9, seed=image)[row][0], row % (label + 1)) for row in range(9)]
        column, kind = list(FEATURES[name].items())[label]
        assert source.classes == [f"{column} {n}" if kind == "ClassLabel" else str(n) for n in range(label + 1)]


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("cifar100", "", "has the columns img, fine_label, coarse_label, of which fine_label or coarse_label may be the label"),
        ("cifar100", "?label=label", "has no column 'label' but img, fine_label, coarse_label; correct ?label=label"),
        ("cifar100", "?labels=label", "unknown 'labels' in ?labels=label; did you mean"),
        ("cifar100", "?label=", "label in ?label= must be the name of one column"),
        ("cifar100", "?label=a&label=b", "label in ?label=a&label=b must be the name of one column"),
        ("food", "?label=dish&image=price", "its images are int64"),
    ],
)
def test_columns_that_are_not_clear(tmp_path, name, asked, said):
    write_named(tmp_path / "x.parquet", FEATURES[name])
    assert said in refusal(f"{tmp_path}{asked}")


def test_files_with_other_columns(tmp_path):
    for number, name in enumerate(("food", "plain")):
        write_named(tmp_path / f"{number}.parquet", FEATURES[name])
    said = "1.parquet' has its images and labels in jpg and cls, "
    assert said in refusal(tmp_path) and "0.parquet' in picture_of_it and dish; open one of them" in refusal(tmp_path)


def test_validation_data_of_the_same_columns_is_held_out(tmp_path):
    write_named(tmp_path / "x.parquet", FEATURES["cifar100"])
    train, val = (opened(f"{tmp_path}?label=fine_label", split, shared=True) for split in ("train", "val"))
    assert len(train) + len(val) == 9 and len(val) == 2


def test_word_of_files_that_take_long(tmp_path, monkeypatch, capsys):
    for number in range(3):
        write(tmp_path / f"{number}.parquet", rows(3))
    monkeypatch.setattr(workers, "EVERY", 0.01)
    slow = module._row_file
    monkeypatch.setattr(module, "_row_file", lambda *of: time.sleep(0.2) or slow(*of))
    opened(tmp_path, first=True)
    assert re.search(r"^data\.train: Parquet files read: [0-2] of 3$", capsys.readouterr().err, re.MULTILINE)
    opened(tmp_path)
    assert capsys.readouterr().err == ""
