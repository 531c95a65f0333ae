"""Residual branches that run on the kept samples only: where they begin, what they compute, and how samples are drawn."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bigvision.config import ModelConfig
from bigvision.errors import UserError
from bigvision.models import blueprint
from bigvision.models.branches import dropping, find_branches
from bigvision.models.drop_path import SkippedBranches, kept_samples, set_constant_rate
from bigvision.samples import seed_from
from tests.models.zoo import ZOO, Entry

CPU, LONG = torch.device("cpu"), pytest.mark.long
VIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 3}
SWIN: dict[str, Any] = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 3)}
MODELS: list[tuple[str, dict[str, Any], int, int]] = [
    # model, options, calls of DropPath that skip, modules that mask
    ("vit_tiny_patch16_224", VIT, 4, 0),
    ("deit3_small_patch16_224", VIT, 4, 0),
    ("vit_small_plus_patch16_dinov3", {**VIT, "embed_dim": 48}, 4, 0),
    ("eva02_tiny_patch14_224", {**VIT, "embed_dim": 48}, 4, 0),
    # Its rotary embeddings follow the patches that are left of each image.
    ("eva02_tiny_patch14_224", {**VIT, "embed_dim": 48, "patch_drop_rate": 0.5}, 4, 0),
    ("swin_tiny_patch4_window7_224", SWIN, 6, 0),
    ("swinv2_tiny_window8_256", SWIN, 6, 0),
    ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20)}, 4, 0),
    ("mixer_s16_224", {"img_size": 32}, 16, 0),
    ("resnet18", {}, 0, 7),
    ("davit_tiny", {"depths": (1, 1), "embed_dims": (8, 16), "num_heads": (1, 2)}, 3, 1),
]  # fmt: skip

COVERED = ("deit3_small_patch16_224", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224", "davit_tiny")
"""Those of which others have all that is particular."""


def made(name: str, options: dict[str, Any], rate: float = 0.4) -> tuple[nn.Module, tuple[int, int, int]]:
    """A model whose branches matter from the first step on."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, drop_path_rate=rate, **options).train()
    for parameter in model.parameters():
        if parameter.ndim <= 1:
            nn.init.uniform_(parameter, 0.5, 1.0)
    side = options.get("img_size", 32)
    return model, (3, side, side)


def result(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The outputs and all gradients."""
    model.zero_grad()
    output = model(images)
    output.square().sum().backward()
    return [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_skips_as_it_masks(model: nn.Module, branches: SkippedBranches, images: Tensor, tolerance: float) -> None:
    results = []
    for whole in (False, True):
        for branch in branches.branches:
            branch.whole = whole
        branches.draw(len(images), 0, 1, 0, 0)
        with torch.random.fork_rng(devices=[]):
            results.append(result(model, images))
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= tolerance * other.norm() + 1e-12


@pytest.mark.parametrize(
    ("name", "options", "skipping", "masking"),
    [pytest.param(*one, marks=[LONG] * (one[0] in COVERED and "patch_drop_rate" not in one[1])) for one in MODELS],
    ids=lambda value: str(value)[:20],
)
def test_skipping_computes_what_masking_does(name: str, options: dict[str, Any], skipping: int, masking: int) -> None:
    model, shape = made(name, options)
    names = list(model.state_dict())
    found, masked = find_branches(model, shape)
    assert (len(found), len(masked)) == (skipping, masking)
    images, plain = torch.randn(5, *shape), copy.deepcopy(model).eval()
    branches = SkippedBranches(found, model, CPU)
    branches.draw(5, 0, 0, 0, 0)
    assert torch.equal(model.eval()(images), plain(images)) and list(model.state_dict()) == names
    assert_skips_as_it_masks(model.train(), branches, images, 1e-4)


@LONG
@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.module)
def test_every_module_of_timms_skips_as_it_masks(entry: Entry) -> None:
    torch.manual_seed(0)
    try:
        model: Any = timm.create_model(entry.name, num_classes=5, drop_path_rate=0.4, **entry.options).train()
    except TypeError:
        pytest.skip("no stochastic depth")
    shape = model.pretrained_cfg["input_size"]
    found, masked = find_branches(model, shape)
    if not found:
        assert masked or not dropping(model)
        pytest.skip("; ".join(sorted(set(masked.values()))) or "no DropPath")
    # In fp64: some gradients are nothing but rounding.
    images = torch.randn(3, *shape, dtype=torch.float64)
    assert_skips_as_it_masks(model.double(), SkippedBranches(found, model, CPU), images, 1e-3)


@LONG
def test_in_how_many_modules_branches_are_found() -> None:
    found, left = [], []
    for entry in ZOO:
        try:
            with torch.device("meta"):
                model: Any = timm.create_model(entry.name, num_classes=5, drop_path_rate=0.4, **entry.options)
        except TypeError:
            continue
        if drops := dropping(model):
            branches, _ = find_branches(model, model.pretrained_cfg["input_size"])
            (found if len({one.path for one in branches}) * 2 >= len(drops) else left).append(entry.module)
    assert len(found) >= 20, (found, left)


@pytest.mark.parametrize(
    "options",
    [
        {"block_fn": "ParallelThingsBlock"}, pytest.param({"block_fn": "ResPostBlock"}, marks=LONG),
        pytest.param({"block_fn": "ParallelScalingBlock"}, marks=LONG), pytest.param({"init_values": 0.1}, marks=LONG),
    ],
)  # fmt: skip
def test_kinds_of_vit_blocks(options: dict[str, Any]) -> None:
    from timm.models import vision_transformer

    if "block_fn" in options:
        options = {"block_fn": getattr(vision_transformer, options["block_fn"])}
    model, shape = made("vit_tiny_patch16_224", VIT | options)
    found, masked = find_branches(model, shape)
    assert not masked and {one.path for one in found} == dropping(model).keys()
    assert_skips_as_it_masks(model, SkippedBranches(found, model, CPU), torch.randn(5, *shape), 1e-4)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None = None, shared: Tensor | None = None) -> Tensor:
        assert mask is not None and shared is not None and len(x) == len(rope) == len(mask) and shared.shape == (2, 2)
        return self.linear(shared @ x * rope + mask)


class Block(nn.Module):
    """What comes with the samples differs between them; *shared* has as many rows as the samples that it is found with."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.norm, self.attn, self.drop = nn.LayerNorm(4), Attention(), DropPath(rate)
        self.register_buffer("shared", torch.randn(2, 2))

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor) -> Tensor:
        return x + self.drop(self.attn(self.norm(x), rope, mask=mask, shared=self.shared))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(0.4), Block(0.4)])

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(2)[:, :2, :4]
        for block in self.blocks:
            x = block(x, images[:, 0, :2, :4], images[:, 1, :2, :4])
        return x


