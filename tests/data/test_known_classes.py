"""Every source alike: validation data follows the classes of the training data, or of a checkpoint, also where it has few of
them in another order; what is not one of them, or has no label, is refused with its name."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bigvision.data import open_both, open_source
from bigvision.data.sources import open_validation
from bigvision.errors import UserError

KNOWN = ["elk", "cat", "dog", "ape"]


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def folder(root: Path, labels: Sequence[Any]) -> str:
    for number, label in enumerate(labels):
        (root / str(label)).mkdir(exist_ok=True)
        (root / str(label) / f"{number}.png").write_bytes(png())
    return f"imagefolder:{root}"


def table(root: Path, labels: Sequence[Any]) -> str:
    for number in range(len(labels)):
        (root / f"{number}.png").write_bytes(png())
    rows = [f"{number}.png,{'' if label is None else label}" for number, label in enumerate(labels)]
    (root / "list.csv").write_text("\n".join(["path,label", *rows]))
    return f"csv:{root}/list.csv"


def shards(root: Path, labels: Sequence[Any]) -> str:
    with tarfile.open(root / "0.tar", "w") as tar:
        for number, label in enumerate(labels):
            members = {"png": png()} | ({} if label is None else {"cls": str(label).encode()})
            for kind, content in members.items():
                entry = tarfile.TarInfo(f"{number}.{kind}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return f"webdataset:{root}"


def arrow(labels: Sequence[Any], names: Sequence[str] | None = None) -> Any:
    pyarrow = pytest.importorskip("pyarrow")
    columns = {"image": [{"bytes": png(), "path": None}] * len(labels), "label": list(labels)}
    if names is None:
        return pyarrow.table(columns)
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    columns["label"] = [None if label is None else names.index(label) for label in labels]
    return pyarrow.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def parquet(root: Path, labels: Sequence[Any], names: Sequence[str] | None = None) -> str:
    table = arrow(labels, names)
    __import__("pyarrow.parquet").parquet.write_table(table, root / "0.parquet")
    return f"parquet:{root}"


def saved(root: Path, labels: Sequence[Any], names: Sequence[str] | None = None) -> str:
    import pyarrow

    table = arrow(labels, names)
    with pyarrow.OSFile(str(root / "data.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    (root / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return f"hf:{root}"


def arrays(root: Path, labels: Sequence[Any]) -> str:
    np.save(root / "images.npy", np.zeros((len(labels), 8, 8), np.uint8))
    np.save(root / "labels.npy", np.array(["" if label is None else label for label in labels]))
    return f"arrays:{root}"


MAKERS: dict[str, Any] = {
    "folder": folder, "table": table, "shards": shards, "parquet": parquet, "saved": saved, "arrays": arrays,
    "parquet with names": lambda root, labels: parquet(root, labels, ["ape", "fox", "dog", "cat"]),
    "saved with names": lambda root, labels: saved(root, labels, ["ape", "fox", "dog", "cat"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", MAKERS)
def test_some_of_the_classes_in_another_order(tmp_path: Path, kind: str) -> None:
    spec = MAKERS[kind](tmp_path, ["ape", "cat", "ape"])
    for val in (
        open_source(spec, "val", classes=KNOWN, shared=False),
        open_validation("imagefolder:gone", spec, classes=KNOWN),  # as an evaluation of a checkpoint opens it
    ):
        found = sorted(val.label(index) for index in range(3))
        assert val.classes == KNOWN and found == [1, 3, 3] and found == sorted(val.read(index).label for index in range(3))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_class_that_is_not_known(tmp_path: Path, kind: str) -> None:
    spec = MAKERS[kind](tmp_path, ["fox", "cat"])
    with pytest.raises(UserError, match=r"^data\.val: class 'fox' in .* is not ") as caught:
        open_validation("imagefolder:gone", spec, classes=KNOWN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "folder" and "names" not in kind])
def test_numbers_are_places(tmp_path: Path, kind: str) -> None:
    val = open_validation("imagefolder:gone", MAKERS[kind](tmp_path, [3, 1, 3]), classes=KNOWN)
    assert val.classes == KNOWN and [val.label(index) for index in range(3)] == [3, 1, 3]


@pytest.mark.parametrize("kind", ["shards", "parquet", "table", "arrays"])
def test_numbers_are_places_in_the_class_file_of_their_own_split(tmp_path: Path, kind: str) -> None:
    for name, labels, classes in (("train", [0, 1, 2], "x y z"), ("val", [0, 0, 1], "z x y")):
        (tmp_path / name).mkdir()
        spec = MAKERS[kind](tmp_path / name, labels)
        (tmp_path / name / "classes.txt").write_text("\n".join(classes.split()))
    spec = f"{spec.partition(':')[0]}:{tmp_path}"
    train, val = open_both(spec, spec)
    assert train.classes == val.classes == ["x", "y", "z"]
    assert [val.label(index) for index in range(3)] == [2, 2, 0]


SPLITS = [("train", "dev"), ("Train", "Valid"), ("training", "testing"), ("train", "test"), ("trainval", "evaluation")]


@pytest.mark.parametrize("names", SPLITS)
@pytest.mark.parametrize("kind", ["shards", "parquet", "saved", "arrays", "npz", "object"])
def test_no_split_is_passed_over_for_its_spelling(tmp_path: Path, kind: str, names: tuple[str, str]) -> None:
    """Else a tenth of the training data would be held out in its place."""
    counts = dict(zip(names, (20, 5)))
    spec: Any = f"{ {'shards': 'webdataset', 'saved': 'hf', 'npz': 'arrays'}.get(kind, kind) }:{tmp_path}"
    if kind == "npz":
        parts = {f"{name}_images": np.zeros((count, 4, 4), np.uint8) for name, count in counts.items()}
        labels = {f"{name}_labels": np.arange(count) % 2 for name, count in counts.items()}
        np.savez(tmp_path / "x.npz", **parts, **labels)  # pyright: ignore[reportArgumentType]
        spec = f"arrays:{tmp_path}/x.npz"
    elif kind == "object":
        spec = {name: [(np.zeros((4, 4), np.uint8), n % 2) for n in range(count)] for name, count in counts.items()}
        spec = {name: type("Own", (list,), {"classes": ["a", "b"]})(items) for name, items in spec.items()}
    else:
        for name, count in counts.items():
            (tmp_path / name).mkdir()
            MAKERS[kind](tmp_path / name, ["a", "b"] * (count // 2) + ["a"] * (count % 2))
        if kind == "saved":
            (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": list(names)}))
    assert [len(source) for source in open_both(spec, spec)] == [20, 5]


MISSING = {"table": r"line 3 of '.*list\.csv'", "shards": "sample 1 ", "parquet": "row 1 of '.*0.parquet'",
           "saved": "row 1 of '.*data.arrow'", "arrays": "sample 1 of '", "parquet with names": "row 1 of",
           "saved with names": "row 1 of"}  # fmt: skip


@pytest.mark.parametrize("kind", MISSING)
def test_a_sample_without_a_label_is_named(tmp_path: Path, kind: str) -> None:
    spec = MAKERS[kind](tmp_path, ["cat", None, "cat"])
    for split, options in (("train", {}), ("val", {"classes": KNOWN})):
        with pytest.raises(UserError, match=f"^data.{split}: .*{MISSING[kind]}.*has no label") as caught:
            open_source(spec, split, shared=False, **options)
        assert "\n" not in str(caught.value)
