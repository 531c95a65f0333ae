"""Distillation: what is learned from a frozen teacher, the same under every strategy, and nothing of it in a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bigvision.config import load_config
from bigvision.data import Batch
from bigvision.engine.state import local_tensor
from bigvision.errors import UserError
from bigvision.tasks.distill import Distill, FeatureMap
from tests.cli.test_mistakes import refused
from tests.distributed import run_ranks
from tests.recipes import MODELS, digests, recipe, run

KINDS = ("logits", "tokens", "features")
# Of another kind, width, image size and normalisation than the students.
TEACHER = {"name": "convnext_atto", "image_size": 64, "options": {"depths": [1, 1, 2, 1], "dims": [18, 24, 36, 45]}}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The step folders of two teachers."""
    found = {}
    for name, seed in (("one", 0), ("other", 1)):
        out = tmp_path_factory.mktemp(name)
        plain = recipe(out, train={"steps": 1, "micro_batch": None}, optim={"lr": 0.01, "warmup": 0}) | {"seed": seed}
        run_ranks(run, 1, plain | {"model": TEACHER})
        found[name] = out / "step-00000001"
    return found


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_loss_is_its_formula(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, told, labels = torch.randn(6, 10, generator=generator), torch.randn(6, 10, generator=generator), torch.arange(6)
    own = F.cross_entropy(outputs, labels, reduction="sum")
    soft, hard = (told / 3).softmax(1), (outputs / 3).softmax(1)
    expected = (1 - share) * own + share * 2.0 * 9 * (soft * (soft / hard).log()).sum()
    found = Distill("t", "logits", share, 3.0).loss_with_teacher(outputs, labels, told, 2.0)
    torch.testing.assert_close(found, expected)
    maps, others = torch.randn(6, 4, 2, 2, generator=generator), torch.randn(6, 7, 4, 4, generator=generator)
    task = Distill("t", "tokens", share, 1.0)
    found = task.loss_with_teacher((outputs, maps), labels, others, 1.0)
    assert task.map is not None or not share
    if task.map is not None:
        torch.testing.assert_close(task.map.T @ task.map, torch.eye(4))
        small = F.interpolate(torch.einsum("btyx,ts->bsyx", others, task.map), (2, 2), mode="bilinear", antialias=True)
        cosine = (F.normalize(maps, dim=1) * F.normalize(small, dim=1)).sum(1).mean((1, 2)).sum()
        torch.testing.assert_close(found, (1 - share) * own + share * (6 - cosine))


def test_feature_maps_of_all_layouts() -> None:
    images = torch.empty(2, 3, 32, 16)
    grid = torch.randn(2, 5, 4, 2)
    tokens = torch.cat([torch.zeros(2, 1, 5), grid.flatten(2).transpose(1, 2)], 1)
    for inner, prefix in ((tokens, 1), (grid, 0), (grid.permute(0, 2, 3, 1), 0)):
        torch.testing.assert_close(FeatureMap(prefix, 5)(inner, images), grid)
    with pytest.raises(UserError, match=r"task\.distill: tokens needs a feature map"):
        FeatureMap(0, 5)(tokens, images)


def student(out: Path, teacher: Path, kind: str, **sections: Any) -> dict[str, Any]:
    task: dict[str, Any] = {"teacher": str(teacher), "distill": kind, "distill_weight": 0.7}
    if kind == "tokens":  # the labels' losses are divided by the sum of these, the teacher's by the number of samples
        task["class_weights"] = [0.1, 2.0, 0.5, 1.0, 0.0, 3.0, 1.0, 1.0, 0.25, 1.0]
    keys = {
        "train": {"steps": 10, "micro_batch": 5},
        "optim": {"name": "sgd", "lr": 0.1},
        "checkpoint": {"every": 5},
        "task": task,
    }
    for name, values in sections.items():
        keys[name] = keys.get(name, {}) | values
    return recipe(out, "small", **keys)


def told(plain: dict[str, Any]) -> Tensor:
    """What the teacher of a run tells of some images."""
    from bigvision.runtime import start
    from bigvision.training.build import build_model

    config = load_config(plain)
    with start("cpu", config.parallel.replicas) as runtime:
        engine, _, _ = build_model(config, 10, runtime, steps=1, say=lambda text: None)
        assert engine.teacher is not None
        held = sum(local_tensor(p).numel() for p in engine.teacher.module.parameters())
        whole = sum(p.numel() for p in engine.teacher.module.parameters())
        expected = {"ddp": 1, "zero2": 1}.get(config.parallel.strategy, runtime.world_size / config.parallel.replicas)
        assert held <= 1.1 * whole / expected
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        place = torch.arange(2)
        outputs = engine.teacher(Batch(images, place, place, torch.ones(2, dtype=torch.bool)))
        engine.close()
        return outputs


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_tells_what_timm_computes(tmp_path: Path, teachers: dict[str, Path], kind: str) -> None:
    outputs = run_ranks(told, 1, student(tmp_path, teachers["one"], kind))[0]
    model: Any = timm.create_model(f"local-dir:{teachers['one']}", pretrained=True).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    inputs = F.interpolate((images / 255 - mean) / std, (64, 64), mode="bilinear", antialias=True)
    with torch.no_grad():
        inner = model.forward_features(inputs)
        expected = {
            "tokens": inner,
            "features": model.forward_head(inner, pre_logits=True),
            "logits": model.forward_head(inner),
        }
    torch.testing.assert_close(outputs, expected[kind], rtol=1e-4, atol=1e-5)


STRATEGIES = [
    pytest.param(2, {"strategy": "fsdp"}, id="fsdp 2"),
    pytest.param(3, {"strategy": "ddp"}, marks=pytest.mark.long, id="ddp 3"),
    pytest.param(3, {"strategy": "fsdp"}, marks=pytest.mark.long, id="fsdp 3"),
    pytest.param(4, {"strategy": "fsdp", "replicas": 2}, marks=pytest.mark.long, id="hybrid 2x2"),
    pytest.param(2, {"strategy": "zero2"}, marks=pytest.mark.long, id="zero2 2"),
    pytest.param(2, {"strategy": "zero3"}, marks=pytest.mark.long, id="zero3 2"),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, teachers: dict[str, Path]) -> dict[str, tuple[Path, list[float]]]:
    """The run of each kind on one rank: its folder and losses."""
    found = {}
    for kind in KINDS:
        out = tmp_path_factory.mktemp(kind)
        found[kind] = out, run_ranks(run, 1, student(out, teachers["one"], kind))[0]
    return found


@pytest.mark.parametrize(("ranks", "parallel"), STRATEGIES)
@pytest.mark.parametrize("kind", ["tokens", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("logits", "features"))])
def test_losses_are_those_of_one_process(
    tmp_path: Path, teachers: dict[str, Path], alone: dict[str, Any], kind: str, ranks: int, parallel: dict[str, Any]
) -> None:
    plain = student(tmp_path, teachers["one"], kind, parallel=parallel)
    out, expected = alone[kind]
    assert run_ranks(run, ranks, plain)[0] == pytest.approx(expected, rel=1e-5)
    assert len(expected) == 10 and expected[-1] != pytest.approx(expected[0], rel=1e-3)
    scalars = [json.loads((folder / "step-00000010/progress.json").read_bytes())["scalars"] for folder in (out, tmp_path)]
    assert scalars[0]["teacher"] == scalars[1]["teacher"], "the fingerprint does not depend on the strategy"
    run_ranks(told, ranks, plain)


