"""Each optimizer by hand, and on a piece of a matrix."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigvision.config import OptimConfig
from bigvision.optim import build_optimizer, parameter_groups

NAMES = ["adamw", "sgd", "lion", "lamb", "adafactor", "muon"]
LR, DECAY = 0.125, 0.5


def gradients(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).float() for _ in range(steps)]


def stepped(name: str, value: Tensor, grads: list[Tensor], decay: float = DECAY, **options: Any) -> Tensor:
    parameter = nn.Parameter(value.clone())
    group = {"params": [parameter], "names": ["weight"], "lr_scale": 1.0, "weight_decay": decay}
    optimizer = build_optimizer([group], OptimConfig(name=name, lr=LR, weight_decay=decay, **options))
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach()


def test_lion_by_hand() -> None:
    value, grads = torch.ones(4, 6), gradients((4, 6), 3)
    found = stepped("lion", value, grads, betas=(0.75, 0.5))
    mean = torch.zeros_like(value)
    for grad in grads:
        value = value * (1 - LR * DECAY) - LR * torch.sign(0.75 * mean + 0.25 * grad)
        mean = 0.5 * mean + 0.5 * grad
    torch.testing.assert_close(found, value)


@pytest.mark.parametrize("decay", [DECAY, 0.0])
def test_lamb_by_hand(decay: float) -> None:
    """The step has the norm of the weights times the rate, without weight decay too; nothing is clipped."""
    value, grads = torch.ones(4, 6), gradients((4, 6), 3)
    found = stepped("lamb", value, grads, decay, betas=(0.75, 0.5))
    mean, square = torch.zeros_like(value), torch.zeros_like(value)
    for step, grad in enumerate(grads, start=1):
        mean, square = 0.75 * mean + 0.25 * grad, 0.5 * square + 0.5 * grad**2
        update = mean / (1 - 0.75**step) / ((square / (1 - 0.5**step)).sqrt() + 1e-6) + decay * value
        value = value - LR * value.norm() / update.norm() * update
    torch.testing.assert_close(found, value)


def test_adafactor_by_hand() -> None:
    value, grads = torch.ones(16, 20), gradients((16, 20), 3)
    found = stepped("adafactor", value, grads, betas=(0.75, 0.5))
    mean, rows, columns = torch.zeros_like(value), torch.zeros(16, 1), torch.zeros(1, 20)
    for step, grad in enumerate(grads, start=1):
        beta = min(0.5, 1 - step**-0.8)
        rows = beta * rows + (1 - beta) * grad.square().mean(1, keepdim=True)
        columns = beta * columns + (1 - beta) * grad.square().mean(0, keepdim=True)
        mean = 0.75 * mean + 0.25 * grad / (rows * columns / rows.mean()).sqrt()
        value = value * (1 - LR * DECAY) - LR * mean
    torch.testing.assert_close(found, value)


def test_muon_by_hand() -> None:
    """Steps are nearly orthogonal, in the direction of Nesterov's momentum and as large as AdamW's (0.2 in the mean square)."""
    value, grads = torch.zeros(16, 20), gradients((16, 20), 2)
    one, two = (stepped("muon", value, grads[:count], 0.0, momentum=0.5) for count in (1, 2))
    momentum = torch.zeros_like(value)
    for grad, step in zip(grads, (one - value, two - one)):
        momentum = 0.5 * momentum + 0.5 * grad
        left, _, right = torch.linalg.svd(0.5 * grad + 0.5 * momentum, full_matrices=False)
        scaled = -step / (LR * 0.2 * 20**0.5)
        singular = torch.linalg.svdvals(scaled)
        assert singular.min() > 0.7 and singular.max() < 1.3
        assert torch.linalg.matrix_norm(scaled - left @ right) < 0.3 * 16**0.5
    decayed = stepped("muon", torch.ones(16, 20), grads[:1], momentum=0.5) - stepped("muon", value, grads[:1], momentum=0.5)
    torch.testing.assert_close(decayed, torch.full((16, 20), 1 - LR * DECAY))


def test_muon_leaves_vectors_to_nadamw() -> None:
    from timm.optim import NAdamW

    grads = gradients((7,), 3)
    found = stepped("muon", torch.ones(7), grads, betas=(0.75, 0.5))
    parameter = nn.Parameter(torch.ones(7))
    optimizer = NAdamW([parameter], lr=LR, betas=(0.75, 0.5), eps=1e-7, weight_decay=DECAY)
    for grad in grads:
        parameter.grad = grad
        optimizer.step()
    torch.testing.assert_close(found, parameter.detach())


@pytest.mark.parametrize("name", NAMES)
def test_only_elementwise_steps_may_be_cut(name: str) -> None:
    """What :mod:`bigvision.config.checks` refuses: rows or flat pieces stepped alone are not the whole's step."""
    value, grads = gradients((32, 40), 1)[0], gradients((32, 40), 3)
    whole = stepped(name, value, grads)
    rows = torch.cat([stepped(name, value[part], [g[part] for g in grads]) for part in (slice(0, 16), slice(16, 32))])
    flat = stepped(name, value.flatten(), [grad.flatten() for grad in grads]).view(32, 40)
    pieces = torch.cat(
        [stepped(name, value.flatten()[part], [g.flatten()[part] for g in grads]) for part in (slice(500), slice(500, None))]
    ).view(32, 40)
    if name in ("adamw", "sgd", "lion"):
        for cut in (rows, flat, pieces):
            torch.testing.assert_close(cut, whole)
    else:
        step = (whole - value).norm()
        for cut in (rows, pieces):
            assert (cut - whole).norm() > 1e-3 * step


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_respected(name: str) -> None:
    """A layer's rate scales its step, and norms and biases are not decayed: with no gradient they stay, matrices shrink."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 20), nn.LayerNorm(20), nn.Linear(20, 16))
    groups = parameter_groups(model, DECAY)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(groups, OptimConfig(name=name, lr=LR, weight_decay=DECAY, momentum=0.0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, before[key])
        else:
            torch.testing.assert_close(parameter.detach(), before[key] * (parameter.norm() / before[key].norm()))
            assert parameter.norm() < 0.95 * before[key].norm()
    rates = [LR, LR / 2, LR / 4]
    sizes = []
    for rate in rates:
        weight = nn.Parameter(torch.ones(16, 20))
        group = {"params": [weight], "names": ["weight"], "lr_scale": rate / LR, "weight_decay": DECAY}
        optimizer = build_optimizer([group], OptimConfig(name=name, lr=LR, weight_decay=DECAY))
        for group in optimizer.param_groups:
            group["lr"] = LR * group["lr_scale"]
        weight.grad = gradients((16, 20), 1)[0]
        optimizer.step()
        sizes.append((weight.detach() - 1).norm().item())
    assert all(more == pytest.approx(2 * less, rel=1e-5) for more, less in pairwise(sizes))
