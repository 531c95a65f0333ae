"""The peers that bigvision's checkpoints are measured against, each used as its own documentation has it.

Three groups hold the machine's memory one after the other, each beside bigvision's own ``fsdp`` engine:

- What saves that engine's sharded model and AdamW (``checkpoint_torch.py``), and `dd`, which writes as many bytes.
- Accelerate's ``save_state``. Its FSDP is for accelerators only: on CPU ranks an ``Accelerator`` with an FSDP plugin still is
  ``MULTI_CPU``. So it keeps the whole state on every rank (DDP), rank 0 writes it and every rank reads it. On devices
  ``save_state`` calls ``torch.distributed.checkpoint.save`` twice, which is measured under its own name.
- DeepSpeed's ``save_checkpoint`` of ZeRO-3, whose files hold the fp32 weights and moments once; those of stages 1 and 2 hold
  the weights a second time. It is the engine that ``deepspeed.initialize`` returned inside bigvision's ``zero3``, whose
  optimizer has its state without a step. The writer is the default one: DeepSpeed's own fast one needs the headers of libaio to
  be compiled.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.checkpoint_torch import SIDES, Side, held
from benchmarks.peers import Work, adamw
from benchmarks.resources import Act
from benchmarks.step_time import configuration, fresh
from bigvision.engine import Engine
from bigvision.engine.zero import ZeroEngine
from bigvision.optim import allocate_state
from bigvision.runtime import Runtime
from bigvision.training.build import build_model

PEERS = ("dd", *SIDES, "accelerate", "deepspeed")


@contextmanager
def sharing(asked: argparse.Namespace, runtime: Runtime, engine: Engine) -> Iterator[list[Side]]:
    """Those that need no other state than the engine's."""
    sides = [make(runtime, engine) for name, make in SIDES.items() if name in asked.peers]
    if "dd" not in asked.peers:
        yield sides
        return
    share = sum(values.nbytes for values in held(engine))
    noise = os.memfd_create("noise")
    try:
        with open(os.dup(noise), "wb", buffering=0) as file:
            for begin in range(0, share, 16 << 20):
                file.write(os.urandom(min(16 << 20, share - begin)))
        for source, name in (("/dev/zero", "zeros"), (f"/dev/fd/{noise}", "noise")):
            for direct in (True, False):
                sides.append(Side(f"dd of {name}{', direct' * direct}", dd(source, noise, share, direct, runtime)))
        yield sides
    finally:
        os.close(noise)


@contextmanager
def accelerated(asked: argparse.Namespace, runtime: Runtime, engine: Engine) -> Iterator[list[Side]]:
    """Accelerate, with a model and AdamW of its own."""
    if "accelerate" not in asked.peers:
        yield []
        return
    from accelerate import Accelerator

    threads = torch.get_num_threads()
    accelerator = Accelerator(cpu=True)
    # Creating an Accelerator may change the number.
    torch.set_num_threads(threads)
    model = fresh(asked, runtime)
    plain = adamw(model, Work())
    allocate_state(plain)
    prepared = list(accelerator.prepare(model, plain))

    def tensors() -> list[Tensor]:
        states = [value for state in prepared[1].state.values() for name, value in state.items() if name != "step"]
        return [*(parameter.detach() for parameter in prepared[0].parameters()), *states]

    # Every rank has the same copy.
    torch.manual_seed(0)
    fill(tensors())
    try:
        yield [
            Side(
                "accelerate save_state (ddp)",
                lambda folder: accelerator.save_state(str(folder)),
                tensors,
                {"accelerate load_state (ddp)": lambda folder: accelerator.load_state(str(folder))},
            )
        ]
    finally:
        accelerator.free_memory()
        prepared.clear()
        del model, plain
        gc.collect()


@contextmanager
def deepspeed(asked: argparse.Namespace, runtime: Runtime, engine: Engine) -> Iterator[list[Side]]:
    """DeepSpeed, with an engine of its own."""
    if "deepspeed" not in asked.peers:
        yield []
        return
    config = configuration(asked, Work(), runtime.world_size, "zero3")
    zero, _, _ = build_model(config, 10, runtime, steps=1, say=lambda text: None)
    assert isinstance(zero, ZeroEngine)
    fill(held(zero))
    zero.refresh()
    try:
        yield [
            Side(
                "deepspeed save_checkpoint (zero3)",
                lambda folder: zero.stepper.deepspeed.save_checkpoint(str(folder)),
                lambda: held(zero),
                {"deepspeed load_checkpoint (zero3)": lambda folder: zero.stepper.deepspeed.load_checkpoint(str(folder))},
            )
        ]
    finally:
        zero.close()
        gc.collect()


GROUPS = (sharing, accelerated, deepspeed)
"""One holds its memory at a time."""


def dd(source: str, noise: int, share: int, direct: bool, runtime: Runtime) -> Act:
    """Each rank's `dd` writes *share* bytes and brings them to the disk."""

    def save(folder: Path) -> None:
        told = ["dd", f"if={source}", f"of={folder / str(runtime.rank)}", "bs=16M", f"count={share}", "iflag=count_bytes"]
        flags = ["oflag=direct"] if direct else []
        subprocess.run([*told, *flags, "conv=fsync", "status=none"], check=True, pass_fds=[noise])

    return save


def fill(tensors: list[Tensor]) -> None:
    """Random numbers, also in the moments: zeros are easier to write for some disks."""
    with torch.no_grad():
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.normal_()
