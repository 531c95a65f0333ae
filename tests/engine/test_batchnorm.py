"""BatchNorm over several ranks, frozen BatchNorm, and branches that exist only in training mode."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.distributed.nn.functional as collectives
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d
from timm.layers.norm_act import SyncBatchNormAct
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bigvision import load_config, train
from bigvision.engine import Engine, check_engine, parallelize
from bigvision.engine.state import Statistics, is_frozen
from bigvision.errors import UserError
from bigvision.models.formats import compute_in
from bigvision.runtime import start
from bigvision.tasks import Classify
from bigvision.training.build import build_model
from tests.distributed import run_ranks
from tests.recipes import losses, recipe, run

LONG = pytest.mark.long

# Statistics over several ranks. torch's SyncBatchNorm needs CUDA, which is imitated.

CUDA: Any = SimpleNamespace(data_ranks=2, data_group=None, device=torch.device("cuda"))


def synchronized(self: Any, inputs: Tensor) -> Tensor:
    """What torch's SyncBatchNorm computes, on the CPU."""
    if not self.training:
        return F.batch_norm(inputs, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
    dims, shape = [0, *range(2, inputs.ndim)], [1, -1, *[1] * (inputs.ndim - 2)]
    count = inputs.new_full((inputs.shape[1],), inputs.numel() / inputs.shape[1])
    total, count = collectives.all_reduce(torch.stack([inputs.sum(dims), count]), group=self.process_group).unbind()
    centred = inputs - (mean := total / count).view(shape)
    var = collectives.all_reduce(centred.square().sum(dims), group=self.process_group) / count
    with torch.no_grad():
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * count / (count - 1), self.momentum)
    return centred * (var + self.eps).rsqrt().view(shape) * self.weight.view(shape) + self.bias.view(shape)


def run_synchronized(plain: dict[str, Any]) -> list[float]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(nn.SyncBatchNorm, "forward", synchronized)
        patched.setattr(parallelize, "SYNCHRONIZED", ("cuda", "cpu"))
        patched.setattr(DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda *_: None)  # refuses the CPU
        return run(plain)


SYNCED = [
    ("ddp", 2),
    pytest.param("fsdp", 3, marks=LONG),
    pytest.param("zero2", 2, marks=LONG),
    pytest.param("pipeline", 4, marks=LONG),
]


@pytest.mark.parametrize("model", ["efficientnet", pytest.param("resnet", marks=LONG)])
@pytest.mark.parametrize(("strategy", "ranks"), SYNCED)
def test_ranks_normalise_as_one_with_the_whole_batch(tmp_path: Path, model: str, strategy: str, ranks: int) -> None:
    copies = 2 if strategy == "pipeline" else ranks
    made = [
        recipe(tmp_path / str(count), model, train={"steps": 5, "micro_batch": 24 // count}, optim={"lr": 5e-4})
        for count in (1, copies)
    ]
    parallel = {"strategy": strategy, **({"stages": 2} if strategy == "pipeline" else {})}
    made[1] |= {"parallel": made[1]["parallel"] | parallel, "model": made[1]["model"] | {"sync_batchnorm": True}}
    expected = run_ranks(run, 1, made[0])[0]
    assert run_ranks(run_synchronized, ranks, made[1])[0] == pytest.approx(expected, rel=1e-5)
    one, several = (load_file(tmp_path / str(count) / "step-00000005" / "model.safetensors") for count in (1, copies))
    assert {name: t.shape for name, t in one.items()} == {name: t.shape for name, t in several.items()}
    statistics = [name for name in one if "running" in name or "tracked" in name]
    assert statistics and all(torch.allclose(one[name], several[name], rtol=1e-3, atol=1e-4) for name in statistics)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_synchronized_norms_are_norms(name: str) -> None:
    with torch.device("meta"):
        module = timm.create_model(name)
    norms = {path: part for path, part in module.named_modules() if isinstance(part, nn.BatchNorm2d)}
    kinds = {path: SyncBatchNormAct if isinstance(norm, BatchNormAct2d) else nn.SyncBatchNorm for path, norm in norms.items()}
    names, first = list(module.state_dict()), next(iter(norms.values()))
    first.requires_grad_(False)
    parallelize.synchronize_norms(module, CUDA)
    assert norms and list(module.state_dict()) == names
    assert all(module.get_submodule(path) is norm and type(norm) is kinds[path] for path, norm in norms.items())
    assert is_frozen(first)
    module.to_empty(device="cpu")
    statistics = Statistics([module], torch.device("cpu"))
    assert statistics.frozen == [first] and sum(map(torch.numel, statistics.running)) == sum(
        2 * norm.num_features for norm in norms.values() if norm is not first
    )
    compute_in([module], (), torch.bfloat16)
    assert all(norm.weight.dtype == torch.float32 for norm in norms.values())
    module.eval()
    assert module(torch.randn(2, 3, 32, 32)).dtype == torch.bfloat16


def test_what_cannot_be_synchronized_is_refused_or_noted() -> None:
    (note,) = parallelize.synchronize_norms(nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4)), CUDA)
    assert note == "model.sync_batchnorm: true changes nothing: the model has no BatchNorm"
    with pytest.raises(UserError, match=r"model.sync_batchnorm: true, but 1 is a SplitBatchNorm2d"):
        parallelize.synchronize_norms(nn.Sequential(nn.Conv2d(3, 4, 1), SplitBatchNorm2d(4)), CUDA)
    config = load_config({"model": {"sync_batchnorm": True}, "parallel": {"device": "cpu"}})
    with start("cpu") as runtime, pytest.raises(UserError, match=r"model.sync_batchnorm: true needs CUDA.*: use false"):
        check_engine(config, runtime, Classify())


