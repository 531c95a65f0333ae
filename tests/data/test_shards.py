import io
import json
import os
import pickle
import random
import re
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bigvision.data import UnreadableSample, open_source, train_batches, transform, workers
from bigvision.data.sources import shards
from bigvision.errors import UserError

AUGMENTED = transform("photo", 8, train=True)


def jpeg(seed: int, size: tuple[int, int] = (20, 16)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as file:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


def write_shards(folder: Path, counts: list[int], name: str = "{}.tar", classes: int = 3) -> dict[str, tuple[bytes, int]]:
    """Write a shard for each of *counts*; returns the image and label of each key."""
    wanted = {}
    for shard, count in enumerate(counts):
        members = []
        for number in range(count):
            key, label = f"{shard:03}{number:04}", (shard + number) % classes
            wanted[key] = jpeg(len(wanted), (9 + number % 7, 8 + number % 5)), label
            members += [(f"{key}.jpg", wanted[key][0]), (f"{key}.cls", str(label).encode())]
        write_tar(folder / name.format(f"{shard:03}"), members)
    return wanted


def contents(source) -> dict[str, tuple[bytes, int]]:
    """The image and label of each key, after checking what else a source promises."""
    found = {}
    for index in random.Random(0).sample(range(len(source)), len(source)):
        image, label = source.read(index)
        assert type(image) is bytes and source.label(index) == label
        file, _, key = source.where(index).rpartition(": ")
        assert os.path.isfile(file) and key not in found
        found[key] = image, label
    assert len(found) == len(source)
    return found


def opened(path, split="train", **options):
    return open_source(f"webdataset:{path}", split, **{"shared": False, "first": True, **options})


def refusal(path, split="train", **options) -> str:
    with pytest.raises(UserError) as caught:
        opened(path, split, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 and message.startswith(f"data.{split}: ")
    return message


# Reading


def test_every_sample_is_what_was_written(tmp_path):
    wanted = write_shards(tmp_path, [5, 1, 12])
    source = opened(tmp_path)
    assert contents(source) == wanted
    assert [source.where(index).rpartition(": ")[2] for index in range(len(source))] == sorted(wanted)
    assert source.classes == ["0", "1", "2"] and source.style == "photo" and source.channels == 3


LONG = "/".join(["a folder with a name of some length"] * 7)  # 251 bytes: too long for every field of a plain header


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 40_000])
def test_formats_names_and_sizes(tmp_path, format, size):
    keys = ["plain", "./dot/slash", "folder/in/folder", "x" * 90 + "/" + "y" * 90, "ümläut/é"]
    keys += [] if format == tarfile.USTAR_FORMAT else [f"{LONG}/1", f"{LONG}/2"]
    images = {key.removeprefix("./"): random.Random(key).randbytes(size + number) for number, key in enumerate(keys)}
    members = []
    for key in keys:
        members += [(f"{key}.cls", b" 0\n"), (f"{key}.PNG", images[key.removeprefix("./")]), (f"{key}.txt", b"a caption")]
    write_tar(tmp_path / "x.tar", members, format)
    assert contents(opened(tmp_path / "x.tar")) == {key: (image, 0) for key, image in images.items()}


def test_sizes_of_pax_and_of_gnus_binary_numbers(tmp_path):
    image = jpeg(0)
    path = write_tar(tmp_path / "x.tar", [("a.jpg", image), ("a.cls", b"0")])
    data = bytearray(path.read_bytes())

    def number(field: bytes) -> bytes:
        header = bytearray(data[:512])
        header[124:136] = field
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return bytes(header)

    path.write_bytes(number(b"\x80" + len(image).to_bytes(11, "big")) + data[512:])
    assert contents(opened(path)) == {"a": (image, 0)}
    # In a pax archive the field may hold anything.
    entry = tarfile.TarInfo("ignored")
    entry.pax_headers = {"size": str(len(image)), "path": "b.jpg"}
    extended = entry.tobuf(tarfile.PAX_FORMAT)[:-512]
    path.write_bytes(extended + number(b"00000000007\0") + data[512:])
    assert "sample b has no label" in refusal(path)
    members = bytes(data).replace(b"a.cls", b"b.cls")
    at = members.index(b"b.cls")
    header = bytearray(members[at : at + 512])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(extended + number(b"00000000007\0") + members[512:at] + header + members[at + 512 :])
    source = opened(path)
    assert contents(source) == {"b": (image, 0)} and source.classes == ["0"]


