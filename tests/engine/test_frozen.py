"""Frozen parameters: a backbone under a head, a frozen stem, nothing to train; what they cost, and holding them in bf16."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigvision.checkpoint.commands import run_export
from bigvision.errors import UserError
from tests.cli.test_mistakes import refused
from tests.distributed import run_ranks
from tests.recipes import losses, recipe, run, write

LONG = pytest.mark.long
LAYOUTS = [
    ("fsdp", 3, {}), ("zero2", 2, {}), ("zero3", 3, {}), ("pipeline", 2, {}), pytest.param("zero1", 2, {}, marks=LONG),
    pytest.param("fsdp", 4, {"replicas": 2}, marks=LONG), pytest.param("pipeline", 4, {"stages": 2}, marks=LONG),
    pytest.param("pipeline", 2, {"schedule": "interleaved"}, marks=LONG),
]  # fmt: skip


def vit(num_classes: int = 10) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, embed_dim=48, num_heads=3, num_classes=num_classes
    )


def head_only(num_classes: int = 10) -> nn.Module:
    model = vit(num_classes).requires_grad_(False)
    model.get_classifier().requires_grad_(True)  # pyright: ignore
    return model


def frozen_stem(num_classes: int = 10) -> nn.Module:
    model = vit(num_classes)
    for name in ("patch_embed", "blocks.0"):
        model.get_submodule(name).requires_grad_(False)
    model.pos_embed.requires_grad_(False)  # pyright: ignore
    return model


def nothing(num_classes: int = 10) -> nn.Module:
    return vit(num_classes).requires_grad_(False)


KINDS = {"head": head_only, "stem": frozen_stem, "nothing": nothing}


def run_frozen(plain: dict[str, Any], kind: str) -> list[float]:
    from bigvision.config import load_config
    from bigvision.training import train_on_rank

    train_on_rank(load_config(plain), model=KINDS[kind])
    return losses(Path(plain["out"]))


def made(out: Path, strategy: str, precision: str = "fp32", **more: Any) -> dict[str, Any]:
    plain = recipe(
        out, train={"steps": 6, "micro_batch": 6}, optim={"lr": 1e-2},
        parallel={"strategy": strategy, "precision": precision, **more},
    )  # fmt: skip
    return plain | {"model": {"image_size": 32}}


@pytest.mark.parametrize(("strategy", "ranks", "more"), LAYOUTS)
@pytest.mark.parametrize("kind", ["head", pytest.param("stem", marks=pytest.mark.long)])
def test_losses_are_those_of_one_process(tmp_path: Path, kind: str, strategy: str, ranks: int, more: dict[str, Any]) -> None:
    reference = run_ranks(run_frozen, 1, made(tmp_path / "ddp", "ddp"), kind)[0]
    found = run_ranks(run_frozen, ranks, made(tmp_path / "other", strategy, **more), kind)[0]
    assert found == pytest.approx(reference, rel=1e-5) and len(set(reference)) == 6
    one, other = (tmp_path / name / "step-00000006" for name in ("ddp", "other"))
    assert load_file(one / "optimizer.safetensors").keys() == load_file(other / "optimizer.safetensors").keys()


@pytest.mark.parametrize("strategy", ["zero2", pytest.param("zero1", marks=LONG), pytest.param("zero3", marks=LONG)])
def test_frozen_weights_keep_their_bits_in_half_precision(tmp_path: Path, strategy: str) -> None:
    """DeepSpeed keeps fp32 values of what it trains only; a resumed run goes on from the same values."""
    run_ranks(run_frozen, 1, made(tmp_path / "ddp", "ddp"), "head")
    plain = made(tmp_path / "other", strategy, "bf16")
    plain["checkpoint"] = {"every": 3}
    whole = run_ranks(run_frozen, 3, plain, "head")[0]
    one, other = (load_file(tmp_path / name / "step-00000006" / "model.safetensors") for name in ("ddp", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one if not name.startswith("head"))
    assert not torch.equal(one["head.weight"], other["head.weight"])
    again = made(tmp_path / "again", strategy, "bf16")
    again["checkpoint"] = {"resume": str(tmp_path / "other" / "step-00000003")}
    assert run_ranks(run_frozen, 3, again, "head")[0] == whole[3:]


def refuse(plain: dict[str, Any]) -> str:
    try:
        run_frozen(plain, "nothing")
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "pipeline"])
def test_nothing_to_train_is_one_line(tmp_path: Path, strategy: str) -> None:
    for said in run_ranks(refuse, 2, made(tmp_path, strategy)):
        assert "all parameters" in said and "frozen" in said


# What is frozen costs no optimizer state and no traffic, and may be held in bf16.

RANKS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp2": (2, {"strategy": "ddp"}), "fsdp2": (2, {"strategy": "fsdp"}), "hybrid": (4, {"strategy": "fsdp", "replicas": 2}),
    "zero1": (2, {"strategy": "zero1"}), "zero2": (2, {"strategy": "zero2"}), "zero3": (2, {"strategy": "zero3"}),
    "pipeline": (2, {"strategy": "pipeline"}), "pipelines": (4, {"strategy": "pipeline", "stages": 2}),
}  # fmt: skip
HEAD, REST = 490, 95_040  # parameters of the small ViT's head, and of all else


class Traffic(TorchDispatchMode):
    """Notes how many elements each collective has."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [leaf.numel() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.calls.append((func.__name__.partition(".")[0], max(sizes, default=0)))
        return func(*args, **(kwargs or {}))


