"""ZeRO's numbers are those of one process, on any number of ranks."""

from __future__ import annotations

import ctypes
import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from bigvision.engine.zero import _pack, _unpack
from tests.distributed import run_ranks, start_ranks
from tests.engine.test_memory import peak_while_building
from tests.engine.test_parity import same_losses
from tests.engine.test_zero_memory import held
from tests.recipes import losses, recipe, run

STAGES = ("zero1", "zero2", "zero3")
EVERY = [(stage, ranks) for stage in STAGES for ranks in (1, 2, 3, 4)]
SOME = [("zero1", 1), ("zero1", 4), ("zero2", 2), ("zero2", 3), ("zero3", 2), ("zero3", 3)]


def compare(tmp_path: Path, layouts: list[tuple[str, int]], model: str = "vit", **sections: dict[str, Any]) -> None:
    parallel = sections.pop("parallel", {})
    reference = run_ranks(run, 1, recipe(tmp_path / "reference", model, **sections))[0]
    for strategy, ranks in layouts:
        plain = recipe(tmp_path / f"{strategy}-{ranks}", model, parallel={"strategy": strategy, **parallel}, **sections)
        same_losses(reference, run_ranks(run, ranks, plain, timeout=900)[0])  # zero3 compiles many small graphs


@pytest.mark.parametrize("micro_batch", [5, pytest.param(3, marks=pytest.mark.long)])
def test_losses_equal_those_of_one_process(tmp_path: Path, micro_batch: int) -> None:
    """Micro-batches of which the last one is short; clipping, decayed and other parameters, rates per layer."""
    optim = {"layer_decay": 0.7, "clip": 0.5}
    compare(tmp_path, SOME if micro_batch == 3 else SOME[3:5], optim=optim, train={"micro_batch": micro_batch})


@pytest.mark.long
@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("model", ["vit", "swin", "convnext", "eva02"])
def test_losses_of_every_model(tmp_path: Path, model: str, micro_batch: int | None) -> None:
    optim = {"layer_decay": 0.7, "clip": 0.5}
    compare(tmp_path, EVERY, model, optim=optim, train={"micro_batch": micro_batch, "global_batch": 24})


@pytest.mark.parametrize("stages", [STAGES[1:2], pytest.param(STAGES, marks=pytest.mark.long)])
def test_models_with_batchnorm(tmp_path: Path, stages: tuple[str, ...]) -> None:
    """Batch statistics are those of a rank's micro-batch, so one process has to cut the global batch alike."""
    compare(tmp_path, [(stage, 2) for stage in stages], "efficientnet", train={"micro_batch": 12})


@pytest.mark.long
def test_recompute_and_compile_change_no_loss_of_zero(tmp_path: Path) -> None:
    compare(tmp_path, [("zero1", 2), ("zero3", 3)], parallel={"recompute": "blocks"})
    compare(tmp_path, [("zero2", 2)], train={"micro_batch": 6}, parallel={"compile": True})


@pytest.mark.long
def test_compile_between_deepspeeds_hooks(tmp_path: Path) -> None:
    compare(tmp_path, [("zero3", 2)], train={"micro_batch": 6}, parallel={"compile": True})


@pytest.mark.long
def test_optimizers_without_clipping(tmp_path: Path) -> None:
    compare(tmp_path, [("zero1", 2), ("zero3", 3)], optim={"name": "sgd", "lr": 0.05, "clip": None})