def test_only_regular_files_are_read(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as file:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            entry = tarfile.TarInfo(f"{kind.decode()}.jpg")
            # A hard link may have the size of what it points to, and has no content all the same.
            entry.type, entry.linkname, entry.size = kind, str(secret), 7000 * (kind == tarfile.LNKTYPE)
            file.addfile(entry)
        for name in (str(secret), "._a.jpg", ".hidden.jpg", "folder.jpg/", "readme", "../a.jpg", "../a.cls"):
            entry = tarfile.TarInfo(name)
            entry.size = 0 if name.endswith("/") else 1
            file.addfile(entry, io.BytesIO(b"0"))
    assert contents(opened(path)) == {"../a": (b"0", 0)}


def test_labels_of_every_kind(tmp_path):
    texts = [("json", b'{"label": 3}'), ("json", b'{"cls": 1, "x": [2]}'), ("json", b'{"class": "2"}'), ("cls", b"0\n")]
    texts += [("json", b"3"), ("json", b'{"label": [1]}'), ("json", b'{"label": 2.0, "target": 7}'), ("cls", b"\xef\xbb\xbf0")]
    texts += [("json", b'{"Target": 3, "width": 1}'), ("JSON", b"[1]"), ("json", b'{"label": "2"}'), ("cls", b"0\r\n")]
    members = [pair for n, (kind, text) in enumerate(texts) for pair in ((f"{n}.jpg", b"x"), (f"{n}.{kind}", text))]
    write_tar(tmp_path / "x.tar", members)
    source = opened(tmp_path)
    assert [source.label(index) for index in range(12)] == [3, 1, 2, 0] * 3 and source.classes == ["0", "1", "2", "3"]
    write_tar(tmp_path / "x.tar", [("a.jpg", b"x"), ("a.json", b'{"label": true}'), ("b.jpg", b"x"), ("b.json", b"false")])
    source = opened(tmp_path)
    assert [source.label(index) for index in range(2)] == [1, 0] and source.classes == ["False", "True"]


def test_labels_that_are_names(tmp_path):
    for shard, names in enumerate(["dog", "cat elk"]):
        write_tar(
            tmp_path / f"{shard}.tar", [(f"{n}.{e}", b) for n in names.split() for e, b in (("cls", n.encode()), ("jpg", b"x"))]
        )
    source = opened(tmp_path)
    assert source.classes == ["cat", "dog", "elk"] and [source.label(i) for i in range(3)] == [1, 0, 2]
    other = opened(tmp_path, classes=["elk", "dog", "fox", "cat"])
    assert other.classes == ["elk", "dog", "fox", "cat"] and [other.label(i) for i in range(3)] == [1, 3, 0]
    assert "class 'elk'" in refusal(tmp_path, classes=["cat", "dog"])
    (tmp_path / "classes.txt").write_text("elk\ndog\ncat\n")
    assert [opened(tmp_path).label(i) for i in range(3)] == [1, 2, 0]
    assert [opened(tmp_path / "*.tar").label(i) for i in range(3)] == [1, 2, 0]


def test_class_names_of_numbers(tmp_path):
    write_shards(tmp_path, [4])
    (tmp_path / "classnames.txt").write_text("ant\nbee\ncow\ndoe\n")
    source = opened(tmp_path)
    assert source.classes == ["ant", "bee", "cow", "doe"] and [source.label(i) for i in range(4)] == [0, 1, 2, 0]
    (tmp_path / "classnames.txt").write_text("ant\nbee\n")
    assert "has label 2, but labels are 0 to 1" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"a.jpg": b"x"}, "sample a has no label"),
        ({"a.jpg": b"x", "a.cls": b" "}, "sample a has no label"),
        ({"a.jpg": b"x", "a.cls": b"\xff"}, "sample a has no label: its .cls is no text in UTF-8"),
        ({"a.jpg": b"x", "a.json": b"[" * 100_000}, "sample a has no label: its .json is no JSON"),
        ({"a.jpg": b"x", "a.json": b"{'label': 3}"}, "its .json is no JSON"),
        ({"a.jpg": b"x", "a.json": b'{"label": null}'}, "sample a has no label"),
        ({"a.jpg": b"x", "a.json": b'{"label": NaN}'}, "sample a has no label"),
        ({"a.jpg": b"x", "a.json": b'{"label": []}'}, "sample a has no label"),
        ({"a.jpg": b"x", "a.json": b'{"width": 3}'}, "sample a has no label"),
        ({"a.jpg": b"x", "a.json": b"{}"}, "sample a has no label"),
        (
            {"a.jpg": b"x", "a.json": b'{"label": [1, 2]}'},
            "sample a has several labels for an image (1, 2); use task",
        ),
        ({"a.jpg": b"x", "a.json": b'{"label": [[1, 2]]}'}, "several labels for an image (1, 2)"),
        (
            {"a.jpg": b"x", "a.json": b'{"label": 0.5}'},
            "sample a has numbers that are no classes (0.5); use task.name: reg",
        ),
        ({"a.jpg": b"x", "a.json": b'{"label": {"id": 3}}'}, "the label in its .json is an object"),
        ({"a.jpg": b"x", "a.json": b'{"target": 3, "category": 4}'}, "target or category in its .json may be the label"),
        ({"a.jpg": b"x", "a.cls": b"1", "b.jpg": b"x", "b.json": b"true"}, "numbers (1) and names ('True')"),
        ({"a.jpg": b"x", "b.jpg": b"x", "a.cls": b"0", "b.cls": b"0"}, "sample a has no label"),
        ({"a.jpg": b"x", "a.png": b"x", "a.cls": b"0"}, "sample a has more than one image"),
        ({"a.1.jpg": b"x", "a.2.jpg": b"x", "a.cls": b"0"}, "sample a has more than one image"),
        ({"a.cls": b"0", "a.txt": b"x"}, "holds no image"),
        ({}, "holds no image"),
        ({"a.jpg": b"x", "a.cls": b"-1"}, "has label -1"),
        ({"a.jpg": b"x", "a.cls": b"1", "b.jpg": b"x", "b.cls": b"cat"}, "numbers (1) and names ('cat')"),
    ],
)
def test_samples_that_are_not_as_described(tmp_path, members, said):
    path = write_tar(tmp_path / "x.tar", list(members.items()))
    assert said in refusal(path) and str(path) in refusal(path)


