"""The average of the weights: its formula, its files, its evaluation, and runs that begin or drop it on resuming."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from bigvision.checkpoint.commands import run_export
from bigvision.engine import Engine
from bigvision.engine import ema as module
from tests.cli.test_mistakes import refused
from tests.distributed import run_ranks
from tests.engine.test_frozen import made, run_frozen
from tests.recipes import digests, lines, losses, recipe, run, write
from tests.training.planted import planted

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp1": (1, {"strategy": "ddp"}),
    "fsdp2": (2, {"strategy": "fsdp", "reshard": "never"}),
    "ddp2": (2, {"strategy": "ddp", "recompute": "blocks"}),
    "fsdp3": (3, {"strategy": "fsdp", "recompute": "blocks"}),
    "hybrid": (4, {"strategy": "fsdp", "replicas": 2}),
    "zero2": (2, {"strategy": "zero2"}),
    "zero3": (3, {"strategy": "zero3", "recompute": "blocks"}),
    "pipeline": (2, {"strategy": "pipeline"}),
    "offload2": (2, {"strategy": "zero2", "offload": "optimizer"}),
    "offload3": (2, {"strategy": "zero3", "offload": "all"}),
}
SHORT = ("ddp1", "fsdp2")
SOME = [pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in LAYOUTS]
DECAY = 0.8
SKIPPED = 18  # late, and a multiple of every `every`: what an earlier one did wrong would be forgotten again


def compare(plain: dict[str, Any]) -> tuple[int, float]:
    """Run *plain*, a step of which is skipped; how many tensors have an average, and how far these are from the formula."""
    followed: dict[str, Tensor] = {}
    found: list[Any] = [0, 0.0]
    every, warmup = plain["ema"].get("every", 1), plain["ema"].get("warmup", True)

    def live(engine: Any) -> dict[str, Tensor]:
        return {f.name: f.values.double().clone() for f in engine.fragments() if f.group == "model"}

    def step(self: Any, batch: Any) -> Any:
        followed.update({} if followed else live(self))
        result = spoiled_step(self, batch)
        assert result.skipped == (result.step == SKIPPED)
        if not result.skipped and result.step % every == 0:
            decay = min(DECAY, (1 + found[0]) / (10 + found[0])) if warmup else DECAY
            found[0] += 1
            for name, values in live(self).items():
                followed[name] = decay * followed[name] + (1 - decay) * values
        if result.step == 20:
            held = {f.name: f.values for f in self.fragments() if f.group == "ema"}
            for name, values in held.items():
                assert torch.allclose(values.double(), followed[name], rtol=1e-6, atol=1e-6), name
                if values.numel():
                    found[1] = max(found[1], float((values - live(self)[name]).abs().max()))
            assert int(self.ema.updates) == found[0]
            found[0] = len(held)
        return result

    # Small buckets, so that a large tensor is cut and small ones share a call.
    with planted("image", [SKIPPED - 1]), patch.object(module, "BUCKET", 1000):
        spoiled_step = Engine.train_step
        with patch.object(Engine, "train_step", step):
            run(plain)
    return found[0], found[1]


KINDS: dict[str, dict[str, Any]] = {"vit": {}, "resnet": {"every": 3, "warmup": False}}
PAIRS = [("ddp1", "resnet"), ("fsdp2", "vit")]
PAIRS += [pytest.param(name, kind, marks=pytest.mark.long) for name in LAYOUTS for kind in KINDS if (name, kind) not in PAIRS]


@pytest.mark.parametrize(("layout", "model"), PAIRS)
def test_the_average_follows_the_formula(tmp_path: Path, layout: str, model: str) -> None:
    """20 steps of several micro-batches, one of them skipped."""
    ranks, parallel = LAYOUTS[layout]
    plain = recipe(tmp_path, model, parallel=parallel, ema={"decay": DECAY, **KINDS[model]}, train={"micro_batch": 4})
    for tensors, distance in run_ranks(compare, ranks, plain):
        saved = load_file(tmp_path / "step-00000020" / "model.safetensors")
        assert tensors == sum(tensor.is_floating_point() for tensor in saved.values())
        assert distance > 1e-4 or ranks > 1, "an average that is the weights would pass as well"


def held(plain: dict[str, Any]) -> dict[str, int]:
    """Train a step: bytes of this rank's averages, of what they follow, and of the memory that the averages lie in."""
    found: dict[str, int] = {}

    def step(self: Any, batch: Any) -> Any:
        fragments = list(self.fragments())
        averages = [f.values for f in fragments if f.group == "ema" and f.values.numel()]
        lies_in = {values.untyped_storage().data_ptr(): values.untyped_storage().nbytes() for values in averages}
        found["ema"], found["storage"] = sum(values.nbytes for values in averages), sum(lies_in.values())
        followed = [f for f in fragments if f.group == "model" and f.values.is_floating_point()]
        found["model"] = sum(f.values.nbytes for f in followed)
        found["whole"] = 4 * sum(f.numel for f in followed)
        return plain_step(self, batch)

    plain_step = Engine.train_step
    with patch.object(Engine, "train_step", step):
        run(plain)
    return found


