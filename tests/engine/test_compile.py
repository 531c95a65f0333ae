"""Compiled blocks: when, how many graphs, what they compute, and where their code is kept."""

from __future__ import annotations

import copy
import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

from bigvision.config import load_config
from bigvision.data import Batch
from bigvision.engine import check_engine
from bigvision.engine import parallelize as engine_compile
from bigvision.engine.parallelize import compile_blocks, why_eager, wrap_blocks
from bigvision.errors import UserError
from bigvision.models import SkippedBranches, find_blocks, kinds
from bigvision.models.blocks import RATES
from bigvision.runtime import start
from bigvision.tasks import Classify
from bigvision.training.build import build_model
from tests.distributed import run_ranks
from tests.recipes import recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Counting:
    """A backend that runs dynamo's graphs as they are, and counts them."""

    def __init__(self, patch: Callable[[str, Any], None]) -> None:
        torch._dynamo.reset()
        self.count = 0
        patch("torch.compile", functools.partial(torch.compile, backend=self))

    def __call__(self, graph: fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Counting]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config: Any = torch._dynamo.config
    names = ("recompile_limit", "accumulated_recompile_limit", "optimize_ddp")
    # Tests before these may have raised the limit of this process.
    with config.patch({name: getattr(config, name) for name in names} | {"recompile_limit": 8}):
        yield Counting(monkeypatch.setattr)
    torch._dynamo.reset()


def vit(drop_path: float, depth: int = 12, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, num_heads=3, depth=depth, num_classes=5,
        drop_path_rate=drop_path, **options,
    )  # fmt: skip


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [block.module for block in find_blocks(model)]


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.long)])
def test_equal_blocks_with_different_drop_rates_share_one_graph(graphs: Counting, recompute: bool) -> None:
    model = vit(drop_path=0.2)
    config = load_config({"parallel": {"compile": True, "recompute": "blocks" if recompute else "none"}})
    wrap_blocks(blocks_of(model), config, CPU, model, (3, 16, 16))
    for training, size, expected in ((True, 4, 1), (True, 4, 1), (False, 4, 2), (True, 3, 3), (False, 3, 4), (False, 4, 4)):
        model.train(training)
        with torch.set_grad_enabled(training):
            loss = model(torch.randn(size, 3, 16, 16)).sum()
        if training:
            loss.backward()
        assert graphs.count == expected


def test_one_graph_for_each_width_and_mode(graphs: Counting) -> None:
    model = timm.create_model("test_convnext", drop_path_rate=0.2, num_classes=5)
    blocks = blocks_of(model)
    assert len(blocks) > (count := len(kinds(blocks))) > 3
    compile_blocks(blocks, CPU)
    for size in (2, 3):
        model.train()(torch.randn(size, 3, 64, 64)).sum().backward()
        with torch.no_grad():
            model.eval()(torch.randn(size, 3, 64, 64))
    assert graphs.count == 4 * count


def test_eager_numbers_are_those_of_timm(graphs: Counting) -> None:
    plain = vit(drop_path=0.3, depth=4)
    ours = copy.deepcopy(plain)
    compile_blocks(blocks_of(ours), CPU)
    results = []
    with torch.compiler.set_stance("force_eager"):
        for model in (plain, ours):
            torch.manual_seed(1)
            output = model.train()(torch.randn(8, 3, 16, 16))
            output.sum().backward()
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            results.append([output, *gradients, torch.get_rng_state()])
    assert graphs.count == 0 and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_drop_path_compiled_blocks_compute_the_same(graphs: Counting) -> None:
    plain, ours = vit(drop_path=0.0), vit(drop_path=0.0)
    compile_blocks(blocks_of(ours), CPU)
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(plain.train()(images), ours.train()(images)) and graphs.count == 1


