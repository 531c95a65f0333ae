"""A recorded build gives what a normal build gives, bit for bit."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import timm
import torch
from torch import Tensor, nn

from bigvision.errors import UserError
from bigvision.models import blueprint
from bigvision.models.tracing import named_tensors
from tests.models.configs import TINY, Model
from tests.models.zoo import SWEEP, ZOO

SEED = 7
OUTSIDE = torch.arange(3.0)
NOT_RECORDED: set[str] = set()
"""Modules of timm whose constructors cannot be recorded."""


def normal(name: str, **options) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return timm.create_model(name, **options)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape, a.stride()) != (b.dtype, b.shape, b.stride()):
        return False
    return torch.equal(a.detach().contiguous().view(-1).view(torch.uint8), b.detach().contiguous().view(-1).view(torch.uint8))


def assert_same(plan, reference: nn.Module) -> None:
    expected = dict(named_tensors(reference))
    seen = []
    for name, value in plan.tensors(SEED):
        assert value.device.type == "cpu" and same_bits(value, expected[name]), name
        seen.append(name)
    assert sorted(seen) == sorted(expected), "each name exactly once"


def materialised(plan) -> nn.Module:
    module = plan.module.to_empty(device="cpu")
    homes = dict(named_tensors(module))
    with torch.no_grad():
        for name, value in plan.tensors(SEED):
            homes[name].copy_(value)
    plan.fill_attributes(module, "cpu")
    return module


@pytest.mark.parametrize("entry", SWEEP)
def test_every_module_of_timm_is_built_bit_for_bit(entry):
    callers = torch.get_rng_state()
    plan = blueprint(Model(entry.name, options=entry.options), 10)
    assert plan.recorded == (entry.module not in NOT_RECORDED), plan.note
    assert all(tensor.is_meta for _, tensor in named_tensors(plan.module))
    reference = normal(entry.name, **plan.arguments)
    theirs = [(name, type(module)) for name, module in reference.named_modules()]
    assert [(name, type(module)) for name, module in plan.module.named_modules()] == theirs
    assert_same(plan, reference)
    assert torch.equal(callers, torch.get_rng_state())


def test_the_zoo_has_every_module():
    from timm.models._registry import _module_to_models

    assert {entry.module for entry in ZOO} == set(_module_to_models)


@pytest.mark.long
@pytest.mark.parametrize("name", timm.list_models()[::5])
def test_every_fifth_architecture_of_timm_is_recorded(name):
    plan = blueprint(Model(name), 10)
    assert plan.recorded, plan.note
    if sum(parameter.numel() for parameter in plan.module.parameters()) < 100e6:
        assert_same(plan, normal(name, **plan.arguments))


@pytest.mark.parametrize(
    "name, size, options",
    [
        ("vit_tiny_patch16_224", 32, TINY),
        ("swin_tiny_patch4_window7_224", 64, {"depths": (1, 1, 2, 1)}),
        ("eva02_tiny_patch14_224", 56, {"depth": 3}),
        ("test_coatnet", 160, {}),
        ("test_convnext", 64, {}),
        ("test_resnet", 64, {}),
        ("hiera_tiny_224", 224, {"stages": (1, 1, 1, 1)}),
        ("levit_128s", 224, {}),
        ("vit_tiny_patch16_224", (32, 64), {"depth": 2, "patch_size": 8}),
        ("swin_tiny_patch4_window7_224", (96, 64), {"depths": (1, 1, 1, 1)}),
        ("convnext_atto", (64, 96), {"depths": (1, 1, 1, 1)}),
    ],
)
def test_the_forward_of_a_materialised_module_is_the_normal_one(name, size, options):
    plan = blueprint(Model(name, image_size=size, options=options), 10)
    module = materialised(plan).eval()
    reference = normal(name, **plan.arguments).eval()
    assert plan.image_size == (size if isinstance(size, tuple) else (size, size))
    images = torch.randn(2, *plan.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(module(images), reference(images))


class Odd(nn.Module):
    """A model that does in its constructor what `habit` says."""

    num_classes, num_features = 10, 4

    def __init__(self, habit: str = "none", num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.fc, self.in_chans = nn.Linear(4, num_classes), in_chans
        getattr(self, habit)()

    def none(self): ...

    def value(self):
        """A value that no random number went into."""
        steps = [*torch.linspace(0, 1, 3).tolist(), torch.unique(torch.tensor([1, 1, 2])).numel()]
        self.extra = nn.Parameter(torch.full((2,), steps[1] * steps[3]))

    def random_value(self):
        if self.fc.weight[0, 0] > 0:
            nn.init.zeros_(self.fc.bias)

    def generator(self):
        self.extra = nn.Parameter(torch.rand(3, generator=torch.Generator().manual_seed(1)))

    def python_random(self):
        self.extra = nn.Parameter(torch.full((2,), random.random()))

    def numpy_random(self):
        self.extra = nn.Parameter(torch.from_numpy(numpy.random.rand(2)))

    def from_numpy(self):
        self.register_buffer("extra", torch.from_numpy(numpy.arange(3.0)), persistent=False)
        self.extra.mul_(2)

    def pieces(self):
        """One storage filled in parts, with other draws in between, scaled at the end."""
        self.extra = nn.Parameter(torch.empty(6, 4))
        nn.init.xavier_uniform_(self.extra[:3])
        nn.init.trunc_normal_(self.fc.weight)
        nn.init.normal_(self.extra.data[3:])
        self.extra.data.div_(3)

    def mixed(self):
        """Tensors made from two drawn ones, by an operation with two results."""
        a, b = torch.randn(5), torch.randn(5)
        values, indices = (a + b).sort()
        self.register_buffer("values", values)
        self.register_buffer("indices", indices[1:])
        self.extra = nn.Parameter(a)

    def made_outside(self):
        """A tensor that was there before: a constant of the program."""
        self.register_buffer("outside", OUTSIDE)
        self.extra = nn.Parameter(OUTSIDE.clone() * 2)

    def asks_where_it_is(self):
        """What some code does to save work on meta."""
        if not (self.fc.weight.is_meta or self.fc.weight.device.type == "meta" or torch.empty(1).device.type == "meta"):
            nn.init.ones_(self.fc.weight)
            self.register_buffer("steps", torch.arange(3, device=self.fc.weight.device))

    def tied(self):
        self.twin = nn.Linear(4, 10)
        self.twin.weight = self.fc.weight

    def unset(self):
        self.extra = nn.Parameter(torch.empty(3))

    def attribute(self):
        self.table = [torch.arange(3.0) * 2, ({"deep": torch.ones(2)}, "text")]

    def attribute_and_random_value(self):
        self.attribute()
        self.random_value()

    def forward(self, x):
        return self.fc(x.flatten(1)[:, :4])


@pytest.fixture
def odd(monkeypatch):
    from timm.models import _registry

    def entry(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **options):
        model = Odd(**options)
        model.pretrained_cfg = model.default_cfg = {"input_size": (3, 8, 8), "architecture": "odd"}
        return model

    monkeypatch.setitem(_registry._model_entrypoints, "odd", entry)
    return lambda habit: blueprint(Model("odd", options={"habit": habit}), 10)


@pytest.mark.parametrize(
    "habit", ["none", "value", "from_numpy", "pieces", "mixed", "made_outside", "asks_where_it_is", "tied"]
)
def test_a_constructor_that_can_be_recorded(odd, habit):
    plan = odd(habit)
    assert plan.recorded and plan.note is None
    assert_same(plan, normal("odd", habit=habit))


@pytest.mark.parametrize("habit, why", [("random_value", "random value"), ("generator", "generator of its own")])
def test_what_cannot_be_recorded_is_built_normally_and_said(odd, habit, why):
    plan = odd(habit)
    assert not plan.recorded and why in plan.note
    assert all(tensor.is_meta for _, tensor in named_tensors(plan.module))
    assert_same(plan, normal("odd", habit=habit))


@pytest.mark.parametrize("habit", ["python_random", "numpy_random"])
def test_numbers_from_elsewhere_are_noticed(odd, habit):
    plan = odd(habit)
    assert not plan.recorded and "outside" in plan.note


def test_tied_tensors_stay_tied_on_meta_and_share_memory(odd):
    plan = odd("tied")
    assert plan.module.twin.weight is plan.module.fc.weight
    held = dict(plan.tensors(SEED))
    assert held["twin.weight"].data_ptr() == held["fc.weight"].data_ptr()


def test_what_timm_leaves_unset_is_the_same_on_every_rank_and_said(odd):
    plan = odd("unset")
    assert plan.recorded and "extra" in plan.note
    assert dict(plan.tensors(SEED))["extra"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("habit", ["attribute", "attribute_and_random_value"])
def test_plain_tensor_attributes_are_filled(odd, habit):
    plan = odd(habit)
    assert plan.recorded == (habit == "attribute")
    assert plan.module.table[0].is_meta and plan.module.table[1][0]["deep"].is_meta
    first, (deep, text) = materialised(plan).table
    assert first.tolist() == [0, 2, 4] and deep["deep"].tolist() == [1, 1] and text == "text"


def test_nothing_is_left_behind_by_a_constructor_that_raises(odd):
    from bigvision.models.exact_init.trace import record

    sampler = nn.init._no_grad_trunc_normal_
    with pytest.raises(ZeroDivisionError):
        with record():
            _ = 1 / 0
    assert nn.init._no_grad_trunc_normal_ is sampler
    assert not torch.empty(1).is_meta and torch.empty(1).device.type == "cpu"


def test_another_seed_gives_other_numbers():
    plan = blueprint(Model(options=TINY, image_size=32), 10)
    one, two = dict(plan.tensors(1)), dict(plan.tensors(2))
    assert not torch.equal(one["blocks.0.attn.qkv.weight"], two["blocks.0.attn.qkv.weight"])


def test_the_callers_default_device_is_not_asked():
    reference = normal("vit_tiny_patch16_224", num_classes=10, img_size=32, drop_path_rate=0.0, **TINY)
    with torch.device("meta"):
        plan = blueprint(Model(options=TINY, image_size=32), 10)
        assert_same(plan, reference)


def test_the_caller_may_draw_between_two_tensors():
    plan = blueprint(Model(options=TINY, image_size=32), 10)
    undisturbed = dict(plan.tensors(SEED))
    for name, value in plan.tensors(SEED):
        torch.rand(3)
        assert torch.equal(value, undisturbed[name])


def test_only_what_is_asked_for_is_performed(monkeypatch):
    """Nothing is drawn for a table; for a tensor that is drawn, what was drawn before it, and its value is the same."""
    from bigvision.models.exact_init import trace as module

    performed, inner = [], module._execute

    def counted(trace, op, storages):
        performed.append(op.random)
        inner(trace, op, storages)

    plan = blueprint(Model("swin_tiny_patch4_window7_224", image_size=64, options={"depths": (1, 1, 2, 1)}), 10)
    monkeypatch.setattr(module, "_execute", counted)
    everything = dict(plan.tensors(SEED))
    draws = sum(performed)
    performed.clear()
    tables = {name for name in everything if name.endswith("relative_position_index")}
    assert tables and dict(plan.tensors(SEED, tables)).keys() == tables
    assert performed and not any(performed)
    for name, fewest, most in (("patch_embed.proj.weight", 1, 3), ("layers.3.blocks.0.mlp.fc2.weight", draws // 2, draws)):
        performed.clear()
        (found,) = plan.tensors(SEED, {name})
        assert found[0] == name and torch.equal(found[1], everything[name])
        assert fewest <= sum(performed) <= most
    performed.clear()
    assert not list(plan.tensors(SEED, set())) and not performed


def test_a_model_that_is_not_recorded_is_not_built_for_nothing(odd, monkeypatch):
    plan = odd("random_value")
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: pytest.fail("it was built"))
    assert not list(plan.tensors(SEED, set()))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "vit_tiny_patch16_224",
            {**TINY, "global_pool": ""},
            r"global_pool: with '' .* returns \(2, \d+, 5\) for 2 images instead",
        ),
        ("test_resnet", {"global_pool": ""}, "global_pool: with '' test_resnet cannot take images of 3 x "),
        ("test_efficientnet", {"act_layer": "relu", "drop_rate": 2}, "drop_rate: with 2 .*dropout probability"),
        ("inception_v3", {"aux_logits": True}, "aux_logits: with True inception_v3 returns tuple for 2 images instead"),
    ],
)
def test_options_that_leave_no_scores(name: str, options: dict[str, Any], words: str) -> None:
    """Known before anything is built: else an error within the first step."""
    with pytest.raises(UserError, match=rf"^model\.options\.{words}") as caught:
        blueprint(Model(name, options=options), 5)
    assert "\n" not in str(caught.value)
