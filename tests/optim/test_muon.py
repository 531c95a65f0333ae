"""Muon over whole tensors is timm's, bit for bit; over shards of rows it is that over whole tensors."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import timm.optim
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from bigvision import muon
from bigvision.muon import Muon
from bigvision.runtime import start
from tests.distributed import run_ranks

OPTIONS = {"lr": 0.01, "momentum": 0.9, "betas": (0.9, 0.99)}
# Too few rows for three ranks, tall, flat, kernels; no matrices: depthwise kernels, a vector, a column; and a square.
SHAPES = [(4, 7), (64, 31), (16, 96), (9, 5, 3, 3), (12, 1, 5, 5), (13,), (200, 1), (8, 8)]


def model() -> nn.ParameterList:
    generator = torch.Generator().manual_seed(0)
    return nn.ParameterList(nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES)


def step(parameters: list[Tensor], optimizer: torch.optim.Optimizer, number: int) -> None:
    """Take step *number* with gradients drawn for whole tensors; the last parameter has none at first."""
    generator = torch.Generator().manual_seed(number)
    for place, parameter in enumerate(parameters):
        grad = torch.randn(SHAPES[place], generator=generator)
        if isinstance(parameter, DTensor):
            mesh, shape, stride = parameter.device_mesh, grad.shape, grad.stride()
            local = grad.split(muon.rows_of_ranks(shape, mesh.size()))[mesh.get_local_rank()]
            grad = DTensor.from_local(local, mesh, parameter.placements, shape=shape, stride=stride)
        parameter.grad = None if place == len(SHAPES) - 1 and not number else grad
    optimizer.step()


def groups(parameters: list[Tensor]) -> list[dict[str, object]]:
    return [{"params": parameters[:3], "weight_decay": 0.1}, {"params": parameters[3:], "weight_decay": 0.0, "lr": 0.02}]


def test_over_whole_tensors_it_is_timms() -> None:
    ours, theirs = list(model()), list(model())
    optimizers = Muon(groups(ours), **OPTIONS), timm.optim.Muon(groups(theirs), nesterov=True, **OPTIONS)  # type: ignore[arg-type]
    for number in range(4):
        step(ours, optimizers[0], number)
        step(theirs, optimizers[1], number)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs))
    for one, other in zip(ours, theirs):
        kept = {key: value for key, value in optimizers[1].state[other].items() if key not in ("step", "use_muon")}
        assert optimizers[0].state[one].keys() == kept.keys()
        assert all(torch.equal(optimizers[0].state[one][key], value) for key, value in kept.items())


def test_a_skipped_step_changes_nothing() -> None:
    parameters = list(model())
    optimizer = Muon(groups(parameters), **OPTIONS)  # type: ignore[arg-type]
    step(parameters, optimizer, 1)

    def everything() -> list[Tensor]:
        kept = [value for parameter in parameters for value in optimizer.state[parameter].values()]
        counters = [group["step"] for group in optimizer.param_groups]
        return [tensor.detach().clone() for tensor in (*parameters, *kept, *counters)]

    before = everything()
    optimizer.skipped = torch.tensor(True)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(before, everything()))
    optimizer.skipped = torch.tensor(False)
    step(parameters, optimizer, 2)
    assert not any(torch.equal(one, other) for one, other in zip(before, everything()))


def sharded(bucket: int) -> list[list[Tensor]]:
    """Four steps of shards, and of whole tensors: this rank's rows of the weights and of the state."""
    with start("cpu") as runtime, patch.object(muon, "BUCKET", bucket):
        whole, module = model(), model()
        fully_shard(module, mesh=init_device_mesh("cpu", (runtime.world_size,)))
        module._get_fsdp_state()._lazy_init()  # type: ignore[operator]
        parts: list[Tensor] = list(module)
        optimizers = Muon(groups(list(whole)), **OPTIONS), Muon(groups(parts), **OPTIONS)  # type: ignore[arg-type]
        for number in range(4):
            step(list(whole), optimizers[0], number)
            step(parts, optimizers[1], number)
        found: list[list[Tensor]] = [[], []]
        for one, part in zip(whole, parts):
            rows, states = (
                muon.rows_of_ranks(one.shape, runtime.world_size),
                (optimizers[0].state[one], optimizers[1].state[part]),
            )
            found[0] += [tensor.detach().split(rows)[runtime.rank].clone() for tensor in (one, *states[0].values())]
            found[1] += [tensor.detach().clone() for tensor in (muon._local(part), *states[1].values())]
        return found


@pytest.mark.parametrize(("ranks", "bucket"), [(3, 1 << 24), (2, 1)])
def test_over_shards_it_is_that_over_whole_tensors(ranks: int, bucket: int) -> None:
    """The same bits, since the gradients are the same; in one exchange and in several."""
    for whole, parts in run_ranks(sharded, ranks, bucket):
        assert len(whole) == len(SHAPES) + 5 + 2 * 3
        assert all(torch.equal(one, other) for one, other in zip(whole, parts))
