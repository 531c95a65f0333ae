"""Hugging Face's datasets: folders of `save_to_disk`, and objects of the package `datasets` where it is installed."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from test_shards import check_batches, jpeg

from bigvision.data import UnreadableSample, open_source
from bigvision.errors import UserError

pa = pytest.importorskip("pyarrow")
IMAGES = [jpeg(number, (9 + number % 7, 8)) for number in range(21)]


def save(folder: Path, labels: list, names: list[str] | None = None, files: int = 2, images=IMAGES) -> Path:
    """Write what `Dataset.save_to_disk` does: Arrow streams with Hugging Face's features in the schema."""
    folder.mkdir(parents=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": image, "path": None} for image in images[: len(labels)]], kind)
    table = pa.table({"id": pa.nulls(len(labels)), "image": column, "label": pa.array(labels)})
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel" if names else "Value"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    written, size = [], -(-len(labels) // files)
    for number in range(files):
        name = f"data-{number:05}-of-{files:05}.arrow"
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table.slice(number * size, size), max_chunksize=4)
        written.append({"filename": name})
    (folder / "state.json").write_text(json.dumps({"_data_files": written, "_split": None}))
    return folder


def save_splits(root: Path, **splits) -> Path:
    for name, labels in splits.items():
        save(root / name, labels, ["a", "b"])
    (root / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return root


def opened(path, split="train", **options):
    return open_source(f"hf:{path}", split, **{"shared": False, **options})


def test_a_saved_dataset(tmp_path):
    save(tmp_path / "x", [row % 2 for row in range(21)], ["cat", "dog"])
    source = opened(tmp_path / "x")
    assert source.classes == ["cat", "dog"] and len(source) == 21
    for copy in (source, pickle.loads(pickle.dumps(source))):  # noqa: S301
        assert [copy.read(row) for row in range(21)] == [(IMAGES[row], row % 2) for row in range(21)]
    assert [source.label(row) for row in range(21)] == [row % 2 for row in range(21)]
    assert source.where(11) == f"{tmp_path}/x/data-00001-of-00002.arrow: row 0"
    assert source.key(20) == b"data-00001-of-00002.arrow/9"
    check_batches(source)
    train, val = (opened(tmp_path / "x", split, shared=True) for split in ("train", "val"))
    assert (len(train), len(val)) == (19, 2) and {val.label(0), val.label(1)} == {0, 1}
    assert not {train.where(row) for row in range(19)} & {val.where(row) for row in range(2)}


@pytest.mark.parametrize("val", ["validation", "test"])
def test_saved_splits_are_the_training_and_the_validation_data(tmp_path, val):
    save_splits(tmp_path, **{"train": [0, 1, 0], val: [1, 1]})
    for shared in (True, False):
        assert (len(opened(tmp_path, shared=shared)), len(opened(tmp_path, "val", shared=shared))) == (3, 2)
    assert len(opened(tmp_path / val)) == 2


def test_labels_are_mapped_and_followed(tmp_path):
    source = opened(save(tmp_path / "x", [3, 1, 2]))
    assert source.classes == ["1", "2", "3"] and source.notes and [source.label(row) for row in range(3)] == [2, 0, 1]
    assert opened(save(tmp_path / "y", ["3", "2"]), "val", classes=source.classes).label(0) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "state.json").unlink(), "has no state.json or dataset_dict.json; give the folder of"),
        (lambda folder: (folder / "state.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "state.json").write_text("[]"), "it is no object"),
        (lambda folder: (folder / "state.json").write_text('{"_data_files": [{"filename": "../x"}]}'), "of another version"),
        (lambda folder: (folder / "state.json").write_text('{"_data_files": []}'), "have no rows"),
        (lambda folder: (folder / "data-00000-of-00002.arrow").write_bytes(b"text"), "cannot be read"),
        (lambda folder: (folder / "data-00000-of-00002.arrow").unlink(), "cannot be read"),
    ],
)
def test_damaged_folders(tmp_path, change, said):
    change(save(tmp_path / "x", [0, 1, 0], ["a", "b"]))
    with pytest.raises(UserError, match=said) as caught:
        opened(tmp_path / "x")
    assert str(caught.value).startswith("data.train: ") and "\n" not in str(caught.value)