@pytest.mark.long
@pytest.mark.parametrize(("stage", "offload"), [("zero2", "optimizer"), ("zero3", "all")])
def test_offload_steps_on_the_cpu_and_goes_on_bit_for_bit(tmp_path: Path, stage: str, offload: str) -> None:
    parallel = {"strategy": stage, "offload": offload}
    compare(tmp_path, [(stage, 2)], checkpoint={"every": 7, "keep": 9}, parallel=parallel)
    whole, resumed = tmp_path / f"{stage}-2", tmp_path / "resumed"
    run_ranks(run, 2, recipe(resumed, parallel=parallel, checkpoint={"resume": str(whole / "step-00000007")}))
    assert losses(resumed) == losses(whole)[7:]
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, other = (folder / "step-00000020" / file for folder in (whole, resumed))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.long
def test_half_precision_follows_fsdp(tmp_path: Path) -> None:
    """BatchNorm computes in fp32 under either."""
    for model, precision, relative in (("efficientnet", "bf16", 2e-2), ("vit", "fp16", 2e-4)):
        train = {"micro_batch": 12}
        name = f"{model}-{precision}"
        shared = {"precision": precision, "strategy": "fsdp"}
        reference = run_ranks(run, 2, recipe(tmp_path / name, model, parallel=shared, train=train))[0]
        for stage in STAGES:
            plain = recipe(tmp_path / f"{name}-{stage}", model, parallel=shared | {"strategy": stage}, train=train)
            assert run_ranks(run, 2, plain)[0] == pytest.approx(reference, rel=relative), (name, stage)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_goes_on_bit_for_bit(tmp_path: Path, precision: str) -> None:
    """The copies that compute are made anew from the fp32 weights of the checkpoint, also from fsdp's."""
    train = {"steps": 6, "micro_batch": 6}

    def plain(name: str, strategy: str, **checkpoint: Any) -> dict[str, Any]:
        parallel = {"strategy": strategy, "precision": precision}
        return recipe(tmp_path / name, parallel=parallel, train=train, checkpoint=checkpoint, optim={"schedule": "constant"})

    for stage in STAGES:
        run_ranks(run, 3, plain(stage, stage, every=3))
        run_ranks(run, 3, plain(f"{stage}-on", stage, resume=str(tmp_path / stage / "step-00000003")))
        for file in ("model.safetensors", "optimizer.safetensors"):
            one, other = (tmp_path / name / "step-00000006" / file for name in (stage, f"{stage}-on"))
            assert one.read_bytes() == other.read_bytes(), (stage, file)
        run_ranks(run, 2, plain(f"{stage}-fsdp", "fsdp", resume=str(tmp_path / stage / "step-00000003")))
        assert losses(tmp_path / f"{stage}-fsdp") == pytest.approx(losses(tmp_path / stage)[3:], rel=2e-3)


def overflow_and_go_on(plain: dict[str, Any], resumed: str | None) -> list[Any]:
    """Train with a loss scale that overflows at first; return (skipped, scale) of each step and the last scalars."""
    from bigvision.config import load_config
    from bigvision.data import Batch
    from bigvision.runtime import start
    from bigvision.training.build import build_model

    with start("cpu") as runtime:
        engine, plan, _ = build_model(load_config(plain), 10, runtime, steps=99, say=print)
        if resumed:
            engine.restored(json.loads(resumed))
        images = torch.full((4, *plan.input_shape), 99, dtype=torch.uint8)
        batch = Batch(images, torch.arange(4), torch.arange(4), torch.ones(4, dtype=torch.bool))
        told = []
        for _ in range(8):
            result = engine.train_step(batch)
            told.append((result.skipped, engine.scalars()["loss_scale"]))
        return [told, json.dumps(engine.scalars())]


@pytest.mark.parametrize("stage", ["zero1", *(pytest.param(stage, marks=pytest.mark.long) for stage in STAGES[1:])])
def test_the_loss_scale_is_kept(tmp_path: Path, stage: str) -> None:
    file = tmp_path / "scale.json"
    fp16 = {"enabled": True, "initial_scale_power": 40, "loss_scale_window": 3, "hysteresis": 2}
    file.write_text(json.dumps({"zero_optimization": {"stage": int(stage[-1])}, "fp16": fp16}))
    parallel = {"strategy": stage, "precision": "fp16", "deepspeed": str(file)}
    plain = recipe(tmp_path, parallel=parallel, train={"global_batch": 8, "micro_batch": None})
    told, scalars = run_ranks(overflow_and_go_on, 2, plain, None)[0]
    assert tuple(told[0]) == (True, 2.0**40), "the first overflow only uses up the hysteresis"
    assert told[1][0] and told[1][1] == 2.0**39
    saved = json.loads(scalars)
    assert saved["step"] == 8 and saved["optimizer_steps"] == sum(not skipped for skipped, _ in told)
    # A native strategy takes the scale over, and gives it back.
    native = recipe(tmp_path, parallel={"strategy": "fsdp", "precision": "fp16"}, train=plain["train"])
    on, _ = run_ranks(overflow_and_go_on, 2, native, scalars)[0]
    assert on[0][1] == saved["loss_scale"] / (2 if on[0][0] else 1)
    same, again = run_ranks(overflow_and_go_on, 2, plain, scalars)[0]
    assert same[0][1] in (saved["loss_scale"], saved["loss_scale"] / 2, saved["loss_scale"] * 2)
    assert json.loads(again)["step"] == 16


def write_peak_while_building(plain: dict[str, Any]) -> None:
    # The allocator would else keep what is freed.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    Path(plain["out"] + os.environ["RANK"]).write_text(json.dumps(peak_while_building(plain)))


