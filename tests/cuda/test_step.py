"""What a step costs beside its arithmetic: waits for the device, memory formats, graphs, and a checkpoint's stall."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from tests.cuda.jobs import job
from tests.cuda.runs import DATA_PARALLEL, compiler, on_cpu, parallel, peak_of, plain, synchronize
from tests.recipes import MODELS, digests, losses, run


def batch(size: int = 8, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels as a loader hands them over: in pinned memory where there is a GPU."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, 10, (size,), generator=draw)
    return (images, labels) if on_cpu() else (images.pin_memory(), labels.pin_memory())


# A step never waits for the device.

SLEEP = 2_000_000_000
"""Cycles for which the device is kept busy: about a second."""


def steps_without_waiting(folder: Path, strategy: str) -> dict[str, dict[str, Any] | str]:
    """In each precision; of one that failed the traceback."""
    found: dict[str, dict[str, Any] | str] = {}
    for precision in ("fp32", "bf16", "fp16"):
        try:
            found[precision] = steps_behind_a_busy_device(folder / precision, strategy, precision)
        except Exception:
            found[precision] = traceback.format_exc()
    return found


def steps_behind_a_busy_device(folder: Path, strategy: str, precision: str, **more: Any) -> dict[str, Any]:
    import bigvision

    with bigvision.Engine(
        plain(folder / "out", parallel={"strategy": strategy, "precision": precision} | more), num_classes=10, steps=20,
        global_batch=8, train={"micro_batch": 4}, optim={"warmup": 0}, ema={"decay": 0.99},
    ) as engine:  # fmt: skip
        images, labels = batch()
        for _ in range(4):  # the first ones allocate, choose algorithms and may find a loss scale
            result = engine.train_step(images, labels)
        last = float(result.loss)
        synchronize()
        if not on_cpu():
            torch.cuda.set_sync_debug_mode("error")
        try:
            results = [engine.train_step(images, labels) for _ in range(3)]
        finally:
            if not on_cpu():
                torch.cuda.set_sync_debug_mode("default")
        losses = [float(result.loss) for result in results]
        synchronize()
        # The mode does not see a wait for an event: a step behind a busy device has to return all the same.
        if not on_cpu():
            torch.cuda._sleep(SLEEP)
        begin = time.perf_counter()
        engine.train_step(images, labels)
        host = time.perf_counter() - begin
        synchronize()
        return {"losses": [last, *losses], "host": host, "whole": time.perf_counter() - begin}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("strategy", [pytest.param(s, marks=job(steps_without_waiting, s)) for s in DATA_PARALLEL])
def test_a_step_never_waits(results: Callable[..., Any], strategy: str, precision: str) -> None:
    found = results(steps_without_waiting, strategy)[precision]
    assert not isinstance(found, str), found
    assert found["losses"][-1] < found["losses"][0], "the steps trained"
    if not on_cpu():
        assert found["whole"] > 0.4, "the device was busy"
        assert found["host"] < found["whole"] / 2, found


# Models of convolutions compute in channels_last on CUDA.

LAYOUTS = {
    "resnet18": True, "convnext_atto": True, "efficientnet_b0": True,
    "regnety_002": False,  # channels_last ruins it
}  # fmt: skip


def layouts(folder: Path, strategy: str) -> dict[str, float]:
    """The share of the convolutions with spatial inputs that got them in channels_last."""
    import bigvision

    found: dict[str, float] = {}
    seen: list[bool] = []

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # On meta the model is traced before it is built.
        if isinstance(module, nn.Conv2d) and not inputs[0].is_meta and inputs[0].shape[1] > 1 and inputs[0].shape[2] > 1:
            seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    handle = register_module_forward_pre_hook(look)
    for name in LAYOUTS:
        seen.clear()
        with bigvision.Engine(
            model=name, num_classes=10, image_size=64, steps=1, global_batch=4, out=str(folder / name),
            parallel=parallel(strategy, "bf16"),
        ) as engine:  # fmt: skip
            engine.train_step(*batch(4, 64))
        found[name] = sum(seen) / len(seen)
    handle.remove()
    return found


@pytest.mark.parametrize("strategy", [pytest.param(s, marks=job(layouts, s)) for s in DATA_PARALLEL])
def test_convolutions_compute_in_channels_last(results: Callable[..., Any], strategy: str) -> None:
    found = results(layouts, strategy)
    wanted = {name: chosen and not on_cpu() for name, chosen in LAYOUTS.items()}
    # A LayerNorm between two convolutions may hand on another layout.
    assert {name: share > 0.8 for name, share in found.items()} == wanted, found


def own_channels_last(folder: Path, strategy: str) -> dict[str, Any]:
    """A module that its owner has put into channels_last: its first checkpoint, and two steps."""
    import timm

    import bigvision

    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10).to(memory_format=torch.channels_last)
    chosen = parallel(strategy)
    with bigvision.Engine(model=model, image_size=64, steps=2, global_batch=4, parallel=chosen) as engine:
        saved = load_file(engine.save(folder / "own") / "model.safetensors")
        losses = [float(engine.train_step(*batch(4, 64)).loss) for _ in range(2)]
    expected = {name: tensor for name, tensor in model.state_dict().items() if name in saved}
    differ = [name for name, tensor in expected.items() if not torch.equal(saved[name], tensor)]
    contiguous = timm.create_model("resnet18", num_classes=10)
    contiguous.load_state_dict(model.state_dict())
    with bigvision.Engine(model=contiguous, image_size=64, steps=2, global_batch=4, parallel=chosen) as engine:
        others = [float(engine.train_step(*batch(4, 64)).loss) for _ in range(2)]
    return {"differ": differ, "tensors": len(expected), "losses": losses, "others": others}


@pytest.mark.parametrize("strategy", [pytest.param(s, marks=job(own_channels_last, s)) for s in DATA_PARALLEL])
def test_a_module_in_channels_last_is_saved_in_logical_order(results: Callable[..., Any], strategy: str) -> None:
    found = results(own_channels_last, strategy)
    assert found["tensors"] > 60 and found["differ"] == []
    assert found["losses"] == pytest.approx(found["others"], rel=1e-4)


# Compiled blocks.


def graphs(folder: Path) -> dict[str, Any]:
    """The graphs of a ViT with drop path that trains, with a short last micro-batch, and evaluates."""
    from torch._dynamo.utils import counters

    # With fewer blocks each is more than a quarter of the model, and opened into attention and MLP.
    options = MODELS["vit"]["options"] | {"depth": 6}
    found = {}
    for drop_path in (0.0, 0.2):
        counters.clear()
        made = plain(
            folder / str(drop_path), parallel={"strategy": "ddp", "precision": "bf16", "compile": True},
            train={"steps": 3, "micro_batch": 16},
        )  # fmt: skip
        made["model"] = made["model"] | {"options": options, "drop_path": drop_path}
        losses = run(made)
        torch._dynamo.reset()
        found[drop_path] = (counters["stats"]["unique_graphs"], losses)
    return found


@compiler()
@job(graphs, seconds=90)
def test_drop_path_needs_as_many_graphs_as_none(results: Callable[..., Any], figure: Callable[[str], None]) -> None:
    (without, _), (dropping, losses) = results(graphs).values()
    figure(f"compiled graphs: {without} without drop path, {dropping} with it")
    assert len(losses) == 3 and 0 < dropping <= without + 3, "drop path compiles in training alone, not for each block"


# Recompute saves memory.


def peaks(folder: Path) -> list[int]:
    from tests.cuda.test_faults import LARGE

    found = []
    for recompute in ("none", "blocks"):
        made = plain(
            folder / recompute, parallel={"strategy": "fsdp", "precision": "bf16", "recompute": recompute},
            train={"steps": 2, "global_batch": 64, "micro_batch": None},
            data={"train": f"synthetic:128x{LARGE['image_size']}", "val": f"synthetic:8x{LARGE['image_size']}"},
        ) | {"model": LARGE}  # fmt: skip
        found.append(peak_of(made))
    return found


@job(peaks)
def test_recompute_needs_less_memory(results: Callable[..., Any], figure: Callable[[str], None]) -> None:
    without, with_it = results(peaks)
    if not on_cpu():
        figure(f"peak memory: {without / 2**20:.0f} MiB, with recompute {with_it / 2**20:.0f} MiB")
        assert with_it < 0.6 * without


# Offloaded activations.

MOVED = ("none", "blocks", "selective")


def offloads(folder: Path) -> dict[str, Any]:
    """Of each kind of recompute the peaks, losses and files without and with offloaded activations."""
    from contextlib import nullcontext

    from tests.cuda.test_faults import LARGE
    from tests.offload import on_the_cpu

    found: dict[str, Any] = {}
    with on_the_cpu() if on_cpu() else nullcontext():
        for recompute in MOVED:
            for offload in ("none", "activations"):
                out = folder / f"{recompute}-{offload}"
                made = plain(
                    out, parallel={"precision": "bf16", "recompute": recompute, "offload": offload},
                    train={"steps": 3, "global_batch": 48, "micro_batch": 32},
                    data={"train": f"synthetic:96x{LARGE['image_size']}", "val": f"synthetic:8x{LARGE['image_size']}"},
                ) | {"model": LARGE}  # fmt: skip
                peak = peak_of(made)
                found[out.name] = peak, losses(out), digests(out / "step-00000003")
    return found


@pytest.mark.parametrize("recompute", MOVED)
@job(offloads, seconds=90)
def test_offloaded_activations_change_no_byte_and_need_less_memory(
    results: Callable[..., Any], figure: Callable[[str], None], recompute: str
) -> None:
    (without, *numbers), (with_it, *same) = (results(offloads)[f"{recompute}-{kind}"] for kind in ("none", "activations"))
    assert same == numbers
    if not on_cpu():
        figure(f"peak memory, recompute {recompute}: {without / 2**20:.0f} MiB, offloaded {with_it / 2**20:.0f} MiB")
        assert with_it < (0.6 if recompute == "none" else 0.95) * without


def pinned_copies(folder: Path) -> dict[str, Any]:
    """Passes of blocks behind a busy device: the host does not wait, the values come back, and slabs are used again."""
    from bigvision.models.offload import Offload, PinnedCopies
    from tests.offload import LateCopies

    device = torch.device("cpu" if on_cpu() else "cuda")
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)).to(device) for _ in range(6)]
    images = torch.randn(2048, 512, device=device)

    def gradients() -> list[torch.Tensor]:
        for parameter in nn.Sequential(*blocks).parameters():
            parameter.grad = None
        nn.Sequential(*blocks)(images).square().mean().backward()
        return [parameter.grad for parameter in nn.Sequential(*blocks).parameters() if parameter.grad is not None]

    expected = gradients()
    copies: Any = LateCopies(device) if on_cpu() else PinnedCopies(device)
    offload = Offload(device, transfers=copies)
    for block in blocks:
        offload.wrap(block)
    gradients()  # which asks for pinned memory
    synchronize()
    if not on_cpu():
        torch.cuda.set_sync_debug_mode("error")
        torch.cuda._sleep(SLEEP)
    begin = time.perf_counter()
    passes = [gradients() for _ in range(3)]
    host = time.perf_counter() - begin
    if not on_cpu():
        torch.cuda.set_sync_debug_mode("default")
    synchronize()
    equal = all(torch.equal(one, other) for found in passes for one, other in zip(found, expected, strict=True))
    slabs = 0 if on_cpu() else len(copies.buffers.slabs)
    return {"equal": equal, "host": host, "whole": time.perf_counter() - begin, "slabs": slabs}


@job(pinned_copies)
def test_copies_of_activations_never_wait_for_the_device(results: Callable[..., Any], figure: Callable[[str], None]) -> None:
    found = results(pinned_copies)
    assert found["equal"]
    if not on_cpu():
        figure(f"offloaded passes: {found['host'] * 1e3:.0f} ms of the host behind {found['whole'] * 1e3:.0f} ms")
        assert found["host"] < 0.5 * found["whole"] and found["slabs"] <= 4


# A save in the background.

SAVED = {"name": "vit_small_patch16_224" if on_cpu() else "vit_base_patch16_224", "image_size": 32}


def stalls(folder: Path) -> dict[str, Any]:
    """How long training stands still for each of three saves, in the background and not; and what they hold."""
    from bigvision.checkpoint import Saver

    save, times = Saver.save, list[float]()

    def timed(self: Saver, *arguments: Any) -> None:
        self.wait()  # for the save before, which a run with rarer saves does not meet
        synchronize()
        begin = time.perf_counter()
        save(self, *arguments)
        times.append(time.perf_counter() - begin)

    Saver.save = timed  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    for background in (True, False):
        out = folder / str(background)
        times.clear()
        run(
            plain(
                out, parallel={"strategy": "fsdp", "precision": "bf16"},
                train={"steps": 15, "global_batch": 8, "micro_batch": None}, checkpoint={"every": 5, "background": background},
            ) | {"model": SAVED}
        )  # fmt: skip
        found[str(background)] = (list(times), [digests(path) for path in sorted(out.glob("step-*"))])
    files = (folder / "True" / "step-00000015").iterdir()
    return found | {"bytes": sum(path.stat().st_size for path in files)}


@job(stalls, seconds=60, alone=True)
def test_a_background_save_hardly_stalls(results: Callable[..., Any], figure: Callable[[str], None]) -> None:
    found = results(stalls)
    (background, copied), (foreground, written) = found["True"], found["False"]
    stall, whole = 1e3 * min(background[1:]), 1e3 * min(foreground)
    figure(f"a save of {found['bytes'] / 1e9:.2f} GB stalls for {stall:.0f} ms, in the foreground for {whole:.0f} ms")
    assert len(copied) == 3 and copied == written, "what is saved is the state of its step"
    # The first one allocates the buffers.
    assert stall < 0.5 * whole


# A profile.

PROFILED = {"name": "vit_small_patch16_224", "image_size": 32 if on_cpu() else 224}


def profiles(folder: Path) -> list[dict[str, Any]]:
    """The summaries of a run whose last three steps are recorded, eager and compiled."""
    found = []
    for compiled in (False, True):
        out, side = folder / str(compiled), PROFILED["image_size"]
        run(
            plain(
                out, parallel={"precision": "bf16", "compile": compiled},
                train={"steps": 8, "global_batch": 16, "micro_batch": 8},
                data={"train": f"synthetic:64x{side}", "val": f"synthetic:8x{side}"}, ema={"decay": 0.9},
                monitor={"profile": [6, 8], "memory_snapshot": True},
            ) | {"model": PROFILED}
        )  # fmt: skip
        memory = json.loads((out / "profile" / "memory-rank-0.json").read_text())
        peak = 0 if on_cpu() else torch.cuda.max_memory_allocated()
        found.append(json.loads((out / "profile" / "summary.json").read_text()) | {"allocated": memory, "peak": peak})
    return found


@job(profiles, seconds=60)
@compiler()
def test_a_profile_knows_the_kernels(results: Callable[..., Any], figure: Callable[[str], None]) -> None:
    for summary, kind in zip(results(profiles), ("eager", "compiled"), strict=True):
        (rank,), times = summary["ranks"].values(), summary["categories"]
        figure(f"{kind}: {summary['step']:.1f} ms, " + ", ".join(f"{name} {ms:.2f}" for name, ms in times.items()))
        assert sum(times.values()) == pytest.approx(summary["step"], rel=1e-9)
        assert min(times[name] for name in ("matrix products", "elementwise", "optimizer")) > 0
        assert summary["allocated"]["peak"] > 0 and summary["allocated"]["groups"]
        if not on_cpu():
            assert rank["device"] == torch.cuda.get_device_name()
            assert min(times["attention"], times["normalisation"], times["copies"]) > 0
            assert times["communication"] == 0
            assert summary["allocated"]["peak"] <= summary["peak"] * 1.02 and summary["allocated"]["before"] > 0
