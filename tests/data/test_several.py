"""Several labels and numbers for each image, in every format that has them, and what is wrong with them in one line."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from bigvision.data import MapStyle, open_source
from bigvision.data.sources import open_both
from bigvision.errors import UserError

LABELS = [["cat"], ["dog", "cat"], [], ["emu", "dog"]]
HOT = [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 1]]
"""Of cat, dog, emu."""


def image(number: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(file, "png")
    return file.getvalue()


def csv(folder: Path, text: str, name: str = "list.csv") -> str:
    for number in range(4):
        (folder / f"{number}.png").write_bytes(image(number))
    (folder / name).write_text(text)
    return f"{name.rpartition('.')[2]}:{folder / name}"


def parquet(folder: Path, columns: dict[str, Any]) -> str:
    count = len(next(iter(columns.values())))
    pq.write_table(pa.table({"image": [image(number) for number in range(count)], **columns}), folder / "data.parquet")
    return f"parquet:{folder}"


def targets(spec: Any, target: Any, **keys: Any) -> tuple[list[str], list[Any]]:
    """The classes, and the target of each sample; read and listed ones are the same."""
    source = open_source(spec, "train", target=target, shared=False, **keys)
    found = [source.label(index) for index in range(len(source))]
    for index, one in enumerate(found):
        np.testing.assert_array_equal(source.read(index).target, one)
    return source.classes, [one.tolist() for one in found]


@pytest.mark.parametrize(
    ("table", "asked"),
    [
        ("path,tags\n0.png,cat\n1.png,dog|cat\n2.png,\n3.png,emu|dog\n", ""),
        ("path;label\n0.png;cat\n1.png;dog,cat\n2.png;\n3.png;emu,dog\n", ""),
        ("path,what\n0.png,cat\n1.png,dog / cat\n2.png,\n3.png,emu/dog\n", "?label=what&separator=/"),
        ("path,label\n0.png,cat\n1.png,dog\n1.png,cat\n2.png,\n3.png,emu\n3.png,dog\n", ""),
        ("path,cat,dog,emu\n0.png,1,0,0\n1.png,1,1,0\n2.png,0,0,0\n3.png,0,1,1\n", ""),
        (
            "path,cat,dog,emu\n0.png,True,False,False\n1.png,True,True,False\n2.png,False,False,False\n3.png,False,True,True\n",
            "",
        ),
        ("path,id,cat,dog,emu\n0.png,7,1,0,0\n1.png,8,1.0,1,0\n2.png,9,0,0,0\n3.png,9,0,1,1\n", "?labels=cat,dog,emu"),
        ("path,id,emu,cat,dog\n0.png,7,0,1,0\n1.png,8,0,1,1\n2.png,9,0,0,0\n3.png,9,1,0,1\n", "?label=cat,dog,emu"),
    ],
)
def test_tables_with_several_labels(tmp_path: Path, table: str, asked: str) -> None:
    assert targets(csv(tmp_path, table) + asked, "labels") == (["cat", "dog", "emu"], HOT)
    tabs = csv(tmp_path, table.replace(",", "\t").replace(";", "\t"), "list.tsv")
    if ";" not in table:
        assert targets(tabs + asked, "labels") == (["cat", "dog", "emu"], HOT)


@pytest.mark.parametrize(
    ("columns", "asked"),
    [
        ({"labels": LABELS}, ""),
        ({"labels": [[0], [1, 0], None, [2, 1]], "other": [1, 2, 3, 4]}, "?label=labels"),
        ({"tags": ["cat", "dog;cat", None, "emu;dog"]}, "?label=tags&separator=;"),
        ({"cat": [1, 1, 0, 0], "dog": [False, True, False, True], "emu": [0.0, 0.0, 0.0, 1.0]}, "?labels=cat,dog,emu"),
    ],
)
def test_parquet_with_several_labels(tmp_path: Path, columns: dict[str, Any], asked: str) -> None:
    classes, found = targets(parquet(tmp_path, columns) + asked, "labels")
    assert found == HOT and classes == (["0", "1", "2"] if "other" in columns else ["cat", "dog", "emu"])


def test_hugging_face_lists_of_class_labels(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "labels": datasets.Sequence(datasets.ClassLabel(names=["emu", "cat", "dog"]))}
    )
    rows = {"image": [{"bytes": image(), "path": None}] * 4, "labels": LABELS}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "set")
    assert targets(f"hf:{tmp_path / 'set'}", "labels")[0] == ["emu", "cat", "dog"]
    # By name they follow the training data's.
    assert targets(f"hf:{tmp_path / 'set'}", "labels", classes=["cat", "dog", "emu"]) == (["cat", "dog", "emu"], HOT)


@pytest.mark.parametrize(
    ("table", "asked", "names", "values"),
    [
        ("path,age\n0.png,1.5\n1.png,-2\n2.png,3e1\n3.png,4\n", "", ["age"], [[1.5], [-2], [30], [4]]),
        ("path;age\n0.png;1,5\n1.png;-2\n2.png;3,25\n3.png;4\n", "", ["age"], [[1.5], [-2], [3.25], [4]]),
        ("path,x,y\n0.png,1,2\n1.png,3,4\n", "", ["x", "y"], [[1, 2], [3, 4]]),
        ("path,name,x,y\n0.png,a,1,2\n1.png,b,3,4\n", "?labels=y,x", ["y", "x"], [[2, 1], [4, 3]]),
    ],
)
def test_tables_of_numbers(tmp_path: Path, table: str, asked: str, names: list[str], values: list[list[float]]) -> None:
    assert targets(csv(tmp_path, table) + asked, "numbers") == (names, values)


def test_numbers_of_parquet_and_arrays(tmp_path: Path) -> None:
    values = [[1.0, 2.5], [3.0, 4.5]]
    (tmp_path / "a").mkdir()
    spec = parquet(tmp_path / "a", {"x": [1, 3], "y": [2.5, 4.5], "xy": values})
    assert targets(f"{spec}?labels=x,y", "numbers") == (["x", "y"], values)
    assert targets(f"{spec}?label=y", "numbers") == (["y"], [[2.5], [4.5]])
    assert targets(f"{spec}?label=xy", "numbers") == (["0", "1"], values)
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "n.npz", images=pixels, labels=np.array(values, np.float32))
    assert targets(f"arrays:{tmp_path / 'n.npz'}", "numbers") == (["0", "1"], values)
    (tmp_path / "classes.txt").write_text("x\ny\n")
    assert targets(f"arrays:{tmp_path / 'n.npz'}", "numbers")[0] == ["x", "y"]


def test_arrays_of_several_labels_and_of_shares(tmp_path: Path) -> None:
    np.savez(tmp_path / "n.npz", images=np.zeros((4, 4, 4), np.uint8), labels=np.array(HOT, np.int64))
    spec = f"arrays:{tmp_path / 'n.npz'}"
    assert targets(spec, "labels") == (["0", "1", "2"], HOT)
    shares = np.array([[0.5, 0.5, 0], [1, 0, 0], [0.25, 0.25, 0.5], [0, 1, 0]], np.float32)
    np.savez(tmp_path / "n.npz", images=np.zeros((4, 4, 4), np.uint8), labels=shares)
    assert targets(spec, "label") == (["0", "1", "2"], shares.tolist())
    train, val = open_both(spec, spec, target="label")
    assert len(train) + len(val) == 4 and train.label(0).dtype == np.float32


class Given:
    """A dataset of the user's."""

    def __init__(self, targets: list[Any], classes: list[str] | None = None) -> None:
        self.targets_ = targets
        if classes:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.targets_)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        return torch.zeros(3, 4, 4, dtype=torch.uint8), self.targets_[index]


