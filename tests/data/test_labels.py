"""What labels of every form become: classes, a number for each sample, notes, or one line that says why not."""

from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bigvision.data import MapStyle, open_source
from bigvision.data.labels import coded, label_samples, read_classes
from bigvision.errors import UserError

NAN = float("nan")


def labelled(values, known=None, folders=()):
    return label_samples(coded(values), known, folders, key="some.key", where="'x'", at=lambda sample: f"sample {sample}")


def refusal(values, known=None) -> str:
    with pytest.raises(UserError) as caught:
        labelled(values, known)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300 and message.startswith("some.key: ")
    return message


@pytest.mark.parametrize(
    ("values", "classes", "labels"),
    [
        # Dense from 0 on, as they are.
        ([0, 2, 1, 2], ["0", "1", "2"], [0, 2, 1, 2]),
        (np.array([1, 0], dtype=np.uint8), ["0", "1"], [1, 0]),
        ([0.0, 1.0], ["0", "1"], [0, 1]),
        ([Decimal("1.0"), Decimal(0)], ["0", "1"], [1, 0]),
        (["1", "0", "10", *map(str, range(10))], [str(label) for label in range(11)], [1, 0, 10, *range(10)]),
        (torch.tensor([1, 0]).numpy(), ["0", "1"], [1, 0]),
        ([torch.tensor(1), np.int8(0)], ["0", "1"], [1, 0]),
        # Truth values.
        ([True, False], ["False", "True"], [1, 0]),
        (np.array([True, True]), ["False", "True"], [1, 1]),
        # Names.
        (["dog", "Cat", "ape"], ["Cat", "ape", "dog"], [2, 0, 1]),
        ([b"dog", b"caf\xc3\xa9"], ["café", "dog"], [1, 0]),
        (np.array(["b", "a"]), ["a", "b"], [1, 0]),
        (np.array([b"b", b"a"]), ["a", "b"], [1, 0]),
    ],
)
def test_forms_that_need_no_word(values, classes, labels):
    found = labelled(values)
    assert found.classes == classes and found.values.tolist() == labels and found.values.dtype == np.int64
    assert found.notes == ()


@pytest.mark.parametrize(
    ("values", "classes", "labels", "note"),
    [
        ([1, 3, 2], ["1", "2", "3"], [0, 2, 1], "labels 1 to 3 become 0 to 2"),
        (np.array([5, 4], dtype=np.uint64), ["4", "5"], [1, 0], "labels 4 to 5 become 0 to 1"),
        (
            [90000, 100, 90000],
            ["100", "90000"],
            [1, 0, 1],
            "2 labels from 100 to 90000 become 0 to 1 in their order: 100 is 0",
        ),
        ([2**64 - 1, 0], ["0", str(2**64 - 1)], [1, 0], "2 labels from 0 to 18446744073709551615 become 0 to 1"),
        (["10", "9"], ["9", "10"], [1, 0], "labels 9 to 10 become"),
        ([0, 1, 3], ["0", "1", "2", "3"], [0, 1, 3], "no sample has label 2, which stays a class of its own"),
        (["dog", "Dog "], ["Dog ", "dog"], [1, 0], "differ only in case, spaces or accents"),
        (["cafe\u0301", "caf\u00e9"], ["cafe\u0301", "caf\u00e9"], [0, 1], "differ only in"),
    ],
)
def test_what_is_mapped_is_noted(values, classes, labels, note):
    found = labelled(values)
    assert found.classes == classes and found.values.tolist() == labels
    assert len(found.notes) == 1 and note in found.notes[0] and "\n" not in found.notes[0]
    # Validation data follows: the same numbers have the same classes, also where there are fewer of them.
    follows = labelled(values[:1], found.classes)
    assert follows.classes == classes and follows.values.tolist() == labels[:1] and follows.notes == ()