def costs(plain: dict[str, Any]) -> dict[str, Any]:
    """Train two steps: the collectives of the second, and the bytes that this rank holds for each group of fragments."""
    from bigvision.engine import Engine

    traffic, held = Traffic(), dict[str, float]()

    def second(self: Any, batch: Any) -> Any:
        if self.step == 0:
            return step(self, batch)
        with traffic:
            result = step(self, batch)
        for fragment in self.fragments():
            held[fragment.group] = held.get(fragment.group, 0.0) + fragment.values.nbytes / fragment.copy[1]
        return result

    step, Engine.train_step = Engine.train_step, second  # type: ignore[method-assign]
    try:
        run(plain)
    finally:
        Engine.train_step = step  # type: ignore[method-assign]
    return {"calls": traffic.calls, "held": held}


def parts(out: Path, trainable: Any, dtype: str = "bf16", steps: int = 2, **parallel: Any) -> dict[str, Any]:
    plain = recipe(out, parallel=parallel, train={"steps": steps, "micro_batch": 6}, checkpoint={"every": 4})
    return plain | {"model": plain["model"] | {"trainable": trainable, "frozen_dtype": dtype}}


@pytest.mark.parametrize("layout", [n if n in ("fsdp2", "zero2") else pytest.param(n, marks=LONG) for n in RANKS])
def test_what_is_frozen_has_no_state_and_no_traffic(tmp_path: Path, layout: str) -> None:
    """Exact, in elements of every reduction and in bytes of all ranks together."""
    ranks, parallel = RANKS[layout]
    found = run_ranks(costs, ranks, parts(tmp_path, "head", **parallel))
    for one in found:
        reduced = {size for name, size in one["calls"] if name.startswith(("allreduce", "_reduce", "reduce")) and size > 8}
        # Within a shard a replica exchanges half; of a pipeline the last stage has the head, and one rank alone of it.
        assert reduced <= {HEAD, HEAD // 2}
        if not layout.startswith("pipeline"):
            assert HEAD in reduced
    if layout == "pipeline":
        assert not any(name == "send" for name, _ in found[1]["calls"]), "no gradient goes back to what is frozen"
    held = {group: sum(one["held"].get(group, 0.0) for one in found) for group in ("model", "optimizer")}
    assert held == {"model": 4 * HEAD + 2 * REST, "optimizer": 2 * 4 * HEAD}


def run_given(plain: dict[str, Any], rounded: bool) -> list[float]:
    from bigvision.config import load_config
    from bigvision.training import train_on_rank

    torch.manual_seed(0)
    model = head_only()
    for parameter in model.parameters():
        if rounded and not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16().float()
    train_on_rank(load_config(plain), model=model)
    return losses(Path(plain["out"]))


@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("fp16", marks=LONG), pytest.param("amp_bf16", marks=LONG)])
def test_bf16_weights_are_the_rounded_ones(tmp_path: Path, precision: str) -> None:
    """The losses of a model that holds the same numbers in fp32, bit for bit."""
    expected, found = (
        run_ranks(run_given, 1, made(tmp_path / dtype, "ddp", precision) | {"model": {"image_size": 32, "frozen_dtype": dtype}},
                  dtype == "fp32")[0]
        for dtype in ("fp32", "bf16")
    )  # fmt: skip
    assert found == expected and len(set(found)) == 6
    one, other = (load_file(tmp_path / dtype / "step-00000006" / "model.safetensors") for dtype in ("fp32", "bf16"))
    assert all(torch.equal(one[name].float(), other[name].float()) for name in one)
    assert {t.dtype for n, t in other.items() if not n.startswith("head")} == {torch.bfloat16}


