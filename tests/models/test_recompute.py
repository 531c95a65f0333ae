"""Selective recompute: what is kept, and that nothing of a run's numbers depends on it."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bigvision import load_config
from bigvision.engine.parallelize import choose_computing, wrap_blocks
from bigvision.errors import UserError
from bigvision.models import blueprint, find_blocks
from bigvision.models.formats import compute_in
from bigvision.models.recompute import Choice, choose_kept, shared_out
from bigvision.models.tracing import product
from tests.distributed import run_ranks
from tests.recipes import MODELS, digests, recipe, run

LONG = pytest.mark.long
SHAPE = (3, 224, 224)


def built(name: str, dtype: torch.dtype | None = None, **options: Any) -> tuple[nn.Module, list[nn.Module]]:
    """A model on meta that computes in *dtype*, and its blocks."""
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    blocks = [block.module for block in find_blocks(model.train())]
    if dtype is not None:
        compute_in([model], blocks, dtype)
    return model, blocks


class Products(TorchDispatchMode):
    """Counts the products that are computed."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += product(func, args, kwargs or {}) is not None
        return func(*args, **(kwargs or {}))


class Watched:
    """Bytes that a block keeps for its backward pass, beside its input, and the products that the backward pass runs."""

    def __init__(self, name: str, recompute: str, compiled: bool = False) -> None:
        model, blocks = built(name)
        config = load_config({"parallel": {"recompute": recompute, "compile": compiled}})
        wrap_blocks(blocks, config, torch.device("cpu"), model, SHAPE)
        model.to_empty(device="cpu")
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.detach().fill_(0.1)
        inputs: list[torch.Tensor] = []
        hook = blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().requires_grad_()))
        with torch.no_grad():
            model(torch.randn(2, *SHAPE))
        hook.remove()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as forward:
            output = blocks[0](inputs[0])
        self.kept = sum(event.self_cpu_memory_usage for event in forward.key_averages()) - output.nbytes
        with Products() as backward:
            output.sum().backward()
        self.products = backward.count


@pytest.mark.parametrize(
    ("name", "compiled"),
    [("vit_tiny_patch16_224", False), ("convnext_atto", False), pytest.param("convnext_atto", True, marks=LONG)],
)
def test_a_block_keeps_products_alone_and_computes_none_again(name: str, compiled: bool) -> None:
    none, selective, budget, blocks = (
        Watched(name, recompute, compiled) for recompute in ("none", "selective", "budget:0.3", "blocks")
    )
    assert blocks.kept < budget.kept < selective.kept < 0.7 * none.kept
    if not compiled:  # whose products no mode sees
        assert selective.products == none.products < budget.products < blocks.products
    assert budget.kept <= 0.3 * none.kept


VIT = frozenset({("addmm", (1024, 3072)), ("attention", ()), ("addmm", (1024, 1024)), ("addmm", (1024, 4096))})


def test_what_a_vit_keeps_in_half_precision() -> None:
    """The last product is only added to the residual stream, so nothing needs it. For half of the bytes attention and what
    follows it are computed again. A budget that no choice uses up is shared out evenly among the blocks."""
    model, blocks = built("vit_large_patch16_224", torch.bfloat16)
    qkv, projection, first = (("addmm", (1024, width)) for width in (3072, 1024, 4096))
    assert set(choose_kept(blocks, "selective", model, SHAPE).values()) == {VIT}
    half, less = frozenset({qkv, first}), frozenset({projection, first})
    assert choose_kept(blocks, "budget:0.5", model, SHAPE) == dict.fromkeys(blocks, half)
    mixed = choose_kept(blocks, "budget:0.47", model, SHAPE)
    assert list(mixed) == blocks and set(mixed.values()) == {half, less}
    fewer = [number for number, kept in enumerate(mixed.values()) if kept == less]
    assert len(fewer) == 7 and {b - a for a, b in itertools.pairwise(fewer)} <= {3, 4}


def test_a_budget_is_met_with_the_fewest_operations() -> None:
    found = [Choice(frozenset(), 0.1, 8.0), Choice(frozenset({("mm", (1, 1))}), 0.4, 4.0), Choice(VIT, 0.8, 0.0)]
    shares = {one.kept: one.share for one in found}
    for budget, flops in ((0.05, 32.0), (0.1, 32.0), (0.4, 16.0), (0.5, 12.0), (0.6, 8.0), (0.8, 0.0), (1.0, 0.0)):
        kept = shared_out(found, budget, 4)
        assert sum(one.flops for part in kept for one in found if one.kept == part) == flops
        assert sum(map(shares.__getitem__, kept)) <= max(budget, 0.1) * 4 + 1e-9


def test_a_product_that_a_layer_scale_needs_is_kept() -> None:
    model, blocks = built("vit_tiny_patch16_224", init_values=1e-5)
    assert ("addmm", (768, 192)) in choose_kept(blocks, "selective", model, SHAPE)[blocks[0]]


