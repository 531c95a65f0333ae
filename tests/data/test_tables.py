"""CSV and TSV files with paths and labels, as spreadsheets, databases and people write them."""

import os
import random
import re
import unicodedata
from pathlib import Path

import pytest
from photo_files import write_photos

from bigvision.data import open_source
from bigvision.errors import UserError

IMAGES = {"cat/000.jpg": "cat", "dog/000.jpg": "dog", "dog/001.png": "dog"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("table"), {"cat": 1, "dog": 2, "a b, c": 2, "été": 1})


@pytest.fixture
def opened(root):
    """Writes a table beside the images, and opens it."""
    written = []

    def write(content: str | bytes, split="train", *, name="list.csv", asked="", kind="csv", coding="utf-8", **options):
        file = root / name
        written.append(file)
        file.write_bytes(content if isinstance(content, bytes) else content.encode(coding))
        return open_source(f"{kind}:{file}{asked}", split, **{"shared": False, **options})

    yield write
    for file in written:
        file.unlink(missing_ok=True)


@pytest.fixture
def refusal(opened):
    def refused(content, **options) -> str:
        with pytest.raises(UserError) as caught:
            opened(content, **options)
        message = str(caught.value)
        assert "\n" not in message and len(message) < 500 and message.startswith("data.train: ")
        return message

    return refused


def contents(source) -> dict[str, str]:
    """The class of each file, after checking what else a source promises."""
    found = {}
    for index in random.Random(0).sample(range(len(source)), len(source)):
        image, label = source.read(index)
        assert label == source.label(index) and image == Path(source.where(index)).read_bytes()
        assert not os.path.isabs(source.key(index)) and source.size(index) == len(image)
        found[os.fsdecode(source.key(index))] = source.classes[label]
    return dict(sorted(found.items()))


LINES = [f"{path},{label}" for path, label in IMAGES.items()]
PLAIN = "\n".join(["path,label", *LINES]) + "\n"


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        PLAIN.encode("utf-8-sig"),
        PLAIN.encode("utf-16"),
        PLAIN.encode("utf-16-le"),
        PLAIN.encode("utf-16-be"),
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\r"),
        PLAIN.replace("\n", "\n\n").rstrip("\n"),
        PLAIN.replace(",", ";"),
        "sep=;\n" + PLAIN.replace(",", ";"),
        PLAIN.replace(",", "\t"),
        PLAIN.replace(",", "|"),
        PLAIN.replace(",", ", "),
        PLAIN.replace(",", ",,").replace("path,,", "path,note,"),
        PLAIN.replace("\n", ",\n"),
        "\n".join('"{}","{}"'.format(*line.split(",")) for line in PLAIN.splitlines()),
        PLAIN.replace("/", "\\"),
        PLAIN.replace("cat/", "./cat/"),
        # Without a header.
        "\n".join(LINES),
        "\n".join(LINES).replace(",", " "),
        "\n".join(",".join(reversed(line.split(","))) for line in LINES),
        # Other names, and other columns.
        PLAIN.replace("path,label", "Image,Class"),
        PLAIN.replace("path,label", "File Name,class-name"),
        PLAIN.replace("path,label", "picture,what it is"),
        "\n".join(["# path,label", *LINES]),
        "\n".join([",path,label", *(f"{number},{line}" for number, line in enumerate(LINES))]),
        "\n".join(["id,label,class,filename,width", *(f"7,{line.split(',')[1]},x,{line.split(',')[0]},40" for line in LINES)]),
    ],
)
def test_dialects(opened, content):
    source = opened(content)
    assert contents(source) == IMAGES and source.classes == ["cat", "dog"] and source.notes == () and not source.passed_over
    if isinstance(content, bytes):  # a byte order mark is no part of the first name
        assert len(opened(content, asked="?path=path&label=label")) == 3


def test_tabs_names_with_separators_and_other_alphabets(opened, root):
    lines = [("a b, c/000.jpg", 'it"s, so'), ("été/000.jpg", "été")]
    for content, kind in (
        ('path,label\n"a b, c/000.jpg","it""s, so"\n' + "été/000.jpg,été\n", "csv"),
        ("path\tlabel\na b, c/000.jpg\tit\"s, so\nété/000.jpg\tété\n", "tsv"),
    ):  # fmt: skip
        source = opened(content, kind=kind)
        assert contents(source) == dict(lines) and source.classes == ['it"s, so', "été"]
    assert contents(opened(f"path,label\n{unicodedata.normalize('NFD', 'été/000.jpg')},x\n")) == {"000.jpg": "x"}
    source = opened("path;label\ncat/000.jpg;été\n".encode("cp1252"))
    assert source.classes == ["été"] and "Windows-1252" in source.notes[0]
    assert contents(opened(f"path,label\n{root}/cat/000.jpg,x\n")) == {"000.jpg": "x"}


