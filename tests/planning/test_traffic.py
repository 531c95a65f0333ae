"""What a rank sends in a step, against the collectives of an engine's step on torch's fake process group."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import run_ranks

VIT = {"name": "vit_tiny_patch16_224", "image_size": 32, "num_classes": 10, "options": {"depth": 4, "patch_size": 8}}
RESNET = {"name": "resnet18", "image_size": 32, "num_classes": 10}
CASES = {
    "fsdp": (8, VIT, {"strategy": "fsdp"}, 2),
    "fsdp, micro-batches": (8, VIT, {"strategy": "fsdp"}, 1),
    "fsdp, replicas": (8, VIT, {"strategy": "fsdp", "replicas": 2}, 1),
    "fsdp, kept, scattered last": (6, VIT, {"strategy": "fsdp", "reshard": "never", "scatter": "last"}, 1),
    "fsdp, bf16": (4, VIT, {"strategy": "fsdp", "precision": "bf16"}, 2),
    "fsdp, BatchNorm": (4, RESNET, {"strategy": "fsdp"}, 2),
    "pipeline": (2, VIT, {"strategy": "pipeline", "schedule": "1f1b"}, None),
    "pipeline, sharded": (4, VIT, {"strategy": "pipeline", "stages": 2, "schedule": "1f1b"}, None),
}
"""Ranks, model, `parallel`, and `train.micro_batch` of two samples on a rank."""


class Sent(TorchDispatchMode):
    """Adds up the bytes that a rank sends, as rings send them."""

    def __init__(self, everyone: int) -> None:
        super().__init__()
        self.everyone = everyone
        self.bytes: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if func.namespace == "c10d":
            if name in ("_allgather_base_", "_reduce_scatter_base_"):
                whole, part = sorted((args[0].nbytes, args[1].nbytes), reverse=True)
                self._add("all_gather" if "gather" in name else "reduce_scatter", whole - part)
            elif name == "allreduce_":
                from torch.distributed import ProcessGroup

                ranks = ProcessGroup.unbox(args[1]).size()
                self._add("all_reduce", sum(one.nbytes for one in args[0]) * 2 * (ranks - 1) / ranks)
            elif name == "send":
                self._add("send", sum(one.nbytes for one in args[0]))
        return func(*args, **(kwargs or {}))

    def _add(self, kind: str, size: float) -> None:
        self.bytes[kind] = self.bytes.get(kind, 0.0) + size


def step_and_prediction(ranks: int, plain: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """What the first of *ranks* sends in the second step, and what is predicted."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import FakeProcessGroup
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from bigvision import load_config
    from bigvision.planning.memory import Layout
    from bigvision.planning.profile import profile
    from bigvision.planning.program import sent
    from bigvision.runtime import process, start
    from bigvision.training.build import build_model
    from tests.planning.held import batch_of

    config = load_config(plain)
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        with (
            mock.patch.dict(os.environ, environment),
            mock.patch.object(FakeProcessGroup, "_set_default_timeout", lambda group, timeout: None, create=True),
            mock.patch.object(process, "gather_json", lambda value, group=None: [value] * ranks),
            start("cpu", config.parallel.replicas, config.parallel.pipeline_ranks) as runtime,
        ):
            engine, plan, _ = build_model(config, 10, runtime, 9, say=lambda text: None)
            batch = batch_of(plan, engine, config.train.global_batch // runtime.data_ranks)
            engine.train_step(batch)
            with Sent(ranks) as counting:
                engine.train_step(batch)
    finally:
        dist.destroy_process_group()
    predicted: dict[str, float] = {}
    for (kind, _), size in sent(profile(config, 10), config, Layout.of(config, ranks)).items():
        predicted[kind] = predicted.get(kind, 0.0) + size
    return counting.bytes, predicted


@pytest.mark.parametrize("name", ["fsdp", *(pytest.param(case, marks=pytest.mark.long) for case in list(CASES)[1:])])
def test_a_rank_sends_what_is_predicted(name: str) -> None:
    ranks, model, parallel, micro = CASES[name]
    plain = {
        "model": model,
        "parallel": {"precision": "fp32", "device": "cpu"} | parallel,
        "train": {"global_batch": 2 * ranks * (2 if parallel["strategy"] == "pipeline" else 1), "micro_batch": micro},
    }
    found, predicted = run_ranks(step_and_prediction, 1, ranks, plain)[0]
    assert found.keys() == predicted.keys(), (found, predicted)
    for kind, size in found.items():
        assert predicted[kind] == pytest.approx(size, rel=1e-9), (kind, size, predicted[kind])