@pytest.mark.parametrize(
    "strategy", ["ddp", pytest.param("zero3", marks=pytest.mark.long), pytest.param("fsdp", marks=pytest.mark.long)]
)
def test_it_resumes_bit_for_bit_and_no_other_teacher_goes_on(
    tmp_path: Path, teachers: dict[str, Path], alone: dict[str, Any], strategy: str
) -> None:
    ranks, out = (1, alone["tokens"][0]) if strategy == "ddp" else (2, tmp_path / "whole")
    parallel = {"strategy": strategy}
    if strategy != "ddp":
        run_ranks(run, ranks, student(out, teachers["one"], "tokens", parallel=parallel))
    from_middle = {"resume": str(out / "step-00000005")}
    again = student(tmp_path / "again", teachers["one"], "tokens", parallel=parallel, checkpoint=from_middle)
    run_ranks(run, ranks, again)
    assert digests(tmp_path / "again/step-00000010") == digests(out / "step-00000010")
    other = student(tmp_path / "other", teachers["other"], "tokens", parallel=parallel, checkpoint=from_middle)
    for error in run_ranks(mistake, ranks, other):
        assert error.startswith(f"task.teacher: {teachers['other']} has other weights (") and "name that one" in error


def mistake(plain: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        run(plain)
    return str(error.value)


def test_the_student_stays_timms(alone: dict[str, Any]) -> None:
    for kind in KINDS:
        folder = alone[kind][0] / "step-00000010"
        options = MODELS["small"]["options"] | {"img_size": 32, "num_classes": 10}
        names = timm.create_model("vit_tiny_patch16_224", **options).state_dict().keys()
        with safe_open(folder / "model.safetensors", "pt") as opened:
            assert set(opened.keys()) == set(names)
        timm.create_model(f"local-dir:{folder}", pretrained=True)


@pytest.mark.parametrize(
    ("flags", "words", "ranks"),
    [
        (["--task.distill", "tokens"], "task.distill: tokens needs task.teacher", 1),
        (
            ["--task.teacher", "T", "--task.distill", "tokens", "--task.temperature", "3"],
            "task.temperature: 3.0 is for task.distill",
            1,
        ),
        (["--task.teacher", "T", "--task.distill_weight", "1.5"], "task.distill_weight: 1.5 must be a share, at most 1", 1),
        (["--task.teacher", "s3://bucket/step"], "task.teacher: s3://bucket/step: weights are not read from URLs", 1),
        (["--task.teacher", "nowhere"], "task.teacher: nowhere is neither a timm model nor weights with timm's config.json", 1),
        (
            ["--task.teacher", "RUN"],
            "is neither a timm model nor weights with timm's config.json beside them: name a step folder",
            1,
        ),
        (["--task.teacher", "BARE"], "the classifier (head.fc.weight) starts fresh", 1),
        (["--task.teacher", "CUT"], "is damaged or not safetensors", 1),
        (
            ["--task.teacher", "T", "--model.num_classes", "11"],
            "has 10 classes, and the student 11: use a teacher of the same",
            1,
        ),
        (["--task.teacher", "T", "--data.train", "D", "--data.val", "D", "--data.classes", "C"], "has the classes '0', ...", 1),
        (["--task.teacher", "T", "--parallel.strategy", "pipeline"], "parallel.strategy: pipeline cannot run task.teacher", 2),
    ],
    ids=[
        "no teacher",
        "temperature",
        "weight",
        "url",
        "nowhere",
        "run folder",
        "no classifier",
        "damaged",
        "classes",
        "names",
        "pipeline",
    ],
)
def test_mistakes(tmp_path: Path, teachers: dict[str, Path], flags: list[str], words: str, ranks: int) -> None:
    cut = shutil.copytree(teachers["one"], tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:500])
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(teachers["one"] / "config.json", bare)
    weights = load_file(teachers["one"] / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "head.fc" not in name}, bare / "model.safetensors")
    (tmp_path / "classes.txt").write_text("\n".join("abcdefghij"))
    np.savez(tmp_path / "data.npz", images=np.zeros((40, 32, 32, 3), np.uint8), labels=np.arange(40) % 10)
    named = {"T": str(teachers["one"]), "RUN": str(teachers["one"].parent), "CUT": str(cut), "BARE": str(bare)}
    named |= {"D": f"arrays:{tmp_path}/data.npz", "C": str(tmp_path / "classes.txt")}
    base = ["train", "--model.name", "resnet10t", "--model.image_size", "32", "--data.train", "synthetic:53x32", "--data.val"]
    base += ["synthetic:53x32", "--data.workers", "0", "--out", str(tmp_path / "out"), "--parallel.device", "cpu"]
    refused([*base, *(named.get(flag, flag) for flag in flags)], words, ranks=ranks)
