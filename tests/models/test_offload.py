"""Offloaded activations: what moves and when, and that nothing of a run's numbers depends on it."""

from __future__ import annotations

import copy
import functools
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bigvision import load_config
from bigvision.engine import check_engine
from bigvision.engine.parallelize import make_offload, wrap_blocks
from bigvision.errors import UserError
from bigvision.models import SkippedBranches, blueprint, find_blocks
from bigvision.models.offload import ALIGNED, SLAB, Buffers, Offload, PinnedCopies
from bigvision.runtime import start
from bigvision.tasks import Classify
from tests.distributed import run_ranks
from tests.offload import NEVER_WRITTEN, LateCopies, LateStream, on_the_cpu
from tests.recipes import MODELS, digests, recipe, run

LONG = pytest.mark.long
CPU = torch.device("cpu")


class Block(nn.Module):
    """Saves its input, a product, and what an activation needs."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


def wrapped(blocks: Sequence[nn.Module], least: int = 1) -> LateCopies:
    with on_the_cpu(least) as found:
        offload = Offload(CPU)
    for block in blocks:
        offload.wrap(block)
    return found[0]


def gradients(blocks: Sequence[nn.Module], images: Tensor) -> list[Tensor]:
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    for parameter in parameters:
        parameter.grad = None
    nn.Sequential(*blocks)(images).square().sum().backward()
    return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return len(ones) == len(others) and all(torch.equal(one, other) for one, other in zip(ones, others))


# What moves, and when.


def test_what_is_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block saved is gone when the block after the next begins, and back when the next one's backward pass begins."""
    monkeypatch.setattr("bigvision.models.offload.LEAST", 1)
    blocks = [Block() for _ in range(5)]
    plain = gradients(blocks, images := torch.randn(8, 16, requires_grad=True))
    copies = wrapped(blocks)
    events: list[tuple[str, int]] = []
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, n=number: events.append((f"forward {n}", sum(copies.leaving))))
        block.register_full_backward_hook(lambda *_, n=number: events.append((f"backward {n} is over", copies.back)))
    assert equal(gradients(blocks, images), plain)
    each = (16 + 4 * 16) * 8 * 4  # the input and tanh's result
    begun = [(f"forward {n}", each * max(0, n - 1)) for n in range(5)]
    # The last block's never left, and that of the block before it was still there.
    ended = [(f"backward {n} is over", each * back) for n, back in ((4, 0), (3, 1), (2, 2), (1, 3), (0, 3))]
    assert events == begun + ended
    assert sum(copies.leaving) == 4 * each and copies.held == 0


def test_a_block_that_saves_nothing_does_not_delay_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigvision.models.offload.LEAST", 1)
    blocks: list[nn.Module] = [nn.Tanh() for _ in range(5)]
    copies, back = wrapped([*blocks[:3], nothing := nn.Identity(), *blocks[3:]]), list[int]()
    x = torch.randn(8, requires_grad=True) * 1
    for block in (*blocks[:3], nothing, *blocks[3:]):
        x = block(x) * 1
        if block is nothing:
            x.register_hook(lambda _: back.append(copies.back))
    x.sum().backward()
    assert back == [32], "when the next block's backward pass begins"


def saved_in(block: nn.Module, *inputs: Tensor, least: int = 1) -> tuple[list[int], Tensor]:
    """Bytes of each memory that leaves when the next block begins, and what *block* returns."""
    copies = wrapped([block, after := nn.Linear(1, 1)], least)
    output = block(*inputs)
    after(torch.zeros(1))
    return copies.leaving, output


