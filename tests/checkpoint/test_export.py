"""Exports of real runs, opened by timm and Accelerate."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import accelerate
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bigvision.checkpoint import reader
from tests.checkpoint.real import command, contents, flip, refused, train, write
from tests.distributed import run_ranks
from tests.engine.test_memory import resident
from tests.recipes import MODELS

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def outputs(model: torch.nn.Module) -> Tensor:
    size = 28 if "eva02" in str(model.pretrained_cfg) else 32
    with torch.no_grad():
        return model.eval()(IMAGES[:, :, :size, :size])


def make(folder: Path) -> Any:
    """The checkpoint's model with other weights."""
    card = json.loads((folder / "config.json").read_text())
    torch.manual_seed(99)
    return timm.create_model(card["architecture"], **card["model_args"])


def exported(*arguments: object) -> str:
    code, out, err = command("export", *arguments)
    assert (code, err) == (0, ""), err
    return out


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("vit") / "out", 2)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BatchNorm's buffers, in files of 100 kB."""
    return train(tmp_path_factory.mktemp("resnet") / "out", 2, model="resnet", checkpoint={"shard_size": "100kB"})


LONG = [pytest.param(name, marks=pytest.mark.long) for name in MODELS if name not in ("vit", "resnet")]


@pytest.mark.parametrize("model", ["vit", "resnet", *LONG])
def test_timm_opens_a_file_and_a_folder(tmp_path: Path, model: str) -> None:
    folder = train(tmp_path / "out", 1, model=model)
    expected = outputs(timm.create_model(f"local-dir:{folder}", pretrained=True))
    said = exported(folder, tmp_path / "model.safetensors")
    assert "timm.create_model(" in said and f'checkpoint_path="{tmp_path / "model.safetensors"}"' in said
    card = json.loads((folder / "config.json").read_text())
    opened = timm.create_model(
        card["architecture"], checkpoint_path=str(tmp_path / "model.safetensors"), **card["model_args"]
    )  # fmt: skip
    assert torch.equal(outputs(opened), expected) and not torch.equal(outputs(make(folder)), expected)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert f"local-dir:{tmp_path / 'folder'}" in exported(folder, tmp_path / "folder")
    assert torch.equal(outputs(timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)), expected)
    assert contents(tmp_path / "folder") == {name: contents(folder)[name] for name in ("config.json", "model.safetensors")}
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_accelerate_opens_a_folder_of_several_files(tmp_path: Path, resnet: Path) -> None:
    """From a checkpoint in other parts; one file of the same checkpoint has the same tensors."""
    model, again = make(resnet), make(resnet)
    accelerate.load_checkpoint_in_model(model, str(resnet))
    said = exported(resnet, tmp_path / "folder", "--shard-size", "300kB")
    assert "accelerate.load_checkpoint_in_model(" in said
    files = sorted((tmp_path / "folder").glob("model-*.safetensors"))
    whole = [load_file(path) for path in files]
    assert len(files) > 2 and not (tmp_path / "folder" / "model.safetensors").exists()
    assert all(sum(t.nbytes for t in held.values()) <= 300_000 or len(held) == 1 for held in whole)
    accelerate.load_checkpoint_in_model(again, str(tmp_path / "folder"))
    assert torch.equal(outputs(again), outputs(model))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    exported(resnet, tmp_path / "one.safetensors")
    one = load_file(tmp_path / "one.safetensors")
    assert list(one) and all(torch.equal(one[name], value) for held in whole for name, value in held.items())
    assert len(one) == sum(map(len, whole)) == len(model.state_dict())


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.long)])
def test_half_precision_leaves_counters_alone(tmp_path: Path, resnet: Path, dtype: str) -> None:
    target = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    before = reader.PART
    reader.PART = 1000  # parts that end inside rows
    try:
        exported(resnet, tmp_path / "folder", "--dtype", dtype)
    finally:
        reader.PART = before
    held = load_file(tmp_path / "folder" / "model.safetensors")
    model = make(resnet)
    accelerate.load_checkpoint_in_model(model, str(resnet))
    assert set(held) == set(model.state_dict())
    for name, value in model.state_dict().items():
        wanted = value.to(target) if value.is_floating_point() else value
        assert held[name].dtype == wanted.dtype and torch.equal(held[name], wanted), name
    assert any(value.dtype == torch.int64 and value > 0 for value in held.values() if not value.is_floating_point())
    opened = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    assert torch.allclose(outputs(opened), outputs(model), atol=0.05, rtol=0.05)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.long