@pytest.mark.long
def test_a_sharded_model_is_never_whole(tmp_path: Path) -> None:
    """86 M parameters over four ranks, as in test_memory."""
    plain = recipe(tmp_path / "peak", parallel={"strategy": "zero3"}) | {"model": {"name": "vit_base_patch16_224"}}
    for process in (processes := start_ranks(write_peak_while_building, 4, plain)):
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * 4
    for rank in range(4):
        found = json.loads((tmp_path / f"peak{rank}").read_text())
        # DeepSpeed holds gradients and a second copy of the parameters, and imports 128 MiB of code.
        allowed = found["share"] + 2 * found["gradients"] + 3.5 * found["largest"] + 128 * 2**20
        assert found["peak"] < allowed, found
        assert found["share"] + 2 * found["gradients"] + found["whole"] > allowed, "the bound would let a whole copy pass"


def seen_settings(plain: dict[str, Any]) -> list[Any]:
    from bigvision.config import load_config
    from bigvision.runtime import start
    from bigvision.training.build import build_model

    with start("cpu") as runtime:
        engine, _, _ = build_model(load_config(plain), 10, runtime, steps=9, say=print)
        zero = engine.stepper.deepspeed._config.zero_config  # type: ignore[attr-defined]
        return [zero.reduce_bucket_size, zero.prefetch_bucket_size, zero.param_persistence_threshold, zero.max_live_parameters]


def test_settings_of_a_deepspeed_file_reach_deepspeed(tmp_path: Path) -> None:
    file = tmp_path / "knobs.json"
    zero = {"stage": 3, "reduce_bucket_size": 12345, "prefetch_bucket_size": 77, "stage3_param_persistence_threshold": "auto"}
    file.write_text(json.dumps({"zero_optimization": zero}))
    bucket, prefetch, persistent, live = run_ranks(seen_settings, 1, recipe(tmp_path, parallel={"deepspeed": str(file)}))[0]
    assert (bucket, prefetch) == (12345, 77) and 0 < persistent < 1000 and 0 < live < 10**6


def held_after_closing(plain: dict[str, Any]) -> list[int]:
    """Bytes of all tensors before any engine, and after each of three was used and closed."""
    from bigvision.config import load_config
    from bigvision.data import Batch
    from bigvision.runtime import start
    from bigvision.training.build import build_model

    found = [held()]
    for _ in range(3):
        with start("cpu") as runtime:
            engine, plan, _ = build_model(load_config(plain), 10, runtime, steps=9, say=print)
            images = torch.zeros(8, *plan.input_shape, dtype=torch.uint8)
            labels = torch.zeros(8, dtype=torch.int64)
            engine.train_step(Batch(images, labels, labels, torch.ones(8, dtype=torch.bool)))
            engine.close()
            del engine, images
        found.append(held())
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_closed_engine_holds_nothing(tmp_path: Path, stage: str) -> None:
    """DeepSpeed's hooks would keep model and optimizer for as long as the process lives."""
    before, *after = run_ranks(held_after_closing, 1, recipe(tmp_path, parallel={"strategy": stage}))[0]
    assert max(after) - before < 100_000 and after[2] - after[1] < 1000, (before, after)


def test_a_forward_pass_without_a_backward_one_is_freed() -> None:
    """Such as one that ran out of memory: an operation that keeps its own result must not keep itself alive."""
    start = torch.ones(3, requires_grad=True)
    with saved_tensors_hooks(_pack, _unpack):
        result = (start * 1.0).exp()
    result.sum().backward()
    assert start.grad is not None and torch.allclose(start.grad, result.detach())
    with saved_tensors_hooks(_pack, _unpack):
        result = (start * 1.0).exp()
    left = weakref.ref(result)
    del result
    assert left() is None


def test_weights_are_not_gathered_from_the_forward_to_the_backward_pass() -> None:
    """Autograd saves a convolution's weight and a norm's as they are, a linear layer's through a view."""
    images = torch.ones(1, 4, 4, requires_grad=True)
    for function, shape in ((F.linear, (4, 4)), (F.conv1d, (4, 1, 3)), (lambda x, weight: F.layer_norm(x, (4,), weight), (4,))):
        weight = nn.Parameter(torch.ones(shape))
        vars(weight)["ds_id"] = 0
        inputs = images.mT[:, :1] if function is F.conv1d else images
        with saved_tensors_hooks(_pack, _unpack):
            result = function(inputs, weight)
        gathered = weakref.ref(weight.untyped_storage())
        weight.data = torch.empty(0)
        assert gathered() is None, function
        weight.data = torch.full(shape, 2.0)
        result.sum().backward()
        assert weight.grad is not None and weight.grad.shape == shape
