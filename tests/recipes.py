"""Small runs of real timm architectures, for tests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

MODELS: dict[str, dict[str, Any]] = {
    "vit": {
        "name": "vit_tiny_patch16_224",
        "image_size": 32,
        "options": {"patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 3},
    },
    "small": {
        "name": "vit_tiny_patch16_224",
        "image_size": 32,
        "options": {"patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2},
    },
    "swin": {
        "name": "swin_tiny_patch4_window7_224",
        "image_size": 32,
        "options": {"window_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 3]},
    },
    "convnext": {
        "name": "convnext_atto",
        "image_size": 32,
        "options": {"depths": [1, 1, 2, 1], "dims": [18, 24, 36, 45]},
    },
    # Large enough for a decoder's norms to have several values.
    "pyramid": {
        "name": "convnext_atto",
        "image_size": 64,
        "options": {"depths": [1, 1, 2, 1], "dims": [16, 24, 32, 48]},
    },
    "eva02": {
        "name": "eva02_tiny_patch14_224",
        "image_size": 28,
        "options": {"patch_size": 7, "depth": 3, "embed_dim": 48, "num_heads": 3},
    },
    # Not ReLU, here and in "nfnet": a rounding difference that crosses its kink changes a gradient by a whole activation.
    "resnet": {"name": "test_resnet", "image_size": 32, "options": {"act_layer": "silu"}},
    "efficientnet": {"name": "test_efficientnet", "image_size": 32},
    "coat": {
        "name": "coat_tiny",
        "image_size": 32,
        "options": {"embed_dims": [16] * 4, "serial_depths": [1, 1, 1, 1], "parallel_depth": 2},
    },
    "nfnet": {"name": "nf_resnet26", "image_size": 32, "options": {"act_layer": "silu"}},
}


def recipe(out: Path, model: str = "vit", **sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration of a run of seconds; *sections* change single keys."""
    plain: dict[str, Any] = {
        "out": str(out),
        "model": MODELS[model],
        "data": {"train": "synthetic:53x32", "val": "synthetic:53x32", "workers": 0},
        "optim": {"lr": 1e-3, "warmup": 3},
        "parallel": {"strategy": "ddp", "precision": "fp32", "device": "cpu"},
        "train": {"steps": 20, "global_batch": 24, "micro_batch": 5, "eval_every": 1000},
        "checkpoint": {"every": 1000},
        "monitor": {"progress": False, "every": 1, "report": False},
    }
    for name, keys in sections.items():
        plain[name] = plain.get(name, {}) | keys
    if plain["parallel"]["strategy"] == "fsdp":
        plain["parallel"].setdefault("unit_size", "block")  # as on CUDA
    return plain


def write(folder: Path, plain: dict[str, Any]) -> str:
    """Write a configuration to a file, and return its path."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(plain))
    return str(folder / "recipe.yaml")


def write_recipe(folder: Path, **sections: dict[str, Any]) -> str:
    """Write a :func:`recipe` whose output is beside it, and return its path."""
    return write(folder, recipe(folder / "out", **sections))


def run(plain: dict[str, Any], **objects: Any) -> list[float]:
    """Train on this rank as *plain* says, with *objects* of the caller's, and return the loss of every step."""
    from bigvision import load_config, train

    train(load_config(plain), **objects)
    return losses(Path(plain["out"]))


def losses(out: Path) -> list[float]:
    """The logged losses of a run, in the order of the steps."""
    return [line["loss"] for line in lines(out) if "loss" in line]


def lines(out: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of the model, optimizer and averaged files of a checkpoint."""
    files = [path for path in sorted(folder.iterdir()) if path.name.startswith(("model", "optimizer", "ema"))]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