@pytest.mark.parametrize(
    ("labels", "classes", "values", "note"),
    [
        (["0", "1", "1"], ["0", "1"], [0, 1, 1], ""),
        (["10", "9", "9"], ["9", "10"], [1, 0, 0], "labels 9 to 10 become 0 to 1"),
        (["1.0", "2.0", "2.0"], ["1", "2"], [0, 1, 1], "labels 1 to 2 become"),
        (["True", "False", "True"], ["False", "True"], [1, 0, 1], ""),
        (['"1,0"', '"2,0"', '"2,0"'], ["1", "2"], [0, 1, 1], "labels 1 to 2 become"),
        (["NA", "EU", "EU"], ["EU", "NA"], [1, 0, 0], "the label 'NA' is taken as a class of that name"),
        (["a|b", "a|c", "a|c"], ["a|b", "a|c"], [0, 1, 1], ""),
        (['"crane, bird"', "crane", "crane"], ["crane", "crane, bird"], [1, 0, 0], ""),
    ],
)
def test_numbers_and_names_in_a_table_become_the_right_classes(opened, labels, classes, values, note):
    content = "path,label\n" + "".join(f"{path},{label}\n" for path, label in zip(IMAGES, labels))
    source = opened(content)
    assert source.classes == classes and [source.label(index) for index in range(3)] == values
    assert note in "".join(source.notes) and bool(note) == bool(source.notes)


def test_columns_that_are_asked_for(opened):
    content = "a,b,file,other\n" + "".join(f"x,{label},{path},{path}\n" for path, label in IMAGES.items())
    assert contents(opened(content, asked="?path=file&label=b")) == IMAGES
    assert contents(opened("\n".join(f"7,{line},x" for line in LINES), asked="?path=2&label=3")) == IMAGES


def test_where_paths_begin(opened, root, tmp_path, monkeypatch):
    (root / "lists").mkdir(exist_ok=True)
    source = opened(PLAIN, name="lists/list.csv")
    assert contents(source) == IMAGES and f"relative to '{root}'" in source.notes[0]
    (tmp_path / "x.csv").write_text(PLAIN)
    assert contents(open_source(f"csv:{tmp_path}/x.csv?root={root}", "train", shared=False)) == IMAGES
    monkeypatch.chdir(root)
    assert contents(open_source(f"csv:{tmp_path}/x.csv", "train", shared=False)) == IMAGES


def test_rows_without_a_file_are_counted(opened):
    source = opened(PLAIN + "none.jpg,cat\ncat,cat\ncat/none.jpg,fox\n")
    assert contents(source) == IMAGES and source.classes == ["cat", "dog"]
    assert dict(source.passed_over) == {"without a file": (3, "none.jpg (line 5 of list.csv)")}
    source = opened(PLAIN + LINES[0] + "\n")
    assert len(source) == 4 and "1 rows list an image again" in source.notes[0]


def test_a_split_column_and_files_per_split_divide_the_images(opened, root, tmp_path):
    content = "split,path,label\n" + "".join(f"{'train' if 'dog' in p else 'Val'},{p},{label}\n" for p, label in IMAGES.items())
    assert list(contents(opened(content, shared=True))) == ["000.jpg", "001.png"]
    assert contents(opened(content, "val", classes=["cat", "dog"])) == {"000.jpg": "cat"}
    for split, lines in (("train", LINES[:2]), ("val", LINES[2:])):
        (tmp_path / f"{split}.csv").write_text("\n".join(["path,label", *lines]))
    train, val = (open_source(f"csv:{tmp_path}?root={root}", split, classes=["cat", "dog"]) for split in ("train", "val"))
    assert (len(train), len(val)) == (2, 1) and val.label(0) == 1
    # A set that is something else is no split.
    assert len(opened(content.replace("split,", "set,").replace("train,", "base,").replace("Val,", "extra,"))) == 3
    assert len(opened(content.replace("split,", "Subset,").replace("Val,", "testing,"), "val", classes=["cat", "dog"])) == 1
    # Truth values, and folds, which are not used.
    for flag, words in (("is_valid", ("False", "True")), ("Is-Train", ("1", "0")), ("is_test", ("no", "yes"))):
        flagged = content.replace("split,", f"{flag},").replace("train,", f"{words[0]},").replace("Val,", f"{words[1]},")
        assert len(opened(flagged, shared=True)) == 2
        assert contents(opened(flagged, "val", classes=["cat", "dog"])) == {"000.jpg": "cat"}
    folds = opened(content.replace("split,", "fold,").replace("train,", "0,").replace("Val,", "1,"))
    assert len(folds) == 3 and "the column 'fold' of list.csv is not used" in folds.notes[0]
    many = "path,label\n" + "".join(f"{path},x\n" for path in IMAGES)
    train, val = (opened(many, split, shared=True) for split in ("train", "val"))
    assert (len(train), len(val)) == (2, 1) and not set(contents(train)) & set(contents(val))