def test_arguments_of_samples_are_taken_out_too() -> None:
    model = Own().train()
    found, masked = find_branches(model, (3, 4, 4))
    assert not masked
    assert [(o.path, o.places, o.names) for o in found[0].openings] == [
        ("blocks.0.norm", (0,), ()), ("blocks.0.attn", (1,), ("mask",)),
    ]  # fmt: skip
    assert_skips_as_it_masks(model, SkippedBranches(found, model, CPU), torch.randn(5, 3, 4, 4), 1e-6)


@pytest.mark.parametrize(
    ("samples", "rate", "kept"),
    [
        (40, 0.4, 24), (64, 0.5, 32), (40, 0.0, None), (40, 0.036, None), (40, 0.073, 37), (5, 0.2, 4), (5, 0.3, None),
        (2, 0.5, None), (1, 0.4, None), (4, 0.5, 2), (8, 0.9, None),
    ],
)  # fmt: skip
def test_how_many_samples_are_kept(samples: int, rate: float, kept: int | None) -> None:
    assert kept_samples(samples, rate) == kept


def test_expectation_and_variance() -> None:
    """Each sample is kept as often as the rate says, and all together exactly so often in each draw."""
    model = Own().train()
    branches = SkippedBranches(find_branches(model, (3, 4, 4))[0], model, CPU)
    samples, kept, draws = 10, 6, 1500
    counts = []
    for step in range(draws):
        branches.draw(samples, 0, step, 0, 0)
        drawn = [branch.drawn for branch in branches.branches]
        counts.append(torch.stack([(one.origin >= 0) * one.factor for one in drawn if one is not None]))
    found = torch.stack(counts).double()  # (draws, branches, samples)
    assert torch.allclose(found.sum(-1), torch.tensor(float(samples), dtype=torch.float64))
    assert (found.mean(0) - 1).abs().max() < 0.12  # six standard errors
    assert (found.var(0) - (samples / kept - 1)).abs().max() < 0.06
    rest = found - 1
    pairs = {"branches": (rest[:, 0], rest[:, 1]), "steps": (rest[1:].flatten(1), rest[:-1].flatten(1))}
    for name, (one, other) in pairs.items():
        # Of every sample with every other one, too.
        assert (one.mT @ other / draws).abs().max() < 0.12, f"draws of {name} are not independent"


