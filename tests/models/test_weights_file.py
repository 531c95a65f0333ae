"""Weights in one file or several: what is opened, what is read, and what is said about those that do not work."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from bigvision.errors import UserError
from bigvision.models import blueprint, check_model
from bigvision.models.weights_file import INDEX, WeightsFile
from tests.models.configs import TINY, Model


def model(**changes) -> Model:
    return Model(**{"image_size": 32, "options": dict(TINY), **changes})


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, **TINY).state_dict()


def write_shards(folder: Path, state: dict[str, Tensor], count: int = 3) -> dict[str, str]:
    """Spread *state* over files in *folder*, with an index; return the index's map."""
    folder.mkdir(exist_ok=True, parents=True)
    names = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    placed = {name: names[n % count] for n, name in enumerate(state)}
    for file in names:
        save_file({name: tensor for name, tensor in state.items() if placed[name] == file}, folder / file)
    write_index(folder, placed)
    return placed


def write_index(folder: Path, placed: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


@pytest.mark.parametrize("name", ["", INDEX])
def test_shards_are_found_through_the_folder_or_the_index(state, tmp_path, name):
    write_shards(tmp_path / "shards", state)
    config = model(weights=str(tmp_path / "shards" / name))
    check_model(config)
    values = dict(blueprint(config, 10).tensors(0))
    assert all(torch.equal(values[name], tensor) for name, tensor in state.items())


def test_a_folder_with_one_file(state, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    check_model(model(weights=str(tmp_path)))
    values = dict(blueprint(model(weights=str(tmp_path)), 10).tensors(0))
    assert all(torch.equal(values[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_runs_of_any_type(tmp_path, monkeypatch, stored, wanted):
    from bigvision.models import weights_file

    monkeypatch.setattr(weights_file, "CHUNK", 56)
    whole = torch.randn(11, 7).to(stored)
    save_file({"first": torch.zeros(3), "whole": whole, "count": torch.tensor(5)}, tmp_path / "x.safetensors")
    file = WeightsFile(str(tmp_path / "x.safetensors"), "model.weights")
    for start, length in ((0, 77), (10, 30), (76, 1), (77, 0)):
        values = torch.full((length,), 7.0).to(wanted)
        file.read("whole", start, values)
        assert torch.equal(values, whole.view(-1)[start : start + length].to(wanted))
    assert torch.equal(file.whole("whole"), whole) and file.whole("count").item() == 5


def test_only_what_is_wanted_is_read(tmp_path, monkeypatch):
    whole = torch.randn(1000, 100)
    save_file({"first": torch.zeros(3), "whole": whole}, tmp_path / "x.safetensors")
    file = WeightsFile(str(tmp_path / "x.safetensors"), "model.weights")
    asked = []
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: asked.append(len(buffers[0])) or read(fd, buffers, offset))
    values = torch.empty(300)
    file.read("whole", 500, values)
    assert asked == [1200] and torch.equal(values, whole.view(-1)[500:800])


def test_short_reads_are_completed(tmp_path, monkeypatch):
    whole = torch.randn(100)
    save_file({"whole": whole}, tmp_path / "x.safetensors")
    file = WeightsFile(str(tmp_path / "x.safetensors"), "model.weights")
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read(fd, [buffers[0][:12]], offset))
    assert torch.equal(file.whole("whole"), whole)


def test_a_file_cut_after_it_was_opened_is_an_error(state, tmp_path):
    save_file(state, tmp_path / "x.safetensors")
    plan = blueprint(model(weights=str(tmp_path / "x.safetensors")), 10)
    os.truncate(tmp_path / "x.safetensors", 5000)
    with pytest.raises(UserError, match=r"^model\.weights: .*x\.safetensors: the file ends early; fetch or write it again"):
        dict(plan.tensors(0))
    (tmp_path / "x.safetensors").unlink()
    with pytest.raises(UserError, match=r"^model\.weights: .*No such file"):
        dict(plan.tensors(0))


def with_header(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ONE = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged or not safetensors"),
        (b"\x08\0\0\0\0\0\0\0{broken}", "damaged or not safetensors"),
        (with_header({"a": entry([2], 0, 8)}, b"1234"), "damaged or not safetensors"),
        (with_header({"a": entry([2], 0, 8)}, b"1" * 12), "damaged or not safetensors"),
        (with_header({"a": entry([3], 0, 8)}, b"1" * 8), "damaged or not safetensors"),
        (with_header({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"1234"), "damaged or not safetensors"),
        (with_header({}, length=2**62), "header too large"),
        (with_header({}, length=2**27), "header too large"),
        (with_header({"a": entry([-1], 0, 4)}, b"1234"), "damaged or not safetensors"),
        (with_header(b"{" + ONE + b"," + ONE + b"}", b"1234"), "a is there twice"),
        (b"PK\x03\x04" + b"1" * 8, "is a pickled file, as torch.save writes it; call it .pth and convert it once"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        (with_header({"a": entry([2], 0, 8)}, length=0x280), "damaged or not safetensors"),
        (with_header({"a\n": entry([4], 0, 4, "F8_E4M3")}, b"1234"), "holds a as F8_E4M3; convert it to one of F64, F32"),
    ],
)
def test_a_damaged_weights_file_is_one_line_before_a_model_is_built(tmp_path, content, words):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^model\.weights: {path} .*{words}") as caught:
        check_model(model(weights=str(path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("weights.pth", r"pickled file, .*: bigvision convert {path} {folder}/weights\.safetensors"),
        ("pytorch_model.bin", r"pickled file, .*: bigvision convert {path} {folder}/pytorch_model\.safetensors"),
        ("the weights.pt", r"bigvision convert '{path}' '{folder}/the weights\.safetensors'"),
        ("weights.npz", r"not a \.safetensors file, an index"),
        ("pytorch_model.bin.index.json", r"not a \.safetensors file, an index"),
    ],
)
def test_other_files_are_refused(tmp_path, name, words):
    path = tmp_path / name
    path.write_bytes(b"anything")
    with pytest.raises(UserError, match=rf"^model\.weights: {path} .*{words.format(path=path, folder=tmp_path)}"):
        check_model(model(weights=str(path)))


def test_folders_without_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match=rf"^model\.weights: {tmp_path} holds neither model\.safetensors nor {INDEX}; name "):
        check_model(model(weights=str(tmp_path)))
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickled file, .*: bigvision convert "):
        check_model(model(weights=str(tmp_path)))
    with pytest.raises(UserError, match="does not exist"):
        check_model(model(weights=str(tmp_path / "absent.safetensors")))


FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"


def missing(folder: Path, placed: dict[str, str]) -> None:
    (folder / SECOND).unlink()


def elsewhere(folder: Path, placed: dict[str, str]) -> None:
    write_index(folder, {**placed, "norm.weight": SECOND if placed["norm.weight"] == FIRST else FIRST})


def twice(folder: Path, placed: dict[str, str]) -> None:
    save_file({"norm.weight": torch.zeros(48)}, folder / "more.safetensors")
    write_index(folder, {**placed, "other": "more.safetensors"})


def both(folder: Path, placed: dict[str, str]) -> None:
    text = json.dumps({"weight_map": placed})
    (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"norm.weight": "{FIRST}", '))


def unlisted(folder: Path, placed: dict[str, str]) -> None:
    write_index(folder, {name: file for name, file in placed.items() if name != "norm.weight"})


def cut(folder: Path, placed: dict[str, str]) -> None:
    os.truncate(folder / SECOND, 3000)


def linked(folder: Path, placed: dict[str, str]) -> None:
    (folder / SECOND).rename(folder.parent / "outside.safetensors")
    (folder / SECOND).symlink_to(folder.parent / "outside.safetensors")


def pointing(name: Any):
    def point(folder: Path, placed: dict[str, str]) -> None:
        save_file({"norm.weight": torch.zeros(48)}, folder.parent / "outside.safetensors")
        write_index(folder, {**placed, "norm.weight": name})

    return point


def written(text: str):
    def write(folder: Path, placed: dict[str, str]) -> None:
        (folder / INDEX).write_text(text)

    return write


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (missing, rf"lists {SECOND}, which is missing beside it; fetch all of its files"),
        (elsewhere, r"lists norm\.weight in model-.*, which does not have it|does not list norm\.weight in model-"),
        (twice, r"has norm\.weight twice: in model-.* and in more\.safetensors"),
        (both, r"is not an index of weights \(norm\.weight is there twice\)"),
        (unlisted, r"does not list norm\.weight in model-.*, which has it"),
        (cut, rf"has a shard {SECOND} that is damaged or not safetensors"),
        (linked, rf"names '{SECOND}', which is a link to a file elsewhere"),
        (pointing("../outside.safetensors"), r"names '\.\./outside\.safetensors', which is not the plain name"),
        (pointing("/etc/outside.safetensors"), r"names '/etc/outside\.safetensors', which is not the plain name"),
        (pointing(".."), r"names '\.\.', which is not the plain name"),
        (pointing("model.bin"), r"names 'model\.bin', which is not the plain name of a \.safetensors file"),
        (pointing(7), r"names 7, which is not the plain name"),
        (written("{"), r"is not an index of weights \("),
        (written("[]"), r"is not an index of weights \(it has no weight_map\)"),
        (written('{"weight_map": {}}'), r"is not an index of weights \(it has no weight_map\)"),
        (written("[" * 100_000), r"is not an index of weights \(it is nested too deeply\)"),
    ],
)
def test_indexes_that_do_not_fit_their_shards(state, tmp_path, change, words):
    folder = tmp_path / "shards"
    change(folder, write_shards(folder, state))
    with pytest.raises(UserError, match=rf"^model\.weights: {folder} .*({words})") as caught:
        check_model(model(weights=str(folder)))
    assert "\n" not in str(caught.value)


def test_pretrained_takes_shards_from_the_cache_of_the_hub(state, tmp_path, monkeypatch):
    """There a snapshot's files are links to blobs."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    snapshot, blobs = tmp_path / "models--timm--vit" / "snapshots" / "abc", tmp_path / "models--timm--vit" / "blobs"
    write_shards(snapshot, state)
    blobs.mkdir()
    for n, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(n))
        file.symlink_to(f"../../blobs/{n}")
    asked = []

    def download(repository: str, file: str, revision: str | None) -> str:
        asked.append(file)
        if not (snapshot / file).exists():
            raise EntryNotFoundError(file)
        return str(snapshot / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    values = dict(blueprint(model(pretrained=True), 10).tensors(0))
    assert asked == ["model.safetensors", INDEX, *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))]
    assert torch.equal(values["norm.weight"], state["norm.weight"])
    with pytest.raises(UserError, match=r"a link to a file elsewhere"):
        (snapshot / FIRST).unlink()
        (snapshot / FIRST).symlink_to("../../../outside")
        check_model(model(weights=str(snapshot)))

    for kind, words in ((EntryNotFoundError, "only pickled files; .*bigvision convert"), (LocalEntryNotFoundError, "neither")):
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(kind("no such entry")))
        with pytest.raises(UserError, match=rf"^model\.pretrained: .*{words}"):
            blueprint(model(pretrained=True), 10)


def test_an_index_of_the_hub_names_no_paths(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    asked = []
    write_index(tmp_path, {"norm.weight": "../other.safetensors"})

    def download(repository: str, file: str, revision: str | None) -> str:
        asked.append(file)
        if file == "model.safetensors":
            raise EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError, match=r"^model\.pretrained: .* is not an index of weights \(it names '\.\./other"):
        blueprint(model(pretrained=True), 10)
    assert asked == ["model.safetensors", INDEX]


def raising(error: Exception):
    def fail(*_args: Any, **_kwargs: Any) -> str:
        raise error

    return fail
