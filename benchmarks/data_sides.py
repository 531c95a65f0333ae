"""From a folder of photos to normalised float32 batches: by bigvision, by torchvision, by timm, and by no loader at all."""

from __future__ import annotations

import math
import multiprocessing
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import simplejpeg
import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
TIMES = 1000
"""How often peers find each file listed, so that none of their epochs ends while they are timed."""

Run = Callable[[int], object]
"""Makes so many batches."""


@contextmanager
def bigvision(
    root: Path, size: int, batch: int, workers: int, mode: str, reduce: bool = False, arithmetic: bool = True
) -> Iterator[Run]:  # fmt: skip
    """Images stay uint8 until they are on the device.

    Args:
        arithmetic: what the device does with them too, which on a CPU takes the time of the workers' cores.
    """
    from bigvision.data import open_source, train_batches, transform

    source = open_source(f"imagefolder:{root}", "train", shared=False)
    change = transform("photo", size, train=True, interpolation=mode, scale=SCALE, reduce=reduce)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    with train_batches(
        source, change, seed=0, position=0, global_batch=batch, rank=0, ranks=1, workers=workers
    ) as batches:  # fmt: skip
        slot: list[Tensor | None] = [None]

        def run(count: int) -> None:
            for _ in range(count):
                arrived = next(batches).to("cpu")
                if arithmetic:
                    # As the engine does.
                    slot[0] = arrived.inputs(mean, std, slot[0])
                    _check(slot[0], size, batch)
                else:
                    assert arrived.images.shape == (batch, 3, size, size) and arrived.images.dtype == torch.uint8

        yield run


@contextmanager
def torchvision(root: Path, size: int, batch: int, workers: int, mode: str, tensors: bool = False) -> Iterator[Run]:
    """``ImageFolder`` and ``DataLoader``.

    Args:
        tensors: transforms v2 on uint8 tensors, as torchvision's page on performance has it, rather than the classic ones on
            Pillow's images.
    """
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import InterpolationMode, v2

    steps: list[Any]
    crop = {"scale": SCALE, "ratio": RATIO, "interpolation": InterpolationMode(mode), "antialias": True}
    if tensors:
        steps = [v2.ToImage(), v2.RandomResizedCrop(size, **crop), v2.RandomHorizontalFlip()]
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    else:
        steps = [transforms.RandomResizedCrop(size, **crop), transforms.RandomHorizontalFlip()]
        steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    dataset = ImageFolder(str(root), (v2 if tensors else transforms).Compose(steps))
    dataset.samples *= TIMES
    loader = DataLoader(dataset, batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0)
    yield _endless(loader, size, batch)


@contextmanager
def timm(root: Path, size: int, batch: int, workers: int, mode: str, prefetcher: bool = False) -> Iterator[Run]:
    """``create_dataset`` and ``create_loader``.

    Args:
        prefetcher: normalise on the device, as timm's own training script does.
    """
    from timm.data import create_dataset, create_loader

    dataset: Any = create_dataset("", str(root), is_training=True)
    dataset.reader.samples *= TIMES
    loader = create_loader(
        dataset, size, batch, is_training=True, use_prefetcher=prefetcher, scale=SCALE, ratio=RATIO, hflip=0.5,
        color_jitter=0.0, interpolation=mode, mean=MEAN, std=STD, num_workers=workers, device=torch.device("cpu"),
    )  # fmt: skip
    yield _endless(loader, size, batch)


@contextmanager
def ceiling(root: Path, size: int, batch: int, workers: int, mode: str) -> Iterator[Run]:
    """As many processes that read, decode, crop and resize, and throw away what comes out."""
    files = sorted(map(str, root.glob("*/*.jpg")))
    if workers == 0:
        yield lambda count: _bare(files, size, mode, count * batch, random.Random(0))
        return
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in range(workers)]
    processes = [
        context.Process(target=_serve, args=(theirs, files, size, mode, number), daemon=True)
        for number, (_, theirs) in enumerate(ends)
    ]
    for process in processes:
        process.start()

    def run(count: int) -> None:
        for number, (ours, _) in enumerate(ends):
            ours.send((count * batch + number) // workers)
        for ours, _ in ends:
            ours.recv()

    try:
        yield run
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(connection: Connection, files: Sequence[str], size: int, mode: str, number: int) -> None:
    torch.set_num_threads(1)
    draw = random.Random(number)
    while True:
        _bare(files, size, mode, connection.recv(), draw)
        connection.send(None)


def _bare(files: Sequence[str], size: int, mode: str, count: int, draw: random.Random) -> None:
    for _ in range(count):
        with open(draw.choice(files), "rb") as file:
            pixels = torch.from_numpy(simplejpeg.decode_jpeg(file.read()))
        top, left, height, width = _rectangle(pixels.shape[0], pixels.shape[1], draw)
        crop = pixels[None, top : top + height, left : left + width].permute(0, 3, 1, 2)
        torch.nn.functional.interpolate(crop, (size, size), mode=mode, antialias=True)


def _rectangle(height: int, width: int, draw: random.Random) -> tuple[int, int, int, int]:
    """As a random resized crop draws it: top, left, height, width."""
    for _ in range(10):
        area = height * width * draw.uniform(*SCALE)
        ratio = math.exp(draw.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        tall, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < tall <= height and 0 < wide <= width:
            return draw.randint(0, height - tall), draw.randint(0, width - wide), tall, wide
    return 0, 0, height, width


def _endless(loader: Any, size: int, batch: int) -> Run:
    batches = iter(loader)

    def run(count: int) -> None:
        for _ in range(count):
            _check(next(batches)[0].to("cpu"), size, batch)

    return run


def _check(images: torch.Tensor, size: int, batch: int) -> None:
    assert images.shape == (batch, 3, size, size) and images.dtype == torch.float32 and images.is_contiguous()
