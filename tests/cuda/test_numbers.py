"""Every strategy and precision on one device has the losses of one fp32 process on the CPU."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.cuda.jobs import job
from tests.cuda.runs import DATA_PARALLEL, STRATEGIES, compiler, installed, marks_of, on_cpu, parallel, plain
from tests.recipes import MODELS, losses, recipe, run

NAMES = ("vit", "convnext", "resnet")
PRECISIONS = ("fp32", "bf16", "fp16")
NEAR = {"fp32": 1e-4, "bf16": 3e-3, "amp_bf16": 3e-3, "fp16": 3e-4}
"""By how much a loss may differ from the CPU's fp32 one, relative. A rate that is a tenth too large makes 1.4e-3."""
STEPS = 20


def near(precision: str, model: str) -> float:
    """:data:`NEAR`; BatchNorm over a few samples multiplies differences of rounding from step to step."""
    return NEAR[precision] * (5 if model == "resnet" else 1)


def sections(**keys: Any) -> dict[str, Any]:
    """Twenty steps of 24 samples in micro-batches of 8, with a rate at which the losses fall."""
    return {"train": {"steps": STEPS, "micro_batch": 8}, "optim": {"lr": 5e-4}, "parallel": keys}


# Jobs: module-level functions that run in a process of their own; the first argument is a folder.


def reference(folder: Path) -> dict[str, list[float]]:
    """The losses of one process on the CPU in fp32."""
    return {model: run(recipe(folder / model, model, **sections())) for model in NAMES}


def cases(folder: Path, strategy: str) -> dict[str, list[float] | str]:
    """The losses of every precision and model under *strategy*; of a case that failed its traceback."""
    found: dict[str, list[float] | str] = {}
    for precision in (*PRECISIONS, *(["amp_bf16"] if strategy in DATA_PARALLEL else [])):
        for model in NAMES:
            out = folder / f"{precision}-{model}"
            try:
                found[f"{precision} {model}"] = run(plain(out, model, **sections(strategy=strategy, precision=precision)))
            except Exception:
                found[f"{precision} {model}"] = traceback.format_exc()
    return found


def difference(found: Any, expected: list[float]) -> float:
    """The largest relative difference of two runs' losses."""
    assert not isinstance(found, str), found
    assert len(found) == len(expected)
    return max(abs(one - other) / abs(other) for one, other in zip(found, expected))