def test_other_folders(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.parquet").touch()
    for path, split, said in (
        (tmp_path, "train", f"did you mean parquet:{tmp_path}"),
        ("someone/flowers", "train", "no folder 'someone/flowers'; hf:PATH reads what .* wrote. For a dataset of the Hub"),
        (save_splits(tmp_path / "d", train=[0, 1]), "val", "has train but no val; name one as"),
        (save_splits(tmp_path / "e", test=[0, 1]), "train", "has test but no train"),
    ):
        with pytest.raises(UserError, match=said):
            opened(path, split)


def test_a_file_that_changes_and_rows_without_an_image(tmp_path):
    folder = save(tmp_path / "x", [0, 1], ["a", "b"], 1, images=[None, IMAGES[0]])
    source = opened(folder)
    with pytest.raises(UnreadableSample, match="no image"):
        source.read(0)
    other = opened(folder)
    (folder / "data-00000-of-00001.arrow").write_bytes((folder / "data-00000-of-00001.arrow").read_bytes() + b"\0")
    with pytest.raises(UnreadableSample, match="has changed"):
        other.read(1)


# Objects of the package


def dataset(labels: list, names: list[str] | None = None, **more):
    hub = pytest.importorskip("datasets")
    columns = {"image": [{"bytes": image, "path": None} for image in IMAGES[: len(labels)]], "label": labels, **more}
    features = {"image": hub.Image(), "label": hub.ClassLabel(names=names) if names else hub.Value("int64")}
    features |= {name: hub.ClassLabel(names=["x", "y"]) for name in more}
    return hub.Dataset.from_dict(columns, features=hub.Features(features))


def test_a_dataset_object_is_read_as_it_is_seen():
    given = dataset([0, 1, 1, 0], ["cat", "dog"], kind=[0, 1, 0, 1])
    source = open_source(given, "train")
    assert source.classes == ["cat", "dog"] and [source.read(row) for row in range(4)] == list(zip(IMAGES, [0, 1, 1, 0]))
    chosen = open_source(given.select([3, 1]), "train")
    assert [chosen.read(row) for row in range(2)] == [(IMAGES[3], 0), (IMAGES[1], 1)] and chosen.label(1) == 1
    check_batches(open_source(dataset([row % 2 for row in range(21)], ["cat", "dog"]), "train"))
    # Formats and transforms of its own.
    assert open_source(given.with_format("torch"), "train").read(2).label == 1
    changed = given.with_transform(
        lambda rows: {"img": [np.zeros((4, 4, 3), np.uint8)] * len(rows["label"]), "y": rows["label"]}
    )
    with pytest.raises(UserError, match="neither classes nor targets"):
        open_source(changed, "train")


def test_objects_with_splits_numbers_and_mistakes():
    hub = pytest.importorskip("datasets")
    both = hub.DatasetDict(train=dataset([1, 2, 3]), test=dataset([3, 1]))
    train = open_source(both, "train")
    val = open_source(both, "val", classes=train.classes)
    assert train.classes == ["1", "2", "3"] and train.notes and [val.label(0), val.label(1)] == [2, 0]
    assert [val.read(row).label for row in range(2)] == [2, 0]
    for given, said in (
        (dataset([-1, -1], ["cat", "dog"]), "has label -1"),
        (dataset([None, 1], ["cat", "dog"]), "sample 0|row 0 of the dataset has no label"),
        (dataset([0, 1]).rename_columns({"label": "fine_label"}).add_column("coarse_label", [0, 1]), "may be the label"),
        (dataset([0, 1]).remove_columns("image"), "none is known as the image"),
        (dataset([0, 1]).to_iterable_dataset(), "can only be iterated over"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            open_source(given, "train")
        assert str(caught.value).startswith("data.train: ") and "\n" not in str(caught.value)


def test_what_the_package_saves(tmp_path):
    given = dataset([0, 1, 1, 0], ["cat", "dog"])
    given.select([3, 1]).save_to_disk(tmp_path / "x")
    source = opened(tmp_path / "x")
    assert [source.read(row) for row in range(2)] == [(IMAGES[3], 0), (IMAGES[1], 1)] and source.classes == ["cat", "dog"]
