"""Weights from files under every strategy: the right values, read and held only where they belong."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tests.distributed import run_ranks
from tests.engine.test_memory import resident
from tests.models.test_adapt import beit3
from tests.models.test_weights_file import write_shards
from tests.recipes import recipe, run

SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 3}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # A name, the file's options, the model's.
    "vit": ("vit_tiny_patch16_224", {**SMALL, "img_size": 32, "patch_size": 8}, {"img_size": 48}),
    "patch": ("vit_tiny_patch16_224", {**SMALL, "img_size": 32, "patch_size": 8}, {"patch_size": 4}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 8, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 3]},
        {"window_size": 4},
    ),
    "convnext": ("convnext_atto", {"depths": [1, 1, 2, 1], "dims": [18, 24, 36, 45]}, {}),
    "eva02": ("eva02_tiny_patch14_224", {**SMALL, "img_size": 28, "patch_size": 7}, {"img_size": 56}),
    "beit": ("beit_base_patch16_224", {**SMALL, "img_size": 32, "patch_size": 8}, {"img_size": 48}),
    "dinov3": ("vit_small_patch16_dinov3_qkvb", {**SMALL, "patch_size": 8, "img_size": 64}, {"img_size": 32}),
}
Layout = tuple[int, dict[str, Any]]
"""A number of ranks and the parallel section."""

LAYOUTS: list[Layout] = [
    (2, {"strategy": "ddp"}),
    (3, {"strategy": "fsdp"}),
    (3, {"strategy": "zero3"}),
    (2, {"strategy": "pipeline"}),
]
MORE: list[Layout] = [
    (4, {"strategy": "fsdp", "replicas": 2}),
    (2, {"strategy": "zero1"}),
    (2, {"strategy": "fsdp", "precision": "bf16"}),
    (4, {"strategy": "pipeline", "stages": 2}),
    (2, {"strategy": "zero3", "offload": "all"}),
]


def compare(plain: dict[str, Any], expected: str, classes: int) -> dict[str, Any]:
    """Build the model on this rank, compare what it holds with the file *expected*, and say what it read."""
    from bigvision.config import load_config
    from bigvision.runtime import start
    from bigvision.training.build import build_model

    asked: list[int] = []
    said: list[str] = []
    read = os.preadv
    os.preadv = lambda fd, buffers, offset: asked.append(sum(map(len, buffers))) or read(fd, buffers, offset)
    try:
        with start("cpu") as runtime:
            engine, plan, _ = build_model(load_config(plain), classes, runtime, steps=1, say=said.append)
            values = load_file(expected)
            held: dict[str, list[tuple[int, int]]] = {}
            runs = set(plan.runs())
            in_runs = 0
            for fragment in engine.fragments():
                if fragment.group == "model" and fragment.values.numel():
                    whole, end = values[fragment.name].view(-1), fragment.start + fragment.values.numel()
                    assert tuple(values[fragment.name].shape) == fragment.shape
                    assert torch.equal(fragment.values.detach(), whole[fragment.start : end]), fragment.name
                    held.setdefault(fragment.name, []).append((fragment.start, end))
                    in_runs += fragment.values.nbytes if fragment.name in runs else 0
            if hasattr(engine, "close"):
                engine.close()
            return {"held": held, "read": sum(asked), "in_runs": in_runs, "said": said, "computed": sorted(held.keys() - runs)}
    finally:
        os.preadv = read


def fresh(name: str, arguments: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(name, drop_path_rate=0.0, **arguments).state_dict()


def timms(folder: Path, key: str, classes: int, dtype: torch.dtype = torch.float32, shards: int = 0) -> dict[str, Any]:
    """Write the weights of one model with ten classes, and what timm makes of them for another; return ours."""
    name, theirs, ours = MODELS[key]
    torch.manual_seed(1)
    state = {n: t.to(dtype).contiguous() for n, t in timm.create_model(name, num_classes=10, **theirs).state_dict().items()}
    save_file(state, folder / "file.safetensors")
    options = {**theirs, **ours}
    card = {"file": str(folder / "file.safetensors"), "num_classes": 10, "label_offset": 0}
    arguments = {**options, "num_classes": classes}
    expected = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=card, **arguments).state_dict()
    if classes != 10:
        expected |= {n: t for n, t in fresh(name, arguments, 7).items() if n.startswith("head.") and "norm" not in n}
    save_file({n: t.contiguous() for n, t in expected.items()}, folder / "expected.safetensors")
    weights = folder / "file.safetensors"
    if shards:
        write_shards(folder / "shards", state, shards)
        weights = folder / "shards"
    size = options.pop("img_size", None)
    return {"name": name, "weights": str(weights), "image_size": size, "options": options}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the ranks have: the last bit of a resampled patch embedding (a pseudo-inverse) depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(folder: Path, key: str, layout: Layout, classes: int, **file: Any) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    ranks, parallel = layout
    plain = recipe(folder / "out", parallel=parallel, train={"micro_batch": None}) | {"seed": 7}
    plain["model"] = timms(folder, key, classes, **file)
    found = run_ranks(compare, ranks, plain, str(folder / "expected.safetensors"), classes)
    expected = load_file(folder / "expected.safetensors")
    for name, tensor in expected.items():
        covered, runs = 0, sorted(run for rank in found for run in rank["held"].get(name, ()))
        for begin, end in runs:
            assert begin <= covered, name
            covered = max(covered, end)
        assert covered == tensor.numel(), name
    return found


@pytest.mark.parametrize("layout", [*LAYOUTS, *(pytest.param(one, marks=pytest.mark.long) for one in MORE)], ids=str)
def test_every_rank_holds_timms_values(tmp_path: Path, layout: Layout) -> None:
    """Positions resampled, a fresh head, and of the rest no byte read that the rank does not hold."""
    for rank in check(tmp_path, "vit", layout, classes=4):
        # The position embedding is computed from all of the file's.
        assert rank["read"] == rank["in_runs"] + ("pos_embed" in rank["held"]) * 17 * 48 * 4
        assert set(rank["computed"]) <= {"pos_embed", "head.weight", "head.bias"}
    assert any("starts fresh" in note for note in rank["said"])


@pytest.mark.parametrize("key", [key for key in MODELS if key != "vit"])
def test_every_model_under_fsdp(tmp_path: Path, key: str) -> None:
    check(tmp_path, key, LAYOUTS[1], classes=10)


@pytest.mark.long
@pytest.mark.parametrize("layout", [*LAYOUTS, *MORE], ids=str)
@pytest.mark.parametrize("key", MODELS)
def test_every_model_under_every_layout(tmp_path: Path, key: str, layout: Layout) -> None:
    for classes in (10, 4):
        check(tmp_path / str(classes), key, layout, classes)


@pytest.mark.long
def test_half_precision_shards(tmp_path: Path) -> None:
    for layout in LAYOUTS[1:]:
        for rank in check(tmp_path / layout[1]["strategy"], "convnext", layout, 10, dtype=torch.bfloat16, shards=3):
            assert rank["read"] * 2 == rank["in_runs"]


def test_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    """Several files, other classes, another strategy."""
    plain = recipe(tmp_path / "first", train={"steps": 2}, checkpoint={"shard_size": "40kB"})
    run_ranks(run, 1, plain)
    folder = tmp_path / "first" / "step-00000002"
    state: dict[str, torch.Tensor] = {}
    for file in {*json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()}:
        state |= load_file(folder / file)
    name, options = plain["model"]["name"], plain["model"]["options"]
    head = fresh(name, {**options, "img_size": 32, "num_classes": 4}, 0)
    save_file({n: head[n] if n.startswith("head.") else t for n, t in state.items()}, tmp_path / "expected.safetensors")
    again = recipe(tmp_path / "second", parallel={"strategy": "fsdp"})
    again["model"] = {**plain["model"], "weights": str(folder)}
    found = run_ranks(compare, 2, again, str(tmp_path / "expected.safetensors"), 4)
    assert "starts fresh" in found[0]["said"][0] and set(found[0]["computed"]) <= {"head.weight", "head.bias"}


def cut_on_one_rank(plain: dict[str, Any]) -> str:
    from bigvision.config import load_config
    from bigvision.errors import UserError
    from bigvision.runtime import start
    from bigvision.training.build import build_model

    read = os.preadv
    with start("cpu") as runtime:
        if runtime.rank == 1:
            os.preadv = lambda fd, buffers, offset: 0
        try:
            build_model(load_config(plain), 10, runtime, steps=1, say=print)
        except UserError as error:
            return str(error)
        finally:
            os.preadv = read
    return ""


def test_what_one_rank_cannot_read_all_ranks_say(tmp_path: Path) -> None:
    plain = recipe(tmp_path / "out", parallel={"strategy": "fsdp"})
    plain["model"] = timms(tmp_path, "convnext", 10)
    for said in run_ranks(cut_on_one_rank, 3, plain):
        assert said.startswith("model.weights: ") and "file.safetensors: the file ends early; fetch" in said


M_MMAP_THRESHOLD = -3
"""Of malloc.h: larger pieces are given back to the system at once when they are freed."""


def peak_while_filling(plain: dict[str, Any]) -> dict[str, int]:
    """Bytes resident at most, mapped files included, over what is resident before the first value is there."""
    from bigvision.config import load_config
    from bigvision.engine import step as native
    from bigvision.runtime import start
    from bigvision.training.build import build_model

    # The allocator would else keep what is freed, and what is held next would not show, or for longer than it is held.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    found: dict[str, int] = {}
    fill = native.fill

    def measured(*arguments: Any) -> None:
        fragments = [fragment for fragment in arguments[2]]
        found["share"] = sum(fragment.values.nbytes for fragment in fragments)
        for fragment in fragments:
            fragment.values.detach().zero_()  # all of the shard is resident
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before = {field: resident(field) for field in ("VmRSS", "RssAnon", "RssFile")}
        fill(arguments[0], arguments[1], fragments, *arguments[3:])
        found.update({field: resident(field) - value for field, value in before.items()})
        found["peak"] = resident("VmHWM") - before["VmRSS"]

    native.fill = measured
    try:
        with start("cpu") as runtime:
            build_model(load_config(plain), 10, runtime, steps=1, say=print)
            return found
    finally:
        native.fill = fill
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 25)  # where it ends by itself


KINDS = [("fp32", 4), ("bf16", 4), ("computed", 4)]


@pytest.mark.parametrize(("kind", "ranks"), [("fp32", 2), *(pytest.param(*one, marks=pytest.mark.long) for one in KINDS)])
def test_a_rank_holds_its_shard_and_one_tensor(tmp_path: Path, kind: str, ranks: int) -> None:
    """86 M parameters: a whole copy, or the pages of a mapped file, would be hundreds of MB."""
    state = {name: torch.zeros(shape.shape) for name, shape in meta("vit_base_patch16_224").items()}
    if kind == "bf16":
        state = {name: tensor.bfloat16() for name, tensor in state.items()}
    elif kind == "computed":
        state = {name: tensor.contiguous() for name, tensor in beit3(state).items()}
    save_file(state, tmp_path / "file.safetensors")
    assert (tmp_path / "file.safetensors").stat().st_size > 170e6
    largest = 4 * 3072 * 768
    plain = recipe(tmp_path / "out", parallel={"strategy": "fsdp"})
    plain["model"] = {"name": "vit_base_patch16_224", "weights": str(tmp_path / "file.safetensors")}
    for found in run_ranks(peak_while_filling, ranks, plain):
        # Queries, keys and values are there, and what they are joined to.
        tensors = 1 if kind != "computed" else 2
        assert found["peak"] < tensors * largest + 4 * 2**20 < found["share"], found
        assert found["RssFile"] < 4 * 2**20, found


def meta(name: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=10).state_dict()