@pytest.mark.parametrize(
    ("given", "classes"),
    [
        (LABELS, ["cat", "dog", "emu"]),
        ([[0], (1, 0), [], {2, 1}], ["cat", "dog", "emu"]),
        ([np.array(one) for one in HOT], None),
        ([torch.tensor(one, dtype=torch.bool) for one in HOT], ["cat", "dog", "emu"]),
        ([[float(one) for one in some] for some in HOT], ["cat", "dog", "emu"]),
    ],
)
def test_datasets_from_python_with_several_labels(given: list[Any], classes: list[str] | None) -> None:
    found = targets(Given(given, classes), "labels")
    assert found == (classes or ["0", "1", "2"], HOT)
    if classes:
        assert targets(Subset(Given(given, classes), [3, 1]), "labels") == (classes, [HOT[3], HOT[1]])


def test_datasets_from_python_with_numbers_and_shares() -> None:
    assert targets(Given([1, 2.5]), "numbers") == (["0"], [[1.0], [2.5]])
    assert targets(Given([torch.tensor([1.0, 2.0])], ["x", "y"]), "numbers") == (["x", "y"], [[1.0, 2.0]])
    assert targets(Given([np.array([0.25, 0.75])], ["a", "b"]), "label") == (["a", "b"], [[0.25, 0.75]])


