"""One FSDP step of a model of each of timm's modules, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import run_ranks
from tests.models.zoo import ZOO, Entry

Part = tuple[str, int, np.ndarray]


def one_step(plain: dict[str, Any]) -> tuple[float, list[Part]]:
    """Take a plain SGD step on noise; return the loss and this rank's parameters: (name, start, values)."""
    from bigvision.config import load_config
    from bigvision.data import Batch
    from bigvision.engine import Engine
    from bigvision.runtime import start
    from bigvision.training.build import build_model

    with start("cpu") as runtime:
        engine, plan, _ = build_model(load_config(plain), 10, runtime, steps=1, say=lambda text: None)
        assert isinstance(engine, Engine)
        # Masks are drawn per rank.
        for module in engine.module.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "drop_rate", None), float):
                module.drop_rate = 0.0  # pyright: ignore
        count = 4 // runtime.world_size
        images = torch.randint(0, 256, (4, *plan.input_shape), generator=torch.Generator().manual_seed(0))
        mine = slice(runtime.rank * count, (runtime.rank + 1) * count)
        labels, every = torch.tensor([1, 7, 3, 9])[mine], torch.ones(count, dtype=torch.bool)
        loss = engine.train_step(Batch(images[mine].to(torch.uint8), labels, labels, every)).loss.item()
        names = {name for name, _ in engine.module.named_parameters()}
        return loss, [(f.name, f.start, f.values.detach().numpy().copy()) for f in engine.fragments() if f.name in names]


@pytest.mark.long
@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.module)
def test_a_sharded_step_is_the_step_of_one_process(tmp_path: Path, entry: Entry) -> None:
    """BatchNorm sees the same batches: two samples in each pass, on one rank and on two."""
    results = []
    for strategy, ranks in (("ddp", 1), ("fsdp", 2)):
        plain = {
            "model": {"name": entry.name, "options": entry.options},
            "optim": {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "clip": None, "warmup": 0},
            "parallel": {"strategy": strategy, "precision": "fp32", "device": "cpu"},
            "train": {"global_batch": 4, "micro_batch": 2},
        }
        results.append(run_ranks(one_step, ranks, plain))
    ((loss, whole),), sharded = results
    assert all(other == pytest.approx(loss, rel=1e-5) for other, _ in sharded)
    values = {name: flat for name, _, flat in whole}
    seen, difference, size = dict.fromkeys(values, 0), 0.0, 0.0
    for _, parts in sharded:
        for name, start, flat in parts:
            expected = values[name][start : start + flat.size]
            difference += float(np.square(flat.astype(np.float64) - expected).sum())
            size += float(np.square(expected.astype(np.float64)).sum())
            seen[name] += flat.size
    assert all(count >= values[name].size for name, count in seen.items())
    assert np.sqrt(difference / size) < 1e-5
