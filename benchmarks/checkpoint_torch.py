"""Saving and loading a state that is sharded by ``fully_shard`` with what torch has for it.

- ``torch.save`` of the whole state, gathered on rank 0, which also loads and broadcasts it.
- ``torch.save`` of each rank's shards, in a file of its own.
- ``torch.distributed.checkpoint`` with its defaults: a file per rank, brought to the disk.
- The same with ``HuggingFaceStorageWriter``: a safetensors file per rank, brought to the disk. Its shards stay as they are,
  since consolidating them writes everything a second time. It is given tensors only, so learning rates and the like are not in
  its files: with anything else it writes files that nobody can read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.optim import AdamW

from benchmarks.resources import Act
from bigvision.engine import Engine
from bigvision.engine.state import local_tensor
from bigvision.engine.zero import ZeroEngine
from bigvision.optim import allocate_state
from bigvision.runtime import Runtime


@dataclass(frozen=True)
class Side:
    name: str
    save: Act
    """Writes into an empty folder."""
    tensors: Callable[[], list[Tensor]] = list
    """This rank's live tensors of the state."""
    loads: Mapping[str, Act] = field(default_factory=dict)
    """By name: each brings the state back."""
    reads: Mapping[str, Act] = field(default_factory=dict)
    """By name: each reads the files, to nowhere."""


def held(engine: Engine | ZeroEngine) -> list[Tensor]:
    """This rank's fragments, as they are now: a peer's load may put others in the place of the optimizer's."""
    return [fragment.values for fragment in engine.fragments()]


@functools.cache
def _optimizer(engine: Engine) -> AdamW:
    """An optimizer over the module's own parameters, as torch's functions expect it: ours steps their local tensors."""
    optimizer = AdamW(engine.module.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    allocate_state(optimizer)
    return optimizer


def _held(engine: Engine) -> list[Tensor]:
    """What torch's functions save and load of a rank: the model's fragments, and the state of :func:`_optimizer`."""
    model = [fragment.values for fragment in engine.stepper.model_fragments()]
    states = [value for state in _optimizer(engine).state.values() for value in state.values()]
    return [*model, *(local_tensor(value).view(-1) for value in states if isinstance(value, Tensor) and value.ndim)]


def torch_full(runtime: Runtime, engine: Engine) -> Side:
    """The whole state gathered on rank 0, in one file."""

    def save(folder: Path) -> None:
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(engine.module, _optimizer(engine), options=whole)
        if runtime.is_main:
            torch.save({"model": model, "optimizer": optimizer}, folder / "state.pt")

    def load(folder: Path) -> None:
        # Mapped, as the tutorials have it: a tensor is read when it is broadcast.
        state: dict[str, Any] = (
            torch.load(folder / "state.pt", mmap=True, weights_only=True) if runtime.is_main else {"model": {}, "optimizer": {}}
        )
        sent = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(engine.module, state["model"], options=sent)
        set_optimizer_state_dict(engine.module, _optimizer(engine), state["optimizer"], options=sent)

    return Side("torch.save on rank 0", save, lambda: _held(engine), {"torch.load on rank 0": load})


def torch_ranks(runtime: Runtime, engine: Engine) -> Side:
    """Each rank's shards in a file of its own."""

    def save(folder: Path) -> None:
        state = {"model": engine.module.state_dict(), "optimizer": _optimizer(engine).state_dict()}
        torch.save(state, folder / f"rank{runtime.rank}.pt")

    def load(folder: Path) -> None:
        # Not mapped: the optimizer would take the mapping for its state, and read it at its next step.
        state = torch.load(folder / f"rank{runtime.rank}.pt", weights_only=True)
        engine.module.load_state_dict(state["model"])
        _optimizer(engine).load_state_dict(state["optimizer"])

    return Side("torch.save per rank", save, lambda: _held(engine), {"torch.load per rank": load})


def distributed(runtime: Runtime, engine: Engine) -> Side:
    """``torch.distributed.checkpoint`` with its default ``FileSystemWriter``, which brings its files to the disk."""

    def state() -> dict[str, Any]:
        model, optimizer = get_state_dict(engine.module, _optimizer(engine))
        return {"model": model, "optimizer": optimizer}

    def load(folder: Path) -> None:
        found = state()
        dcp.load(found, checkpoint_id=folder)
        set_state_dict(
            engine.module, _optimizer(engine), model_state_dict=found["model"], optim_state_dict=found["optimizer"]
        )  # fmt: skip

    return Side(
        "torch.distributed.checkpoint",
        lambda folder: dcp.save(state(), checkpoint_id=folder),
        lambda: _held(engine),
        {"torch.distributed.checkpoint": load},
    )


def distributed_safetensors(runtime: Runtime, engine: Engine) -> Side:
    """``torch.distributed.checkpoint`` into a safetensors file per rank."""

    def state() -> dict[str, Any]:
        model = get_model_state_dict(engine.module)
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        optimizer = get_optimizer_state_dict(engine.module, _optimizer(engine), options=flat)
        values = {f"model.{name}": value for name, value in model.items()}
        values |= {f"optimizer.{name}": value for name, value in optimizer.items()}
        # Live shards, so that what is loaded into them is loaded.
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def save(folder: Path) -> None:
        dcp.save(state(), storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))

    def load(folder: Path) -> None:
        dcp.load(state(), storage_reader=dcp.HuggingFaceStorageReader(str(folder)))

    name = "torch.distributed.checkpoint, safetensors"
    return Side(name, save, lambda: _held(engine), {name: load})


SIDES: dict[str, Callable[[Runtime, Engine], Side]] = {
    "full": torch_full,
    "ranks": torch_ranks,
    "dcp": distributed,
    "safetensors": distributed_safetensors,
}