def test_validation_follows_the_training_data(opened):
    source = opened("path,label\ncat/000.jpg,90000\ndog/000.jpg,100\n")
    assert opened("path,label\ndog/001.png,90000\n", "val", classes=source.classes).label(0) == 1
    with pytest.raises(UserError, match=r"^data.val: class '7' in .* is not one of the 2 classes"):
        opened("path,label\ndog/001.png,7\n", "val", classes=source.classes)


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("path,label\nx.jpg,a\ny.jpg,b\n", {}, "none of the 2 images that '.*' lists is a file, as 'x.jpg'; paths are"),
        ("path,label\nhttps://x.org/x.jpg,a\n", {}, "download them"),
        ("path,label\ncat/000.jpg,\ndog/000.jpg,dog\n", {}, "line 2 of '.*list.csv' has no label; remove"),
        ("path,label\ncat/000.jpg,nan\n", {}, "has no labels"),
        ("path,label\ncat/000.jpg,N/A\ndog/000.jpg,dog\n", {}, "line 2 of '.*list.csv' has no label; remove"),
        ("path,label\ncat/000.jpg,NULL\ndog/000.jpg,3\n", {}, "line 2 of '.*list.csv' has no label; remove"),
        ('path;label\ncat/000.jpg;0,5\ndog/000.jpg;2\n', {}, "numbers that are no classes"),
        ('path,label\ncat/000.jpg,"[1, 2]"\ndog/000.jpg,"[1]"\n', {}, r"several labels for an image \(\[1, 2\]\)"),
        ("path,label\ncat/000.jpg,Mass|Nodule\ndog/000.jpg,Mass\n", {}, r"several labels for an image \(Mass\|Nodule\)"),
        ("path;label\ncat/000.jpg;b|a\ndog/000.jpg;a|c\n", {}, "several labels for an image"),
        ('path,label\ncat/000.jpg,"a,b"\ndog/000.jpg,a\ndog/001.png,b\n', {}, "several labels for an image"),
        ("path,label,is_valid\ncat/000.jpg,a,maybe\n", {}, "line 2 of .* has 'maybe' in a column of true and false"),
        ("path,label\ncat/000.jpg,0.5\ndog/000.jpg,2\n", {}, "numbers that are no classes"),
        ("path,label\ncat/000.jpg,-1\n", {}, "has label -1"),
        ("path,label\ncat/000.jpg,a\ncat/000.jpg,b\n", {}, "line 3 of .* has several labels for an image"),
        ("path,healthy,rust\ncat/000.jpg,1,0\n", {}, r"several labels for an image \(healthy, rust\)"),
        (PLAIN, {"asked": "?label=label,path"}, "has several labels for an image"),
        ("path,a,b\ncat/000.jpg,x,y\n", {}, "has the columns 'path', 'a', 'b', of which none is known as the label; add"),
        ("path,class,target\ncat/000.jpg,x,y\n", {}, "'class' or 'target' may be the label; add"),
        (PLAIN, {"asked": "?label=lable"}, "has no column 'lable' but 'path', 'label'; did you mean 'label'"),
        (PLAIN, {"asked": "?labels=label"}, "unknown 'labels' in .labels=label; did you mean"),
        ("path,label\ncat/000.jpg,a,b\n", {}, "line 2 of '.*' has 3 columns, the first 2"),
        ("path\ncat/000.jpg\n", {}, "has one column"),
        (PLAIN, {"kind": "tsv"}, "has one column"),
        ('path,label\ncat/000.jpg,"cat\ndog/000.jpg,dog\n', {}, "is no table of text: unexpected end of data"),
        ('path,label\ncat/000.jpg,"cat\ndog/000.jpg,dog"\n', {}, "ends on line 3 of .* has several lines; close the quotes"),
        ("path,label\n", {}, "list no images for train"),
        ("", {}, "list no images"),
        ("path,label,split\ncat/000.jpg,a,fold1\n", {}, "has 'fold1' in its column for the split"),
        ("path,label,split\ncat/000.jpg,a,test\n", {}, "list no images for train"),
        (b"\x89PNG\r\n\x1a\n\0\0\x81", {}, "is no table of text|is no text"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_table_is_one_line_with_its_place(refusal, content, options, said):
    assert re.search(said, refusal(content, **options))