@pytest.mark.parametrize(
    ("values", "known", "labels"),
    [
        ([2, 0], ["a", "b", "c"], [2, 0]),
        (["c", "a"], ["a", "b", "c"], [2, 0]),
        ([300], ["2", "300"], [1]),
        ([True], ["no", "yes"], [1]),
        ([True, False], ["False", "True"], [1, 0]),
        ([1.0], ["0", "1"], [1]),
    ],
)
def test_known_classes_decide(values, known, labels):
    assert labelled(values, known).values.tolist() == labels and labelled(values, known).classes == known


def test_numbers_that_may_count_from_one():
    found = labelled([2, 1], ["tench", "goldfish", "shark"])
    assert found.values.tolist() == [2, 1] and "no sample has label 0, which is 'tench'" in found.notes[0]
    assert labelled([2], ["tench", "goldfish", "shark"]).notes == ()
    own = MapStyle([("x.jpg", 1), ("x.jpg", 2)], ["a", "b", "c"])
    assert own.notes == ()  # labels are not listed
    listed = SimpleNamespace(targets=[1, 2], classes=["a", "b", "c"])
    listed = type("Own", (list,), vars(listed))([("x.jpg", 1), ("x.jpg", 2)])
    assert "no sample has label 0, which is 'a'" in MapStyle(listed).notes[0]


@pytest.mark.parametrize(
    ("values", "known", "labels"),
    [
        ([0, 2], ["c", "a", "b"], [1, 0]),
        ([2], ["c", "a", "b", "d"], [0]),
        (["a"], ["c", "a", "b"], [1]),
    ],
)
def test_numbers_follow_by_the_names_of_their_own_class_file(tmp_path, values, known, labels):
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    found = labelled(values, known, folders=[tmp_path])
    assert found.classes == known and found.values.tolist() == labels
    with pytest.raises(UserError, match=r"class 'c' in 'x', named by .*classes.txt', is not one of the 2 classes"):
        labelled([2], ["a", "b"], folders=[tmp_path])
    assert labelled([0], ["a", "z"], folders=[tmp_path]).values.tolist() == [0]


def test_numbers_for_classes_whose_names_are_other_numbers():
    found = labelled([0, 1], ["1", "0"])
    assert found.values.tolist() == [0, 1] and "label 0 is '1'" in found.notes[0]


@pytest.mark.parametrize(
    ("values", "known", "said"),
    [
        ([0, 3], ["a", "b", "c"], "has label 3, but labels are 0 to 2"),
        ([1, 2, 3], ["a", "b", "c"], "labels count from 0: subtract 1, write names, or leave out the list of classes"),
        ([3, 2], ["a", "b", "c"], "labels count from 0: subtract 1"),
        ([101], ["100", "90000"], "class '101' in 'x' is not one of the 2 classes"),
        ([0], ["1", "2"], "class '0' in 'x' is not one of"),
        (["fox"], ["cat"], "class 'fox' in 'x' is not one of"),
        ([0, -1], None, "has label -1, but labels are 0 or more; remove or label"),
        ([0, -100], ["a"], "has label -100"),
        (["-1", "4"], None, "has label -1"),
        ([0, None, None], None, "sample 1 has no label, like 1 more; remove or label it"),
        ([0.0, NAN, 2.0], None, "sample 1 has no label; remove"),
        (["a", " "], None, "sample 1 has no label"),
        ([None, None], None, "has no labels; add labels"),
        (np.array([NAN, NAN]), None, "has no labels"),
        ([0.5, 1.0], None, "has numbers that are no classes (0.5); use task.name: regress"),
        (np.array([np.inf]), None, "numbers that are no classes (inf)"),
        ([Decimal("0.1")], None, "numbers that are no classes (0.1)"),
        ([(1, 2), (0,)], None, "has several labels for an image (1, 2); use task.name: multilabel"),
        (["1", "cat"], None, "has numbers (1) and names ('cat') as labels; use one of them"),
        ([b"\xff"], None, "is no text in UTF-8"),
        ([1j], None, "the labels of 'x' are complex"),
    ],
)
def test_labels_that_are_no_classes_are_refused_with_the_reason(values, known, said):
    assert said in refusal(values, known)


