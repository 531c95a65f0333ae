"""The numbers do not depend on the strategy or the number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from bigvision.config import load_config
from bigvision.runtime import start
from bigvision.training.build import build_model
from tests.distributed import run_ranks
from tests.recipes import lines, recipe, run

LAYOUTS = [("ddp", 2, 1), ("ddp", 3, 1), ("fsdp", 1, 1), ("fsdp", 2, 1), ("fsdp", 3, 1), ("fsdp", 4, 1), ("fsdp", 4, 2)]
FEW = [("ddp", 3, 1), ("fsdp", 4, 2)]
LONG = pytest.mark.long


def same_losses(reference: list[float], others: list[float], relative: float = 1e-5) -> None:
    assert len(reference) == len(others) == 20
    assert others == pytest.approx(reference, rel=relative)
    # Losses that all repeat the first would agree as well.
    assert len(set(reference)) > 15


def parallel(strategy: str, replicas: int, **more: Any) -> dict[str, Any]:
    return {"strategy": strategy, "replicas": replicas, **more}


CASES = [("vit", FEW), *(pytest.param(model, LAYOUTS, marks=LONG) for model in ("vit", "swin", "convnext", "eva02"))]


@pytest.mark.parametrize(("model", "layouts"), CASES)
def test_losses_equal_those_of_one_process(tmp_path: Path, model: str, layouts: list[tuple[str, int, int]]) -> None:
    """24 samples in micro-batches of 5: the last one is short on every number of ranks."""
    reference = run_ranks(run, 1, recipe(tmp_path / "reference", model))[0]
    for strategy, ranks, replicas in layouts:
        out = tmp_path / f"{strategy}-{ranks}-{replicas}"
        same_losses(reference, run_ranks(run, ranks, recipe(out, model, parallel=parallel(strategy, replicas)))[0])


ZEROS = [("zero2", 3), ("zero3", 4)]
THREE, EVEN = [("ddp", 3, 1), ("fsdp", 3, 1)], [("ddp", 2, 1), ("fsdp", 4, 1), ("fsdp", 4, 2)]


@pytest.mark.parametrize(("micro_batch", "layouts"), [(8, THREE), pytest.param(6, EVEN, marks=LONG)])
@pytest.mark.parametrize("model", ["resnet", pytest.param("efficientnet", marks=LONG)])
def test_batchnorm_models_equal_one_process_with_the_same_micro_batches(
    tmp_path: Path, model: str, micro_batch: int, layouts: list[tuple[str, int, int]]
) -> None:
    """Batch statistics are those of a rank's micro-batch, so one process has to cut the global batch alike."""
    # Half the usual rate: norms of six samples of noise multiply rounding differences from step to step.
    train, optim = {"micro_batch": micro_batch}, {"lr": 5e-4}
    reference = run_ranks(run, 1, recipe(tmp_path / "reference", model, train=train, optim=optim))[0]
    for strategy, ranks, replicas in layouts:
        plain = recipe(
            tmp_path / f"{strategy}-{ranks}-{replicas}", model, train=train, optim=optim, parallel=parallel(strategy, replicas)
        )  # fmt: skip
        same_losses(reference, run_ranks(run, ranks, plain)[0])


@pytest.mark.parametrize(("strategy", "ranks"), [("fsdp", 4), *(pytest.param(*other, marks=LONG) for other in ZEROS)])
def test_scalar_and_tiny_parameters(tmp_path: Path, strategy: str, ranks: int) -> None:
    """NFNet's skip gains are 0-D; layer scale and norms have fewer elements than four ranks can share."""
    skip_init = {"options": {"depths": [1, 1, 1, 1], "channels": [8, 12, 16, 20], "stem_chs": 8, "skipinit": True}}

    def plain(name: str, **sections: Any) -> dict[str, Any]:
        made = recipe(tmp_path / name, "nfnet", **sections)
        return made | {"model": made["model"] | skip_init}

    reference = run_ranks(run, 1, plain("reference"))[0]
    same_losses(reference, run_ranks(run, ranks, plain("other", parallel=parallel(strategy, 1)))[0])


@LONG
@pytest.mark.parametrize("optim", [{"name": "sgd", "lr": 0.05}, {"clip": None}, {"clip": 0.1, "weight_decay": 0.3}])
def test_other_optimizers_and_clipping(tmp_path: Path, optim: dict[str, Any]) -> None:
    reference = run_ranks(run, 1, recipe(tmp_path / "reference", optim=optim))[0]
    for strategy, ranks, replicas in (("ddp", 3, 1), ("fsdp", 3, 1), ("fsdp", 4, 2)):
        plain = recipe(tmp_path / f"{strategy}-{ranks}", optim=optim, parallel=parallel(strategy, replicas))
        same_losses(reference, run_ranks(run, ranks, plain)[0])


@LONG
def test_layer_decay(tmp_path: Path) -> None:
    decayed = {"layer_decay": 0.75}
    reference = run_ranks(run, 1, recipe(tmp_path / "reference", optim=decayed))[0]
    assert reference != pytest.approx(run_ranks(run, 1, recipe(tmp_path / "without"))[0], rel=1e-3)
    for strategy, ranks in (("ddp", 2), ("fsdp", 3)):
        plain = recipe(tmp_path / f"{strategy}-{ranks}", optim=decayed, parallel=parallel(strategy, 1))
        same_losses(reference, run_ranks(run, ranks, plain)[0])
    assert max(line["lr"] for line in lines(tmp_path / "fsdp-3") if "loss" in line) == 1e-3