def test_masks_beside_images_and_dots_in_extensions(tmp_path):
    names = ["a.jpg", "a.mask.png", "a.cls", "b.photo.jpg", "b.cls"]
    write_tar(tmp_path / "x.tar", [(name, str(number).encode()) for number, name in enumerate(names)])
    source = opened(tmp_path)
    assert contents(source) == {"a": (b"0", 0), "b": (b"3", 1)} and source.classes == ["2", "4"]


# Damage


def test_cut_anywhere(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"x" * 700), ("a.cls", b"0"), ("b.jpg", b"y" * 1024), ("b.cls", b"0")])
    data = path.read_bytes()
    end = 512 * (1 + 2 + 1 + 1 + 1 + 2 + 1 + 1)
    for length in [*range(0, end, 256), 1, end - 1, end + 511]:
        path.write_bytes(data[:length])
        assert f"'{path}': it ends early" in refusal(path), length
    path.write_bytes(data[: end + 512])
    assert len(opened(path)) == 2


@pytest.mark.parametrize("byte", [0, 124, 148, 156, 300, 1536, 1536 + 130])
def test_damaged_headers(tmp_path, byte):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"x" * 700), ("a.cls", b"0")])
    data = bytearray(path.read_bytes())
    data[byte] ^= 0x41
    path.write_bytes(data)
    assert f"'{path}': it is damaged at byte {byte // 1536 * 1536}" in refusal(path)