def test_exports_do_not_depend_on_the_strategy(tmp_path: Path, resnet: Path) -> None:
    """A state that another strategy, number of ranks and size of files took over and saved again."""
    seen = []
    for name, ranks, parallel, shard_size in (
        ("ddp", 1, {"strategy": "ddp"}, "5GB"),
        ("fsdp", 3, {"strategy": "fsdp"}, "40kB"),
        ("zero3", 2, {"strategy": "zero3"}, "1MB"),
        ("pipeline", 2, {"strategy": "pipeline"}, "200kB"),
    ):
        checkpoint = {"resume": str(resnet), "shard_size": shard_size}
        folder = train(tmp_path / name, 2, ranks, "resnet", parallel=parallel, checkpoint=checkpoint)
        for dtype in ("fp32", "bf16"):
            exported(folder, tmp_path / f"{name}-{dtype}.safetensors", "--dtype", dtype)
        exported(folder, tmp_path / f"{name}-folder", "--shard-size", "300kB")
        seen.append([digest(tmp_path / f"{name}-{dtype}.safetensors") for dtype in ("fp32", "bf16")])
        seen[-1].append(contents(tmp_path / f"{name}-folder"))
    assert all(entry == seen[0] for entry in seen) and len(seen[0][2]) > 4
    assert digest(tmp_path / "ddp-fp32.safetensors") == digest(tmp_path / "ddp" / "step-00000002" / "model.safetensors")


def test_the_order_in_a_file_is_that_of_the_exported_types(tmp_path: Path) -> None:
    values = {name: torch.arange(3.0) for name in "abc"}
    plain = with_ema(tmp_path / "plain", values, {})
    wide = with_ema(tmp_path / "wide", values | {"b": values["b"].double()}, {"c": values["c"].double()})
    exported(plain, tmp_path / "plain.safetensors", "--dtype", "bf16")
    exported(wide, tmp_path / "wide.safetensors", "--dtype", "bf16", "--ema")
    assert digest(tmp_path / "plain.safetensors") == digest(tmp_path / "wide.safetensors")


def with_ema(out: Path, model: dict[str, Tensor], ema: dict[str, Tensor]) -> Path:
    card = {"architecture": "made", "model_args": {}}
    return write(out, 1, {"model": model, "ema": ema}, {"config.json": card, "progress.json": {}})


def test_averaged_weights(tmp_path: Path, resnet: Path) -> None:
    """Buffers have no average and come from the model."""
    model = make(resnet)
    accelerate.load_checkpoint_in_model(model, str(resnet))
    averaged = {name: value * 0.5 for name, value in model.named_parameters()}
    folder = with_ema(tmp_path / "out", model.state_dict(), averaged)
    exported(folder, tmp_path / "ema.safetensors", "--ema")
    held = load_file(tmp_path / "ema.safetensors")
    assert set(held) == set(model.state_dict()) and len(averaged) < len(held)
    for name, value in held.items():
        assert torch.equal(value, averaged.get(name, model.state_dict()[name])), name
    exported(folder, tmp_path / "model.safetensors")
    assert all(torch.equal(v, model.state_dict()[name]) for name, v in load_file(tmp_path / "model.safetensors").items())
    said = refused("export", resnet, tmp_path / "none.safetensors", "--ema")
    assert f"--ema: {resnet} has no averaged weights" in said and "ema.decay" in said
    other = with_ema(tmp_path / "other", {"a": torch.ones(3)}, {"b": torch.ones(3)})
    assert "ema.safetensors has b [3]" in refused("export", other, tmp_path / "none.safetensors", "--ema")
    assert not (tmp_path / "none.safetensors").exists()