@pytest.mark.parametrize("layout", SOME)
def test_it_needs_four_bytes_for_each_number_that_a_rank_holds(tmp_path: Path, layout: str) -> None:
    """As docs/strategies.md has it: 4 P / S."""
    ranks, parallel = LAYOUTS[layout]
    plain = recipe(tmp_path, "vit", parallel=parallel, ema={"decay": DECAY}, train={"steps": 1})
    found = run_ranks(held, ranks, plain)
    assert all(one["ema"] == one["model"] for one in found)
    copies = {"ddp1": 1, "ddp2": 2, "hybrid": 2}.get(layout, 1)
    assert sum(one["ema"] for one in found) == copies * found[0]["whole"]
    assert all(one["storage"] == one["ema"] for one in found), "a view would hold on to more"
    assert max(one["ema"] for one in found) <= 1.2 * copies * found[0]["whole"] / ranks or layout == "pipeline"


def evaluated(folder: Path, plain: dict[str, Any], ema: bool) -> dict[str, float]:
    from bigvision import load_config
    from bigvision.training import evaluate_checkpoint

    return evaluate_checkpoint(folder, load_config(plain), ema=ema)


@pytest.mark.parametrize("layout", [pytest.param(name, marks=() if name == "fsdp2" else pytest.mark.long) for name in LAYOUTS])
def test_it_is_evaluated_saved_and_resumed(tmp_path: Path, layout: str) -> None:
    """Bit for bit; what is evaluated between is what is saved, and evaluating it changes nothing."""
    ranks, parallel = LAYOUTS[layout]

    def plain(name: str, evaluate: bool = True, resume: str = "auto", **keys: Any) -> dict[str, Any]:
        return recipe(
            tmp_path / name, "resnet", parallel=parallel | keys, ema={"decay": DECAY, "evaluate": evaluate},
            train={"steps": 8, "eval_every": 4, "micro_batch": 6}, checkpoint={"every": 4, "keep": 9, "resume": resume},
        )  # fmt: skip

    run_ranks(run, ranks, plain("whole"))
    middle, last = (tmp_path / "whole" / f"step-{step:08}" for step in (4, 8))
    written = digests(last)
    assert "ema.safetensors" in written
    run_ranks(run, ranks, plain("silent", evaluate=False))
    assert losses(tmp_path / "silent") == losses(tmp_path / "whole") and digests(tmp_path / "silent" / last.name) == written
    run_ranks(run, ranks, plain("on", resume=str(middle)))
    assert losses(tmp_path / "on") == losses(tmp_path / "whole")[4:] and digests(tmp_path / "on" / last.name) == written

    lone = plain("whole") | {"parallel": recipe(tmp_path)["parallel"]}
    by_step = {line["step"]: line for line in lines(tmp_path / "whole") if "val_ema_loss" in line}
    assert sorted(by_step) == [4, 8]
    for folder in (middle, last):
        for ema, prefix in ((True, "val_ema_"), (False, "val_")):
            line = by_step[int(folder.name[-8:])]
            (found,) = run_ranks(evaluated, 1, folder, lone, ema)
            assert found["loss"] == pytest.approx(line[f"{prefix}loss"], rel=1e-5), (folder, ema)
        assert line["val_ema_loss"] != pytest.approx(line["val_loss"], rel=1e-4)