def test_hostile_headers(tmp_path):
    path = tmp_path / "x.tar"

    def header(kind: bytes, size: bytes, content: bytes = b"") -> bytes:
        entry = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
        entry[156:157], entry[124:136] = kind, size
        entry[148:156] = b" " * 8
        entry[148:156] = b"%06o\0 " % sum(entry)
        return bytes(entry) + content.ljust(-(-len(content) // 512) * 512, b"\0")

    for kind in (b"0", b"L", b"x", b"g", b"K"):
        path.write_bytes(header(kind, b"\x80" + b"\xff" * 11) + bytes(1024))
        assert "ends early" in refusal(path)
        path.write_bytes(header(kind, b"-0000000001\0") + bytes(1024))
        assert "damaged" in refusal(path)
    for records in (b"999 path=x\n", b"0 path=x\n", b"xx\n", b"12 size=-100\n", b"11 size=1e9\n", b"9" * 5000, b"5 ab\n"):
        path.write_bytes(header(b"x", b"%011o\0" % len(records), records) + bytes(1024))
        assert "pax header is damaged" in refusal(path), records
    path.write_bytes(header(b"S", b"%011o\0" % 0) + bytes(1024))
    assert "sparse" in refusal(path)


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
def test_compressed_shards(tmp_path, suffix):
    for name in (f"x.tar.{suffix}", "hidden.tar"):
        with tarfile.open(tmp_path / name, f"w:{suffix}"):
            pass
    for path in (tmp_path, tmp_path / f"x.tar.{suffix}", tmp_path / "x.*", tmp_path / "hidden.tar"):
        assert "is compressed; decompress it" in refusal(path)


def test_a_shard_that_changes_while_it_is_read(tmp_path):
    write_shards(tmp_path, [3, 3])
    source, late = opened(tmp_path), opened(tmp_path)
    source.read(0)
    (tmp_path / "000.tar").unlink()
    source.read(1)  # it stays open
    with pytest.raises(UnreadableSample, match="No such file"):
        late.read(0)
    os.truncate(tmp_path / "001.tar", 600)
    with pytest.raises(UnreadableSample, match="has changed"):
        source.read(3)


# The index


def test_the_index_is_made_once(tmp_path, monkeypatch):
    wanted = write_shards(tmp_path, [5, 4])
    first = opened(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000.tar", "000.tar.index", "001.tar", "001.tar.index"]
    for index in tmp_path.glob("*.index"):
        assert set(load_file(index)) == set(shards.Index._fields[:7])

    def scan(descriptor):
        raise AssertionError("a shard was gone through again")

    monkeypatch.setattr(shards, "samples", scan)
    for pattern in (tmp_path, tmp_path / "*"):
        again = opened(pattern, first=False)
        assert contents(again) == wanted and again.where(3) == first.where(3)


def test_word_of_shards_that_take_long(tmp_path, monkeypatch, capsys):
    wanted = write_shards(tmp_path, [2] * 40)
    scan, started = shards.samples, []

    def slowly(descriptor, passed_over):
        started.append(descriptor)
        time.sleep(0.5 if len(started) > workers.THREADS else 0)
        return scan(descriptor, passed_over)

    monkeypatch.setattr(workers, "EVERY", 0.3)
    monkeypatch.setattr(shards, "samples", slowly)
    assert contents(opened(tmp_path, first=False)) == wanted and capsys.readouterr().err == "", "of the other ranks none"
    started.clear()
    opened(tmp_path, first=True)
    found = [int(count) for count in re.findall(r"data\.train: shards indexed: (\d+) of 40\n", capsys.readouterr().err)]
    assert found == sorted(found) and len(found) > 1 and 0 < found[-1] < 40
    opened(tmp_path, first=True)
    assert capsys.readouterr().err == "", "nothing takes long any more"


def test_a_damaged_shard_ends_the_indexing(tmp_path, monkeypatch):
    write_shards(tmp_path, [2] * 60)
    (tmp_path / "000.tar").write_bytes(b"x" * 600)
    scan, started = shards.samples, []

    def slowly(descriptor, passed_over):
        started.append(descriptor)
        time.sleep(0.05)
        return scan(descriptor, passed_over)

    monkeypatch.setattr(shards, "samples", slowly)
    assert "000.tar': it is damaged at byte 0" in refusal(tmp_path)
    assert len(started) < 60


def test_a_changed_shard_is_indexed_anew(tmp_path):
    wanted = write_shards(tmp_path, [5, 4])
    opened(tmp_path)
    old = (tmp_path / "000.tar.index").read_bytes()
    time = os.stat(tmp_path / "000.tar").st_mtime_ns
    path = write_tar(tmp_path / "000.tar", [("new.jpg", b"new"), ("new.cls", b"1")])
    wanted = {"new": (b"new", 1)} | {key: value for key, value in wanted.items() if key.startswith("001")}
    os.utime(path, ns=(time, time))  # of another size
    assert contents(opened(tmp_path)) == wanted and (tmp_path / "000.tar.index").read_bytes() != old
    write_tar(path, [("nei.jpg", b"nei"), ("nei.cls", b"1")])  # of another time
    os.utime(path, ns=(time + 1, time + 1))
    assert "nei" in contents(opened(tmp_path)) and "nei" in contents(opened(tmp_path, first=False))


@pytest.mark.parametrize("first", [True, False])
def test_where_the_index_cannot_be_written(tmp_path, first):
    wanted = write_shards(tmp_path, [5, 4])
    (tmp_path / "000.tar.index").mkdir()
    assert contents(opened(tmp_path, first=first)) == wanted
    # The others do not write, and nothing temporary is left.
    names = ["000.tar", "000.tar.index", "001.tar"] + ["001.tar.index"] * first
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_folder_on_a_full_disk(tmp_path, monkeypatch):
    wanted = write_shards(tmp_path, [5])

    def full(tensors, path, metadata):
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    assert contents(opened(tmp_path)) == wanted and [path.name for path in tmp_path.iterdir()] == ["000.tar"]


def test_a_damaged_index_is_made_again(tmp_path):
    wanted = write_shards(tmp_path, [5])
    opened(tmp_path)
    index = tmp_path / "000.tar.index"
    whole, tables = index.read_bytes(), load_file(index)
    stat = os.stat(tmp_path / "000.tar")
    metadata = {"version": shards.VERSION, "size": str(stat.st_size), "mtime_ns": str(stat.st_mtime_ns)}
    changes = {
        "offsets": [tables["offsets"] * 100, -tables["offsets"], tables["offsets"].int(), tables["offsets"][:4]],
        "sizes": [tables["sizes"] + stat.st_size, -tables["sizes"], tables["sizes"].view(1, -1)],
        "key_ends": [tables["key_ends"] + 1, tables["key_ends"].flip(0), tables["key_ends"][:0]],
        "labels": [tables["labels"] + 9, tables["labels"] - 9],
        "name_ends": [tables["name_ends"][:0], tables["name_ends"] - 1],
    }
    bad = [whole[: len(whole) // 2], b"", b"\0" * len(whole)]
    for name, values in changes.items():
        for value in values:
            save_file(tables | {name: value.contiguous()}, index, metadata)
            bad.append(index.read_bytes())
    save_file(tables, index, metadata | {"version": "0"})
    bad.append(index.read_bytes())
    for content in bad:
        index.write_bytes(content)
        assert contents(opened(tmp_path)) == wanted
        assert all(torch.equal(table, tables[name]) for name, table in load_file(index).items())
        with safe_open(index, "pt") as file:
            assert file.metadata() == metadata


# Splits and patterns


def test_a_tenth_of_each_class_is_held_out(tmp_path):
    wanted = write_shards(tmp_path, [30, 31], classes=3)
    train, val = (opened(tmp_path, split, shared=True) for split in ("train", "val"))
    found = contents(train), contents(val)
    assert not found[0].keys() & found[1].keys() and found[0] | found[1] == wanted
    assert np.bincount([label for _, label in found[1].values()]).tolist() == [2, 2, 2]
    # The choice is by key: neither the shards nor what is added later matters much.
    members = [(f"{key}.{kind}", content) for key, (image, label) in wanted.items()
               for kind, content in (("jpg", image), ("cls", str(label).encode()))]  # fmt: skip
    other = tmp_path / "other"
    write_tar(other / "all.tar", members)
    assert contents(opened(other, "val", shared=True)) == found[1]
    write_tar(other / "new.tar", [("new.jpg", b"x"), ("new.cls", b"1")])
    assert len(found[1].keys() - contents(opened(other, "val", shared=True)).keys()) <= 1
    assert len(opened(tmp_path, shared=False)) == len(opened(tmp_path, "val", shared=False)) == 61


def test_nothing_to_hold_out(tmp_path):
    write_shards(tmp_path, [3])
    assert "none can be held out" in refusal(tmp_path, "val", shared=True)
    assert len(opened(tmp_path, "train", shared=True)) == 3


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
@pytest.mark.parametrize("layout", ["{}/{{}}.tar", "{}-{{}}.tar", "set1-{}-{{}}.tar", "data/{}-{{}}.tar"])
@pytest.mark.parametrize("shared", [True, False])
def test_splits_by_folder_and_by_name(tmp_path, val, layout, shared):
    wanted = {name: write_shards(tmp_path, [4] * count, layout.format(name)) for name, count in (("train", 2), (val, 1))}
    for split, name in (("train", "train"), ("val", val)):
        assert contents(opened(tmp_path, split, shared=shared)) == wanted[name]


def test_splits_that_are_missing(tmp_path):
    write_shards(tmp_path / "a", [30], "train-{}.tar")
    assert "has train but no val" in refusal(tmp_path / "a", "val")
    assert len(opened(tmp_path / "a", "val", shared=True)) == 3 and len(opened(tmp_path / "a", shared=True)) == 27
    assert len(opened(tmp_path / "a/train-*.tar", "val")) == 30
    write_shards(tmp_path / "b/val", [3])
    assert "has val but no train" in refusal(tmp_path / "b") and len(opened(tmp_path / "b", "val")) == 3
    write_shards(tmp_path / "a", [1], "more-{}.tar")
    assert "more-000.tar' for training or validation?" in refusal(tmp_path / "a")
    (tmp_path / "c").mkdir()
    assert "holds no *.tar file" in refusal(tmp_path / "c")
    assert "no file" in refusal(tmp_path / "none")


def test_a_pattern_names_the_shards_of_its_split(tmp_path):
    write_shards(tmp_path, [1] * 12, "train-{}.tar")
    write_shards(tmp_path, [1] * 2, "val-{}.tar")

    def shards_of(pattern: str, split="train") -> list[str]:
        source = opened(tmp_path / pattern, split)
        return [os.path.basename(source.where(index).rpartition(": ")[0])[:-4] for index in range(len(source))]

    assert shards_of("train-{009..011}.tar") == ["train-009", "train-010", "train-011"]
    assert shards_of("train-00{1,3}.tar") == ["train-001", "train-003"]
    assert shards_of("{train,val}-{000..001}.tar", "val") == ["val-000", "val-001"]
    assert shards_of("{train,val}-{000..001}.tar") == ["train-000", "train-001"]
    assert shards_of("train-01?.tar") == ["train-010", "train-011"] == shards_of("train-0[1]*.tar")
    assert shards_of("*", "val") == ["val-000", "val-001"] and shards_of("train-000.tar") == ["train-000"]
    assert "no file" in refusal(tmp_path / "train-{000..012}.tar") and "train-012" in refusal(tmp_path / "train-{000..012}.tar")
    assert "no file matches" in refusal(tmp_path / "tr-*.tar")
    assert "more than" in refusal(tmp_path / "{0..999}{0..999}{0..999}.tar")
    odd = tmp_path / "odd [1]"
    write_shards(odd, [2])
    assert len(opened(odd)) == len(opened(odd / "000.tar")) == 2


# In processes


def test_workers_open_shards_anew(tmp_path):
    wanted = write_shards(tmp_path, [5, 6])
    source = opened(tmp_path, shared=True)
    source.read(0)
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301
    assert contents(copy) == contents(source) and len(copy) < len(wanted)
    assert copy.classes == source.classes and copy.where(1) == source.where(1)
    del copy
    assert contents(source)  # it had its own descriptors


def open_below(folder: Path) -> int:
    """How many descriptors this process has of files below *folder*."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.path.realpath(link).startswith(f"{folder}/") for link in links)


def test_more_shards_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    wanted = write_shards(tmp_path, [3] * 5)
    source = opened(tmp_path)
    assert open_below(tmp_path) == 0
    assert contents(source) == wanted
    assert open_below(tmp_path) == 2
    del source
    assert open_below(tmp_path) == 0


def batches(source, workers: int, steps: int, start: int = 0) -> list[torch.Tensor]:
    """The ids, labels and pixels of each step."""
    options = {"seed": 3, "position": start * 8, "global_batch": 8, "rank": 0, "ranks": 1}
    with train_batches(source, AUGMENTED, workers=workers, **options) as found:
        taken = [next(found) for _ in range(steps)]
    return [torch.cat([batch.ids[:, None], batch.labels[:, None], batch.images.flatten(1)], 1) for batch in taken]


def check_batches(source) -> None:
    """The *source* of 21 samples gives the same batches with workers, and goes on after a resume."""
    wanted = batches(source, 0, 6)
    assert sorted(torch.cat(wanted)[:21, 0].tolist()) == list(range(21))
    assert all(map(torch.equal, batches(source, 2, 6), wanted))
    assert all(map(torch.equal, batches(source, 0, 3, start=3), wanted[3:]))


def test_batches_do_not_depend_on_workers_and_go_on_after_a_resume(tmp_path):
    write_shards(tmp_path, [7, 9, 5])
    check_batches(opened(tmp_path))


def test_json_of_the_hub(tmp_path):
    members = [(f"{n}.{kind}", content) for n in range(3)
               for kind, content in (("jpg", b"x"), ("json", json.dumps({"label": n, "filename": "é"}).encode()))]  # fmt: skip
    write_tar(tmp_path / "imagenet1k-train-0000.tar", members)
    write_tar(tmp_path / "imagenet1k-validation-00.tar", members[:2])
    assert len(opened(tmp_path)) == 3 and len(opened(tmp_path, "val", classes=["a", "b", "c"])) == 1