class Branches(nn.Module):
    """A BatchNorm, an LSTM and a layer whose weight is read past its name."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8)
        self.lstm, self.head, self.hidden = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 10), hidden
        self.requires_grad_(False)
        self.head.requires_grad_(True)

    def forward(self, images: Tensor) -> Tensor:
        weight = self.conv._parameters["weight"] if self.hidden else self.conv.weight
        x = self.norm(nn.functional.conv2d(images, weight, self.conv.bias, 8))  # type: ignore[arg-type]
        return self.head(self.lstm(x.flatten(2).transpose(1, 2))[0].mean(1))


def run_branches(plain: dict[str, Any], hidden: bool) -> str:
    from bigvision.config import load_config
    from bigvision.training import train_on_rank

    try:
        train_on_rank(load_config(plain), model=Branches(hidden))
    except UserError as error:
        return str(error)
    return ""


def test_what_bf16_does_not_fit(tmp_path: Path) -> None:
    plain = made(tmp_path / "a", "fsdp") | {"model": {"image_size": 32, "frozen_dtype": "bf16"}}
    assert run_ranks(run_branches, 2, plain, False) == ["", ""]
    saved = load_file(tmp_path / "a" / "step-00000006" / "model.safetensors")
    assert {n for n, t in saved.items() if t.dtype == torch.bfloat16} == {"conv.weight", "conv.bias"}
    (said,) = run_ranks(run_branches, 1, plain | {"out": str(tmp_path / "b")}, True)
    assert said.startswith("model.frozen_dtype: bf16, but the model's own code") and said.endswith("use fp32")


def test_resuming_with_other_parts_names_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both values and what to do; another name for the same parameters is no other choice."""
    plain = parts(tmp_path / "first", "head", strategy="ddp")
    run_ranks(run, 1, plain)
    saved = tmp_path / "first" / "step-00000002"
    path = write(tmp_path, plain | {"out": str(tmp_path / "second"), "train": plain["train"] | {"steps": 4}})

    def other(*flags: str) -> list[str]:
        return ["train", path, "--checkpoint.resume", str(saved), *flags]

    fix = f"--model.weights {saved}"
    refused(other("--model.trainable", "last:1"), "had model.trainable: head, this one has model.trainable: last:1", fix)
    refused(other("--model.frozen_dtype", "fp32"), "had model.frozen_dtype: bf16, this one has model.frozen_dtype: fp32", fix)
    named = plain | {"out": str(tmp_path / "third"), "train": plain["train"] | {"steps": 4}}
    named = named | {"model": named["model"] | {"trainable": ["head"]}, "checkpoint": {"resume": str(saved)}}
    assert len(run_ranks(run, 1, named)[0]) == 2

    fresh = copy.deepcopy(named) | {"out": str(tmp_path / "fresh"), "checkpoint": {}}
    fresh["model"] |= {"weights": str(saved), "trainable": "all", "frozen_dtype": "fp32"}
    assert len(run_ranks(run, 1, fresh)[0]) == 4

    weights = load_file(saved / "model.safetensors")
    for flags, dtype in (([], torch.bfloat16), (["--dtype", "fp32"], torch.float32)):
        target = tmp_path / f"{dtype}.safetensors"
        assert run_export([str(saved), str(target), *flags]) == 0
        exported = load_file(target)
        assert exported["pos_embed"].dtype == dtype and exported["head.weight"].dtype == torch.float32
        assert all(torch.equal(exported[name].float(), values.float()) for name, values in weights.items())
    model = timm.create_model(f"local-dir:{saved}", pretrained=True)
    assert all(torch.equal(values, weights[name].float()) for name, values in model.state_dict().items())
