"""Segmentation: masks beside images, models around timm's, losses and metrics of pixels, under every strategy."""

from __future__ import annotations

import io
import os
import re
import shutil
import struct
import zlib
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import bigvision
from bigvision import training
from bigvision.config import ModelConfig, load_config
from bigvision.data import open_source, transform
from bigvision.data.sources import open_both
from bigvision.data.sources.base import UnreadableSample
from bigvision.errors import UserError
from bigvision.models import blueprint, find_blocks
from bigvision.tasks import Segment
from tests.distributed import run_ranks
from tests.recipes import lines, recipe, run
from tests.tasks.scenes import Scenes

pytest.importorskip("segmentation_models_pytorch", reason="bigvision[segment] is not installed")

SMALL = {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 64, "decoder_dropout": 0.0}
IGNORE = 255


def save(folder: Path, name: str, image: Any, mask: Any, masks: str = "masks", images: str = "images") -> None:
    for inner, pixels in ((images, image), (masks, mask)):
        file = folder / inner / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        (pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels))).save(file)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes as files, in the layout of ADE20k; the 53 for validation divide over no number of ranks and batches."""
    root = tmp_path_factory.mktemp("scenes")
    for split, count in (("training", 64), ("validation", 53)):
        dataset = Scenes(count, "mask", seed=len(split))
        for index in range(count):
            image, mask = dataset[index]
            mask[0, :7] = IGNORE
            save(root, f"{split}/{index:03}", image.permute(1, 2, 0).numpy(), mask, masks="annotations")
    (root / "classes.txt").write_text("background\ndisc\nsquare\n<b>cross, or\n")
    return root


# Losses and metrics.


def pixels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(7, 5, 12, 10, generator=generator)
    targets = torch.randint(0, 4, (7, 12, 10), generator=generator, dtype=torch.uint8)
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = IGNORE
    targets[3] = IGNORE  # nothing to learn from it
    return outputs, targets


def segment(loss: str | None = None, classes: int = 5, ignore: int = IGNORE) -> Segment:
    task = Segment(loss=loss, ignore=ignore)
    task.prepare([str(number) for number in range(classes)], {})
    return task


def test_losses_are_sums_over_samples_of_what_they_are_called() -> None:
    outputs, targets = pixels()
    weight = segment().weight(targets)
    assert weight is not None and int(weight) == int((targets != IGNORE).sum())
    mean = F.cross_entropy(outputs, targets.long(), ignore_index=IGNORE)
    assert (segment("ce").loss(outputs, targets) / weight).item() == pytest.approx(mean.item(), rel=1e-6)
    expected = 0.0
    for output, target in zip(outputs.double().softmax(1), targets):
        known, found = target != IGNORE, []
        for label in set(target[known].tolist()):
            chances, given = output[label][known], (target[known] == label).double()
            found.append(1 - 2 * (chances * given).sum() / (chances.sum() + given.sum()))
        expected += float(sum(found) / len(found) * known.sum()) if found else 0.0
    assert segment("dice").loss(outputs, targets).item() == pytest.approx(expected, rel=1e-5)
    both = segment("ce+dice").loss(outputs, targets)
    assert both.item() == pytest.approx(mean.item() * int(weight) + expected, rel=1e-5)
    parts = sum(segment("ce+dice").loss(outputs[[n]], targets[[n]]) for n in range(len(outputs)))
    assert both.item() == pytest.approx(float(parts), rel=1e-6)


def test_metrics_are_those_of_torchmetrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    outputs, targets = pixels()
    outputs[:, 4] = -9.0  # a class that is nowhere
    task, valid = segment(), torch.tensor([True] * 5 + [False] * 2)
    outputs[6] = torch.nan  # padding may be anything
    sums = sum(task.measure(outputs[[n]], targets[[n]], valid[[n]]) for n in range(7))
    assert isinstance(sums, Tensor) and torch.equal(sums[1:], task.measure(outputs, targets, valid)[1:])
    found, classes = task.compute(sums, 5, None), [str(number) for number in range(5)]
    keys: dict[str, Any] = {"num_classes": 5, "ignore_index": IGNORE}
    ious = torchmetrics.JaccardIndex("multiclass", average=None, **keys)(outputs[:5], targets[:5].long())
    report = task.report(sums, 5, None, classes)["classes"]
    assert [row["iou"] for row in report[:4]] == pytest.approx(ious[:4].tolist(), rel=1e-6) and report[4]["iou"] is None
    assert found["miou"] == pytest.approx(ious[:4].mean().item(), rel=1e-6)
    right = torchmetrics.Accuracy("multiclass", average="micro", **keys)(outputs[:5], targets[:5].long())
    assert found["pixel_accuracy"] == pytest.approx(right.item(), rel=1e-6)
    # An ignored class has no part in the mean, whatever is predicted where it is.
    other = segment(ignore=0)
    sums = other.measure(outputs[:5], targets[:5].clamp(max=3), valid[:5])
    assert other.report(sums, 5, None, classes)["classes"][0]["iou"] is None


def test_predictions_are_masks_and_can_be_drawn() -> None:
    outputs, _ = pixels()
    task = segment()
    row, *_ = task.predict(task.scores(outputs), ["a"] * 5)
    assert row["prediction"].dtype == torch.uint8 and torch.equal(row["prediction"].long(), outputs[0].argmax(0))
    image = torch.full((3, 24, 20), 100, dtype=torch.uint8)
    drawn = task.draw(image, row)
    large = row["prediction"].repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert drawn.shape == image.shape and torch.equal((drawn != 100).any(0), large > 0)


# Data.


@pytest.mark.parametrize(
    ("images", "masks", "split"),
    [
        ("images", "masks", ""), ("Images", "annotations", ""), ("images/training", "annotations/training", "validation"),
        ("train/images", "train/masks", "val"), ("images/train", "masks/train", ""),
    ],
)  # fmt: skip
def test_folders_of_images_and_masks(tmp_path: Path, images: str, masks: str, split: str) -> None:
    for index in range(30):
        image = np.full((6, 8, 3), index, np.uint8)
        save(tmp_path, f"a/{index}", image, np.full((6, 8), index % 3, np.uint8), masks, images)
        if split:
            names = [name.replace("training", split).replace("train", split) for name in (masks, images)]
            save(tmp_path, f"b/{index}", image, np.full((6, 8), index % 2, np.uint8), *names)
    train, val = open_both(f"imagefolder:{tmp_path}", f"imagefolder:{tmp_path}", target="mask")
    assert train.classes == val.classes == ["0", "1", "2"] and "data.classes" in train.notes[0]
    assert (len(train), len(val)) == ((30, 30) if split else (27, 3))
    if not split:
        assert {train.key(i) for i in range(27)}.isdisjoint(val.key(i) for i in range(3))
    for source in (train, val):
        image, target = source.read(1)
        number = int(Path(source.where(1)).stem)
        value = number % 3 if not split or source is train else number % 2
        assert isinstance(image, bytes) and target.shape == (6, 8) and (target == value).all()
    assert open_source(f"imagefolder:{tmp_path}", "val", target="mask", classes=["x", "y", "z"]).classes == ["x", "y", "z"]


def test_every_kind_of_mask_has_its_values(tmp_path: Path) -> None:
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    palette = Image.fromarray(ids, "P")
    palette.putpalette([value for number in range(256) for value in (255 - number, number, 7)])
    kinds = {"grey": ids, "palette": palette, "wide": ids.astype(np.uint16), "one": Image.fromarray(ids > 5)}
    for name, mask in kinds.items():
        save(tmp_path, name, np.zeros((3, 4, 3), np.uint8), mask)
    palette.save(tmp_path / "masks" / "palette.png", bits=4)
    # Pillow writes no grey values of 4 bits.
    (tmp_path / "masks" / "nibbles.png").write_bytes(grey_of_4_bits(ids))
    shutil.copy(tmp_path / "images" / "grey.png", tmp_path / "images" / "nibbles.png")
    source = open_source(f"imagefolder:{tmp_path}", "train", target="mask", shared=False)
    assert len(source.classes) == 12
    for index in range(len(source)):
        name, target = Path(source.where(index)).stem, source.read(index).target
        assert target.dtype == torch.uint8 and np.array_equal(target.numpy(), ids > 5 if name == "one" else ids), name

    class Pairs(list[Any]):
        classes = tuple(map(str, range(12)))

    for mask in (ids, torch.from_numpy(ids.astype(np.int64))[None], palette, tmp_path / "masks" / "wide.png"):
        pair = Pairs([(Image.new("RGB", (4, 3)), mask)])
        assert np.array_equal(open_source(pair, "train", target="mask").read(0).target.numpy(), ids)
    del Pairs.classes
    assert len(open_source(Pairs([(Image.new("RGB", (4, 3)), ids)]), "train", target="mask").classes) == 12


def grey_of_4_bits(ids: np.ndarray) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(row[::2] << 4 | row[1::2]) for row in ids)
    head = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], 4, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda root: (root / "masks/1.png").unlink(),
            r"the image '.*images/1.png' has no mask of this name in masks/: add it",
        ),
        (lambda root: (root / "images/0.png").unlink(), r"the mask '.*masks/0.png' has no image of this name in images/"),
        (lambda root: (root / "masks/1.png").rename(root / "masks/1.jpg"), r"1.jpg' is no PNG, which masks are"),
        (lambda root: shutil.copy(root / "images/1.png", root / "images/1.jpg"), "of one name: remove one of them"),
        (lambda root: (root / "masks").rename(root / "mosks"), "has no folder masks/"),
        (
            lambda root: shutil.copytree(root / "masks", root / "annotations"),
            "annotations/ and masks/, which may both be meant",
        ),
    ],
    ids=["no mask", "no image", "jpeg", "twice", "no folder", "two folders"],
)
def test_files_that_do_not_belong_together_are_one_line(tmp_path: Path, spoil: Any, words: str) -> None:
    for index in range(3):
        save(tmp_path, str(index), np.zeros((6, 8, 3), np.uint8), np.zeros((6, 8), np.uint8))
    spoil(tmp_path)
    with pytest.raises(UserError, match=f"^data.train: .*{words}") as error:
        open_source(f"imagefolder:{tmp_path}", "train", target="mask", shared=False)
    assert "\n" not in str(error.value)


def test_a_mask_that_does_not_fit_is_an_unreadable_sample(tmp_path: Path) -> None:
    grey = np.zeros((6, 8), np.uint8)
    colours = Image.new("RGB", (8, 6))
    for name, mask in {"colour": colours, "id": grey + 3, "size": np.zeros((8, 6), np.uint8), "sound": grey + IGNORE}.items():
        save(tmp_path, name, np.zeros((6, 8, 3), np.uint8), mask)
    (tmp_path / "images" / "text.png").write_bytes((tmp_path / "images" / "sound.png").read_bytes())
    (tmp_path / "masks" / "text.png").write_text("no image")
    source = open_source(f"imagefolder:{tmp_path}", "val", target="mask", shared=False, classes=["a", "b", "c"])
    change, reasons = transform("photo", 32, train=False, ignore=IGNORE), {}
    for index in range(len(source)):
        try:
            change(*source.read(index))
        except UnreadableSample as error:
            reasons[Path(source.where(index)).stem] = str(error)
    assert set(reasons) == {"colour", "id", "size", "text"} and "has colours (RGB)" in reasons["colour"]
    assert "has the id 3, but classes are 0 to 2 and task.ignore is 255" in reasons["id"]
    assert "Mask is of [8, 6] pixels, but the image of [6, 8]" in reasons["size"]


@pytest.mark.parametrize("style", ["photo", "tiny", "digit"])
def test_masks_move_with_their_images(style: Any) -> None:
    """A pixel of class n has the colour 40 n: after crops, flips and shifts it still has."""
    ids = np.kron(np.arange(1, 7, dtype=np.uint8).reshape(2, 3), np.ones((16, 12), np.uint8))
    image = torch.from_numpy(np.repeat(ids[None] * 40, 3, 0))
    source = open_source([(image, ids)], "train", target="mask")  # type: ignore[arg-type]
    change = transform(style, (32, 48), train=True, interpolation="bilinear", ignore=IGNORE, scale=(0.3, 1.0))
    flipped = 0
    for seed in range(20):
        torch.manual_seed(seed)
        pixels, target = change(*source.read(0))
        assert target.shape == (32, 48) and set(target.unique().tolist()) <= {*range(1, 7), IGNORE}
        expected = torch.where(target == IGNORE, 0, target * 40)
        assert ((pixels[0].int() - expected.int()).abs() <= 2).float().mean() > (0.7 if style == "digit" else 0.8)
        flipped += int(IGNORE > target[8, 12] > target[8, -12])
        assert style == "photo" or seed or bool((target == IGNORE).any())
    assert (flipped > 0) == (style != "digit")


# Models.


@pytest.mark.parametrize(
    ("decoder", "name", "options", "size"),
    [
        ("upernet", "swin_tiny_patch4_window7_224", {"window_size": 2, "embed_dim": 24, "depths": [1, 1, 2, 1]}, 64),
        ("dpt", "vit_tiny_patch16_224", {"depth": 4}, (64, 32)),
        pytest.param("fpn", "convnext_atto", {}, 32, marks=pytest.mark.long),
        pytest.param("unet", "resnet18", {}, 64, marks=pytest.mark.long),
        pytest.param("dpt", "vit_small_patch16_dinov3", {}, 64, marks=pytest.mark.long),
        pytest.param("fpn", "hiera_tiny_224", {}, 224, marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_models_around_timms(tmp_path: Path, decoder: str, name: str, options: dict[str, Any], size: Any) -> None:
    """First values are exact without the model's memory, blocks are found, and the backbone takes timm's weights."""
    config = ModelConfig(name=name, image_size=size, options=options)
    around = Segment(decoder).model(load_config({"model": {"name": name, "image_size": size}}))
    plan = blueprint(config, 5, None, around)
    assert plan.recorded and not plan.notes and (plan.crop_mode, plan.crop_pct) == ("squash", 1.0)
    torch.manual_seed(3)
    made = around(name, **plan.arguments)
    expected = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    values = dict(plan.tensors(3))
    assert values.keys() == expected.keys() and all(torch.equal(values[key], expected[key]) for key in values)
    height, width = plan.image_size
    assert made.eval()(torch.zeros(1, 3, height, width)).shape == (1, 5, height, width)
    blocks = find_blocks(plan.module, plan.image_size)
    assert blocks.reason is None and any(block.path.startswith("encoder.model.") for block in blocks)
    # What timm's model has goes into the backbone, but for what the decoder does without.
    taken = {key: value for key, value in plan.arguments.items() if key not in ("pretrained", "num_classes")}
    plain = timm.create_model(name, **taken).state_dict()
    file = str(tmp_path / "timm.safetensors")
    save_file(plain, file)
    plan = blueprint(ModelConfig(name=name, image_size=size, options=options, weights=file), 5, None, around)
    loaded = dict(plan.tensors(3))
    flat = {re.sub(r"^(layers|stages)\.(\d)", r"\1_\2", key.replace("stem.", "stem_")): value for key, value in plain.items()}
    for key, value in loaded.items():
        inner = key.removeprefix("encoder.model.").removeprefix("model.")
        wanted = expected[key] if inner == key else flat.get(inner, plain.get(inner, expected[key]))
        assert torch.equal(value, wanted), key
        assert inner == key or inner in flat or inner in plain or key not in made.state_dict()


def test_weights_of_another_segmentation_run(tmp_path: Path) -> None:
    config = ModelConfig(name="convnext_atto", image_size=32)
    around = Segment("fpn").model(load_config({}))
    first = dict(blueprint(config, 5, None, around).tensors(1))
    save_file({key: value.contiguous() for key, value in first.items()}, tmp_path / "run.safetensors")
    for classes, fresh in ((5, False), (3, True)):
        given = ModelConfig(name="convnext_atto", image_size=32, weights=str(tmp_path / "run.safetensors"))
        plan = blueprint(given, classes, None, around)
        found = dict(plan.tensors(2))
        same = {key for key in found if torch.equal(found[key], first[key])} if not fresh else set(first)
        assert same == set(first) and torch.equal(found["decoder.p5.weight"], first["decoder.p5.weight"])
        assert any("segmentation_head.0" in note for note in plan.notes) == fresh


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"task": {"decoder": "fpn"}},
            "task.decoder: fpn cannot be built around vit_tiny_patch16_224 .*: use dpt, which takes",
        ),
        (
            {"model": {"name": "eva02_tiny_patch14_224", "image_size": 224, "options": {}}},
            "what the task builds around eva02_ti",
        ),
        (
            {"model": {"image_size": 40}},
            "model.image_size: 40 is not a multiple of 32, which task.decoder: dpt needs: use 32 or",
        ),
        ({"task": {"decoder_options": {"readout": "add"}}}, "task.decoder_options.readout: dpt takes no such argument"),
        ({"task": {"loss": "bce"}}, "task.loss: bce, but task.name: segment has ce, dice or ce.dice: use one of them"),
        ({"task": {"mixup": 0.8}}, "task.mixup: 0.8, but task.name: segment has no use for it"),
        (
            {"data": {"train": "digits", "val": "digits"}},
            "data.train: digits does not give a mask the task needs: use imagefolder",
        ),
        ({"data": {"policy": "randaugment"}}, "data.policy: it turns and shifts images, but not their masks"),
    ],
    ids=["one scale", "patch 14", "size", "option", "loss", "mixup", "data", "policy"],
)
def test_what_cannot_be_done_is_one_line(tmp_path: Path, sections: dict[str, Any], words: str) -> None:
    plain = recipe(tmp_path, "vit", train={"steps": 1, "micro_batch": None})
    plain["task"] = {"name": "segment", "decoder": "dpt"}
    plain["model"] = plain["model"] | {"options": {"depth": 4, "patch_size": 8, "embed_dim": 48, "num_heads": 3}}
    for name, keys in sections.items():
        plain[name] = plain[name] | keys
    given = {} if sections.get("data", {}).get("train") else {"data": Scenes(24, "mask"), "val": Scenes(5, "mask")}
    with pytest.raises(UserError, match=words) as error:
        bigvision.train(plain, **given)
    assert "\n" not in str(error.value)


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigvision.tasks.segment.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^task.name: segment needs .*; install it with: pip install 'bigvision\[segment\]'$"):
        Segment()


# Runs; what is the same for all tasks is in test_strategies.py.


def plain_run(out: Path, scenes: Path, parallel: dict[str, Any], **sections: Any) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "data": {"train": f"imagefolder:{scenes}", "val": f"imagefolder:{scenes}", "crop_scale": [0.5, 1.0]},
        "task": {"name": "segment", "decoder_options": SMALL, "loss": "ce+dice"}, "parallel": parallel,
        "train": {"steps": 4, "micro_batch": 4}, "optim": {"name": "sgd", "lr": 0.001},
    }  # fmt: skip
    made = {name: keys.get(name, {}) | sections.get(name, {}) for name in {*keys, *sections} - {"model"}}
    plain = recipe(out, "pyramid", **made)
    return plain | {"model": plain["model"] | sections.get("model", {})}


def trained(plain: dict[str, Any]) -> tuple[list[float], dict[str, float]]:
    with redirect_stdout(io.StringIO()) as text:
        losses = run(plain)
    loads = [line for line in text.getvalue().splitlines() if line.startswith("load ")]
    # timm builds the backbone alone.
    assert all("load_checkpoint_in_model" in line for line in loads) and len(loads) == (os.environ["RANK"] == "0"), loads
    (last,) = [line for line in lines(Path(plain["out"])) if "val_loss" in line]
    return losses, {name: value for name, value in last.items() if name.startswith("val_")}


def evaluated(folder: Path, plain: dict[str, Any]) -> dict[str, float]:
    return training.evaluate_checkpoint(folder, load_config(plain))


UNET = {"decoder_channels": [32, 32, 24, 16, 16]}


@pytest.mark.long
@pytest.mark.parametrize(
    ("parallel", "sections"),
    [
        ({"strategy": "fsdp", "recompute": "blocks"}, {"ema": {"decay": 0.9}}),
        ({"strategy": "fsdp"}, {"task": {"decoder": "upernet", "decoder_options": {"decoder_channels": 16}}}),
        ({"strategy": "zero2"}, {"task": {"decoder": "unet", "decoder_options": UNET}}),
        ({"strategy": "pipeline"}, {"task": {"decoder": "unet", "decoder_options": UNET | {"decoder_use_norm": False}}}),
    ],
    ids=["recompute and average", "batch norm, fsdp", "batch norm, zero2", "unet in a pipeline"],
)
def test_other_decoders_and_settings(tmp_path: Path, scenes: Path, parallel: dict[str, Any], sections: dict[str, Any]) -> None:
    """A micro-batch is what one of two ranks has of a step, so that BatchNorm sees the same samples in one process."""
    keys = {"train": {"micro_batch": 12}} | sections
    plain = plain_run(tmp_path / "several", scenes, parallel, **keys)
    alone = plain_run(tmp_path / "alone", scenes, {"strategy": "ddp"}, **keys)
    (one,), several = run_ranks(trained, 1, alone), run_ranks(trained, 2, plain)
    assert several[0][0] == pytest.approx(one[0], rel=1e-5)


def test_metrics_are_those_of_one_process_also_without_a_sample(tmp_path: Path, scenes: Path) -> None:
    """The same weights on two ranks and on one; a mask of another size is one of the 53 for validation."""
    shutil.copytree(scenes, tmp_path / "data")
    Image.new("L", (5, 5)).save(tmp_path / "data" / "annotations" / "validation" / "052.png")
    keys: dict[str, Any] = {"train": {"steps": 1}, "data": {"bad_budget": 1}}
    plain = plain_run(tmp_path / "out", tmp_path / "data", {"strategy": "fsdp"}, **keys)
    _, metrics = run_ranks(trained, 2, plain)[0]
    line = (tmp_path / "out" / "bad_samples.jsonl").read_text()
    assert "052.png" in line and "Mask is of [5, 5] pixels" in line
    other = plain_run(tmp_path / "other", tmp_path / "data", {"strategy": "ddp"}, **keys)
    (alone,) = run_ranks(evaluated, 1, tmp_path / "out" / "step-00000001", other)
    assert alone.pop("loss") == pytest.approx(metrics.pop("val_loss"), rel=1e-6)
    assert {f"val_{name}": value for name, value in alone.items()} == metrics


def learned(out: str) -> dict[str, float]:
    plain = {
        "out": out,
        "model": {"name": "test_resnet", "image_size": 32},
        "task": {
            "name": "segment",
            "decoder": "unet",
            "loss": "ce+dice",
            "decoder_options": {"decoder_channels": [64, 48, 32, 24, 16]},
        },
        "data": {"augment": False, "workers": 0},
        "optim": {"lr": 4e-3, "warmup": 0.1},
        "parallel": {"strategy": "fsdp", "precision": "fp32", "device": "cpu"},
        "train": {"steps": 300, "global_batch": 32, "eval_every": 10000},
        "checkpoint": {"every": 10000},
        "monitor": {"progress": False},
    }  # fmt: skip
    return dict(bigvision.train(plain, data=Scenes(4096, "mask"), val=Scenes(200, "mask", seed=1)).metrics)


@pytest.mark.long
def test_scenes_are_segmented(tmp_path: Path) -> None:
    metrics = run_ranks(learned, 2, str(tmp_path))[0]
    assert metrics["miou"] >= 0.9, metrics
