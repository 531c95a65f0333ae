"""Programs that train on the digits as one would write them without bigvision: with Accelerate, with Lightning Fabric, and of
timm's pieces as its train.py puts them together. `start_time.py` runs each beside ``bigvision train``.

All have bigvision's recipe: model, images, batch, shifts and turns, AdamW, clipping, the cosine with its warm-up after each
step, an evaluation and a checkpoint after each epoch, one worker per loader that lives as long as the run. Each resumes from
its last checkpoint. Lines on the standard output say when a start's first step is done, and what an evaluation has found.

    python benchmarks/digits_loops.py accelerate --data digits.npz --out FOLDER --epochs 6
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

MODEL, SIZE, BATCH, LR, DECAY, WARMUP, CLIP = "convnext_atto", 32, 64, 2e-3, 0.05, 0.1, 1.0


class Digits(Dataset):
    """The images of a file that has them as uint8 (N, 3, 8, 8) beside their labels; moved a little for training."""

    def __init__(self, path: Path, split: str, floats: bool) -> None:
        """Args: *floats*: normalised; else bytes, for a loader that normalises batches."""
        arrays = np.load(path)
        self.images, self.labels = torch.from_numpy(arrays[f"{split}_images"]), arrays[f"{split}_labels"].tolist()
        steps: list[nn.Module] = [v2.Resize((SIZE, SIZE), v2.InterpolationMode.BICUBIC, antialias=True)]
        if split == "train":
            steps.append(
                v2.RandomAffine((-10, 10), translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR)
            )
        if floats:
            steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
        self.transform: Any = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def loaders(path: Path) -> tuple[DataLoader[Any], DataLoader[Any]]:
    options: dict[str, Any] = {"batch_size": BATCH, "num_workers": 1, "persistent_workers": True}
    train, val = Digits(path, "train", True), Digits(path, "val", True)
    return DataLoader(train, shuffle=True, drop_last=True, **options), DataLoader(val, **options)


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(MODEL, num_classes=10)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups_weight_decay(model, DECAY), lr=LR, fused=True)


def rate(step: int, steps: int) -> float:
    """The learning rate's share before a step."""
    warmup = WARMUP * steps
    return (step + 1) / warmup if step + 1 < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def run(
    begin: int, epochs: int, model: nn.Module, optimizer: Any, train: Any, val: Iterable[Any],
    backward: Callable[[Tensor], object], clip: Callable[[], object], save: Callable[[int], object],
) -> None:  # fmt: skip
    """The loop of Accelerate's and Fabric's documentation, from the epoch *begin* on."""
    steps = epochs * len(train)
    step = begin * len(train)
    first = step + 1
    for epoch in range(begin, epochs):
        model.train()
        for images, labels in train:
            for group in optimizer.param_groups:
                group["lr"] = LR * rate(step, steps)
            loss = nn.functional.cross_entropy(model(images), labels)
            backward(loss)
            clip()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == first:
                print(f"step {step} of {steps}: loss {loss.item():.4f}", flush=True)
        accuracy = evaluate(model, val)
        save(epoch + 1)
        print(f"step {step}/{steps}  accuracy {accuracy:.2f}%", flush=True)


@torch.no_grad()
def evaluate(model: nn.Module, val: Iterable[Any]) -> float:
    model.eval()
    right = total = 0
    for images, labels in val:
        right += int((model(images).argmax(1) == labels).sum())
        total += len(labels)
    return 100 * right / total


def accelerate_program(asked: argparse.Namespace) -> None:
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    accelerator = Accelerator(cpu=True, project_config=ProjectConfiguration(str(asked.out)))
    model = new_model()
    model, optimizer, train, val = accelerator.prepare(model, adamw(model), *loaders(asked.data))
    last, begin = asked.out / "last", 0
    if (last / "epoch").exists():
        accelerator.load_state(str(last))
        begin = int((last / "epoch").read_text())

    def save(epoch: int) -> None:
        accelerator.save_state(str(last))
        (last / "epoch").write_text(str(epoch))

    clip = lambda: accelerator.clip_grad_norm_(model.parameters(), CLIP)  # noqa: E731
    run(begin, asked.epochs, model, optimizer, train, val, accelerator.backward, clip, save)
    accelerator.end_training()


