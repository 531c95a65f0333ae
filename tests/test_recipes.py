"""Every file in recipes/ says where it is from, suits 8 GPUs, and takes its first steps, scaled down, on images made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bigvision import train
from bigvision.config import check_batches, load_config
from bigvision.data.sources.volumes import write_examples
from tests.data.photo_files import write_photos
from tests.distributed import run_ranks
from tests.docs.recipe_table import FACTS, PAGE, facts, page, recipes
from tests.recipes import losses

SMALL = {
    "deit3": ("deit3_small_patch16_224", "{patch_size: 8, depth: 2, embed_dim: 24, num_heads: 2}"),
    "vit_large_patch16_224": ("vit_tiny_patch16_224", "{patch_size: 8, depth: 2, embed_dim: 24, num_heads: 2}"),
    "vit_large_patch16_dinov3": ("vit_small_patch16_dinov3", "{patch_size: 8, depth: 2, embed_dim: 48, num_heads: 2}"),
    "vit_7b": ("vit_small_patch16_dinov3", "{patch_size: 8, depth: 2, embed_dim: 48, num_heads: 2, swiglu_mlp: true}"),
    "convnext": ("convnext_atto", "{depths: [1, 1, 1, 1], dims: [8, 16, 24, 32]}"),
}  # fmt: skip
"""A model of each family that takes milliseconds: the recipe's name begins with the key."""
FAST = ("dinov3_7b_lora.yaml", "imagenet_vit_b.yaml")
FILES = [pytest.param(path, id=path.stem, marks=() if path.name in FAST else pytest.mark.long) for path in recipes()]


def test_each_says_where_it_is_from() -> None:
    """The page's table has a row for each, made of these comments."""
    assert len(recipes()) >= 12
    assert [path.name for path in recipes() if not facts(path).keys() >= {"What", *FACTS}] == []
    assert PAGE.read_text() == page(), "run python -m tests.docs.recipe_table"


@pytest.mark.parametrize("path", recipes(), ids=lambda path: path.stem)
def test_each_suits_8_ranks(path: Path) -> None:
    config = load_config(path)
    check_batches(config, 8, 1)
    assert config.out == f"checkpoints/{path.stem}"


def write_masks(root: Path) -> None:
    """A mask with the ids 0 to 2 beside each image."""
    pixels = np.random.default_rng(1)
    for image in list(root.rglob("images/*")):
        mask = image.parents[1] / "masks" / f"{image.stem}.png"
        mask.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.integers(0, 3, (64, 64), dtype=np.uint8)).save(mask)


def first_steps(path: Path, flags: list[str]) -> list[float]:
    config = load_config(path, flags)
    train(config)
    return losses(Path(config.out))


@pytest.mark.parametrize("path", FILES)
def test_each_takes_its_first_steps(tmp_path: Path, path: Path) -> None:
    asked = load_config(path)
    segments = asked.task.name == "segment"
    flags: dict[str, Any] = {
        "out": tmp_path / "out", "train.steps": 2, "train.global_batch": 12, "train.micro_batch": 6, "train.eval_every": 2,
        "checkpoint.every": 2, "data.workers": 0, "parallel.device": "cpu", "monitor.every": 1, "monitor.progress": "false",
    }  # fmt: skip
    if path.stem == "volumes":
        write_examples(tmp_path / "data", volumes=4, size=8)
        flags |= dict.fromkeys(("data.train", "data.val"), f"volumes:{tmp_path / 'data'}?slices=5")
    elif path.stem != "digits":
        for part in ("train", "val"):
            write_photos(tmp_path / "data" / part, {"images": 12} if segments else {"cat": 12, "dog": 12}, (64, 64))
        if segments:
            write_masks(tmp_path / "data")
            flags |= {"task.decoder_options": "{decoder_channels: 16}", "model.sync_batchnorm": "false"}
        flags |= dict.fromkeys(("data.train", "data.val"), f"imagefolder:{tmp_path / 'data'}")
        name, options = next(small for begin, small in SMALL.items() if asked.model.name.startswith(begin))
        kept = ", ".join(f"{key}: {value}" for key, value in asked.model.options.items() if key not in options)
        options = options if not kept else f"{options[:-1]}, {kept}}}"
        flags |= {
            "model.name": name,
            "model.image_size": 64 if segments else 32,
            "model.options": options,
            "model.pretrained": "false",
        }
    given = [text for key, value in flags.items() for text in (f"--{key}", str(value))]
    (found,) = run_ranks(first_steps, 1, path, given)
    assert len(found) >= 2 and all(0 < loss < 10 for loss in found)