DROPS: dict[str, dict[str, Any]] = {"vit": {"proj_drop_rate": 0.1, "attn_drop_rate": 0.1}}
MODELS_HERE = ["vit", *(pytest.param(one, marks=LONG) for one in MODELS if one not in ("vit", "small", "pyramid"))]


@pytest.mark.parametrize("model", MODELS_HERE)
def test_a_run_ends_with_the_same_bytes(tmp_path: Path, model: str) -> None:
    """Also where dropout draws between what is kept and what is computed again, and where activations work in place."""
    found = []
    for recompute in ("none", "selective", "budget:0.4"):
        plain = recipe(tmp_path / recompute, model, train={"steps": 3}, parallel={"recompute": recompute})
        options = MODELS[model].get("options", {}) | DROPS.get(model, {})
        plain["model"] = plain["model"] | {"options": options, "drop_path": 0.0 if model == "coat" else 0.2}
        found.append((run(plain), digests(tmp_path / recompute / "step-00000003")))
    assert found[0] == found[1] == found[2]


STRATEGIES: list[tuple[int, dict[str, Any]]] = [
    (2, {"strategy": "ddp"}),
    (3, {"strategy": "fsdp"}),
    (4, {"strategy": "fsdp", "replicas": 2}),
    (2, {"strategy": "zero2"}),
    (3, {"strategy": "zero3"}),
    (2, {"strategy": "pipeline"}),
    (2, {"strategy": "pipeline", "schedule": "interleaved"}),
    (4, {"strategy": "pipeline", "stages": 2}),
]


@LONG
@pytest.mark.parametrize(("ranks", "parallel"), STRATEGIES)
@pytest.mark.parametrize("recompute", ["selective", "budget:0.3"])
def test_losses_are_those_of_one_process(tmp_path: Path, ranks: int, parallel: dict[str, Any], recompute: str) -> None:
    train = {"steps": 10, "micro_batch": 6}
    reference = run_ranks(run, 1, recipe(tmp_path / "one", train=train))[0]
    plain = recipe(tmp_path / "out", train=train, parallel=parallel | {"recompute": recompute})
    assert run_ranks(run, ranks, plain)[0] == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_products_are_listed_where_fsdp_casts_the_weights(tmp_path: Path, precision: str) -> None:
    """The modules cast their inputs alone there: on meta, where nothing is gathered, weights would be of another type."""
    config = load_config(recipe(tmp_path, parallel={"strategy": "fsdp", "precision": precision, "recompute": "selective"}))
    plan = blueprint(config.model, 10)
    blocks, cpu = find_blocks(plan.module, 32), torch.device("cpu")
    modules = [block.module for block in blocks]
    computing = choose_computing(config, plan, blocks, cpu, False, 6)
    computing.apply([plan.module], modules, False, cpu)
    wrap_blocks(modules, config, cpu, plan.module, plan.input_shape, gathered=computing.dtype)
    assert {parameter.dtype for parameter in plan.module.parameters()} == {torch.float32}


def test_attention_with_dropout_is_computed_again() -> None:
    """Were its result kept, the second pass would draw other numbers for what comes after it."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention.default
    query = torch.empty(1, 1, 4, 8, device="meta")
    assert product(attend, (query, query, query), {}) == ("attention", ())
    assert product(attend, (query, query, query, 0.1), {}) is None
    assert product(attend, (query, query, query), {"dropout_p": 0.1}) is None


@pytest.mark.parametrize(
    "value", ["budget", "budget:", "budget:2", "budget:0", "budget:-1", "budget:nan", "most", "budget:1e-1"]
)
def test_what_is_no_kind_of_recompute(value: str) -> None:
    with pytest.raises(UserError, match=r"parallel.recompute: '.*' must be none, selective, blocks, auto, or budget:X"):
        load_config({"parallel": {"recompute": value}})


def test_a_schedule_that_goes_through_a_block_twice() -> None:
    """torch's selective checkpoint gives what it kept once."""
    parallel = {"strategy": "pipeline", "schedule": "zbv", "recompute": "selective"}
    with pytest.raises(
        UserError, match=r"parallel.recompute: selective excludes parallel.schedule: zbv, .*: use blocks or none"
    ):
        load_config({"parallel": parallel})


def test_a_model_that_cannot_run_on_meta() -> None:
    model, blocks = built("vit_tiny_patch16_224")
    broken = copy.copy(model)
    broken.forward = lambda images: images.tolist()  # type: ignore[method-assign]
    with pytest.raises(
        UserError, match=r"parallel.recompute: this model's products cannot be listed on meta .*: use blocks or none"
    ):
        choose_kept(blocks, "selective", broken, SHAPE)
