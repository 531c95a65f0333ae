"""Pickled weights become safetensors by a command, which runs no code of theirs."""

from __future__ import annotations

import argparse
import io
import pickle
from collections import defaultdict, deque
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models import load_state_dict
from torch import nn

from bigvision.cli import main
from bigvision.errors import UserError
from bigvision.models import blueprint
from bigvision.models.convert import convert
from tests.models.configs import TINY, Model


def plain() -> dict[str, Any]:
    return {"weight": torch.arange(6.0).view(2, 3), "half": torch.ones(2).bfloat16(), "count": torch.tensor(7)}


def averaged() -> dict[str, Any]:
    return {name: tensor + 1 for name, tensor in plain().items()}


def prefixed(*prefixes: str) -> dict[str, Any]:
    return {"".join(prefixes) + name: tensor for name, tensor in plain().items()}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "in.pth", tmp_path / "out.safetensors"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (plain(), None),
        ({"state_dict": plain(), "epoch": 3}, "took 'state_dict', left out epoch"),
        ({"model": plain()}, "took 'model'"),
        ({"model": plain(), "model_ema": averaged()}, "took 'model_ema', left out model"),
        ({"state_dict": plain(), "state_dict_ema": averaged(), "args": argparse.Namespace(lr=1)}, "took 'state_dict_ema'"),
        ({"state_dict": plain(), "state_dict_ema": None}, "took 'state_dict', left out state_dict_ema"),
        (prefixed("module."), None),
        (prefixed("_orig_mod.", "module."), None),
        ({"model": prefixed("module.", "_orig_mod.")}, "took 'model'"),
    ],
)
def test_what_is_taken_is_what_timm_takes(files, content, said):
    source, target = files
    torch.save(content, source)
    lines = convert(str(source), str(target))
    found, theirs = load_file(target), load_state_dict(str(source))
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in theirs.items())
    assert lines[0] == f"wrote {target}: 3 tensors, 0.0 MB"
    assert (len(lines) == 1) if said is None else lines[1].startswith(said)
    with safe_open(target, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert {path.name for path in target.parent.iterdir()} == {"in.pth", "out.safetensors"}


@pytest.mark.parametrize(
    ("content", "names", "said"),
    [
        ({"blocks.0._orig_mod.weight": torch.ones(2), "n_averaged": torch.tensor(3)}, {"blocks.0.weight"}, None),
        (
            {"net": prefixed("model."), "optimizer": {"state": {0: plain()}}},
            prefixed("model."),
            "took 'net', left out optimizer",
        ),
        ({"teacher": {"backbone": plain()}, "epoch": 3}, prefixed("backbone."), "took 'teacher', left out epoch"),
        ({"model": plain(), "ema": {"module": averaged()}}, plain(), "took 'ema', left out model"),
        ({"state_dict": plain(), "best": np.float64(8.5), "n": np.arange(3)}, plain(), "took 'state_dict', left out best, n"),
        (
            {
                "model": plain(),
                "at": datetime(2024, 1, 31),
                "out": Path("runs/a"),
                "seen": defaultdict(list, a=[1]),
                "last": deque([1], 9),
            },
            plain(),
            "took 'model', left out at, out, seen, last",
        ),
    ],
)
def test_what_other_programs_write(files, content, names, said):
    source, target = files
    torch.save(content, source)
    lines = convert(str(source), str(target))
    assert load_file(target).keys() == set(names) and lines[1:] == ([said] if said else [])


def test_which_of_several_weights_is_taken(files):
    source, target = files
    torch.save({"teacher": averaged(), "student": plain(), "optimizer": {"state": {0: plain()}}}, source)
    with pytest.raises(UserError, match=r"only teacher, student; take one of them, such as --take teacher"):
        convert(str(source), str(target))
    with pytest.raises(UserError, match=r"has no weights 'tutor', only teacher, student"):
        convert(str(source), str(target), "tutor")
    assert main(["convert", str(source), str(target), "--take", "teacher"]) == 0
    assert torch.equal(load_file(target)["weight"], averaged()["weight"])


def test_shared_windows_and_transposed_tensors_and_what_is_none(files):
    source, target = files
    table = torch.randn(40, 5)
    tied = nn.Parameter(torch.randn(3, 4))
    content = {"tied": tied, "again": tied, "window": table[3:5], "turned": table.t(), "empty": torch.empty(0), "version": 2}
    torch.save(content, source)
    lines = convert(str(source), str(target))
    found = load_file(target)
    assert found.keys() == content.keys() - {"version"}
    assert all(torch.equal(found[name], content[name]) for name in found)
    assert target.stat().st_size < 4 * (2 * 12 + 10 + 200) + 600, "no window brings its whole storage along"
    assert "left out what are no tensors: version" in lines
    assert "again shares memory with tied: each has values of its own now" in lines


def test_the_older_format_of_torch(files):
    source, target = files
    torch.save(plain(), source, _use_new_zipfile_serialization=False)
    convert(str(source), str(target))
    assert torch.equal(load_file(target)["weight"], plain()["weight"])


class Evil:
    ran = False

    def __reduce__(self):
        return (_run, ())


def _run() -> dict[str, Any]:
    Evil.ran = True
    return plain()


def pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickled({"state_dict": plain(), "more": Evil()}), r"without running its code: it asks for .*_run"),
        (pickle.dumps({"a": Evil()}), "without running its code: Weights only load failed"),
        (pickled(nn.Linear(2, 2)), r"without running its code: it asks for .*Linear"),
        (pickled([torch.zeros(2)]), "holds a list, not weights by name"),
        (pickled({"teacher": plain(), "student": plain()}), "has no tensors by name, only teacher, student; take"),
        (pickled({"a": torch.zeros(2, 2).to_sparse()}), "only plain tensors, not sparse or quantized ones: a"),
        (pickled({"a\nb": 1, 3: 2}), "has no tensors by name, only a b, 3; take"),
        (b"no pickle at all", "cannot be read"),
        (b"<!DOCTYPE html>", "is a web page, not the file: download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a pointer of Git LFS"),
        (pickled(plain())[:-50], "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_what_cannot_be_converted(files, content, words):
    source, target = files
    source.write_bytes(content)
    with pytest.raises(UserError, match=rf"^convert: {source}.*{words}") as caught:
        convert(str(source), str(target))
    assert "\n" not in str(caught.value) and not Evil.ran
    assert list(target.parent.iterdir()) == [source]


def test_names_that_do_not_do(files, tmp_path):
    source, target = files
    torch.save(plain(), source)
    for wrong, words in (
        ((tmp_path / "absent.pth", target), "absent.pth is not a file"),
        ((source, tmp_path / "out.pth"), r"out.pth is no name for the result; let it end in \.safetensors"),
        ((source, tmp_path / "none" / "out.safetensors"), "there is no folder"),
    ):
        with pytest.raises(UserError, match=f"^convert: .*{words}"):
            convert(*map(str, wrong))
    convert(str(source), str(target))
    with pytest.raises(UserError, match=r"out\.safetensors exists already"):
        convert(str(source), str(target))
    with pytest.raises(UserError, match=r"is not pickled; set model\.weights to it as it is"):
        convert(str(target), str(tmp_path / "again.safetensors"))


def test_a_disk_that_is_full_leaves_nothing(files, monkeypatch):
    from bigvision.models import convert as module

    source, target = files
    torch.save(plain(), source)

    def full(_tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(UserError, match=r"^convert: .* cannot be written: No space left"):
        convert(str(source), str(target))
    assert list(target.parent.iterdir()) == [source]


def test_the_command_that_the_error_names_is_the_fix(files, capsys):
    source, _ = files
    torch.manual_seed(3)
    module = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, **TINY)
    torch.save({"state_dict": module.state_dict()}, source)
    config = Model(image_size=32, options=dict(TINY), weights=str(source))
    with pytest.raises(UserError) as caught:
        blueprint(config, 10)
    command = str(caught.value).partition("bigvision ")[2].split()
    assert main(command) == 0 and "took 'state_dict'" in capsys.readouterr().out
    config = replace(config, weights=command[-1])
    values = dict(blueprint(config, 10).tensors(0))
    assert all(torch.equal(values[name], tensor) for name, tensor in module.state_dict().items())
    assert main(command) == 2 and "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["in.pth"], ["in.pth", "out.safetensors", "more"], ["--fast", "in.pth"]])
def test_the_command_wants_two_files(arguments, capsys):
    assert main(["convert", *arguments]) == 2
    assert capsys.readouterr().err.startswith(
        "error: convert: name the pickled file and the one to write: bigvision convert IN"
    )
    assert main(["convert", "--help"]) == 0 and "usage: bigvision convert IN.pth" in capsys.readouterr().out
