"""A model whole and in stages, in one process. ``python -m tests.pipeline.staged`` writes docs/stages.md."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from bigvision.config import ModelConfig
from bigvision.errors import UserError
from bigvision.models import Blocks, blueprint, find_blocks
from bigvision.pipeline import Placement, Stage, StageMemory, StagePlan, plan_stages
from bigvision.pipeline.stages import imbalance
from tests.models.zoo import ZOO, Entry

PAGE = Path(__file__).parents[2] / "docs" / "stages.md"


@dataclass(frozen=True)
class Staged:
    """How a model in stages compares with itself whole."""

    blocks: int
    output: float
    """Relative difference; 0 is bit for bit."""
    gradients: float
    """The same of all gradients together."""
    imbalance: float
    crossing: int
    """Most tensors that cross a cut."""


def unlimited(stages: int) -> StageMemory:
    """Of devices that have enough: AdamW in fp32 under 1f1b, six micro-batches of three images."""
    kept = tuple(stages - stage for stage in range(stages))
    return StageMemory(Placement(stages, 1, False), kept, 6, 3, 1, 8, torch.float32, "none")


def cut(model: nn.Module, blocks: Blocks, image_shape: tuple[int, int, int], stages: int) -> StagePlan:
    """*model*, on meta, in *stages* stages for the CPU."""
    return plan_stages(model, blocks, image_shape, torch.device("cpu"), unlimited(stages))


def run(stages: list[Stage], images: Tensor) -> tuple[list[tuple[Tensor, ...]], list[Any]]:
    """Each stage's inputs, cut off from what made them, and outputs."""
    inputs, outputs = [], []
    values: Any = (images,)
    for stage in stages:
        inputs.append(tuple(value.detach().requires_grad_(value.requires_grad) for value in values))
        outputs.append(stage(*inputs[-1]))
        values = outputs[-1]
    return inputs, outputs


def backward(inputs: list[tuple[Tensor, ...]], outputs: list[Any], loss: Tensor) -> None:
    """Take the gradients back through all stages, each from the gradients of the next one's inputs."""
    loss.backward()
    for number in reversed(range(len(outputs) - 1)):
        sent = zip(outputs[number], inputs[number + 1])
        pairs = [(tensor, received.grad) for tensor, received in sent if received.grad is not None]
        torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])


def total(outputs: Any) -> Tensor:
    """A loss of whatever a model returns."""
    tensors = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum()


def difference(first: Tensor, second: Tensor) -> float:
    first, second = first.detach(), second.detach()
    return 0.0 if torch.equal(first, second) else float((first - second).norm() / second.norm())


def compare(entry: Entry, count: int) -> Staged:
    """Run a model of 10 classes in eval mode, whole and in *count* stages.

    Raises:
        UserError: it cannot be cut.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(entry.name, num_classes=10, **entry.options).eval()
        size = resolve_model_data_config(model)["input_size"]
        images = torch.randn(2, *size)
    meta = blueprint(ModelConfig(entry.name, options=entry.options), 10).module
    plan = cut(meta, blocks := find_blocks(meta), size, count)
    whole = model(images)
    total(whole).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    stages = [plan.build(model, number) for number in range(count)]
    held = [name for stage in stages for name, _ in stage.named_parameters(remove_duplicate=False)]
    assert sorted(name for name in held if name in expected) == sorted(expected), (
        "each parameter is on one stage, under timm's name"
    )
    inputs, outputs = run(stages, images)
    backward(inputs, outputs, total(outputs[-1]))
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all((found[name] is None) == (grad is None) for name, grad in expected.items())
    pairs = [(found[name], grad) for name, grad in expected.items() if grad is not None]
    gradients = difference(*(torch.cat([pair[side].reshape(-1) for pair in pairs]) for side in (0, 1)))
    first, last = ([value] if isinstance(value, Tensor) else value for value in (whole, outputs[-1]))
    apart = max(difference(a, b) for a, b in zip(last, first, strict=True))
    return Staged(len(blocks), apart, gradients, imbalance(plan.costs), max(map(len, plan.sends[True, tuple(size[1:])][:-1])))


def describe(entry: Entry) -> tuple[bool, str]:
    """Whether it can be cut, and its row of the table."""
    cells = [entry.module, entry.name]
    try:
        for count in (2, 4):
            found = compare(entry, count)
            exact = "exact" if found.output == found.gradients == 0 else f"{max(found.output, found.gradients):.0e}"
            cells += [exact, str(found.crossing), f"{found.imbalance:.2f}"]
    except UserError as error:
        return False, f"| {' | '.join(cells[:2])} | {str(error).removeprefix('parallel.strategy: ')} | | | | | |"
    return True, f"| {' | '.join(cells)} |"


def main() -> None:
    with ProcessPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        rows = []
        for row in pool.map(describe, ZOO):
            rows.append(row)
            print(row[1], flush=True)
    head, _, _ = PAGE.read_text(encoding="utf-8").partition("| module |")
    columns = ["module", "model", "2 stages", "crossing", "imbalance", "4 stages", "crossing", "imbalance"]
    table = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(row for _, row in rows)]
    PAGE.write_text(head + "\n".join(table) + "\n", encoding="utf-8")
    print(f"{sum(fine for fine, _ in rows)} of {len(rows)} modules can be cut; wrote {PAGE}")


if __name__ == "__main__":
    main()
