"""The one entry under real launchers, and what its checkpoints are to other tools."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from bigvision.data import Source, normalize, open_source, transform
from tests.distributed import run_ranks
from tests.launch.commands import BIN, ROOT, TORCHRUN, launch, start
from tests.recipes import lines, losses, recipe, run, write_recipe


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The first epoch of the default recipe on two FSDP ranks, as ``make train`` runs it, but for its data workers."""
    return digits_run(tmp_path_factory, "--train.epochs", "1", "--data.workers", "0")


def digits_run(tmp_path_factory: pytest.TempPathFactory, *flags: str) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("digits") / "run"
    rest = ["launch/train.py", "--out", str(out), "--monitor.every", "1", *flags]
    return out, launch([*TORCHRUN, "--nproc-per-node", "2", *rest])


@pytest.mark.long
def test_the_default_recipe_learns_digits(tmp_path_factory: pytest.TempPathFactory) -> None:
    check_digits(*digits_run(tmp_path_factory), accuracy=0.97, kept=3)


def test_an_epoch_of_the_default_recipe(digits: tuple[Path, str]) -> None:
    check_digits(*digits, accuracy=0.8, kept=1)


def check_digits(out: Path, said: str, accuracy: float, kept: int) -> None:
    last = lines(out)[-1]
    folder = out / f"step-{last['step']:08}"
    assert last["val_top1"] >= accuracy, last
    for words in (f"checkpoint  {folder}", "resume ", f"bigvision eval {folder}", f'timm.create_model("local-dir:{folder}"'):
        assert words in said
    assert {"step", "samples", "loss", "lr", "grad_norm", "images_per_second", "peak_memory"} <= set(lines(out)[0])
    assert [line["step"] for line in lines(out) if "loss" in line] == list(range(1, last["step"] + 1))
    assert len(list(out.glob("step-*"))) == kept and (out / "latest").read_text().strip() == folder.name
    assert yaml.safe_load((out / "run.yaml").read_text())["parallel"]["strategy"] == "fsdp"


def measured_accuracy(model: torch.nn.Module, source: Source, size: int) -> float:
    """Top-1 accuracy by a plain loop that knows nothing of bigvision's engine."""
    card: Any = model.pretrained_cfg
    see = transform(source.style, size, train=False, interpolation=card["interpolation"], crop_pct=card["crop_pct"])
    hits = 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(source), 64):
            samples = [source.read(index) for index in range(start, min(start + 64, len(source)))]
            images = torch.stack([see(sample.image, sample.label)[0] for sample in samples])
            outputs = model(normalize(images, card["mean"], card["std"]))
            hits += int((outputs.argmax(dim=1) == torch.tensor([sample.label for sample in samples])).sum())
    return hits / len(source)


def test_other_tools_open_the_checkpoint(digits: tuple[Path, str], tmp_path: Path) -> None:
    from accelerate import load_checkpoint_in_model

    out, _ = digits
    folder = out / (out / "latest").read_text().strip()
    reached = lines(out)[-1]["val_top1"]
    source = open_source("digits", "val")

    assert measured_accuracy(timm.create_model(f"local-dir:{folder}", pretrained=True), source, 32) == pytest.approx(reached)

    plain = timm.create_model("convnext_atto", num_classes=10)
    plain.load_state_dict(load_file(folder / "model.safetensors"))
    assert measured_accuracy(plain, source, 32) == pytest.approx(reached)

    several = tmp_path / "several"
    config = yaml.safe_load((out / "run.yaml").read_text())
    config |= {"out": str(several), "checkpoint": {"resume": str(folder), "shard_size": "2MB"}}
    run_ranks(run_quietly, 2, config)
    shards = several / folder.name
    assert len(list(shards.glob("model-*.safetensors"))) > 4
    for place in (folder, shards):
        fresh = timm.create_model("convnext_atto", num_classes=10)
        load_checkpoint_in_model(fresh, str(place))
        assert measured_accuracy(fresh, source, 32) == pytest.approx(reached)


def run_quietly(config: dict[str, Any]) -> None:
    from bigvision import load_config, train

    train(load_config(config | {"data": config["data"] | {"workers": 0}, "monitor": {"progress": False}}))


@pytest.mark.long
def test_eval_prints_the_metrics_of_the_run(digits: tuple[Path, str]) -> None:
    out, _ = digits
    last = lines(out)[-1]
    folder = str(out / (out / "latest").read_text().strip())
    flags = ["--parallel.strategy", "ddp", "--data.workers", "0"]
    said = launch([*TORCHRUN, "--nproc-per-node", "2", "-m", "bigvision.cli", "eval", folder, *flags])
    metrics = json.loads(said)
    assert metrics["top1"] == last["val_top1"] and metrics["loss"] == pytest.approx(last["val_loss"], rel=1e-5)


def test_accelerate_launch_trains_the_same(tmp_path: Path) -> None:
    """Two CPU ranks under FSDP from the configuration file in launch/accelerate; the recipe asks for something else."""
    run_ranks(run, 2, recipe(tmp_path / "reference", parallel={"strategy": "fsdp"}))
    path = write_recipe(tmp_path, parallel={"strategy": "ddp", "precision": "bf16", "device": "auto"})
    accelerate = [str(BIN / "accelerate"), "launch", "--config_file", "launch/accelerate/fsdp_cpu.yaml"]
    launch([*accelerate, "launch/train.py", path])
    assert losses(tmp_path / "out") == losses(tmp_path / "reference")
    saved = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert (saved["parallel"]["strategy"], saved["parallel"]["precision"]) == ("fsdp", "fp32")


@pytest.mark.long
def test_accelerate_launch_with_a_setting_that_is_refused(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "launch/accelerate/fsdp_cpu.yaml").read_text())
    config["fsdp_config"]["fsdp_offload_params"] = True
    (tmp_path / "offload.yaml").write_text(yaml.safe_dump(config))
    command = [str(BIN / "accelerate"), "launch", "--config_file", str(tmp_path / "offload.yaml"), "launch/train.py"]
    done = start(command, timeout=300)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(said) == 1 and "FSDP_OFFLOAD_PARAMS=true" in said[0]


@pytest.mark.long
def test_one_rank_without_a_launcher(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, train={"steps": 2})
    launch([sys.executable, "launch/train.py", "--local_rank=0", path])
    assert len(losses(tmp_path / "out")) == 2