@pytest.mark.parametrize("model", NAMES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("strategy", [pytest.param(s, marks=[job(cases, s, seconds=50), *marks_of(s)]) for s in STRATEGIES])
@job(reference, seconds=60)
def test_losses_are_those_of_the_cpu(
    results: Callable[..., Any], figure: Callable[[str], None], strategy: str, precision: str, model: str
) -> None:
    expected, found = results(reference)[model], results(cases, strategy)[f"{precision} {model}"]
    apart = difference(found, expected)
    figure(f"{strategy} {precision} {model}: losses differ from the CPU's by at most {apart:.1e}")
    assert apart < near(precision, model)
    assert len(set(found)) > 15, "losses that all repeat the first would agree as well"


@pytest.mark.parametrize("model", NAMES)
@pytest.mark.parametrize("strategy", [pytest.param(s, marks=job(cases, s, seconds=50)) for s in DATA_PARALLEL])
@job(reference, seconds=60)
def test_autocast_has_the_losses_of_the_cpu(results: Callable[..., Any], strategy: str, model: str) -> None:
    found = results(cases, strategy)[f"amp_bf16 {model}"]
    assert difference(found, results(reference)[model]) < near("amp_bf16", model)


@pytest.mark.parametrize("strategy", [pytest.param(s, marks=[job(cases, s), *marks_of(s)]) for s in STRATEGIES[1:]])
@job(cases, "ddp", seconds=50)
def test_strategies_agree_on_the_device(results: Callable[..., Any], figure: Callable[[str], None], strategy: str) -> None:
    """Between strategies the device adds up alike: fp32 losses agree ten times as closely as with the CPU's."""
    ddp, found = results(cases, "ddp"), results(cases, strategy)
    apart = difference(found["fp32 vit"], ddp["fp32 vit"])
    figure(f"{strategy} fp32 vit: losses differ from ddp's by at most {apart:.1e}")
    assert apart < near("fp32", "vit") / 10


# What changes how a step computes, but not its numbers.

VARIANTS: dict[str, dict[str, Any]] = {
    "recompute": {"recompute": "blocks"},
    "compile": {"compile": True},
    "recompute and compile": {"recompute": "blocks", "compile": True},
}


def variant(folder: Path, name: str, strategy: str, model: str) -> list[float]:
    made = plain(folder / "out", model, **sections(strategy=strategy, precision="fp32", **VARIANTS[name]))
    made["model"] = made["model"] | {"drop_path": 0.0}
    return run(made)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[job(variant, *case, seconds=60), *([compiler()] if on_cpu() else []), *marks_of(case[1])])
        for case in (
            ("recompute", "ddp", "vit"), ("recompute", "zero3", "vit"), ("compile", "ddp", "vit"), ("compile", "ddp", "resnet"),
            ("recompute and compile", "fsdp", "vit"),
        )
    ],
)  # fmt: skip
@job(reference, seconds=60)
def test_recompute_and_compile_change_no_number(results: Callable[..., Any], case: tuple[str, str, str]) -> None:
    assert difference(results(variant, *case), results(reference)[case[2]]) < near("fp32", case[2])


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {}, "sgd": {"lr": 0.02}, "lion": {"lr": 1e-4}, "lamb": {}, "adafactor": {}, "muon": {"lr": 2e-3},
    "no clip": {"clip": None},
}  # fmt: skip


def optimizers(folder: Path, strategy: str) -> dict[str, list[list[float]]]:
    """Five steps of each optimizer that *strategy* admits, on the CPU and on the device."""
    admitted = {"ddp": set(OPTIMIZERS), "fsdp": {"adamw", "sgd", "lion", "lamb", "muon", "no clip"}}
    found = {}
    for name in OPTIMIZERS:
        if name in admitted.get(strategy, {"adamw", "sgd", "lion", "no clip"}):
            changed = sections() | {"optim": {"name": "adamw" if name == "no clip" else name} | OPTIMIZERS[name]}
            changed["train"] = {"steps": 5}
            here = {"strategy": strategy, "precision": "fp32"}
            one = run(recipe(folder / f"{name}-cpu", **changed))
            found[name] = [one, run(plain(folder / name, **changed | {"parallel": here}))]
    return found


@pytest.mark.parametrize(
    "strategy", [pytest.param(s, marks=[job(optimizers, s), *marks_of(s)]) for s in ("ddp", "fsdp", "zero2")]
)
def test_every_optimizer_steps_as_on_the_cpu(results: Callable[..., Any], strategy: str) -> None:
    found = results(optimizers, strategy)
    apart = {name: difference(there, here) for name, (here, there) in found.items()}
    # Muon's orthogonalisation runs in bf16.
    assert all(value < (1e-2 if name == "muon" else 1e-4) for name, value in apart.items()), apart


def mixed(folder: Path) -> list[list[float]]:
    task = {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}
    train = {"steps": 5, "micro_batch": 8}
    return [run(make(folder / make.__name__, task=task, train=train)) for make in (recipe, plain)]


@job(mixed)
def test_mixup_and_cutmix_mix_as_on_the_cpu(results: Callable[..., Any]) -> None:
    here, there = results(mixed)
    assert difference(there, here) < 1e-4


# Parameters that do not train.


