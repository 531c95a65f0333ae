"""`data.classes`: a file that says which class has which label."""

import json

import pytest
from photo_files import write_photos

from bigvision.data import open_source
from bigvision.data.labels import read_classes
from bigvision.errors import UserError

FORMS = {
    "lines": "elk\ncat\n\n dog \n",
    "list": '["elk", "cat", "dog"]',
    "index": json.dumps({"0": ["elk", "moose"], "1": ["cat", "tabby"], "2": ["dog", "husky"]}),
    "names": json.dumps({"2": "dog", "1": "cat", "0": "elk"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_labels_follow_the_file(tmp_path, photos, form):
    (tmp_path / "classes").write_text(FORMS[form])
    source = open_source(f"imagefolder:{photos}", "train", class_file=str(tmp_path / "classes"))
    assert source.classes == ["elk", "cat", "dog"]
    for index in range(len(source)):
        assert source.classes[source.label(index)] == source.where(index).split("/")[-2]
    val = open_source(f"imagefolder:{photos}", "val", classes=source.classes)
    assert val.classes == source.classes and {val.label(index) for index in range(len(val))} <= {0, 1, 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must name each class once"),
        ("cat\ncat\n", "must name each class once"),
        ('["cat", 3]', "must name each class once"),
        ('{"0": "cat", "2": "dog"}', "is no list of names and no class index from 0 on"),
        ('{"0": []}', "is no list of names and no class index"),
        ("[1,", "is no list of names and no class index"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_files_that_are_not_as_described(tmp_path, text, said):
    if text is not None:
        (tmp_path / "classes").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        read_classes(str(tmp_path / "classes"), "data.classes")
    assert str(caught.value).startswith("data.classes: ") and "\n" not in str(caught.value)


def test_a_folder_that_the_file_does_not_name(tmp_path):
    write_photos(tmp_path / "data", {"cat": 2, "fox": 2})
    (tmp_path / "classes").write_text("cat\n")
    with pytest.raises(UserError, match=r"class .fox. in .* is not a class"):
        open_source(f"imagefolder:{tmp_path}/data", "train", class_file=str(tmp_path / "classes"))