@LONG
def test_draws_at_other_places_are_independent() -> None:
    model = Own().train()
    branches, draws = SkippedBranches(find_branches(model, (3, 4, 4))[0], model, CPU), 3000

    def kept(*place: int) -> Tensor:
        branches.draw(10, *place)
        return torch.stack([branch.drawn.origin >= 0 for branch in branches.branches if branch.drawn is not None]).flatten()

    def deviations(seed: int, first: int, rank: int, number: int) -> Tensor:
        return torch.stack([kept(seed, step, rank, number) for step in range(first, first + draws)]).double() - 0.6

    here = deviations(0, 0, 0, 0)
    for place in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 7, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):
        scores = here.mT @ deviations(*place) / draws**0.5 / 0.24
        assert scores.abs().max() < 5 and 0.9 < scores.square().mean().sqrt() < 1.1, place


@LONG
@pytest.mark.parametrize("mode", ["mask", "skip"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_mean_gradient_is_that_of_all_subsets(name: str, mode: str) -> None:
    """Over many draws, against the exact expectation: the sum over all choices of branches of each sample."""
    rate, samples, draws = 0.4, 20, 500
    model, shape = made(name, next(options for one, options, _, _ in MODELS if one == name), rate)
    set_constant_rate(model, rate, name)
    branches = SkippedBranches(find_branches(model, shape)[0], model, CPU) if mode == "skip" else None
    parameters = list(model.double().parameters())
    images, labels = torch.randn(samples, *shape, dtype=torch.float64), torch.zeros(samples, dtype=torch.int64)

    def gradient(losses: Tensor) -> Tensor:
        return torch.cat([one.flatten() for one in torch.autograd.grad(losses.sum() / samples, parameters)])

    found = []
    for step in range(draws):
        torch.manual_seed(seed_from("dropout", step))
        if branches is not None:
            branches.draw(samples, 0, step, 0, 0)
        found.append(gradient(cross_entropy(model(images), labels, reduction="none")))
    mean, variance = torch.stack(found).mean(0), torch.stack(found).var(0) / draws

    drops = [part for part in model.modules() if isinstance(part, DropPath)]
    chosen = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(drops))), dtype=torch.float64)
    share = torch.where(chosen == 1, 1 - rate, rate).prod(1)
    for drop, column in zip(drops, chosen.mT / (1 - rate)):
        drop.forward = lambda x, column=column: x * column.view(-1, *[1] * (x.ndim - 1))
    if branches is not None:
        branches.clear()
    exact = torch.zeros_like(mean)
    for image, label in zip(images, labels):
        output = model(image.expand(len(chosen), *shape))
        exact += gradient(cross_entropy(output, label.expand(len(chosen)), reduction="none") * share)
    assert variance.sum().sqrt() < 0.02 * exact.norm(), "too few draws"
    assert (mean - exact).square().sum() < 3 * variance.sum(), "1 is expected"


def test_a_draw_is_a_function_of_its_place_and_leaves_other_numbers_alone() -> None:
    model, shape = made("vit_tiny_patch16_224", VIT)
    branches = SkippedBranches(find_branches(model, shape)[0], model, CPU)
    before = torch.get_rng_state()

    def drawn(*place: int) -> list[Any]:
        branches.draw(12, *place)
        return [branch.drawn.origin.tolist() for branch in branches.branches if branch.drawn is not None]

    first, places = drawn(0, 3, 1, 2), [(1, 3, 1, 2), (0, 4, 1, 2), (0, 3, 0, 2), (0, 3, 1, 3)]
    assert all(drawn(*place) != first for place in places) and drawn(0, 3, 1, 2) == first
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_draw_it_is_timms() -> None:
    model, shape = made("vit_tiny_patch16_224", VIT)
    plain, images = copy.deepcopy(model), torch.randn(6, *shape)
    SkippedBranches(find_branches(model, shape)[0], model, CPU)
    results = []
    for one in (plain, model):
        torch.manual_seed(1)
        results.append(result(one, images))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rates() -> None:
    def rates(**keys: Any) -> list[float]:
        module = blueprint(ModelConfig("vit_tiny_patch16_224", image_size=32, options={"depth": 4}, **keys), 5).module
        return [round(part.drop_prob, 3) for part in module.modules() if isinstance(part, DropPath)][::2]

    assert rates(drop_path=0.3) == [0.1, 0.2, 0.3]
    assert rates(drop_path=0.3, drop_path_schedule="constant") == [0.3] * 4
    assert rates(drop_path_schedule="constant") == []
    with pytest.raises(UserError, match=r"^model\.drop_path_schedule: constant, but own has no"):
        set_constant_rate(nn.Linear(2, 2), 0.1, "own")
