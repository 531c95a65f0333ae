"""The memory of batches that workers make: not in /dev/shm, used again, and never while anyone still looks at it."""

import gc
import os
import shutil
import subprocess
import sys
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch

from bigvision.data import Sample, Source, eval_batches, open_source, train_batches, transform
from bigvision.data.reading import Reader, SharedMemory, Slots, dumps

AUGMENTED = transform("photo", 12, train=True)
OPTIONS = {"seed": 3, "position": 0, "global_batch": 6, "rank": 0, "ranks": 1}


def write(slots: Slots, slot: int) -> None:
    slots.images(slot)[1] = 7


def test_slots_come_back_when_nothing_shows_them():
    slots = Slots(2, 3, (3, 4, 4))
    first, second = slots.take(), slots.take()
    assert {first, second} == {0, 1} and slots.take() is None
    assert first is not None and slots.images(first).shape == (3, 3, 4, 4)
    images = slots.received(first)
    part = images[1:, :, 2].flip(-1)[0], images[0, 0]
    del images
    gc.collect()
    assert slots.take() is None, "a view is left"
    del part
    gc.collect()
    assert slots.take() == first


@pytest.mark.parametrize("start", ["fork", "forkserver", "spawn"])
def test_another_process_writes_what_this_one_reads(start: str):
    slots = Slots(2, 3, (3, 4, 4))
    process = get_context(start).Process(target=write, args=(slots, 1))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert (slots.received(1)[1] == 7).all() and not slots.received(0).any()


def test_without_memfd_it_is_a_file_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def forbidden(name: str) -> int:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    memory = SharedMemory(5000)
    memory.array()[4999] = 3
    assert memory[4999] == 3 and os.listdir(tmp_path) == []
    open_files = len(os.listdir("/proc/self/fd"))
    del memory
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) < open_files


def test_batches_lie_where_earlier_ones_did_but_never_where_one_still_is():
    source = open_source("synthetic:40x20", "train")
    with train_batches(source, AUGMENTED, workers=0, **OPTIONS) as loader:
        wanted = [next(loader).images for _ in range(40)]
    with train_batches(source, AUGMENTED, workers=2, **OPTIONS) as loader:
        kept, places = {}, set()
        for number in range(40):
            batch = next(loader)
            places.add(batch.images.untyped_storage().data_ptr())
            assert torch.equal(batch.images, wanted[number])
            if number in (3, 4, 11):
                kept[number] = batch.images[number % 6, 1:]
        assert all(torch.equal(part, wanted[number][number % 6, 1:]) for number, part in kept.items())
        # A batch that found no slot, since the kept ones lie in three, is where the allocator has put it.
        begin = torch.frombuffer(loader._slots._memory, dtype=torch.uint8).data_ptr()
        assert 0 < len([place for place in places if begin <= place < begin + loader._slots.nbytes]) <= 2 * 2 + 2


def test_more_are_kept_than_there_are_slots():
    source = open_source("synthetic:40x20", "val")
    plain = transform("photo", 12, train=False)
    found = []
    for workers in (0, 1):
        with eval_batches(source, plain, batch=3, rank=0, ranks=1, workers=workers) as loader:
            found.append(list(loader))
    assert len(found[0]) == len(found[1]) == 14
    assert all(torch.equal(one.images, other.images) for one, other in zip(*found))
    assert all(torch.equal(one.valid, other.valid) for one, other in zip(*found))


class Held(Source):
    """Holds its images, and a part of them once more, as sources of arrays do; its targets are tensors."""

    name, classes = "held", ["a"]

    def __init__(self) -> None:
        self.images = torch.randint(0, 256, (40, 3, 20, 20), dtype=torch.uint8)
        self.first = self.images[:20]

    def __len__(self) -> int:
        return 40

    def read(self, index: int) -> Sample:
        return Sample((self.first if index < 20 else self.images)[index], {"mask": self.images[index, 0].clone(), "n": index})

    def label(self, index: int) -> Any:
        return self.read(index).target


