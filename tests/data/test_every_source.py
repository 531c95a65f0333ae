"""One rule for all sources: neither workers, nor ranks, nor stops change which samples come, nor their pixels."""

from __future__ import annotations

import io
import random
import tarfile
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photo_files import write_photos
from PIL import Image

from bigvision.data import Batch, Source, Stream, open_source, train_batches, transform

LENGTH, GLOBAL, STEPS = 29, 12, 8


class Own:
    """A user's own dataset."""

    def __init__(self) -> None:
        self.targets = [index % 3 for index in range(LENGTH)]

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)), index % 3


def photo(number: int) -> bytes:
    file = io.BytesIO()
    Own()[number][0].save(file, "JPEG")
    return file.getvalue()


def folder(root: Path) -> str:
    write_photos(root, {"a": 10, "b": 19})
    return f"imagefolder:{root}"


def shards(root: Path) -> str:
    for shard, members in enumerate((range(17), range(17, LENGTH))):
        with tarfile.open(root / f"{shard:03}.tar", "w") as tar:
            for number in members:
                for suffix, data in (("jpg", photo(number)), ("cls", str(number % 3).encode())):
                    entry = tarfile.TarInfo(f"{number:04}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return f"webdataset:{root}"


def parquet(root: Path) -> str:
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": photo(number), "path": None} for number in range(LENGTH)]
    table = pyarrow.table({"image": images, "label": [number % 3 for number in range(LENGTH)]})
    pyarrow.parquet.write_table(table, root / "data.parquet", row_group_size=7)
    return f"parquet:{root}"


def arrays(root: Path) -> str:
    np.save(root / "images.npy", np.stack([np.asarray(Own()[number][0]) for number in range(LENGTH)]))
    np.save(root / "labels.npy", np.array(Own().targets))
    return f"arrays:{root}"


def volumes(root: Path) -> str:
    pixels = np.random.default_rng(0)
    for name, slices in (("a", 10), ("b", 19)):
        (root / name).mkdir()
        np.save(root / name / "x.npy", pixels.normal(size=(20, 24, slices)).astype(np.float32))
    return f"volumes:{root}?slices=5"


def mixture(root: Path) -> str:
    (root / "one").mkdir()
    (root / "two").mkdir()
    return f"0.4*{shards(root / 'one')} + 0.6*{shards(root / 'two')}"


MAKERS: dict[str, Any] = {
    "folder": folder, "shards": shards, "parquet": parquet, "arrays": arrays, "volumes": volumes, "mixture": mixture,
    "digits": lambda root: "digits", "synthetic": lambda root: f"synthetic:{LENGTH}x20", "own": lambda root: Own(),
}  # fmt: skip
ORDERS: dict[str, dict[str, int]] = {
    "plain": {}, "near": {"block": 4, "window": 2}, "repeats": {"repeats": 3}, "both": {"repeats": 2, "block": 5, "window": 3},
}  # fmt: skip


def run(source: Source, stream: Stream, first: int, last: int, workers: int, ranks: int) -> list[torch.Tensor]:
    """The ids, labels, pixels and validity of the samples of the steps from *first* to *last*."""
    change = transform(source.style, 16, train=True)
    loaders = [
        train_batches(
            source, change, seed=5, position=GLOBAL * first, global_batch=GLOBAL, rank=rank, ranks=ranks, workers=workers,
            stream=stream,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        batches: list[Batch] = [next(loader) for _ in range(last - first) for loader in loaders]
    finally:
        for loader in loaders:
            loader.close()
    return [torch.cat([getattr(batch, name) for batch in batches]) for name in ("ids", "labels", "images", "valid")]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MAKERS)
def test_workers_ranks_and_stops_change_no_sample_and_no_pixel(tmp_path: Path, name: str, order: str) -> None:
    source = open_source(MAKERS[name](tmp_path), "train", shared=name == "digits")
    stream = Stream(5, source.parts, **ORDERS[order])
    whole = ids, labels, images, valid = run(source, stream, 0, STEPS, 0, 1)
    repeats = ORDERS[order].get("repeats", 1)
    if repeats == 1 and name != "mixture":
        assert len(set(ids[: len(source)].tolist())) == min(len(source), GLOBAL * STEPS)
    if name == "synthetic":
        assert len(images[:repeats].flatten(1).unique(dim=0)) == repeats, "each repetition is augmented by itself"
    assert labels.tolist() == [source.label(id) for id in ids.tolist()] and valid.all()
    # Workers take time to start: all combinations, and more workers than a rank has batches, for one source only.
    every = [*product((0, 1, 2), (1, 2, 3, 4)), (5, 1)]
    for workers, ranks in every if (name, order) == ("synthetic", "plain") else [(1, 3), (2, 2)]:
        found = run(source, stream, 0, STEPS, workers, ranks)
        assert all(torch.equal(one, other) for one, other in zip(found, whole)), (workers, ranks)
    # Several stops, within epochs too, each time on other ranks and, for one source, other workers.
    random.seed(f"{name} {order}")
    stops = [0, *sorted(random.sample(range(1, STEPS), 3)), STEPS]
    setups = zip((0, 1, 2, 0) if name == "synthetic" else (0, 0, 0, 0), (1, 4, 2, 3))
    parts = [run(source, stream, *ends, *setup) for ends, setup in zip(pairwise(stops), setups)]
    assert all(torch.equal(torch.cat(found), wanted) for found, wanted in zip(zip(*parts), whole))
