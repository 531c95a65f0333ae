"""What a rank sends in a step, against the collectives of an engine's step.

The other ranks are torch's fake process group. Under ddp, whose reducer needs results, and under ZeRO and in fp16, which skip
a step whose gradients are not finite, they are real.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeProcessGroup  # type: ignore[attr-defined]
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigvision.config import load_config
from bigvision.planning.program import sent
from bigvision.planning.state import Layout
from bigvision.runtime import process, start
from bigvision.training.build import build_model
from tests.distributed import run_ranks
from tests.engine.test_batchnorm import in_evaluation
from tests.planning.held import Make, batch_of, profiled
from tests.planning.test_memory import written_teacher

VIT = {"name": "vit_tiny_patch16_224", "image_size": 32, "num_classes": 10, "options": {"depth": 4, "patch_size": 8}}
RESNET = {"name": "resnet18", "image_size": 32, "num_classes": 10}
CONVNEXT = {"name": "convnext_atto", "image_size": 64, "num_classes": 10}
CASES = {
    "fsdp": (8, VIT, {"strategy": "fsdp"}, 2),
    "fsdp, micro-batches": (8, VIT, {"strategy": "fsdp"}, 1),
    "fsdp, replicas": (8, VIT, {"strategy": "fsdp", "replicas": 2}, 1),
    "fsdp, kept, scattered last": (6, VIT, {"strategy": "fsdp", "reshard": "never", "scatter": "last"}, 1),
    "fsdp, bf16": (4, VIT, {"strategy": "fsdp", "precision": "bf16"}, 2),
    "fsdp, blocks by themselves": (4, VIT, {"strategy": "fsdp", "unit_size": "block"}, 2),
    "fsdp, BatchNorm": (4, RESNET, {"strategy": "fsdp"}, 2),
    "fsdp, replicas, reduced in bf16": (8, RESNET, {"strategy": "fsdp", "replicas": 2, "reduce": "bf16"}, 2),
    "pipeline": (2, VIT, {"strategy": "pipeline", "schedule": "1f1b"}, None),
    "pipeline, sharded": (4, VIT, {"strategy": "pipeline", "stages": 2, "schedule": "1f1b"}, None),
    "pipeline, sharded, gpipe": (4, VIT, {"strategy": "pipeline", "stages": 2, "schedule": "gpipe"}, None),
    "pipeline, sharded, interleaved": (4, VIT, {"strategy": "pipeline", "stages": 2, "schedule": "interleaved"}, None),
    "pipeline, sharded, kept": (4, VIT, {"strategy": "pipeline", "stages": 2, "reshard": "never"}, None),
    "pipeline, sharded, BatchNorm": (4, RESNET, {"strategy": "pipeline", "stages": 2}, 2),
    "pipeline, sharded, cut inside a block": (6, CONVNEXT, {"strategy": "pipeline", "stages": 3}, None),
    "pipeline, sharded, units": (4, VIT, {"strategy": "pipeline", "stages": 2, "unit_size": "4MB"}, None),
    "pipeline, copied": (4, VIT, {"strategy": "pipeline", "stages": 2, "replicas": 2}, None),
    "pipeline, sharded, reduced in bf16": (4, VIT, {"strategy": "pipeline", "stages": 2, "reduce": "bf16"}, None),
    "pipeline, copied, reduced in bf16": (4, VIT, {"strategy": "pipeline", "stages": 2, "replicas": 2, "reduce": "bf16"}, None),
    "ddp": (2, VIT, {"strategy": "ddp"}, 2),
    "ddp, reduced in bf16": (2, VIT, {"strategy": "ddp", "reduce": "bf16"}, 1),
    "ddp, micro-batches": (3, VIT, {"strategy": "ddp"}, 1),
    "ddp, BatchNorm": (2, RESNET, {"strategy": "ddp"}, 2),
    "zero1": (2, VIT, {"strategy": "zero1"}, 2),
    "zero1, micro-batches, bf16": (2, VIT, {"strategy": "zero1", "precision": "bf16"}, 1),
    "zero2": (3, VIT, {"strategy": "zero2"}, 2),
    "zero2, micro-batches, bf16": (2, VIT, {"strategy": "zero2", "precision": "bf16"}, 1),
    "zero3": (3, VIT, {"strategy": "zero3"}, 2),
    "zero3, micro-batches, bf16": (2, VIT, {"strategy": "zero3", "precision": "bf16"}, 1),
    "zero3, recompute": (2, VIT, {"strategy": "zero3", "recompute": "blocks"}, 2),
    "zero3, selective": (2, VIT, {"strategy": "zero3", "recompute": "selective"}, 2),
    **{f"zero{stage}, reduced in bf16": (2, VIT, {"strategy": f"zero{stage}", "reduce": "bf16"}, 1) for stage in (1, 2, 3)},
    **{
        f"{strategy}, fp16": (2, VIT, {"strategy": strategy, "precision": "fp16"}, 1)
        for strategy in ("ddp", "fsdp", "zero1", "zero2", "zero3")
    },
    "zero1, fp16, reduced in bf16": (2, VIT, {"strategy": "zero1", "precision": "fp16", "reduce": "bf16"}, 2),
    **{
        f"{strategy}, {offload} offloaded, {precision}": (
            2,
            VIT,
            {"strategy": strategy, "precision": precision, "offload": offload},
            1,
        )
        for strategy, offload in (("zero1", "optimizer"), ("zero2", "optimizer"), ("zero3", "all"))
        for precision in ("fp32", "bf16")
    },
    "pipeline, interleaved": (2, VIT, {"strategy": "pipeline", "schedule": "interleaved"}, None),
    "pipeline, zbv": (2, VIT, {"strategy": "pipeline", "schedule": "zbv"}, None),
    "pipeline, dualpipev": (2, VIT, {"strategy": "pipeline", "schedule": "dualpipev"}, None),
    "zero1, bf16, reduced in bf16": (2, VIT, {"strategy": "zero1", "precision": "bf16", "reduce": "bf16"}, 1),
}
"""Ranks, model, `parallel`, and `train.micro_batch` of two samples on a rank."""


class Sent(TorchDispatchMode):
    """Adds up the bytes that a rank sends, as rings send them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._overloadpacket.__name__
            sizes = [sum(one.nbytes for one in tree_leaves(arg) if isinstance(one, Tensor)) for arg in args[:2]]
            if "allgather" in name or "reduce_scatter" in name:
                self._add("all_gather" if "gather" in name else "reduce_scatter", max(sizes) - min(sizes))
            elif name == "allreduce_":
                ranks = dist.ProcessGroup.unbox(args[1]).size()
                self._add("all_reduce", sizes[0] * 2 * (ranks - 1) / ranks)
            elif name == "send":
                self._add("send", sizes[0])
            elif name not in ("recv_", "barrier", "broadcast_"):
                raise NotImplementedError(name)
        return func(*args, **(kwargs or {}))

    def _add(self, kind: str, size: float) -> None:
        self.bytes[kind] = self.bytes.get(kind, 0.0) + size