class Whole:
    """No transform of ours: the size of its images is known when there is one."""

    def __call__(self, image, target):
        return image[:, :9, :7], target


@pytest.mark.parametrize("change", [transform("photo", 12, train=False), Whole()], ids=["ours", "own"])
def test_nothing_lies_in_dev_shm(change, monkeypatch):
    """Whose size containers limit: to write more kills a process. Neither images, nor targets, nor what sources hold."""

    def refused(*args: object) -> None:
        raise AssertionError("torch's shared memory, which is in /dev/shm")

    # What reduces tensors that multiprocessing sends, here and, being inherited, in the workers.
    for name in ("_share_fd_cpu_", "_share_filename_cpu_", "_new_shared"):
        monkeypatch.setattr(torch.UntypedStorage, name, refused)
    monkeypatch.setattr("bigvision.data.loader.needs_main", lambda value: True)  # forked
    source = Held()
    found = []
    for workers in (0, 2):
        with train_batches(source, change, workers=workers, **OPTIONS | {"global_batch": 80}) as loader:
            found.append([next(loader) for _ in range(3)])
    for one, other in zip(*found):
        assert torch.equal(one.images, other.images) and torch.equal(one.targets["mask"], other.targets["mask"])
        assert one.targets["n"].tolist() == other.targets["n"].tolist() == one.ids.tolist()
    dumps(source)
    assert source.first.untyped_storage().data_ptr() == source.images.untyped_storage().data_ptr()


def read_first(reader: Reader, answers: Any) -> None:
    answers.put((reader.source.images.sum().item(), reader.source.first[3].sum().item()))
    reader.source.images[:] = 0


def test_what_a_source_holds_is_shared_by_all_processes():
    source, context = Held(), get_context("forkserver")
    wanted, answers = (source.images.sum().item(), source.first[3].sum().item()), context.SimpleQueue()
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    process = context.Process(target=read_first, args=(Reader(source, AUGMENTED, 0), answers))
    process.start()
    assert answers.get() == wanted
    process.join()
    assert not source.images.any() and not source.first.any()
    assert not any(name.startswith("torch_") for name in set(os.listdir("/dev/shm")) - before)


def test_memory_does_not_grow_with_the_batch(photos):
    """Batch 4,096 in micro-batches of 64 at 224 pixels with 8 workers had 11 GB in /dev/shm."""
    source, change = open_source(f"imagefolder:{photos}", "train"), transform("photo", 224, train=True)
    options = OPTIONS | {"global_batch": 4096, "workers": 8, "micro_batch": 64}
    # Not started: only what would be asked of workers.
    sizes = {}
    for size in (64, 4096):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bigvision.data.loader.iter", lambda loader: loader, raising=False)
            loader = train_batches(source, change, **options | {"global_batch": size})
            sizes[size] = loader.shared_bytes
    assert sizes[64] == sizes[4096] <= 400e6
    assert sizes[64] == 10 * 64 * 3 * 224 * 224 == np.prod((10, 64, 3, 224, 224))


SMALL = """
import os

from bigvision import train

if __name__ == "__main__":
    assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize == 1 << 20
    train({
        "out": os.environ["RUN"],
        "model": {"name": "vit_tiny_patch16_224", "image_size": 224, "options": {"patch_size": 112, "depth": 1}},
        "data": {"train": "synthetic:512x160", "val": "synthetic:40x160", "workers": 2},
        "parallel": {"strategy": "ddp", "precision": "fp32", "device": "cpu"},
        "train": {"steps": 2, "global_batch": 256, "micro_batch": 64, "eval_every": 2},
    })
"""


@pytest.mark.long
def test_training_with_a_dev_shm_of_one_megabyte(tmp_path):
    """A container's, in a mount namespace of its own."""
    (tmp_path / "small.py").write_text(SMALL)
    unshare = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    command = [*unshare, sys.executable, str(tmp_path / "small.py")]
    done = subprocess.run(command, env=os.environ | {"RUN": str(tmp_path / "run")}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run").glob("step-*2"))