def test_parameters_buffers_and_cast_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigvision.models.offload.LEAST", 1)

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))
            self.table: Tensor
            self.register_buffer("table", torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            cast = self.weight.to(torch.float64)
            return (x @ self.weight.t()[:, :6] * self.table).double() @ cast.t() @ self.weight[:6].double()

    leaving, output = saved_in(Weighted(), torch.randn(4, 6, requires_grad=True))
    # The input, and the left sides of two products in fp64.
    assert sorted(leaving) == [4 * 6 * 4, 4 * 6 * 8, 4 * 6 * 8]
    output.sum().backward()


def test_memory_is_moved_once_and_small_memory_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigvision.models.offload.LEAST", 400)

    class Attend(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            query, key, value = x.square().chunk(3, dim=1)  # three views of one memory, and the input
            small = x[:2].clone().exp()
            return (query * key * value).sum() + small.sum()

    leaving, output = saved_in(Attend(), torch.randn(10, 30, requires_grad=True), least=400)
    # query times key is a third of the input's size; the small one stays.
    assert sorted(leaving) == [400, 1200, 1200]
    output.backward()


def test_memory_of_which_little_was_saved_is_somebody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigvision.models.offload.LEAST", 1)

    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square()

    batch = torch.randn(30, 10, requires_grad=True)
    assert saved_in(Square(), batch[:10])[0] == []
    assert saved_in(Square(), batch[:15])[0] == [1200]


@pytest.mark.parametrize("when", ["still there", "leaving", "moved"])
def test_what_is_changed_in_place_is_an_error_as_without(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Unless its values have left already, which are those that were saved."""
    monkeypatch.setattr("bigvision.models.offload.LEAST", 1)
    parts: list[nn.Module] = [nn.Tanh() for _ in range(3)]
    wrapped(parts)
    images = torch.randn(4, requires_grad=True)
    first = parts[0](images * 1)  # which saves its result
    if when == "leaving":
        parts[1](images * 1)
    if when == "moved":
        parts[2](parts[1](images * 1))
    output, expected = first * 1, 1 - first.detach().square()
    first.mul_(2)
    if when == "leaving":
        parts[2](images * 1)
    if when == "moved":
        output.sum().backward()
        assert torch.allclose(images.grad, expected)  # type: ignore[arg-type]
        return
    with pytest.raises(RuntimeError, match="changed in place after the forward pass"):
        output.sum().backward()


def test_memory_that_is_changed_between_two_saves_is_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigvision.models.offload.LEAST", 1)

    class Twice(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            table = torch.ones(4)
            self.one = x * table  # whose gradient nobody asks for
            table.mul_(3)
            return self.one.detach() + scale * table

    leaving, output = saved_in(Twice(), torch.randn(4, requires_grad=True), scale := torch.ones(4, requires_grad=True))
    output.sum().backward()
    assert leaving == [16], "what was changed is of no use"
    assert torch.equal(scale.grad, torch.full((4,), 3.0))  # type: ignore[arg-type]


def test_memory_at_an_address_that_is_used_again_moves_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigvision.models.offload.LEAST", 1)

    class Twice(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            one = x * scale
            older.clear()
            return one + x * scale

    first, second, third, twice, last = blocks = [nn.Tanh(), nn.Tanh(), nn.Tanh(), Twice(), nn.Tanh()]
    copies, saved = wrapped(blocks), first(torch.randn(8, requires_grad=True) * 1)
    address, older = saved.untyped_storage()._cdata, [saved * 1]
    del saved  # which its block has saved
    second(torch.zeros(8))
    third(torch.zeros(8))  # the first block's memory is free now, and awaited by a backward pass still
    others = [torch.zeros(8)]
    while others[-1].untyped_storage()._cdata != address and len(others) < 1000:
        others.append(torch.zeros(8))
    assert others[-1].untyped_storage()._cdata == address
    output = twice(others[-1], scale := torch.ones(8, requires_grad=True))
    last(torch.zeros(8))
    assert copies.leaving == [32, 32], "of the first block and of this one"
    output.sum().backward()
    assert torch.equal(scale.grad, torch.zeros(8))  # type: ignore[arg-type]


def test_what_no_backward_pass_needs_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass whose result is dropped, an evaluation, and a backward pass through a part of what came back."""
    monkeypatch.setattr("bigvision.models.offload.LEAST", 1)
    blocks: list[nn.Module] = [Block() for _ in range(4)]
    model, copies = nn.Sequential(*blocks), wrapped(blocks)
    images = torch.randn(8, 16, requires_grad=True)
    with torch.no_grad():
        model(images)
    assert not copies.leaving
    output = model(images)
    del output
    assert copies.held == 0
    outputs = [images]
    for block in blocks:
        outputs.append(block(outputs[-1]))
    torch.autograd.grad(outputs[-1].sum(), outputs[2])  # the first two blocks' is brought back, but for the first
    assert copies.held > 0
    del outputs
    assert copies.held == 0
    copies.wait(copies.done + len(copies.queue))  # nothing comes back into memory that is free


def test_what_a_backward_pass_has_begun_to_read_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines alternate between forward and backward passes."""
    monkeypatch.setattr("bigvision.models.offload.LEAST", 1)
    blocks: list[nn.Module] = [nn.Tanh() for _ in range(4)]
    copies = wrapped(blocks)
    first, second = (block(torch.randn(8, requires_grad=True) * 1) * 1 for block in blocks[:2])
    assert copies.leaving == [32], "of the first"
    first.sum().backward(retain_graph=True)
    second.sum().backward(retain_graph=True)
    for block in blocks[2:]:
        block(torch.zeros(8))
    first.sum().backward()
    second.sum().backward()
    assert copies.leaving == [32] and copies.back == 0


def test_hooks_around_the_model_see_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigvision.models.offload.LEAST", 1)
    seen: list[Tensor] = []

    def keep(tensor: Tensor) -> Any:
        seen.append(tensor)
        return (
            ("weight", tensor)
            if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
            else tensor.detach()
        )

    def kept(value: Any) -> Tensor:
        return value[1] if isinstance(value, tuple) else value

    blocks: list[nn.Module] = [Block() for _ in range(3)]
    plain = gradients(blocks, images := torch.randn(8, 16, requires_grad=True))
    copies = LateCopies(CPU)
    offload = Offload(CPU, (keep, kept), copies)
    for block in blocks:
        offload.wrap(block)
    with saved_tensors_hooks(keep, kept):
        assert equal(gradients(blocks, images), plain)
    assert copies.leaving and len(seen) > 6


def test_slabs_are_used_again() -> None:
    made: list[int] = []

    def allocate(size: int) -> Tensor:
        made.append(size)
        return torch.empty(size, dtype=torch.uint8)

    buffers = Buffers(allocate)
    for _ in range(3):
        taken = [buffers.take(size) for size in (1000, 3 << 20, 1000, SLAB + 5)]
        assert {one.data_ptr() % ALIGNED for one in taken[:3]} == {taken[0].data_ptr() % ALIGNED}
        assert [one.numel() for one in taken] == [1000, 3 << 20, 1000, SLAB + 5]
        ends = sorted((one.data_ptr(), one.data_ptr() + one.numel()) for one in taken)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends))
        buffers.give(taken[0])
        other = buffers.take(2000)
        assert buffers.take(1000).data_ptr() == taken[0].data_ptr() and other.numel() == 2000
        buffers.give(other)
        for one in taken:
            buffers.give(one)
    assert made == [SLAB, SLAB + 5] and buffers.out == 0

    def full(size: int) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    with pytest.raises(UserError, match=r"parallel.offload: activations has 0.0 GiB of pinned host memory and gets no more"):
        Buffers(full).take(1)


def test_pinned_copies_are_made_between_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the streams of CUDA imitated."""
    stream = LateStream()
    for name, value in {"Stream": lambda _: stream, "current_stream": lambda _: stream, "stream": lambda one: one}.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def pinned(size: int, *, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        return torch.full((size,), NEVER_WRITTEN, dtype=dtype)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", pinned)
        copies = PinnedCopies(CPU)
    blocks = [Block() for _ in range(5)]
    same, offload = copy.deepcopy(blocks), Offload(CPU, transfers=copies, least=1)
    for block in blocks:
        offload.wrap(block)
    for step in range(1, 4):
        images = torch.randn(8, 16, requires_grad=True)
        assert equal(gradients(blocks, images), gradients(same, images))
        # Two memories of each block but the last leave, and come back where they were gone.
        assert stream.done == step * (4 * 2 + 3 * 2) and not stream.queue
        assert copies.buffers.used == [4 * (16 + 4 * 16) * 8 * 4] and copies.buffers.out == 0


# Models.

SKIP = {"drop_path": 0.5, "drop_path_schedule": "constant", "drop_path_mode": "skip"}
"""Of four samples and of six a branch runs on half."""
DEEP = {"depth": 5}
"""Of fewer blocks each has so many of the parameters that it is divided into attention and MLP."""


def passes(model: str, recompute: str, offload: str) -> tuple[list[Tensor], list[LateCopies], int]:
    """The gradients of a small model, its transfers, and how often blocks were called."""
    torch.manual_seed(0)
    skips = SKIP | {"options": MODELS[model]["options"] | DEEP} if model == "vit" else {}
    plan = blueprint(load_config({"model": MODELS[model] | skips}).model, 10)
    module = plan.module.train()
    found_blocks = find_blocks(module, plan.image_size)
    blocks = [block.module for block in found_blocks]
    branches = SkippedBranches.of(module, found_blocks, [plan.input_shape], CPU, False, 6)[0] if skips else None
    parallel = {"recompute": recompute, "offload": offload, "precision": "fp32", "compile": False}
    with on_the_cpu() as found:
        config = load_config({"parallel": parallel})
        wrap_blocks(blocks, config, CPU, module, plan.input_shape, branches, make_offload(config, CPU))
        module.to_empty(device="cpu")
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.detach().uniform_(0.1, 0.2) if "running" in str(tensor.shape) else tensor.detach().normal_(0.1, 0.05)
            else:
                tensor.zero_()
        for part in module.modules():
            if hasattr(part, "relative_position_index"):
                part.get_buffer("relative_position_index").zero_()
        images = torch.randn(6, *plan.input_shape)
        for micro in range(2):  # two micro-batches, the second shorter
            if branches is not None:
                branches.draw(len(images), micro)
            loss = module(images).float().logsumexp(1).sum()
            if branches is not None:  # as in pipelines
                branches.draw(len(images), micro + 2)
            loss.backward()
            images = images[:4]
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None], found, 2 * len(blocks)


@functools.cache
def plainly(model: str) -> list[Tensor]:
    return passes(model, "none", "none")[0]


@pytest.mark.parametrize("recompute", ["none", "selective", "budget:0.4", "blocks"])
@pytest.mark.parametrize("model", ["vit", "swin", "convnext", "resnet", "eva02"])
def test_gradients_have_the_same_bytes(model: str, recompute: str) -> None:
    found, (copies,), calls = passes(model, recompute, "activations")
    assert equal(found, plainly(model))
    assert copies.leaving and copies.back and copies.held == 0
    # Recomputed blocks save their inputs, and the last call's stays; of other ones what they keep leaves too.
    assert (len(copies.leaving) < calls) is (recompute == "blocks")


# Runs.


def offloaded(plain: dict[str, Any]) -> tuple[list[float], list[int]]:
    """The losses of a run on this rank, and bytes that left, came back and are on the host at its end."""
    torch._dynamo.reset()
    with on_the_cpu() as found:
        losses = run(plain)
    return losses, [sum(sum(one.leaving) for one in found), sum(one.back for one in found), sum(one.held for one in found)]


DROPS = {"drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}
RUNS: list[Any] = [
    # ranks, parallel, model, other keys of the model
    pytest.param(2, {"strategy": "fsdp", "recompute": "selective", "precision": "bf16"}, "vit", {"drop_path": 0.2}),
    *(
        pytest.param(ranks, parallel | {"recompute": recompute}, "vit", {"drop_path": 0.2}, marks=LONG)
        for recompute in ("none", "blocks")
        for ranks, parallel in (
            (1, {"strategy": "ddp", "precision": "fp16"}),
            (2, {"strategy": "ddp"}),
            (3, {"strategy": "fsdp", "unit_size": "1MB"}),
            (4, {"strategy": "fsdp", "replicas": 2, "precision": "bf16"}),
            (2, {"strategy": "zero1"}),
            (2, {"strategy": "zero2", "precision": "bf16"}),
            (3, {"strategy": "zero3"}),
            (2, {"strategy": "zero3", "offload": "all"}),
            (2, {"strategy": "pipeline"}),
            (2, {"strategy": "pipeline", "schedule": "gpipe"}),
            (2, {"strategy": "pipeline", "schedule": "interleaved"}),
            (4, {"strategy": "pipeline", "stages": 2}),
        )
    ),
    *(pytest.param(2, {"strategy": "zero3", "recompute": kind}, "vit", {}, marks=LONG) for kind in ("selective", "budget:0.4")),
    *(
        pytest.param(2, {"strategy": strategy, "recompute": recompute}, "vit", SKIP, marks=LONG)
        for strategy in ("ddp", "fsdp", "zero3")
        for recompute in ("none", "blocks", "selective")
    ),
    *(pytest.param(2, {"strategy": "fsdp"}, model, {}, marks=LONG) for model in ("swin", "efficientnet", "coat", "nfnet")),
    *(
        pytest.param(1, {"compile": True, "recompute": recompute}, "small", {"drop_path": 0.2}, marks=LONG)
        for recompute in ("none", "blocks", "selective")
    ),
]


def _named(value: Any) -> str:
    return "-".join(str(part) for part in value.values()) or "plain" if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("ranks", "parallel", "model", "more"), RUNS, ids=_named)
def test_a_run_ends_with_the_same_bytes(
    tmp_path: Path, ranks: int, parallel: dict[str, Any], model: str, more: dict[str, Any]
) -> None:
    """With micro-batches of which the last is shorter, also where it is resumed."""
    state = parallel.get("offload", "none")
    both = "activations" if state == "none" else f"{state}+activations"
    train = {"steps": 4, "global_batch": 10 * ranks, "micro_batch": 5 if parallel.get("strategy") == "pipeline" else 4}

    def plain(name: str, offload: str) -> dict[str, Any]:
        made = recipe(tmp_path / name, model, train=train, parallel=parallel | {"offload": offload}, checkpoint={"every": 2})
        options = MODELS[model].get("options", {}) | (DEEP if "drop_path_mode" in more else DROPS if more else {})
        made["model"] = made["model"] | {"options": options} | more
        return made

    expected = run_ranks(run, ranks, plain("none", state))[0]
    (found, (left, back, held)), *_ = run_ranks(offloaded, ranks, plain("offloaded", both))
    assert found == expected and left > 0 and held == 0
    assert back > 0 or model == "small" or parallel.get("strategy") == "pipeline"
    last = "step-00000004"
    assert digests(tmp_path / "offloaded" / last) == digests(tmp_path / "none" / last)
    shutil.rmtree(tmp_path / "offloaded" / last)
    found = run_ranks(offloaded, ranks, plain("offloaded", both))[0][0]
    assert found[-2:] == expected[-2:]
    assert digests(tmp_path / "offloaded" / last) == digests(tmp_path / "none" / last)


# What is refused.


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        (
            {"strategy": "fsdp", "offload": "optimizer+activations"},
            ["needs parallel.strategy zero1", "activations alone works"],
        ),
        ({"strategy": "zero2", "offload": "all+activations"}, ["needs parallel.strategy zero3", "optimizer+activations works"]),
        (
            {"strategy": "pipeline", "schedule": "zbv", "offload": "activations"},
            ["excludes parallel.schedule: zbv", "use 1f1b"],
        ),
    ],
)
def test_what_does_not_go_together(parallel: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config({"parallel": parallel})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_the_cpu_has_no_other_memory() -> None:
    config = load_config({"parallel": {"offload": "activations", "strategy": "ddp", "device": "cpu"}})
    with (
        start("cpu") as runtime,
        pytest.raises(UserError, match=r"parallel.offload: activations .* the device is the CPU: use none"),
    ):
        check_engine(config, runtime, Classify())