# Frozen BatchNorm.


def test_a_norm_that_is_updated_leaves_the_versions_of_the_others() -> None:
    """Autograd compares versions: a compiled block keeps its norm's statistics for the backward pass."""
    norms = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    statistics = Statistics([norms], torch.device("cpu"))
    before = norms[0].running_mean._version  # type: ignore[union-attr]
    norms[1](torch.randn(2, 2, 3, 3))
    norms[1].running_mean.add_(1.0)  # type: ignore[union-attr]
    assert norms[0].running_mean._version == before  # type: ignore[union-attr]
    assert torch.equal(statistics.running[0][4:6], norms[1].running_mean)  # type: ignore[arg-type]


def frozen_stem() -> nn.Module:
    torch.manual_seed(0)
    module = timm.create_model("test_resnet", num_classes=10, act_layer="silu")
    for name, part in module.named_children():
        if name in ("conv1", "bn1"):
            part.requires_grad_(False)
    return module


def train_given(plain: dict[str, Any], make: Any) -> list[float]:
    train(load_config(plain), model=make())
    return losses(Path(plain["out"]))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", pytest.param("zero2", marks=LONG)])
def test_statistics_of_a_frozen_stem_stay(tmp_path: Path, strategy: str) -> None:
    plain = recipe(tmp_path, train={"steps": 3, "micro_batch": 6}, parallel={"strategy": strategy})
    plain["model"] = {"name": "ResNet", "image_size": 32}
    run_ranks(train_given, 2, plain, frozen_stem)
    saved, given = load_file(tmp_path / "step-00000003" / "model.safetensors"), frozen_stem().state_dict()
    stem = [name for name in given if name.startswith(("conv1.", "bn1."))]
    assert len(stem) >= 6 and all(torch.equal(saved[name], given[name]) for name in stem)
    moved = [name for name in given if "running" in name and name not in stem]
    assert moved and not any(torch.equal(saved[name], given[name]) for name in moved)


# Branches of one mode.


class Auxiliary(nn.Module):
    """Has a second head that exists in *training* mode, or in evaluation, alone."""

    def __init__(self, training: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.GELU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.head, self.aux = nn.Linear(128, 10), nn.Linear(128, 10)
        self.mode = training

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        outputs = self.head(features)
        return outputs + 0.3 * self.aux(features) if self.training == self.mode else outputs


def in_training() -> nn.Module:
    torch.manual_seed(0)
    return Auxiliary()


def in_evaluation() -> nn.Module:
    torch.manual_seed(0)
    return Auxiliary(training=False)


def looks_for_unused(plain: dict[str, Any], make: Any) -> bool:
    with start("cpu") as runtime:
        engine, _, _ = build_model(load_config(plain), 10, runtime, 4, lambda text: None, model=make())
        assert isinstance(engine, Engine) and isinstance(engine.forward, DistributedDataParallel)
        return engine.forward.find_unused_parameters


@pytest.mark.parametrize(("make", "unused"), [(in_training, False), (in_evaluation, True)])
def test_branches_of_one_mode(tmp_path: Path, make: Any, unused: bool) -> None:
    def plain(name: str, **parallel: Any) -> dict[str, Any]:
        made = recipe(tmp_path / name, train={"steps": 4}, parallel=parallel)
        return made | {"model": {"name": "Auxiliary", "image_size": 32}}

    expected = run_ranks(train_given, 1, plain("one"), make)[0]
    assert run_ranks(train_given, 2, plain("ddp"), make)[0] == pytest.approx(expected, rel=1e-5)
    assert run_ranks(looks_for_unused, 2, plain("look"), make) == [unused] * 2
    one, several = (load_file(tmp_path / name / "step-00000004" / "model.safetensors") for name in ("one", "ddp"))
    first = make().state_dict()
    assert torch.equal(several["aux.weight"], first["aux.weight"]) == unused
    for name, value in one.items():
        assert torch.allclose(value, several[name], atol=1e-5), name
