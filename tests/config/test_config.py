"""Recipes and flags."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bigvision.config import Config, describe, load_config, parse_size, resolve
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
    assert load_config(Config().to_dict()) == Config()
    pairs = load_config({"model": {"image_size": [64, 32]}}, ["--data.image_range", "[-160, 240]"])
    assert pairs.model.image_size == (64, 32) and pairs.data.image_range == (-160.0, 240.0)
    path.write_text(yaml.safe_dump(pairs.to_dict()))
    assert load_config(path) == pairs


@pytest.mark.parametrize(
    ("recipe", "flags", "words"),
    [
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
        ({"data": {"image_range": [255, 0]}}, [], ["data.image_range: [255.0, 0.0]", "the smaller first"]),
        ({"data": {"image_range": [0, float("inf")]}}, [], ["data.image_range", "finite"]),
        ({"data": {"max_pixels": 0}}, [], ["data.max_pixels: 0"]),
        ({"optim": {"clip": 0}}, [], ["optim.clip"]),
        ({"optim": {"lr": 10**400}}, [], ["optim.lr", "a number"]),
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


@pytest.mark.parametrize("text", ["a: [", "- 1", "!!python/object/apply:os.system [ls]", "3"])
def test_a_recipe_that_is_not_a_mapping_of_sections(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=r"r\.yaml") as caught:
        load_config(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="No such file"):
        load_config(tmp_path / "missing.yaml")


def test_a_launcher_and_a_flag_that_disagree() -> None:
    overrides = {"parallel.precision": ("bf16", "ACCELERATE_MIXED_PRECISION")}
    assert load_config({"parallel": {"precision": "fp32"}}, [], overrides).parallel.precision == "bf16"
    assert load_config(None, ["--parallel.precision", "bf16"], overrides).parallel.precision == "bf16"
    with pytest.raises(UserError, match=r"--parallel\.precision fp32 contradicts ACCELERATE_MIXED_PRECISION"):
        load_config(None, ["--parallel.precision", "fp32"], overrides)