@LONG
def test_clipping_by_the_norm_of_large_tensors(tmp_path: Path) -> None:
    """Matrices of millions of elements: a norm that is added up in fp32 depends on how they are cut."""
    options = {"patch_size": 8, "depth": 1, "embed_dim": 1024, "num_heads": 4}
    short = {"steps": 4, "global_batch": 12, "micro_batch": None}

    def plain(name: str, **parallel: Any) -> dict[str, Any]:
        made = recipe(tmp_path / name, train=short, optim={"name": "sgd", "lr": 0.3, "clip": 0.5}, parallel=parallel)
        return made | {"model": made["model"] | {"options": options}}

    reference = run_ranks(run, 1, plain("reference"))[0]
    norms = [line["grad_norm"] for line in lines(tmp_path / "reference") if "loss" in line]
    for strategy, ranks in (("fsdp", 3), ("ddp", 2), ("zero2", 3), ("zero3", 3)):
        assert run_ranks(run, ranks, plain(strategy, strategy=strategy))[0] == pytest.approx(reference, rel=1e-5)
        others = [line["grad_norm"] for line in lines(tmp_path / strategy) if "loss" in line]
        assert others == pytest.approx(norms, rel=1e-5) and min(norms) > 0.5


def test_recompute_leaves_running_statistics_alone(tmp_path: Path) -> None:
    saved = []
    for recompute in ("none", "blocks"):
        out = tmp_path / recompute
        run_ranks(run, 2, recipe(out, "resnet", train={"steps": 3}, parallel={"strategy": "fsdp", "recompute": recompute}))
        saved.append(load_file(out / "step-00000003" / "model.safetensors"))
    counters = [name for name in saved[0] if name.endswith("num_batches_tracked")]
    assert counters and {int(saved[1][name]) for name in counters} == {9}
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


@pytest.mark.parametrize("model", ["vit", *(pytest.param(name, marks=LONG) for name in ("swin", "resnet"))])
def test_recompute_changes_nothing(tmp_path: Path, model: str) -> None:
    train = {"micro_batch": 6}
    reference = run_ranks(run, 1, recipe(tmp_path / "reference", model, train=train))[0]
    for strategy, ranks in (("ddp", 2), ("fsdp", 2)):
        plain = recipe(
            tmp_path / f"{strategy}-{ranks}", model, train=train, parallel=parallel(strategy, 1, recompute="blocks")
        )  # fmt: skip
        same_losses(reference, run_ranks(run, ranks, plain)[0])


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("vit", {"reshard": "never", "scatter": "last", "unit_size": "auto"}),
        *(pytest.param(model, keys, marks=LONG) for model, keys in (
            ("vit", {"reshard": "never", "scatter": "last"}), ("vit", {"scatter": "last", "replicas": 2}),
            # Three blocks, and one.
            ("swin", {"unit_size": "240kB"}), ("swin", {"unit_size": "240kB", "recompute": "blocks"}),
        )),
    ],
)  # fmt: skip
def test_when_fsdp_frees_and_scatters_changes_nothing(tmp_path: Path, model: str, keys: dict[str, Any]) -> None:
    reference = run_ranks(run, 1, recipe(tmp_path / "reference", model))[0]
    plain = recipe(tmp_path / "fsdp", model, parallel={"strategy": "fsdp", **keys})
    same_losses(reference, run_ranks(run, 4, plain)[0])


def wrapped(plain: dict[str, Any]) -> list[Any]:
    """How FSDP wraps the model: for each unit whether it frees its weights, and which it gathers while it runs and after."""
    with start("cpu") as runtime:
        engine, _, _ = build_model(load_config(plain), 10, runtime, steps=10, say=lambda text: None)
        assert engine.forward is engine.module
        states = {path: m._get_fsdp_state() for path, m in engine.module.named_modules() if isinstance(m, FSDPModule)}
        paths = {state: path for path, state in states.items()}
        return [
            (
                path, state._fsdp_param_group.post_forward_mesh_info is not None,
                [paths[other] for other in state._states_to_forward_prefetch],
                [paths[other] for other in state._states_to_backward_prefetch],
            )
            for path, state in states.items()
        ]  # fmt: skip


def test_how_fsdp_wraps(tmp_path: Path) -> None:
    """One rank alone has the plain module; several gather the next block while one runs, in both directions."""

    def plain(**more: Any) -> dict[str, Any]:
        made = recipe(tmp_path, parallel={"strategy": "fsdp", "precision": "bf16", **more})
        # Blocks of fewer are opened: each is more than a quarter of the model.
        return made | {"model": made["model"] | {"options": made["model"]["options"] | {"depth": 6}}}

    assert run_ranks(wrapped, 1, plain()) == [[]]
    blocks = [f"blocks.{number}" for number in range(6)]
    for reshard in ("forward", "never"):
        (root, *units) = run_ranks(wrapped, 2, plain(reshard=reshard))[0]
        assert root == ("", False, [], []), "freed after the backward pass"
        frees = reshard == "forward"
        assert units == [(path, frees, blocks[n + 1 : n + 2], blocks[max(0, n - 1) : n]) for n, path in enumerate(blocks)]
