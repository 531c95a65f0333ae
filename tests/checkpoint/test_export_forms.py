"""Exports for timm, for Hugging Face's hub and in ONNX: each is run before it gets its name, and says what its images are."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from bigvision.checkpoint import export as exporting
from bigvision.checkpoint.adapters import Adapters
from bigvision.checkpoint.forms import run_onnx
from bigvision.config import LoraConfig, ModelConfig
from bigvision.models import blueprint, model_card
from tests.checkpoint.real import command, contents, refused, write
from tests.recipes import MODELS, recipe

CLASSES = ["<script>alert(1)</script>", "apples, pears", "two\nlines", 'quoted "so"']
IMAGES = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def made(out: Path, name: str = "small", **model: Any) -> Path:
    """A step folder of a run with an average, whose model has the keys *model* beside those of `MODELS`."""
    keys = MODELS[name] | model
    lora = LoraConfig(**keys["lora"]) if "lora" in keys else None
    plan = blueprint(ModelConfig(**keys | {"lora": lora}), len(CLASSES))
    card = model_card(plan.module, plan.image_size, plan.mean, plan.std) | {"label_names": CLASSES}
    generator = torch.Generator().manual_seed(2)
    model_tensors: dict[str, Tensor] = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value.clone()
        for name, value in plan.tensors(0)
        if name in plan.module.state_dict()
    }
    averaged = {name: value * 0.7 for name, value in model_tensors.items() if value.is_floating_point()}
    config = recipe(out, "small") | {"model": keys}
    progress = {"step": 2, "samples": 48, "metrics": {"top1": 0.5}, "evaluated": 2, "config": config, "trained": []}
    documents = {"config.json": card, "progress.json": progress}
    return write(out, 2, {"model": model_tensors, "ema": averaged}, documents)


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("plain") / "out")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("lora") / "out", lora={"rank": 2, "alpha": 3.0})


def exported(*arguments: object) -> str:
    code, out, err = command("export", *arguments)
    assert (code, err) == (0, ""), err
    assert "largest difference" in out, out
    return out


def averaged(step: Path) -> Tensor:
    """What the averaged model returns."""
    model = timm.create_model(f"local-dir:{step}", pretrained=True)
    state = {name: value * 0.7 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    with torch.no_grad():
        return model.eval()(IMAGES)


@pytest.mark.parametrize("form", ["timm", "hf"])
def test_a_folder_for_timm_and_for_the_hub(step: Path, tmp_path: Path, form: str) -> None:
    exported(step, tmp_path / "x", "--format", form, "--ema")
    model = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True)
    with torch.no_grad():
        assert torch.allclose(model.eval()(IMAGES), averaged(step), atol=1e-6)
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["label_names"] == CLASSES == list(model.pretrained_cfg["label_names"])
    facts = {"input_size", "mean", "std", "interpolation", "crop_pct"}
    assert facts <= config["pretrained_cfg"].keys() and config["architecture"] == "vit_tiny_patch16_224"
    if form == "timm":
        assert "num_classes" in config["model_args"]
        return
    # transformers calls timm.create_model(architecture, num_classes=..., **model_args).
    assert config["num_classes"] == 4 and "num_classes" not in config["model_args"]
    card = (tmp_path / "x" / "README.md").read_text()
    assert "script" not in card and "moving average" in card and "after 2 steps: top1 0.5" in card and "random weights" in card
    exported(step, tmp_path / "x", "--force")
    assert sorted(os.listdir(tmp_path / "x")) == ["config.json", "model.safetensors"]
    (tmp_path / "x" / "README.md").write_text("mine")
    assert "holds README.md" in refused("export", step, tmp_path / "x", "--force")


def test_the_hub_learns_what_synsets_mean() -> None:
    from bigvision.checkpoint.forms import hub_config

    described = hub_config({"label_names": ["n01440764", "n01443537"]})["label_descriptions"]
    assert described["n01443537"].startswith("goldfish") and list(described) == ["n01440764", "n01443537"]
    assert "label_descriptions" not in hub_config({"label_names": ["n01440764", "goldfish"]})


def test_onnx_runs_any_number_of_images_and_carries_the_facts(step: Path, tmp_path: Path) -> None:
    import onnx

    said = exported(step, tmp_path / "x.onnx", "--format", "onnx", "--ema")
    assert "onnxruntime.InferenceSession(" in said
    expected = averaged(step)
    for count in (1, 5):
        assert torch.allclose(run_onnx(tmp_path / "x.onnx", IMAGES[:count])[0], expected[:count], atol=1e-4)
    facts = {one.key: one.value for one in onnx.load(tmp_path / "x.onnx").metadata_props}
    assert json.loads(facts["class_names"]) == CLASSES and json.loads(facts["mean"]) == [0.5, 0.5, 0.5]
    assert (facts["interpolation"], facts["crop_pct"], json.loads(facts["input_size"])) == ("bicubic", "0.9", [3, 32, 32])
    assert "moving average" in facts["weights"] and facts["step"] == "2"
    assert os.listdir(tmp_path) == ["x.onnx"] and (tmp_path / "x.onnx").stat().st_mode & 0o777 == 0o644


@pytest.mark.long
def test_onnx_as_a_folder_with_merged_adapters(adapted: Path, tmp_path: Path) -> None:
    exported(adapted, tmp_path / "x", "--format", "onnx")
    assert sorted(os.listdir(tmp_path / "x")) == ["config.json", "model.onnx", "model.onnx.data"]
    exported(adapted, tmp_path / "y")
    model = timm.create_model(f"local-dir:{tmp_path / 'y'}", pretrained=True)
    with torch.no_grad():
        assert torch.allclose(run_onnx(tmp_path / "x" / "model.onnx", IMAGES)[0], model.eval()(IMAGES), atol=1e-4)
    exported(adapted, tmp_path / "x", "--format", "onnx", "--force")


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("vit", "small")])
def test_every_family_in_onnx(tmp_path: Path, name: str) -> None:
    exported(made(tmp_path / "out", name), tmp_path / "x.onnx", "--format", "onnx", "--ema")


def test_other_outputs_leave_what_was_there(
    step: Path, adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Weights that are written wrongly, adapters that are merged wrongly, and what cannot be opened."""
    exported(step, tmp_path / "x")
    before = contents(tmp_path)
    bytes_of = exporting.bytes_of
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "bytes_of", lambda values: bytes_of(values * 1.01))
        for form, name in (("timm", "x"), ("timm", "y.safetensors"), ("hf", "y")):
            said = refused("export", step, tmp_path / name, "--format", form, "--force")
            assert "gives other outputs than the checkpoint's model: they differ by" in said
        code, out, _ = command("export", step, tmp_path / "unseen", "--no-check")
        assert code == 0 and "checked   no" in out
    exported(adapted, tmp_path / "z.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(Adapters, "rank", 4)
        assert "gives other outputs" in refused("export", adapted, tmp_path / "z", "--force")
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "write_new", lambda path, text: path.write_bytes(b"{}"))
        assert "timm cannot run what was exported" in refused("export", step, tmp_path / "z")
    assert {name: value for name, value in contents(tmp_path).items() if name.startswith("x")} == before
    assert sorted(os.listdir(tmp_path)) == ["unseen", "x", "z.safetensors"]