def test_sparse_labels_allocate_nothing_by_their_size():
    found = labelled(np.array([10**15, 3, 10**15]))
    assert found.classes == ["3", str(10**15)] and found.values.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "content",
    [
        b"elk\r\ncat\r\n\r\n dog \r\n",
        b"\xef\xbb\xbfelk\ncat\ndog",
        "elk\r\ncat\r\ndog\r\n".encode("utf-16"),
        b"elk\rcat\rdog\r",
        b'\xef\xbb\xbf["elk", "cat", "dog"]',
        b'{"cat": 1, "dog": 2, "elk": 0}',
    ],
)
def test_class_files_as_others_write_them(tmp_path, content):
    (tmp_path / "classes.txt").write_bytes(content)
    assert read_classes(str(tmp_path / "classes.txt"), "some.key") == ["elk", "cat", "dog"]
    found = labelled(["dog", "elk"], folders=[tmp_path])
    assert found.classes == ["elk", "cat", "dog"] and found.values.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"cat\r\ncat \r\n", "must name each class once, not 'cat' again"),
        (b"\xef\xbb\xbf\r\n\r\n", "must name each class once"),
        (b"caf\xe9\n", "is no list of names"),
        (b'{"cat": 0, "dog": 0}', "is no list of names"),
        (b'{"cat": 1, "dog": 2}', "is no list of names"),
    ],
)
def test_class_files_that_are_refused(tmp_path, content, said):
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_classes(str(tmp_path / "classes.txt"), "some.key")


# Through a source


def arrays(folder, labels):
    folder.mkdir()
    np.save(folder / "images.npy", np.zeros((len(labels), 5, 5), dtype=np.uint8))
    np.save(folder / "labels.npy", labels, allow_pickle=False)
    return f"arrays:{folder}"


@pytest.mark.parametrize(
    ("labels", "classes", "values"),
    [
        (np.array([1, 2, 3]), ["1", "2", "3"], [0, 1, 2]),
        (np.array([[2.0], [0.0], [1.0]]), ["0", "1", "2"], [2, 0, 1]),
        (np.array(["b", "a", "b"]), ["a", "b"], [1, 0, 1]),
        (np.array([True, False, True]), ["False", "True"], [1, 0, 1]),
        (np.eye(4, dtype=np.uint8)[[3, 0, 3]], ["0", "1", "2", "3"], [3, 0, 3]),
    ],
)
def test_labels_of_arrays(tmp_path, labels, classes, values):
    source = open_source(arrays(tmp_path / "x", labels), "train", shared=False)
    assert source.classes == classes and [source.label(index) for index in range(3)] == values
    assert bool(source.notes) == (classes == ["1", "2", "3"])
    assert open_source(arrays(tmp_path / "val", labels[:1]), "val", shared=False, classes=classes).label(0) == values[0]


def test_arrays_that_are_refused(tmp_path):
    for number, (labels, said) in enumerate(
        [
            (np.array([0.0, NAN]), "sample 1 of '.*' has no label"),
            (np.array([[1, 1], [0, 1]]), r"several labels for an image \(int64 \(2, 2\), not one-hot\)"),
            (np.array(["2020-01-01", "2020-01-02"], dtype="datetime64[D]"), "are datetime64.* they must be whole numbers"),
            (np.zeros((2, 2, 2)), r"are float64 \(2, 2, 2\)"),
        ]
    ):
        with pytest.raises(UserError, match=said):
            open_source(arrays(tmp_path / str(number), labels), "train", shared=False)
    np.savez(tmp_path / "x.npz", images=np.zeros((1, 4, 4), np.uint8), labels=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match=r"cannot be read \(Object arrays cannot be loaded.*give .npy or .npz files of numbers"):
        open_source(f"arrays:{tmp_path}/x.npz", "train", shared=False)