@pytest.mark.parametrize("layouts", [("fsdp2",), pytest.param((*LAYOUTS,)[:-2], marks=pytest.mark.long)])
def test_every_strategy_writes_the_same_bytes(tmp_path: Path, layouts: tuple[str, ...]) -> None:
    def plain(name: str, layout: str, resume: str = "auto") -> dict[str, Any]:
        return recipe(
            tmp_path / name, "resnet", parallel=LAYOUTS[layout][1], ema={"decay": DECAY}, train={"steps": 3, "micro_batch": 4},
            checkpoint={"shard_size": "40kB", "resume": resume},
        )  # fmt: skip

    for first, others in ((layout, ("ddp1", *layouts)) for layout in layouts):
        run_ranks(run, LAYOUTS[first][0], plain(first, first))
        saved = tmp_path / first / "step-00000003"
        written = digests(saved)
        assert sum(name.startswith("ema-") for name in written) > 2
        for other in others:
            run_ranks(run, LAYOUTS[other][0], plain(f"{first}-{other}", other, str(saved)))
            assert digests(tmp_path / f"{first}-{other}" / saved.name) == written, f"{first} resumed as {other}"


def run_and_listen(plain: dict[str, Any]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run(plain)
    return said.getvalue()


def test_a_run_begins_it_drops_it_and_exports_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def plain(name: str, steps: int, resume: str = "auto", **ema: Any) -> dict[str, Any]:
        best = {"keep_best": "ema_top1"} if ema else {}
        return recipe(tmp_path / name, "resnet", train={"steps": steps}, ema=ema, checkpoint={"resume": resume} | best)

    def step(name: str, number: int) -> Path:
        return tmp_path / name / f"step-{number:08}"

    assert "average" not in run_ranks(run_and_listen, 1, plain("none", 2))[0]
    assert not [name for name in digests(step("none", 2)) if name.startswith("ema")]
    refused(["eval", str(step("none", 2)), "--ema"], "--ema:", "step-00000002 has no averaged weights", "ema.decay")
    refused(["eval", "resnet18", "--ema", "--data.val", "digits"], "--ema: resnet18 is a timm model")
    refused(["train", write(tmp_path, plain("best", 2) | {"checkpoint": {"keep_best": "ema_top1"}})], "keep_best: ema_top1")
    (said,) = run_ranks(run_and_listen, 1, plain("begun", 2, str(step("none", 2)), decay=0.5))
    assert "step-00000002 has no averaged weights: the average (ema.decay) begins at its weights" in said
    averaged, weights = (load_file(step("begun", 2) / f"{name}.safetensors") for name in ("ema", "model"))
    assert all(torch.equal(values, weights[name]) for name, values in averaged.items())
    (said,) = run_ranks(run_and_listen, 1, plain("begun", 4, decay=0.5))
    assert "has no averaged weights" not in said and "(EMA " in said

    target = tmp_path / "ema.safetensors"
    assert run_export([str(step("begun", 4)), str(target), "--ema"]) == 0
    model = timm.create_model("test_resnet", num_classes=10, act_layer="silu", checkpoint_path=str(target))
    averaged, weights = (load_file(step("begun", 4) / f"{name}.safetensors") for name in ("ema", "model"))
    assert not torch.equal(averaged["fc.weight"], weights["fc.weight"])
    assert all(torch.equal(values, (weights | averaged)[name]) for name, values in model.state_dict().items())

    (said,) = run_ranks(run_and_listen, 1, plain("dropped", 4, str(step("begun", 4))))
    assert "has averaged weights, which this run does not go on with: ema.decay is null" in said
    assert not [name for name in digests(step("dropped", 4)) if name.startswith("ema")]


@pytest.mark.parametrize(("layout", "kind"), [("ddp1", "head"), pytest.param("zero3", "stem", marks=pytest.mark.long)])
def test_what_is_frozen_has_no_average(tmp_path: Path, layout: str, kind: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    plain = made(tmp_path, **parallel) | {"ema": {"decay": DECAY}}
    run_ranks(run_frozen, ranks, plain, kind)
    folder = tmp_path / "step-00000006"
    stepped = {name.partition("/")[0] for name in load_file(folder / "optimizer.safetensors")}
    assert set(load_file(folder / "ema.safetensors")) == stepped
