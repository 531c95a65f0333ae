"""Recipes and flags."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from bigvision.config import Config, GroupConfig, ResizeConfig, describe, load_config, parse_size, resolve
from bigvision.errors import UserError


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {steps: 5, global_batch: 32}\noptim: {lr: 1e-4}\nmodel: {options: {depth: 2}}\n")
    config, origins = resolve(recipe, ["--train.steps", "7", "--out=2024", "--model.weights=null"])
    assert (config.train.steps, config.train.global_batch, config.optim.lr) == (7, 32, 1e-4)
    assert config.out == "2024" and config.model.options == {"depth": 2}
    assert origins["train.steps"] == "flag" and origins["train.global_batch"] == str(recipe)
    assert origins["seed"] == "default"
    assert f"steps: 7{'':<48}# flag" in describe(config, origins) or "# flag" in describe(config, origins)


def test_values_are_spelled_as_in_yaml() -> None:
    flags = "--parallel.compile true --train.steps null --checkpoint.shard_size 3MiB --optim.lr 1e-3 --optim.clip null"
    config = load_config(None, [*flags.split(), "--model.options", "{patch_size: 4}", "--optim.betas", "[0.9, 0.95]"])
    assert config.parallel.compile is True and config.train.steps is None and config.optim.clip is None
    assert config.model.options == {"patch_size": 4} and config.optim.betas == (0.9, 0.95)
    assert parse_size(config.checkpoint.shard_size, "k") == 3 * 2**20


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    config = load_config({"out": "x", "train": {"steps": 3}, "model": {"options": {"depth": 2}}})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert load_config(path) == config
    made = load_config(Config().to_dict())
    assert made == replace(Config(), out=made.out)
    part = load_config(None, ["--model.trainable", "[head, '*.norm?']", "--optim.groups", "[{match: head, lr_scale: 1e1}]"])
    assert part.model.trainable == ("head", "*.norm?") and part.optim.groups == (GroupConfig("head", 10.0),)
    assert load_config(part.to_dict()) == part
    assert load_config(None, ["--model.trainable", "last:2"]).model.trainable == "last:2"
    step = load_config(None, ["--optim.schedule", "step", "--optim.milestones", "[0.3, 0.6, 0.9]"])
    assert step.optim.milestones == (0.3, 0.6, 0.9) and load_config(step.to_dict()).optim == step.optim
    pairs = load_config({"model": {"image_size": [64, 32]}}, ["--data.image_range", "[-160, 240]"])
    assert pairs.model.image_size == (64, 32) and pairs.data.image_range == (-160.0, 240.0)
    path.write_text(yaml.safe_dump(pairs.to_dict()))
    assert load_config(path) == pairs
    sizes = load_config(None, ["--data.resize_schedule", "[{until: 0.5, image_size: [8, 9]}]", "--data.val_size", "64"])
    assert sizes.data.resize_schedule == (ResizeConfig(0.5, (8, 9)),) and sizes.data.val_size == 64
    path.write_text(yaml.safe_dump(sizes.to_dict()))
    assert load_config(path) == sizes


def test_a_step_has_one_spelling() -> None:
    """By which a start knows that it was named before."""
    for text, step in (("0002", "2"), (2, "2"), ("2", "2"), ("٢", "2"), ("²", "²"), ("never", "never"), ("-2", "-2")):
        assert load_config({"checkpoint": {"resume": text}}).checkpoint.resume == step


def test_options_of_the_model_may_be_numbers_with_an_exponent(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-6 as text, and timm would be given that."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("out: 1e3\nmodel: {options: {eps: 1e-6, name: '1e-6', more: {a: [-2E5, .5e1, e5, 1e]}}}\n")
    config = load_config(recipe)
    assert config.model.options == {"eps": 1e-6, "name": "1e-6", "more": {"a": [-2e5, 5.0, "e5", "1e"]}}
    assert config.out == "1e3" and repr(config.model.options["eps"]) == "1e-06"
    assert load_config(None, ["--model.options", "{eps: 1e-6}"]).model.options == {"eps": 1e-6}
    recipe.write_text("model.options: {eps: 1e-6}\n")
    assert load_config(recipe).model.options == {"eps": 1e-6}, "also under the dotted key"


@pytest.mark.parametrize(
    ("recipe", "flags", "words"),
    [
        ({"parallel": {"precision": "bf16\nfp32"}}, [], ['precision: "bf16\\nfp32"']),
        ({"out": b"run"}, [], ["out: !!binary", "is not a text"]),
        ({"modle": {}}, [], ["modle", "'model'"]),
        ({"model": {"nmae": "x"}}, [], ["model.nmae", "'model.name'"]),
        ({"model": 3}, [], ["model must be a section"]),
        ({"train": {"steps": "many"}}, [], ["train.steps: many", "whole number"]),
        ({"train": {"steps": True}}, [], ["train.steps: true"]),
        ({"train": {"steps": 1.5}}, [], ["train.steps: 1.5"]),
        ({"parallel": {"strategy": "fdsp"}}, [], ["parallel.strategy: fdsp", "ddp, fsdp", "'fsdp'"]),
        ({"model": {"options": [1]}}, [], ["model.options"]),
        ({"optim": {"betas": [0.9]}}, [], ["optim.betas"]),
        ({}, ["--train.stpes", "3"], ["--train.stpes", "'--train.steps'"]),
        ({}, ["--train.steps"], ["value is missing"]),
        ({}, ["--model.options", "{a"], ["--model.options", "YAML"]),
        ({}, ["stray"], ["stray"]),
        ({"checkpoint": {"shard_size": "5XB"}}, [], ["checkpoint.shard_size", "5XB", "5GB"]),
        ({"train": {"global_batch": 0}}, [], ["train.global_batch: 0"]),
        ({"model": {"image_size": 0}}, [], ["model.image_size: 0", "[height, width]"]),
        ({"model": {"image_size": [32, 0]}}, [], ["model.image_size: [32, 0]"]),
        ({"model": {"image_size": [32]}}, [], ["model.image_size: [32]", "list of 2 numbers"]),
        ({}, ["--model.image_size", "32x64"], ["model.image_size: 32x64"]),
        ({"data": {"val_size": [32, 0]}}, [], ["data.val_size: [32, 0]", "[height, width]"]),
        ({"data": {"resize_schedule": [{"until": 0.5}]}}, [], ["data.resize_schedule[0].image_size", "missing"]),
        ({"data": {"resize_schedule": [{"until": 0, "image_size": 8}]}}, [], ["data.resize_schedule[0].until: 0", "above 0"]),
        ({}, ["--data.resize_schedule", "[{until: 2, image_size: [0, 8]}]"], ["schedule[0].image_size: [0, 8]", "from 1 on"]),
        (
            {"data": {"resize_schedule": [{"until": 0.5, "image_size": 8}, {"until": 0.4, "image_size": 9}]}},
            [],
            ["data.resize_schedule[1].until: 0.4", "above 0.5"],
        ),
        (
            {"data": {"resize_schedule": [{"until": 0.5, "image_size": 8}, {"until": 9, "image_size": 9}]}},
            [],
            ["data.resize_schedule[1].until: 9", "all of them shares"],
        ),
        ({"data": {"image_range": [255, 0]}}, [], ["data.image_range: [255.0, 0.0]", "the smaller first"]),
        ({"data": {"image_range": [0, float("inf")]}}, [], ["data.image_range", "finite"]),
        ({"data": {"max_pixels": 0}}, [], ["data.max_pixels: 0"]),
        ({"optim": {"clip": 0}}, [], ["optim.clip"]),
        ({"ema": {"decay": 1.0}}, [], ["ema.decay", "below 1"]),
        ({}, ["--ema.every", "0"], ["ema.every"]),
        ({"optim": {"lr": 10**400}}, [], ["optim.lr", "a number"]),
        ({"optim": {"power": 2}}, [], ["optim.power: 2.0", "optim.schedule: cosine", "use poly"]),
        ({"optim": {"schedule": "constant", "min_lr": 1e-5}}, [], ["optim.min_lr: 1.0e-05", "constant", "poly or wsd"]),
        ({"optim": {"schedule": "wsd", "cooldown": 0.7, "warmup": 0.4}}, [], ["optim.cooldown: 0.7", "optim.warmup: 0.4"]),
        ({"optim": {"schedule": "step"}}, [], ["optim.milestones"]),
        ({"optim": {"schedule": "step", "milestones": [9, 3]}}, [], ["optim.milestones: [9.0, 3.0]", "rise"]),
        ({"optim": {"schedule": "step", "milestones": [0.5, 30]}}, [], ["optim.milestones: [0.5, 30.0]", "all shares"]),
        ({"optim": {"schedule": "step", "milestones": 0.5}}, [], ["optim.milestones: 0.5", "a list of numbers"]),
        ({"optim": {"min_lr": 0.01}}, [], ["optim.min_lr: 0.01", "0.001"]),
        ({"optim": {"min_lr": 0.002, "lr_base_size": 64}, "train": {"global_batch": 32}}, [], ["optim.min_lr", "0.0005"]),
        ({"optim": {"lr_base_scale": "sqrt"}}, [], ["optim.lr_base_scale: sqrt", "optim.lr_base_size"]),
        ({"optim": {"lr_base_size": 0}}, [], ["optim.lr_base_size: 0"]),
        ({"optim": {"groups": [{"match": "head", "lr_scal": 2}]}}, [], ["optim.groups[0]", "'lr_scal'", "'lr_scale'"]),
        ({"optim": {"groups": [{"match": "a"}, {"lr_scale": 2}]}}, [], ["optim.groups[1].match", "missing"]),
        ({"optim": {"groups": {"match": "head"}}}, [], ["optim.groups", "a list of mappings"]),
        ({"optim": {"groups": [{"match": "head", "lr_scale": 0}]}}, [], ["optim.groups[0].lr_scale: 0.0", "above 0"]),
        ({}, ["--optim.groups", "[{match: a, weight_decay: -1}]"], ["optim.groups[0].weight_decay: -1.0"]),
        ({"model": {"trainable": "heads"}}, [], ["model.trainable: 'heads'", "last:N", "[heads]"]),
        ({}, ["--model.trainable", "last:0"], ["model.trainable: 'last:0'", "from 1 on"]),
        ({"model": {"trainable": []}}, [], ["model.trainable: []", "nothing to train"]),
        ({"model": {"trainable": [3.5]}}, [], ["model.trainable[0]: 3.5"]),
        ({"train": {"epochs": 0}}, [], ["train.epochs"]),
        ({"task": {"label_smoothing": 1.0}}, [], ["task.label_smoothing"]),
        ({"parallel": {"strategy": "ddp", "replicas": 2}}, [], ["parallel.replicas: 2", "fsdp"]),
        ({"model": {"pretrained": True, "weights": "x"}}, [], ["model.pretrained", "model.weights"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(recipe: dict, flags: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(recipe, flags)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", ["not valid YAML", "line 1"]),
        ("- 1", ["must hold sections", "not a list"]),
        ("!!python/object/apply:os.system [ls]", ["not valid YAML", "python/object"]),
        ("3", ["must hold sections"]),
        ("# nothing\n", ["is empty"]),
        ("", ["is empty"]),
        ("train: {steps: 3}\noptim: {lr: 1}\ntrain: {epochs: 2}\n", ["train is written twice", "lines 1 and 3"]),
        ("train:\n  steps: 3\n  global_batch: 4\n  steps: 5\n", ["train.steps is written twice", "lines 2 and 4"]),
        ("model: {options: {depth: 2, depth: 3}}", ["model.options.depth is written twice", "line 1"]),
        ("train: {steps: 3}\ntrain.steps: 5\n", ["train.steps is written twice", "with a dot"]),
        ("train:\n\tsteps: 3\n", ["line 2", "tab", "spaces"]),
        ("seed: 010\n", ["line 1", "seed: 010", "octal"]),
        ("limits:\n  step: 10:00\n", ["line 2", "limits.step: 10:00", "base 60"]),
        ("a: &a [*a]", ["line 1", "contains itself"]),
        ("out: {{ folder }}", ["not valid YAML"]),
        ("seed: 1\n---\nseed: 2\n", ["not valid YAML", "another document"]),
        ("model: {name: on}", ["model.name: true", "in quotes"]),
        ("out: 1.10", ["out: 1.1", "in quotes"]),
        ("1: 2", ["unknown key '1'"]),
        (b"out: caf\xe9\n", ["line 1", "UTF-8"]),
    ],
)
def test_a_recipe_that_is_not_what_it_looks_like(tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError, match=r"r\.yaml") as caught:
        load_config(path)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


def test_what_yaml_reads_otherwise_and_is_meant_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    text = "optim: {lr: 1e-3, clip: 5e-1}\ntrain: {steps: 1e4, deterministic: yes}\n"
    text += "out: 2024-01-31\ncheckpoint: {resume: 200}\n"
    for content in (text.encode(), b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16")):
        path.write_bytes(content)
        config = load_config(path)
        assert (config.optim.lr, config.optim.clip, config.train.steps, config.train.deterministic) == (1e-3, 0.5, 10_000, True)
        assert (config.out, config.checkpoint.resume) == ("2024-01-31", "200")
    path.write_text("model:\n  options: {<<: &x {depth: 2, num_heads: 3}, depth: 4}\ntrain:\n  # steps: 3\n")
    assert load_config(path).model.options == {"depth": 4, "num_heads": 3}, "a merged key gives way, an empty section is one"


def test_paths_take_the_home_folder_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOT_SET", raising=False)
    for text, path in {
        "~/runs/a": f"{tmp_path}/runs/a", "~": str(tmp_path), "$HOME/a": f"{tmp_path}/a", "${SCRATCH}/a/": "/scratch/me/a",
        "runs/a/": "runs/a", "./a": "a", "a$HOME": "a$HOME", "2024": "2024", "null": "null",
    }.items():  # fmt: skip
        assert load_config(None, ["--out", text]).out == load_config({"out": text}).out == path
    tree = {"data": dict.fromkeys(("root", "trace", "classes"), "~/x"), "model": {"weights": "~/x"}}
    config = load_config(tree | {"checkpoint": {"resume": "~/x"}})
    data = config.data
    assert {data.root, data.trace, data.classes, config.model.weights, config.checkpoint.resume} == {f"{tmp_path}/x"}
    assert [load_config({"checkpoint": {"resume": word}}).checkpoint.resume for word in ("auto", "200")] == ["auto", "200"]
    for text, words in {
        "": "names nothing", "  ": "names nothing", " a": "space", "a\nb": "cannot be seen", "$NOT_SET/a": "NOT_SET is not set",
        "~nobody_of_that_name/a": "no home folder", "s3://bucket/a": "cannot be written to a URL yet", "gs:/b/a": "URL",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=f"^out: .*{words}") as caught:
            load_config({"out": text})
        assert "\n" not in str(caught.value)
    for section, key in (("model", "weights"), ("data", "root"), ("data", "classes"), ("checkpoint", "resume")):
        with pytest.raises(UserError, match=rf"^{section}\.{key}: https://host/x: .*URL"):
            load_config({section: {key: "https://host/x"}})
    for url in ("https://host/r.yaml", "s3://bucket/r.yaml"):
        with pytest.raises(UserError, match=f"^recipe {url}: .*not from URLs"):
            load_config(url)


@pytest.mark.parametrize(
    ("train", "model", "folder"),
    [
        ("imagefolder:pets", "vit_base_patch16_224", "pets-vit_base_patch16_224"),
        ("imagefolder:/data/pets/train/", "resnet50.a1_in1k", "pets-resnet50.a1_in1k"),
        ("webdataset:/data/in1k/train/flowers-{000..099}.tar", "resnet18", "flowers-resnet18"),
        ("webdataset:/data/flowers/train-{000..099}.tar", "resnet18", "flowers-resnet18"),
        ("parquet:hub/pets/data/train-*.parquet?image=img", "resnet18", "pets-resnet18"),
        ("0.7*imagefolder:A + 0.3*webdataset:B", "resnet18", "A-B-resnet18"),
        ("synthetic:53x32", "hf-hub:timm/resnet18.a1_in1k", "synthetic-resnet18.a1_in1k"),
        ("cifar10", "python:Net", "cifar10-Net"),
        ("python:Pets", "resnet18", "Pets-resnet18"),
        ("imagefolder:Blüten und Blätter", "resnet18", "Blüten-und-Blätter-resnet18"),
    ],
)
def test_out_is_made_of_recipe_data_and_model(tmp_path: Path, train: str, model: str, folder: str) -> None:
    tree = {"data": {"train": train}, "model": {"name": model}}
    said: list[str] = []
    config, origins = resolve(tree, say=said.append)
    assert (config.out, config.data.val) == (f"checkpoints/{folder}", train) and said == [f"out: {config.out}"]
    assert "model.name" in origins["out"] and origins["data.val"] == "data.train"
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(tree))
    assert load_config(tmp_path / "first.yaml").out == f"checkpoints/first-{folder}"
    assert load_config(tmp_path / "first.yaml", ["--out", "auto", "--data.val", "digits"]).out == f"checkpoints/first-{folder}"


def test_out_has_to_be_given_where_it_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for train in ("imagefolder:/", "imagefolder:---", " + ".join(f"imagefolder:a_long_name_{n}" for n in range(9))):
        with pytest.raises(UserError, match=r"^out: no folder .*--out"):
            load_config({"data": {"train": train}})
        assert load_config({"data": {"train": train}, "out": "x"}).out == "x"
    monkeypatch.chdir(tmp_path)
    assert load_config({"data": {"train": "imagefolder:."}}).out.startswith(f"checkpoints/{tmp_path.name}-")


def test_a_launcher_and_a_flag_that_disagree() -> None:
    overrides = {"parallel.precision": ("bf16", "ACCELERATE_MIXED_PRECISION")}
    assert load_config({"parallel": {"precision": "fp32"}}, [], overrides).parallel.precision == "bf16"
    assert load_config(None, ["--parallel.precision", "bf16"], overrides).parallel.precision == "bf16"
    with pytest.raises(UserError, match=r"--parallel\.precision fp32 contradicts ACCELERATE_MIXED_PRECISION"):
        load_config(None, ["--parallel.precision", "fp32"], overrides)