def test_a_damaged_checkpoint_is_named_and_leaves_nothing(tmp_path: Path, vit: Path) -> None:
    folder = shutil.copytree(vit, tmp_path / "step-00000002")
    model, size = folder / "model.safetensors", (folder / "model.safetensors").stat().st_size
    for target in (tmp_path / "x.safetensors", tmp_path / "x"):
        for at in (3, 100, model.read_bytes().index(b"head.bias"), size // 2, size - 1):
            flip(model, at)
            said = refused("export", folder, target)
            assert f"{folder} is not a valid checkpoint: model.safetensors" in said
            flip(model, at)
        flip(folder / "config.json", 30)
        assert "not a valid checkpoint: config.json differs" in refused("export", folder, target)
        flip(folder / "config.json", 30)
        data = model.read_bytes()
        model.write_bytes(data[:-1])
        assert "model.safetensors has" in refused("export", folder, target)
        model.unlink()
        model.symlink_to(vit / "model.safetensors")
        assert "model.safetensors is missing" in refused("export", folder, target)
        model.unlink()
        model.write_bytes(data)
    assert os.listdir(tmp_path) == ["step-00000002"]
    flip(folder / "optimizer.safetensors", -1)
    exported(folder, tmp_path / "x.safetensors")


def test_what_is_there_stays_unless_it_is_an_export(tmp_path: Path, vit: Path) -> None:
    file, folder = tmp_path / "x.safetensors", tmp_path / "folder"
    file.write_text("mine")
    assert f"{file} is there already: use --force" in refused("export", vit, file)
    assert file.read_text() == "mine"
    exported(vit, file, "--force")
    assert file.read_bytes() == (vit / "model.safetensors").read_bytes()
    folder.mkdir()
    exported(vit, folder)
    assert "use --force" in refused("export", vit, folder)
    exported(vit, folder, "--force", "--shard-size", "100kB")
    assert not (folder / "model.safetensors").exists() and (folder / "model.safetensors.index.json").exists()
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    assert f"{folder} holds notes.txt" in refused("export", vit, folder, "--force")
    (tmp_path / "a.safetensors").mkdir()
    assert "is not a file" in refused("export", vit, tmp_path / "a.safetensors", "--force")
    (tmp_path / "b").write_text("mine")
    assert "is not a folder" in refused("export", vit, tmp_path / "b", "--force")
    (tmp_path / "link.safetensors").symlink_to(file)
    (tmp_path / "link").symlink_to(folder)
    for link in ("link.safetensors", "link"):
        assert f"{tmp_path / link} is a link" in refused("export", vit, tmp_path / link, "--force")
    inside = contents(vit)
    for target in (vit / "model.safetensors", vit / "more", vit):
        assert vit.name in refused("export", vit, target, "--force")
    assert contents(folder) == before and contents(vit) == inside
    assert sorted(os.listdir(tmp_path)) == sorted([
        "x.safetensors", "folder", "a.safetensors", "b", "link.safetensors", "link"
    ])  # fmt: skip


@pytest.mark.parametrize("name", ["x.safetensors", "folder"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, vit: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(vit, tmp_path / name, "--dtype", "bf16")
    before = contents(tmp_path)

    def full(descriptor: int) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    rename = Path.rename

    def stuck(path: Path, target: Path) -> Path:
        return full(0) if ".tmp-" in path.name else rename(path, target)

    for holder, function, broken in ((os, "fsync", full), (Path, "rename", stuck)):
        with monkeypatch.context() as patch:
            patch.setattr(holder, function, broken)
            said = refused("export", vit, tmp_path / name, "--force")
        assert f"{tmp_path / name} cannot be written (No space left on device)" in said
        assert contents(tmp_path) == before and os.listdir(tmp_path) == [name]


def test_a_value_that_is_too_large_is_refused(tmp_path: Path) -> None:
    values = {"small": torch.tensor([1.0, torch.inf]), "big.weight": torch.tensor([-7e4, 2.0]), "count": torch.tensor(2**40)}
    folder = with_ema(tmp_path / "out", values, {})
    said = refused("export", folder, tmp_path / "x.safetensors", "--dtype", "fp16")
    assert "--dtype: big.weight has the value 70000" in said and "float16" in said
    assert os.listdir(tmp_path) == ["out"]
    exported(folder, tmp_path / "x.safetensors", "--dtype", "bf16")
    assert load_file(tmp_path / "x.safetensors")["small"].isinf().tolist() == [False, True]


def peak(*arguments: object) -> int:
    """Bytes resident at most while a command runs over what was resident before."""
    command(*arguments)  # what is imported stays
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = resident("VmRSS")
    code, _, err = command(*arguments)
    assert code in (0, 1), err
    return resident("VmHWM") - before


def test_a_part_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """A tensor of 120 MB, which is more than what is allowed."""
    values = torch.ones(30, 1000, 1000)
    a, b = (with_ema(tmp_path / name, {"a": tensor}, {}) for name, tensor in (("a", values), ("b", values + 1)))
    assert run_ranks(peak, 1, "export", a, tmp_path / "x", "--dtype", "bf16", "--force")[0] < 100e6
    assert run_ranks(peak, 1, "checkpoint", "diff", a, b)[0] < 100e6


def test_a_mistake_in_an_export_is_one_line_and_writes_nothing(tmp_path: Path, vit: Path) -> None:
    target = tmp_path / "x.safetensors"
    assert "STEP_FOLDER, FILE_OR_FOLDER" in refused("export")
    assert "not a step folder" in refused("export", tmp_path / "no", target)
    assert f"not a step folder: name one, such as {vit}" in refused("export", vit.parent, target)
    assert "'--em'; did you mean '--ema'?" in refused("export", vit, target, "--em")
    assert "'bf32'" in refused("export", vit, target, "--dtype", "bf32")
    assert "--shard-size: 'big'" in refused("export", vit, tmp_path / "x", "--shard-size", "big")
    assert "is one file" in refused("export", vit, target, "--shard-size", "1GB")
    assert "end the name with .safetensors" in refused("export", vit, tmp_path / "x.pth")
    assert f"there is no folder {tmp_path / 'no'}" in refused("export", vit, tmp_path / "no" / "x.safetensors")
    assert os.listdir(tmp_path) == []