def partly_frozen(kind: str) -> nn.Module:
    """A model of which only the head trains ("backbone"), or all but the stem ("stem")."""
    import timm

    made: dict[str, Any] = MODELS["resnet" if kind == "batchnorm" else "vit"]
    torch.manual_seed(0)
    model = timm.create_model(
        made["name"], num_classes=10, **made["options"], **({} if kind == "batchnorm" else {"img_size": 32})
    )
    trains = {"stem": lambda name: not name.startswith("patch_embed"), "backbone": lambda name: name.startswith("head")}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains.get(kind, lambda name: name.startswith("fc"))(name))
    return model


def frozen(folder: Path, kind: str) -> dict[str, list[float] | str]:
    """Six steps of a partly frozen model under every strategy, and under "cpu"."""
    import bigvision

    draw = torch.Generator().manual_seed(0)
    batches = [
        (torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=draw), torch.randint(0, 10, (8,), generator=draw))
        for _ in range(6)
    ]
    found: dict[str, list[float] | str] = {}
    for strategy in ("cpu", *(s for s in STRATEGIES if installed(s))):
        where = parallel(device="cpu") if strategy == "cpu" else parallel(strategy)
        try:
            with bigvision.Engine(
                model=partly_frozen(kind), image_size=32, steps=6, global_batch=8, out=str(folder / strategy),
                parallel=where, optim={"lr": 1e-3, "warmup": 0},
            ) as engine:  # fmt: skip
                found[strategy] = [float(engine.train_step(*batch).loss) for batch in batches]
        except Exception:
            found[strategy] = traceback.format_exc()
    return found


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=job(frozen, kind)) for kind in ("backbone", "stem", "batchnorm")])
def test_frozen_parameters_under_every_strategy(results: Callable[..., Any], kind: str) -> None:
    found = results(frozen, kind)
    expected = found.pop("cpu")
    assert not isinstance(expected, str), expected
    assert all(difference(ran, expected) < 1e-4 for ran in found.values())
    assert len(set(expected)) == 6


def averaged(folder: Path) -> dict[str, dict[str, Any] | str]:
    """Four steps under every strategy and under "cpu", with an average, a trained head and a trunk in bf16: the losses with the
    weights and with the average; the types of what is saved; and what a second engine that resumes it measures."""

    import bigvision

    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=draw)
    found: dict[str, dict[str, Any] | str] = {}
    for strategy in ("cpu", *(s for s in STRATEGIES if installed(s))):
        for precision in ("fp32",) if strategy == "cpu" else ("fp32", "bf16"):
            made: dict[str, Any] = {
                "model": MODELS["vit"] | {"trainable": ["head", "*.bias"], "frozen_dtype": "bf16"}, "num_classes": 10,
                "steps": 8, "global_batch": 8, "out": str(folder / f"{strategy}-{precision}"), "ema": {"decay": 0.8},
                "optim": {"lr": 1e-2, "warmup": 0},
                "parallel": parallel(device="cpu") if strategy == "cpu" else parallel(strategy, precision),
            }  # fmt: skip
            try:
                losses = []
                for resume in (False, True):
                    with bigvision.Engine(**made, resume=resume) as engine:
                        for _ in range(0 if resume else 4):
                            engine.train_step(images, torch.arange(8))
                        losses.append(engine.eval_step(images, torch.arange(8)).means()["loss"])
                        with engine.averaged():
                            losses.append(engine.eval_step(images, torch.arange(8)).means()["loss"])
                        folder_of_step = engine.save()
                saved = load_file(folder_of_step / "model.safetensors")
                types = {name: str(values.dtype) for name, values in saved.items()}
                found[f"{strategy} {precision}"] = {"losses": losses, "types": types}
            except Exception:
                found[f"{strategy} {precision}"] = traceback.format_exc()
    return found


@job(averaged, seconds=60)
def test_the_average_and_frozen_bf16_weights_under_every_strategy(results: Callable[..., Any]) -> None:
    found = results(averaged)
    expected = found.pop("cpu fp32")
    weights, average, *_ = expected["losses"]
    assert abs(average - weights) > 1e-3 and expected["types"]["pos_embed"] == "torch.bfloat16"
    for name, one in found.items():
        assert not isinstance(one, str), one
        assert difference(one["losses"], expected["losses"]) < (1e-4 if "fp32" in name else 1e-2), name
        assert one["types"] == expected["types"] and one["losses"][:2] == one["losses"][2:], name