def sent_in_a_step(plain: dict[str, Any], make: Make = None) -> dict[str, float]:
    """What this rank sends in a step after the first. Called on every rank."""
    config = load_config(plain)
    with start("cpu", config.parallel.replicas, config.parallel.pipeline_ranks) as runtime:
        engine, plan, _ = build_model(config, 10, runtime, 9, lambda text: None, model=make and make())
        batch = batch_of(plan, engine, config.train.global_batch // runtime.data_ranks)
        while engine.train_step(batch).skipped and config.parallel.precision == "fp16":
            pass  # until its loss scale fits
        with Sent() as counting:
            engine.train_step(batch)
        engine.close()
    return counting.bytes


def one_of_fake(plain: dict[str, Any], ranks: int) -> dict[str, float]:
    """What the first of *ranks* sends in a step."""
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        with (
            mock.patch.dict(os.environ, environment),
            mock.patch.object(FakeProcessGroup, "_set_default_timeout", lambda group, timeout: None, create=True),
            mock.patch.object(process, "gather_json", lambda value, group=None: [value] * ranks),
        ):
            return sent_in_a_step(plain)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["fsdp", *(pytest.param(case, marks=pytest.mark.long) for case in list(CASES)[1:])])
def test_a_rank_sends_what_is_predicted(name: str) -> None:
    ranks, model, parallel, micro = CASES[name]
    plain = {
        "model": model,
        "parallel": {"precision": "fp32", "device": "cpu"} | parallel,
        "train": {"global_batch": 2 * ranks * (2 if parallel["strategy"] == "pipeline" else 1), "micro_batch": micro},
    }
    real = parallel["strategy"] in ("ddp", "zero1", "zero2", "zero3") or parallel.get("precision") == "fp16"
    check(plain, (run_ranks(sent_in_a_step, ranks, plain) if real else run_ranks(one_of_fake, 1, plain, ranks))[0], ranks)


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "ranks", "micro"), [("fsdp", 4, 1), ("zero3", 3, 2), ("zero2", 2, 1), ("ddp", 2, 2)])
def test_a_teacher_is_gathered_where_it_is_sharded(tmp_path: Path, strategy: str, ranks: int, micro: int) -> None:
    plain = {
        "model": VIT | {"image_size": 112},
        "task": {"teacher": written_teacher(tmp_path)},
        "parallel": {"precision": "fp32", "device": "cpu", "strategy": strategy},
        "train": {"global_batch": 2 * ranks, "micro_batch": micro},
    }
    check(plain, run_ranks(sent_in_a_step, ranks, plain)[0], ranks)


@pytest.mark.long
def test_the_map_of_unused_parameters() -> None:
    plain = {
        "model": {"name": "Auxiliary", "image_size": 32},
        "parallel": {"strategy": "ddp", "precision": "fp32", "device": "cpu"},
        "train": {"global_batch": 4},
    }
    check(plain, run_ranks(sent_in_a_step, 2, plain, in_evaluation)[0], 2, in_evaluation)


def check(plain: dict[str, Any], found: dict[str, float], ranks: int, make: Make = None) -> None:
    """Raise unless the first rank has sent what is predicted."""
    config = load_config(plain)
    predicted: dict[str, float] = {}
    for (kind, _), size in sent(profiled(config, make), config, Layout.of(config, ranks)).items():
        predicted[kind] = predicted.get(kind, 0.0) + size
    assert found.keys() == predicted.keys(), (found, predicted)
    for kind, size in found.items():
        assert predicted[kind] == pytest.approx(size, rel=1e-9), (kind, size, predicted[kind])