def fabric_program(asked: argparse.Namespace) -> None:
    from lightning_fabric import Fabric  # pyright: ignore[reportMissingImports]

    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    plain = new_model()
    model, optimizer = fabric.setup(plain, adamw(plain))
    train, val = fabric.setup_dataloaders(*loaders(asked.data))
    last = asked.out / "last.ckpt"
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "epoch": 0}
    if last.exists():
        fabric.load(last, state)
    begin = state["epoch"]

    def save(epoch: int) -> None:
        fabric.save(last, state | {"epoch": epoch})

    clip = lambda: fabric.clip_gradients(model, optimizer, max_norm=CLIP)  # noqa: E731
    run(begin, asked.epochs, model, optimizer, train, val, fabric.backward, clip, save)


def timm_program(asked: argparse.Namespace) -> None:
    """timm's train.py in order: model, data configuration, optimizer, loaders with its prefetcher, saver, scheduler, epochs."""
    from timm.data import create_loader, resolve_data_config
    from timm.models import resume_checkpoint
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import (
        AverageMeter,
        CheckpointSaver,
        accuracy,
        dispatch_clip_grad,
        random_seed,
        setup_default_logging,
        update_summary,
    )

    setup_default_logging()
    device = torch.device("cpu")
    random_seed(42, 0)
    model = timm.create_model(MODEL, num_classes=10)
    config = resolve_data_config({"input_size": (3, SIZE, SIZE)}, model=model)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=LR, weight_decay=DECAY)
    begin, last = 0, asked.out / "last.pth.tar"
    if last.exists():
        begin = resume_checkpoint(model, str(last), optimizer) or 0

    def loader(split: str) -> Any:
        dataset = Digits(asked.data, split, False)
        change = dataset.transform
        made = create_loader(
            dataset, config["input_size"], BATCH, is_training=split == "train", mean=config["mean"], std=config["std"],  # type: ignore[arg-type]
            num_workers=1, device=device,
        )  # fmt: skip
        dataset.transform = change  # create_loader has put timm's own in its place
        return made

    train, val = loader("train"), loader("val")
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(asked.out), recovery_dir=str(asked.out))
    schedule: Any = {"warmup_epochs": round(WARMUP * asked.epochs, 2), "warmup_lr": 0.0, "min_lr": 0.0}
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=asked.epochs, step_on_epochs=False, updates_per_epoch=len(train), **schedule
    )
    assert scheduler is not None
    steps = asked.epochs * len(train)
    updates = begin * len(train)
    first = updates + 1
    scheduler.step_update(updates)
    for epoch in range(begin, asked.epochs):
        losses = AverageMeter()
        model.train()
        for images, labels in train:
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            dispatch_clip_grad(model.parameters(), CLIP)  # type: ignore[arg-type]
            optimizer.step()
            optimizer.zero_grad()
            losses.update(loss.item(), len(images))
            updates += 1
            scheduler.step_update(updates, metric=losses.avg)
            if updates == first:
                print(f"step {updates} of {steps}: loss {losses.val:.4f}", flush=True)
        model.eval()
        top1 = AverageMeter()
        with torch.no_grad():
            for images, labels in val:
                top1.update(accuracy(model(images), labels)[0].item(), len(images))
        update_summary(epoch, {"loss": losses.avg}, {"top1": top1.avg}, str(asked.out / "summary.csv"), write_header=epoch == 0)
        saver.save_checkpoint(epoch, top1.avg)
        print(f"step {updates}/{steps}  accuracy {top1.avg:.2f}%", flush=True)


PROGRAMS = {"accelerate": accelerate_program, "fabric": fabric_program, "timm": timm_program}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", choices=tuple(PROGRAMS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    PROGRAMS[asked.program](asked)


if __name__ == "__main__":
    main()