# Attention masks: CUDA refuses one whose dtype is not the query's, which the CPU takes.

MASKED = {
    "swin": MODELS["swin"],
    "swinv2": {
        "name": "swinv2_tiny_window8_256", "image_size": 64,
        "options": {"depths": [2, 2], "embed_dim": 24, "num_heads": [2, 3]},
    },
    "beit": {"name": "beit_base_patch16_224", "image_size": 224, "options": {"depth": 2}},
    "relpos": {"name": "test_vit_relpos", "image_size": None, "options": {}},
    "eva02": MODELS["eva02"],
    "maxxvit": {"name": "test_coatnet", "image_size": None, "options": {}},
    "levit": {"name": "levit_128s", "image_size": 224, "options": {}},
    "tiny_vit": {"name": "tiny_vit_5m_224", "image_size": 224, "options": {}},
    "sam": {"name": "samvit_base_patch16_224", "image_size": 224, "options": {"depth": 2}},
    "naflexvit": {"name": "naflexvit_base_patch16_gap", "image_size": None, "options": {"depth": 2}},
}  # fmt: skip


def masks(folder: Path, strategy: str) -> dict[str, list[float] | str]:
    """Two steps in bf16 and fp16 of models whose attention has a mask or a bias, or the traceback."""
    import bigvision

    found: dict[str, list[float] | str] = {}
    for name, made in MASKED.items():
        for precision in ("bf16", "fp16")[: 1 if on_cpu() else 2]:
            try:
                with bigvision.Engine(
                    model=made, num_classes=10, steps=2, global_batch=4, out=str(folder / name),
                    parallel=parallel(strategy, precision),
                ) as engine:  # fmt: skip
                    images = torch.zeros(4, 3, engine.image_size, engine.image_size, dtype=torch.uint8)
                    found[f"{name} {precision}"] = [float(engine.train_step(images, torch.arange(4)).loss) for _ in range(2)]
            except Exception:
                found[f"{name} {precision}"] = traceback.format_exc()
    return found


@pytest.mark.parametrize("strategy", [pytest.param(s, marks=job(masks, s, seconds=40)) for s in DATA_PARALLEL])
def test_masks_have_the_dtype_of_the_query(results: Callable[..., Any], strategy: str) -> None:
    found = results(masks, strategy)
    assert [text for text in found.values() if isinstance(text, str)] == []
    assert all(0 < losses[0] < 20 for losses in found.values())


# DeepSpeed's files, as `deepspeed launch/train.py --deepspeed FILE` reads them.

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
OFFLOADS = ("zero2_offload", "zero3_offload")


def offloaded(folder: Path) -> dict[str, list[float] | str]:
    """One job for all files: the first start compiles CPU Adam."""
    from bigvision.config import resolve
    from bigvision.training import train_on_rank

    found: dict[str, list[float] | str] = {}
    for file in OFFLOADS:
        for precision in ("fp32", "bf16"):
            out = folder / f"{file}-{precision}"
            try:
                config, _ = resolve(
                    plain(out, **sections(precision=precision)), ["--parallel.deepspeed", str(DS_CONFIGS / f"{file}.json")], {}
                )
                train_on_rank(config)
                found[f"{file} {precision}"] = losses(out)
            except Exception:
                found[f"{file} {precision}"] = traceback.format_exc()
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("file", [pytest.param(file, marks=[*marks_of("zero2"), compiler()]) for file in OFFLOADS])
@job(offloaded, seconds=120)
@job(reference, seconds=60)
def test_offload_files(results: Callable[..., Any], file: str, precision: str) -> None:
    found = results(offloaded)[f"{file} {precision}"]
    assert difference(found, results(reference)["vit"]) < near(precision, "vit")