ONE = "path,label\n0.png,{}\n1.png,2\n"


@pytest.mark.parametrize(
    ("table", "asked", "target", "said"),
    [
        (ONE.format("abc"), "", "numbers", "line 2 of .* has 'abc' in 'label', where a number is needed; correct it"),
        (ONE.format(""), "", "numbers", "line 2 of .* has no number in 'label'; remove"),
        (ONE.format("nan"), "", "numbers", "line 2 of .* has no number in 'label'"),
        (ONE.format("inf"), "", "numbers", "line 2 of .* has inf in 'label'"),
        (ONE.format("1e999"), "", "numbers", "line 2 of .* has inf in 'label'"),
        ("path,a,b\n0.png,1,2\n1.png,0,1\n", "?labels=a,b", "labels", "line 2 of .* has 2 in 'b', a column of 0 and 1"),
        ("path,a,b\n0.png,1,x\n1.png,0,1\n", "?labels=a,b", "labels", "line 2 of .* has 'x' in 'b', where a number is needed"),
        ("path,a,b\n0.png,1,\n1.png,0,1\n", "?labels=a,b", "labels", "line 2 of .* has no value in 'b'"),
        ("path,a,b\n0.png,1,0\n1.png,0,1\n", "?labels=a,c", "labels", "has no column 'c' but 'path', 'a', 'b'"),
        ("path,a,b\n0.png,1,0\n1.png,0,1\n", "", "label", r"several labels for an image \(a, b\); use task.name: multilabel"),
        (
            "path,a,b\n0.png,1,x\n1.png,0,y\n",
            "",
            "labels",
            "none is known as the label; add .label=COLUMN or .labels=COLUMN,COLUMN",
        ),
        (
            "path,a,b\n0.png,1,x\n1.png,0,y\n",
            "",
            "numbers",
            "none is known as the label; add .label=COLUMN or .labels=COLUMN,COLUMN",
        ),
        ("path,tags\n0.png,\n1.png,\n", "", "labels", "no sample of .* has a label"),
        (ONE.format("0.5"), "", "label", r"numbers that are no classes \(0.5\); use task.name: regress"),
        (ONE.format("a"), "?separator=;", "label", "several labels for an image .*; use task.name: multilabel"),
    ],
)
def test_tables_that_do_not_have_it(tmp_path: Path, table: str, asked: str, target: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"^data.train: .*{said}") as error:
        targets(csv(tmp_path, table) + asked, target)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("columns", "asked", "target", "said"),
    [
        ({"label": [0.5, None]}, "", "numbers", "row 1 of .* has no number in 'label'"),
        ({"label": ["a", "b"]}, "", "numbers", "'label' of string; numbers are needed"),
        ({"label": [[1.0], [1.0, 2.0]]}, "", "numbers", "'label' has lists of different lengths"),
        ({"label": [[1.0, 2.0], [1.0, None]]}, "", "numbers", "row 1 of .* has no number in '1'"),
        ({"a": [0, 1], "b": [3, 1]}, "?labels=a,b", "labels", "row 0 of .* has 3 in 'b', a column of 0 and 1"),
        ({"a": [0, 1], "b": [3, 1]}, "?labels=a,c", "labels", "has no column 'c' but image, a, b"),
        ({"label": [["a"], [None]]}, "", "labels", "has no label"),
        ({"label": [[0.5], [1.0]]}, "", "labels", r"numbers that are no classes \(0.5\)"),
        ({"label": [["a"], ["b"]]}, "", "label", "several labels for an image .*; use task.name: multilabel"),
    ],
)
def test_parquet_that_does_not_have_it(tmp_path: Path, columns: dict[str, Any], asked: str, target: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"^data.train: .*{said}") as error:
        targets(parquet(tmp_path, columns) + asked, target)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "target", "said"),
    [
        (Given([["cat"], ["dog"]]), "labels", "it has neither classes nor targets; give MapStyle its classes"),
        (Given([["cat", "ant"]], ["cat"]), "labels", "the label of sample 0 is 'ant', which is none of the 1 classes"),
        (Given([[3]], ["cat"]), "labels", "the label of sample 0 is 3, but there are 1 classes"),
        (Given([torch.tensor([1, 0])], ["cat"]), "labels", r"int64 \(2,\); give a list of classes, or 0 and 1 for each of 1"),
        (Given([torch.tensor([2.0])], ["cat"]), "labels", r"float32 \(1,\); give a list of classes, or 0 and 1"),
        (Given(["cat"], ["cat"]), "labels", "are str; give a list of classes"),
        (Given([0], ["cat"]), "labels", "are int; give a list of classes"),
        (Given([float("nan")]), "numbers", r"sample 0 has \[nan\] as its numbers"),
        (Given(["old"], ["age"]), "numbers", r"the target of sample 0 is str; give 1 numbers \(age\)"),
        (Given([[1, 2]], ["age"]), "numbers", r"the target of sample 0 is list of 2; give 1 numbers \(age\)"),
        (Given([np.array([0.5, 0.7])], ["a", "b"]), "label", "adds up to 1.2; shares of classes make 1"),
        (MapStyle(Given([0], ["cat"])), "labels", "the task needs labels: give the dataset itself, or MapStyle"),
        ("digits", "labels", "digits does not give several labels the task needs: use csv, tsv, parquet, hf or arrays"),
        ("digits", "numbers", "digits does not give numbers the task needs: use csv, tsv, parquet, hf or arrays"),
    ],
)
def test_other_data_that_does_not_have_it(given: Any, target: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"^data.train: .*{said}") as error:
        open_source(given, "train", target=target)
    assert "\n" not in str(error.value)


def test_validation_follows_the_names_of_the_training_data(tmp_path: Path) -> None:
    train = csv(tmp_path, "path,cat,dog\n0.png,1,0\n1.png,0,1\n", "train.csv")
    val = csv(tmp_path, "path,dog,cat\n2.png,1,0\n3.png,0,1\n", "val.csv")
    _, source = open_both(train, val, target="labels")
    assert source.classes == ["cat", "dog"] and source.label(0).tolist() == [0, 1]
    other = csv(tmp_path, "path,dog,emu\n2.png,1,0\n3.png,0,1\n", "other.csv")
    with pytest.raises(UserError, match=r"data.val: .* has the columns dog, emu, but the training data has cat, dog"):
        open_both(train, other, target="labels")