@pytest.mark.long
def test_compiled_relu_and_weight_standardisation_compute_the_same() -> None:
    """In float64 the losses of 10 steps are equal, and gradients in fp32 are as near float64's as those of eager code.

    Losses in fp32 after some steps are no measure for a network of ReLUs: where rounding moves one activation over 0, its
    gradient changes at once, and Adam's first steps make much of it. nf_resnet26 on 32 x 32 pixels, 10 steps of AdamW at 1e-3
    in batches of 24, relative, the largest of 10 losses: eager fp32 1.3e-5 from float64; eager from weights moved by one unit
    in the last place 2.4e-6, 2.4e-6 and 4.5e-4, as the seed of the signs was; compiled fp32 4.1e-4; compiled float64 from eager
    float64 2e-16. With SiLU all of them are below 1.4e-7, so tests/recipes.py trains that in its place.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, 24, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (10, 24), generator=generator)

    def made(dtype: torch.dtype, compiled: bool) -> nn.Module:
        torch.manual_seed(0)
        model = timm.create_model("nf_resnet26", depths=(1, 1, 1, 1), channels=(8, 12, 16, 20), stem_chs=8, num_classes=10)
        if compiled:
            compile_blocks(blocks_of(model), CPU)
        return model.to(dtype)

    def loss(model: nn.Module, number: int) -> Tensor:
        dtype = next(model.parameters()).dtype
        return nn.functional.cross_entropy(model(images[number].to(dtype)), labels[number])

    def trained(model: nn.Module, steps: int) -> list[float]:
        optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        for number in range(steps):
            optimizer.zero_grad()
            value = loss(model, number)
            value.backward()
            optimizer.step()
            found.append(value.item())
        return found

    try:
        reference = trained(made(torch.float64, False), 10)
        assert trained(made(torch.float64, True), 10) == pytest.approx(reference, rel=1e-12)
        start = made(torch.float32, False)
        trained(start, 3)  # at first the gains are 0, and with them most gradients
        gradients = []
        for dtype, compiled in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
            model = made(dtype, compiled)
            model.load_state_dict(start.state_dict())
            loss(model, 3).backward()
            gradients.append(torch.cat([one.grad.double().flatten() for one in model.parameters() if one.grad is not None]))
        exact, *others = gradients
        eager, compiled = (float((other - exact).norm() / exact.norm()) for other in others)
        assert 0 < eager < 1e-5 and compiled < 4 * eager, (eager, compiled)
    finally:
        torch._dynamo.reset()


class Noisy(nn.Module):
    def __init__(self, noise: nn.Module) -> None:
        super().__init__()
        self.linear, self.noise = nn.Linear(3, 3), noise

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(x)


@pytest.mark.parametrize(
    "make", [DropPath, nn.Dropout, lambda p: StochasticDepth(p, "row"), lambda p: StochasticDepth(p, "batch")]
)
def test_compiled_rates(graphs: Counting, make: Callable[[float], nn.Module]) -> None:
    rates = (0.0, 0.25, 0.5, 1.0)
    blocks = [Noisy(make(rate) if rate else nn.Identity()) for rate in rates]
    compile_blocks(blocks, CPU)
    torch.manual_seed(0)
    x = torch.ones(4000, 3, dtype=torch.bfloat16)
    for block, rate in zip(blocks, rates):
        kept = torch.cat([block(x[n::100]) for n in range(100)])
        if not isinstance(block.noise, nn.Dropout):
            assert torch.equal(kept[:, :1].expand_as(kept), kept), "not whole samples"
        if getattr(block.noise, "mode", "") == "batch":
            assert all(len(set(part[:, 0].tolist())) == 1 for part in kept.split(40)), "not whole batches"
        assert set(kept.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - rate) if rate < 1 else 1.0).bfloat16().item()}
        assert (kept == 0).float().mean().item() == pytest.approx(rate, abs=0.13 if rate % 1 else 0)
        assert torch.equal(block.eval()(x), x)
    blocks[0].train()
    setattr(blocks[0].noise, RATES[type(blocks[1].noise).__mro__[1]], 1.0)
    assert not blocks[0](x[::100]).any(), "a rate that is set later does not count"
    assert graphs.count == 2, "one for training, one for evaluation"


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(3, 3), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factor


def test_too_many_graphs_are_reported_in_one_line(graphs: Counting, capfd: pytest.CaptureFixture[str]) -> None:
    blocks = [Scaled(0.1 * n) for n in range(1, 13)]
    compile_blocks(blocks, CPU)
    for _ in range(2):
        for block in blocks:
            x = torch.randn(2, 3)
            assert torch.equal(block(x), block.linear(x) * block.factor)
    assert graphs.count == engine_compile.GRAPHS_PER_KIND
    pattern = r"warning: parallel\.compile: 'forward' \(.*test_compile\.py:\d+\) has 8 graphs.*self\.factor == 0\.8.*false\n"
    assert re.fullmatch(pattern, capfd.readouterr().err)


def configured(**parallel: Any) -> Any:
    return load_config({"parallel": parallel})


@pytest.mark.parametrize("recompute", ["none", pytest.param("blocks", marks=pytest.mark.long)])
def test_branches_that_leave_samples_out_share_one_graph(graphs: Counting, recompute: str) -> None:
    """Each block keeps another number of samples, and the first ones all; compiled and eager code leave out the same."""
    ours, eager = (vit(drop_path=0.4, depth=6) for _ in range(2))
    config = load_config({"parallel": {"compile": True, "recompute": recompute}})
    drawing = []
    for model, compiled in ((ours, True), (eager, False)):
        branches, _ = SkippedBranches.of(model, find_blocks(model), [(3, 16, 16)], CPU, compiled, 20)
        assert branches is not None
        drawing.append(branches)
    wrap_blocks(blocks_of(ours), config, CPU, ours, (3, 16, 16), drawing[0])
    for step, samples in enumerate((20, 20, 13, 20, 13)):
        images, results = torch.randn(samples, 3, 16, 16), []
        for model, branches in zip((ours, eager), drawing):
            branches.draw(samples, 0, step, 0, 0)
            model.zero_grad()
            output = model.train()(images)
            output.square().sum().backward()
            results.append(
                torch.cat([output.detach().flatten(), *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])
            )
        assert torch.allclose(*results, rtol=1e-4, atol=1e-5)
        assert graphs.count == 1 + (step >= 2)
    drawn = [branch.drawn for branch in drawing[0].branches if branch.drawn is not None]
    assert len({len(one.kept) for one in drawn}) > 3


def test_auto_compiles_on_cuda_where_blocks_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_compile, "lacks_for_compile", lambda device: None)
    repeating, resnet, single = blocks_of(vit(0.1, depth=4)), blocks_of(timm.create_model("resnet50")), blocks_of(vit(0.1, 1))
    assert why_eager(configured(), repeating, CUDA) is None and why_eager(configured(), resnet, CUDA) is None
    assert why_eager(configured(compile=True), repeating, CPU) is None
    assert why_eager(configured(compile=False), repeating, CUDA)
    for parallel, blocks, word in (
        ({"strategy": "pipeline", "schedule": "zbv"}, repeating, "zbv"),
        ({"strategy": "zero3"}, repeating, "zero3"),
        ({"recompute": "blocks"}, resnet, "BatchNorm"),
        ({}, single, "repeat"),
    ):
        assert word in (why_eager(configured(**parallel), blocks, CUDA) or "")
        (note,) = wrap_blocks(blocks, configured(**parallel), CUDA, nn.Identity(), (3, 8, 8))
        assert note.startswith("parallel.compile: auto compiles nothing: ") and word in note and "\n" not in note
    assert wrap_blocks(repeating, configured(compile=False), CPU, nn.Identity(), (3, 8, 8)) == []
    assert "not CUDA" in wrap_blocks(repeating, configured(), CPU, nn.Identity(), (3, 8, 8))[0]
    assert why_eager(configured(recompute="blocks"), repeating, CUDA) is None
    monkeypatch.setattr(engine_compile, "lacks_for_compile", lambda device: "a compiler")
    assert "a compiler" in (why_eager(configured(), repeating, CUDA) or "")


@pytest.mark.parametrize(
    ("device", "lacking"), [(CPU, "g++"), (CUDA, "gcc"), (CUDA, "triton"), (CUDA, "7.0"), (CPU, "Python.h")]
)
def test_true_without_a_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch, device: torch.device, lacking: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1) if lacking == "7.0" else (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if lacking == "triton" else object())
    monkeypatch.setattr("shutil.which", lambda name: None if "g" in lacking else name)
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere" if lacking == "Python.h" else os.path.dirname(__file__))
    monkeypatch.setattr(Path, "exists", lambda path: "nowhere" not in str(path))
    runtime: Any = SimpleNamespace(data_ranks=1, pipeline_ranks=1, device=device)
    check_engine(configured(), runtime, Classify())
    with pytest.raises(UserError, match=re.escape(lacking)) as caught:
        check_engine(configured(compile=True), runtime, Classify())
    assert str(caught.value).startswith("parallel.compile: true needs ") and "\n" not in str(caught.value)


def test_the_cache_is_the_users_unless_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def chosen(before: str | None) -> str | None:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        if before is not None:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
        engine_compile._keep_cache()
        return os.environ.get("TORCHINDUCTOR_CACHE_DIR")

    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours = Path(chosen(None) or "")
    assert ours.parent == tmp_path / "bigvision" / "compile" and str(ours) == chosen(default_cache_dir())
    assert ours.stat().st_mode & 0o077 == 0, "others may write code that this user runs"
    assert chosen("/mine") == "/mine"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert chosen(None) is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert chosen(None) == str(tmp_path / ".cache" / "bigvision" / "compile" / ours.name)


PROGRAM = """
import timm, torch
from bigvision.engine.parallelize import compile_blocks
blocks = [torch.nn.Sequential(torch.nn.Linear(8, 8), timm.layers.DropPath(0.1 * n)) for n in range(1, 4)]
compile_blocks(blocks, torch.device("cpu"))
torch.nn.Sequential(*blocks)(torch.randn(4, 8, requires_grad=True)).sum().backward()
counters = torch._dynamo.utils.counters
print(counters["stats"]["unique_graphs"], counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.long
def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    results = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert results == [["1", "2", "0"], ["1", "0", "2"]], "graphs, and forward and backward passes compiled and read"


def graphs_of_a_run(plain: dict[str, Any]) -> list[float]:
    """Graphs per kind of block after building the engine, after steps with a short last micro-batch, and after evaluation."""
    patch = pytest.MonkeyPatch()
    try:
        counting, seen = Counting(patch.setattr), []
        with start("cpu") as runtime:
            engine, plan, _ = build_model(load_config(plain), 10, runtime, steps=10, say=lambda text: None)
            number = len(kinds(blocks_of(plan.module)))
            seen.append(counting.count)
            images = torch.randint(0, 256, (12, *plan.input_shape), dtype=torch.uint8)
            labels, every = torch.arange(12) % 10, torch.ones(12, dtype=torch.bool)
            for _ in range(2):
                engine.train_step(Batch(images, labels, labels, every))
            seen.append(counting.count)
            engine.eval_step(Batch(images[:5], labels[:5], labels[:5], every[:5]))
            engine.close()
        return [count / number for count in (*seen, counting.count)]
    finally:
        patch.undo()
        torch._dynamo.reset()


@pytest.mark.parametrize("strategy", ["fsdp", *(pytest.param(name, marks=pytest.mark.long) for name in ("ddp", "zero2"))])
def test_graphs_of_a_strategy(tmp_path: Path, strategy: str) -> None:
    plain = recipe(tmp_path, parallel={"strategy": strategy, "compile": True})
    # The parts of so small a model lie inside of branches: of a micro-batch of five they get five or four samples.
    plain["model"] = {**plain["model"], "drop_path": 0.2, "drop_path_mode": "skip"}
    assert run_ranks(graphs_of_a_run, 2, plain) == [[0, 2, 3]] * 2
    plain["model"] |= {"drop_path_mode": "mask"}
    assert run_ranks(graphs_of_a_run, 2, plain) == [[0, 2, 3]] * 2