def test_a_model_that_timm_does_not_have_is_exported_unrun(tmp_path: Path) -> None:
    card = {"architecture": "Net", "model_args": {}}
    config = {"model": {"name": "python:Net"}}
    folder = write(
        tmp_path / "out", 1, {"model": {"a": torch.ones(3)}}, {"config.json": card, "progress.json": {"config": config}}
    )
    code, out, _ = command("export", folder, tmp_path / "x")
    assert code == 0 and "checked   no: model.name: the model of this run was given from Python (Net)" in out
    said = refused("export", folder, tmp_path / "y", "--format", "hf")
    assert "--format hf: the model cannot be built" in said and not (tmp_path / "y").exists()


def test_mistakes(step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "add --format onnx" in refused("export", step, tmp_path / "x.onnx")
    assert "end the name with .onnx" in refused("export", step, tmp_path / "x.safetensors", "--format", "onnx")
    assert "the hub takes a folder" in refused("export", step, tmp_path / "x.safetensors", "--format", "hf")
    assert "leave --dtype out" in refused("export", step, tmp_path / "x.onnx", "--format", "onnx", "--dtype", "bf16")
    assert "leave --shard-size out" in refused("export", step, tmp_path / "x", "--format", "onnx", "--shard-size", "1GB")
    assert "leave --format hf or --adapter out" in refused("export", step, tmp_path / "x", "--format", "hf", "--adapter")
    assert "'tflite'" in refused("export", step, tmp_path / "x", "--format", "tflite")
    monkeypatch.setattr(exporting, "ONNX_FILE_LIMIT", 1000)
    assert "name a folder" in refused("export", step, tmp_path / "x.onnx", "--format", "onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    said = refused("export", step, tmp_path / "x.onnx", "--format", "onnx")
    assert "--format onnx needs onnx, onnxscript and onnxruntime" in said and "pip install 'bigvision[onnx]'" in said
    assert os.listdir(tmp_path) == []
