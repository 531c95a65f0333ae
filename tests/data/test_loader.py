import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from photo_files import write_photos

from bigvision.data import (
    Batch,
    Batches,
    Sample,
    Source,
    StepBatch,
    Stream,
    eval_batches,
    open_source,
    train_batches,
    transform,
)
from bigvision.errors import UserError

LENGTH = 23
GLOBAL = 12


@pytest.fixture(scope="module")
def noise():
    return open_source(f"synthetic:{LENGTH}x10", "train")


AUGMENTED = transform("photo", 8, train=True)
PLAIN = transform("photo", 8, train=False)


def join(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "targets", "ids", "valid")))


def assert_equal(one: Batch, other: Batch) -> None:
    for name in ("ids", "labels", "valid", "images"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def train(source, steps, *, position=0, ranks=1, workers=0, global_batch=GLOBAL, seed=3) -> list[Batch]:
    """Return the global batches, the ranks' parts put together."""
    loaders = [
        train_batches(
            source,
            AUGMENTED,
            seed=seed,
            position=position,
            global_batch=global_batch,
            rank=rank,
            ranks=ranks,
            workers=workers,
        )
        for rank in range(ranks)
    ]
    try:
        return [join([next(loader) for loader in loaders]) for _ in range(steps)]
    finally:
        for loader in loaders:
            loader.close()


@pytest.fixture(scope="module")
def reference(noise) -> Batch:
    return join(train(noise, 10))


# Training


def test_each_epoch_sees_each_sample_once(noise, reference):
    for start in range(0, 10 * GLOBAL - LENGTH, LENGTH):
        assert sorted(reference.ids[start : start + LENGTH].tolist()) == list(range(LENGTH))
    assert reference.valid.all()
    assert reference.labels.tolist() == [noise.read(index).label for index in reference.ids.tolist()]


def test_epochs_and_seeds_differ(noise, reference):
    first, second = (reference.ids[start : start + LENGTH] for start in (0, LENGTH))
    assert not torch.equal(first, second)
    # The same sample is augmented anew in the second epoch.
    assert not torch.equal(reference.images[first.argsort()], reference.images[LENGTH + second.argsort()])
    assert not torch.equal(join(train(noise, 2, seed=4)).ids, reference.ids[: 2 * GLOBAL])


def test_resumed_with_another_global_batch(noise, reference):
    parts = [*train(noise, 1, global_batch=5), *train(noise, 2, position=5, global_batch=8, ranks=4)]
    parts += train(noise, 1, position=21, global_batch=99)
    assert_equal(join(parts), join([reference.split(120)[0]]))


@pytest.mark.parametrize(
    ("micro_batch", "workers", "ranks"), [(1, 2, 1), (5, 0, 2), (5, 2, 2), (40, 2, 1), (70, 2, 1), (None, 1, 1)]
)
def test_micro_batches_change_nothing(noise, micro_batch, workers, ranks):
    """Neither those that are a part of what a worker is asked for, nor those that several workers make together."""
    share, size = 120 // ranks, micro_batch or 120 // ranks
    options = {"seed": 3, "position": 0, "global_batch": 120, "ranks": ranks, "workers": workers, "micro_batch": micro_batch}
    found = []
    for rank in range(ranks):
        with train_batches(noise, AUGMENTED, rank=rank, **options) as loader:
            steps = [list(StepBatch(loader, share, size).split(size)) for _ in range(2)]
        assert [len(part) for part in steps[1]] == [min(size, share - begin) for begin in range(0, share, size)]
        found.append([join(step) for step in steps])
    assert_equal(join([part for step in zip(*found) for part in step]), join(train(noise, 2, global_batch=120)))


def test_a_step_nobody_wants_is_taken_from_the_loader(noise):
    options = {"seed": 3, "position": 0, "global_batch": 70, "rank": 0, "ranks": 1, "workers": 2, "micro_batch": 4}
    with train_batches(noise, AUGMENTED, **options) as loader:
        StepBatch(loader, 70, 4).finish()
        half = StepBatch(loader, 70, 4)
        for _, part in zip(range(3), half.split(4)):
            assert len(part) == 4
        half.finish()
        third = StepBatch(loader, 70, 4)
        assert third.waited >= 0 and third.whole().ids.tolist() == third.ids.tolist()
    with train_batches(noise, AUGMENTED, **options | {"position": 140, "workers": 0}) as loader:
        assert torch.equal(StepBatch(loader, 70, 4).whole().ids, third.ids)


def test_the_first_micro_batch_does_not_wait_for_the_others(noise, tmp_path):
    """Of 64 micro-batches, workers have made only a few when the first of them is there."""
    options = {"seed": 0, "position": 0, "global_batch": 4096, "rank": 0, "ranks": 1, "workers": 2, "micro_batch": 64}
    with train_batches(noise, Counted(tmp_path), **options) as loader:
        next(loader)
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= (2 * 2 + 2) * 64
        assert loader._slots is None, "its size is not known before"


class Counted:
    def __init__(self, folder):
        self.folder = folder

    def __call__(self, image, target):
        with open(self.folder / str(os.getpid()), "a") as file:
            file.write(".")
        return AUGMENTED(image, target)


def test_a_global_batch_larger_than_the_source(noise, reference):
    assert_equal(join(train(noise, 2, global_batch=60, ranks=4)), reference)


def test_a_global_batch_that_does_not_divide(noise):
    with pytest.raises(ValueError, match="does not divide"):
        train(noise, 1, ranks=5)


def test_no_shared_state_between_transforms(noise, reference):
    """A sample's pixels follow from (seed, epoch, index), whatever was drawn before it."""
    for number in (0, 5, LENGTH + 1):
        one = join(train(noise, 1, position=number, global_batch=1))
        assert torch.equal(one.images[0], reference.images[number])


# The process around it


def draws() -> tuple:
    return torch.rand(3).tolist(), random.random(), np.random.rand()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generators_are_left_alone(noise, workers):
    def seed():
        torch.manual_seed(1), random.seed(1), np.random.seed(1)

    seed()
    wanted = [draws(), draws(), draws()]
    seed()
    options = {"seed": 0, "position": 0, "global_batch": 4, "rank": 0, "ranks": 1, "workers": workers}
    found = [draws()]
    with train_batches(noise, AUGMENTED, **options) as loader:
        next(loader)
        found.append(draws())
        next(loader)
    found.append(draws())
    assert found == wanted


class Drawing:
    """Draws from each of the three generators."""

    def __call__(self, image, target):
        values = [torch.rand(()).item(), random.random(), np.random.rand()]
        return (torch.tensor(values) * 255).to(torch.uint8).view(3, 1, 1).expand(3, 2, 2), target


def test_all_three_generators_are_seeded_for_each_sample(noise):
    options = {"seed": 0, "position": 0, "global_batch": 8, "rank": 0, "ranks": 1}
    found = []
    for workers in (0, 2):
        with train_batches(noise, Drawing(), workers=workers, **options) as loader:
            found.append(join([next(loader) for _ in range(4)]))
    assert_equal(*found)
    assert len(found[0].images[:, :, 0, 0].unique(dim=0)) == 32


class Broken(Source):
    name, classes = "broken", ["a"]

    def __len__(self):
        return 10

    def read(self, index: int) -> Sample:
        if index == 7:
            raise KeyError("the real reason")
        return Sample(torch.zeros(3, 8, 8, dtype=torch.uint8), 0)

    def label(self, index: int) -> int:
        return 0


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_in_workers_keep_their_message(workers):
    with eval_batches(Broken(), PLAIN, batch=4, rank=0, ranks=1, workers=workers) as loader:
        next(loader)
        with pytest.raises(KeyError, match="the real reason"):
            next(loader)


class Returns:
    """A user's transform."""

    def __init__(self, change):
        self.change = change

    def __call__(self, image, target):
        return self.change(image, target)


def halves(image, target):
    return image[:, : 4 + target % 2], target


WRONG = {
    "floats": (
        lambda image, target: (image / 255, target),
        r"Tensor of float32 \(3, 10, 10\) of .*ToDtype\(torch.uint8, scale",
    ),
    "NaN": (lambda image, target: (image * float("nan"), target), "Tensor of float32"),
    "half": (lambda image, target: (image.half(), target), "Tensor of float16"),
    "int64": (lambda image, target: (image.long(), target), r"Tensor of int64 .*ToDtype\(torch.uint8\)"),
    "bool": (lambda image, target: (image > 9, target), "Tensor of bool"),
    "an array": (lambda image, target: (image.numpy(), target), "ndarray of uint8 .*torch.from_numpy"),
    "HWC": (lambda image, target: (image.permute(1, 2, 0), target), r"\(10, 10, 3\) .*looks like \(H, W, C\)"),
    "grey": (lambda image, target: (image[:1], target), r"\(1, 10, 10\) of .* with 3 channels"),
    "grey without channels": (lambda image, target: (image[0], target), r"\(10, 10\) of"),
    "batches": (lambda image, target: (image[None], target), r"\(1, 3, 10, 10\)"),
    "nothing": (lambda image, target: None, "transform Returns: it returned NoneType; return the pixels and the target"),
    "pixels alone": (lambda image, target: image, "it returned Tensor of uint8"),
    "several sizes": (halves, r"images of \(3, [45], 10\) and \(3, [45], 10\) .*one size"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_transform_may_not_return(noise, name):
    change, said = WRONG[name]
    with (
        pytest.raises(UserError, match=said) as caught,
        eval_batches(noise, Returns(change), batch=4, rank=0, ranks=1, workers=0) as loader,
    ):
        next(loader)
    assert "\n" not in str(caught.value) and (name == "several sizes" or "transform Returns: it " in str(caught.value))


class Gives(Source):
    """A user's source: the last of its samples is *last*."""

    name, classes, style = "gives", ["a"], "tiny"

    def __init__(self, last):
        self.last = last

    def __len__(self):
        return 6

    def read(self, index):
        return Sample(self.last if index == 5 else torch.zeros(3, 8, 8, dtype=torch.uint8), 0)

    def label(self, index):
        return 0


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (torch.zeros(3, 8, 8), "gives, sample 5: its image is Tensor of float32"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "Tensor of int64"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), "H, W, C"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), "with 3 channels"),
        (np.zeros((8, 8, 3), dtype=np.uint8), "ndarray of uint8"),
        ("x.jpg", "its image is str"),
    ],
)
@pytest.mark.parametrize("own", [False, True])
def test_what_a_source_may_not_give(last, said, own):
    change = Returns(lambda image, target: (image, target)) if own else PLAIN
    with (
        pytest.raises(UserError, match=said) as caught,
        eval_batches(Gives(last), change, batch=4, rank=0, ranks=1, workers=0) as loader,
    ):
        list(loader)
    assert "\n" not in str(caught.value)


def test_a_mistake_that_a_worker_finds_is_one_line():
    with eval_batches(Gives(torch.zeros(3, 8, 8)), PLAIN, batch=4, rank=0, ranks=1, workers=1) as loader:
        assert len(next(loader)) == 4
        with pytest.raises(UserError, match=r"^gives, sample 5: its image is Tensor of float32.*Normalize$"):
            next(loader)


# What cannot be read


@pytest.fixture
def damaged(tmp_path) -> Source:
    """Twelve photos, of which numbers 2, 3 and 9 cannot be read."""
    write_photos(tmp_path, {"a": 12}, size=(100, 100))
    for name, size in (("002.jpg", 1000), ("003.png", 500), ("009.png", 0)):
        (tmp_path / "a" / name).write_bytes((tmp_path / "a" / name).read_bytes()[:size])
    return open_source(f"imagefolder:{tmp_path}", "train", shared=False)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_bad_sample_gives_its_place_to_the_next_one(damaged, workers, ranks):
    batches, bad = [], []
    loaders = [
        train_batches(damaged, AUGMENTED, seed=1, position=0, global_batch=4, rank=rank, ranks=ranks, workers=workers)
        for rank in range(ranks)
    ]
    for _ in range(9):
        batches.append(join([next(loader) for loader in loaders]))
    for loader in loaders:
        bad += loader.bad
        loader.close()
    stream = Stream(1, damaged.parts)
    wanted = []
    for place in stream.places(0, 36):
        while place.id in (2, 3, 9):
            place = stream.after(place)
        wanted.append(place.id)
    whole = join(batches)
    assert whole.ids.tolist() == wanted and whole.valid.all()
    # Once in each of three epochs, and again where it would have stood in for another.
    assert {sample.id for sample in bad} == {2, 3, 9}
    for sample in bad:
        assert sample.where == damaged.where(sample.id) and sample.reason and "\n" not in sample.reason


def test_a_stand_in_is_cropped_by_itself(damaged):
    """Else a sample would be seen twice with the same pixels in an epoch."""
    with train_batches(damaged, AUGMENTED, seed=1, position=0, global_batch=12, rank=0, ranks=1, workers=0) as loader:
        batch = next(loader)
    assert len(batch.ids.unique()) == 9 and len(batch.images.flatten(1).unique(dim=0)) == 12


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_out_what_it_cannot_read(damaged, workers):
    with eval_batches(damaged, PLAIN, batch=5, rank=0, ranks=1, workers=workers) as loader:
        whole = join(list(loader))
    assert whole.ids[whole.valid].tolist() == [0, 1, 4, 5, 6, 7, 8, 10, 11]
    assert sorted(sample.id for sample in loader.bad) == [2, 3, 9]


def test_a_source_without_a_readable_sample_is_an_error(tmp_path):
    write_photos(tmp_path, {"a": 3})
    for file in (tmp_path / "a").iterdir():
        file.write_bytes(b"")
    source = open_source(f"imagefolder:{tmp_path}", "train", shared=False)
    with train_batches(source, AUGMENTED, seed=0, position=0, global_batch=2, rank=0, ranks=1, workers=0) as loader:
        with pytest.raises(RuntimeError, match=r"100 samples in a row cannot be read, the last one .*a/00\d"):
            next(loader)
    with eval_batches(source, PLAIN, batch=3, rank=0, ranks=1, workers=0) as loader:
        batch = next(loader)
    assert not batch.valid.any() and batch.images.shape == (3, 3, 8, 8)


# Mixtures


def test_a_mixture(photos):
    spec = f"0.75*imagefolder:{photos} + 0.25*imagefolder:{photos}/../{photos.name}"
    source = open_source(spec, "train", shared=False)
    assert len(source) == 110 and [part.share for part in source.parts] == [83, 27]
    assert source.read(60).label == source.read(5).label and source.where(60) == source.where(5).replace(
        str(photos), f"{photos}/../{photos.name}"
    )


class Pids:
    """Gives the worker's process id instead of pixels."""

    def __call__(self, image, target):
        return torch.tensor(list(os.getpid().to_bytes(4, "little")), dtype=torch.uint8).view(1, 2, 2).expand(3, 2, 2), target


def worker_of(batch: Batch) -> int:
    return int.from_bytes(bytes(batch.images[0, 0].flatten().tolist()), "little")


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
def test_workers_outlive_a_signal_to_stop_and_end_with_close(noise):
    options = {"seed": 0, "position": 0, "global_batch": 4, "rank": 0, "ranks": 1, "workers": 2}
    loader = train_batches(noise, Pids(), **options)
    workers = {worker_of(next(loader)) for _ in range(4)}
    assert len(workers) == 2 and os.getpid() not in workers
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGUSR1)
    assert {worker_of(next(loader)) for _ in range(20)} == workers
    loader.close()
    assert not any(alive(pid) for pid in workers)
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()


class Killed:
    """Ends its worker, the first *times* that it is called in any of them."""

    def __init__(self, folder, times):
        self.folder, self.times = folder, times

    def __call__(self, image, target):
        if torch.utils.data.get_worker_info() and len(os.listdir(self.folder)) < self.times and torch.rand(()) < 0.3:
            (self.folder / f"{os.getpid()}-{time.monotonic_ns()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return AUGMENTED(image, target)


def test_workers_that_die_are_started_again_and_no_sample_is_lost_or_doubled(noise, reference, tmp_path):
    options = {"seed": 3, "position": 0, "global_batch": GLOBAL, "rank": 0, "ranks": 1, "workers": 2}
    with train_batches(noise, Killed(tmp_path, 2), **options) as loader:
        found = join([next(loader) for _ in range(10)])
        assert loader.restarts >= 1
    assert torch.equal(found.ids, reference.ids)


@pytest.mark.long
def test_a_worker_that_is_killed_again_and_again_is_named_as_the_cause(noise, tmp_path, monkeypatch):
    monkeypatch.setattr(Batches, "RESTARTS", 1)  # DataLoader takes five seconds to see each
    options = {"seed": 0, "position": 0, "global_batch": 12, "rank": 0, "ranks": 1, "workers": 1}
    with train_batches(noise, Killed(tmp_path, 100), **options) as loader:
        with pytest.raises(RuntimeError, match="a data worker was killed"):
            for _ in range(20):
                next(loader)


KILLED = """
from multiprocessing import active_children
import os, signal
from bigvision.data import open_source, train_batches, transform

if __name__ == "__main__":
    change = transform("photo", 8, train=True)
    source = open_source("synthetic:9x10", "train")
    loader = train_batches(source, change, seed=0, position=0, global_batch=4, rank=0, ranks=1, workers=2)
    next(loader)
    print(*[worker.pid for worker in active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
def test_workers_end_when_their_process_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(KILLED)
    # Not through a pipe: the workers would hold its other end.
    with open(tmp_path / "out", "w") as out:
        subprocess.run([sys.executable, tmp_path / "script.py"], stdout=out, timeout=60)
    workers = [int(pid) for pid in (tmp_path / "out").read_text().split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


class Stuck:
    def __call__(self, image, target):
        time.sleep(1000)


def test_close_ends_a_worker_that_is_stuck(noise, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # how long DataLoader waits for it
    before = multiprocessing.active_children()
    loader = train_batches(noise, Stuck(), seed=0, position=0, global_batch=4, rank=0, ranks=1, workers=1)
    (worker,) = set(multiprocessing.active_children()) - set(before)
    time.sleep(0.5)
    loader.close()
    worker.join(timeout=1)
    assert not worker.is_alive()


def test_the_signals_of_this_process_are_not_held(noise):
    with train_batches(noise, PLAIN, seed=0, position=0, global_batch=4, rank=0, ranks=1, workers=1) as loader:
        next(loader)
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_sources_and_transforms_pickle(photos):
    for spec in (f"imagefolder:{photos}", "digits", "synthetic:3x8"):
        source = open_source(spec, "train")
        change = transform(source.style, 16, train=True)
        copy, same = pickle.loads(pickle.dumps((source, change)))  # noqa: S301
        assert len(copy) == len(source) and same(copy.read(0).image, 0)[0].shape == (3, 16, 16)


# Evaluation


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 23])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_evaluation_sees_each_sample_once(length, ranks):
    source = open_source(f"synthetic:{length}x8", "val")
    parts = [list(eval_batches(source, PLAIN, batch=3, rank=rank, ranks=ranks, workers=0)) for rank in range(ranks)]
    assert {len(part) for part in parts} == {-(-length // (3 * ranks))}
    assert all(len(batch) == 3 for part in parts for batch in part)
    whole = join([batch for step in zip(*parts) for batch in step])
    assert whole.ids[whole.valid].tolist() == list(range(length))
    for index, image, label in zip(range(length), whole.images[whole.valid], whole.labels[whole.valid].tolist()):
        assert label == index % 10
        assert torch.equal(image, PLAIN(source.read(index).image, label)[0])
    assert not whole.images[~whole.valid].any()


@pytest.mark.parametrize("workers", [1, 2])
def test_evaluation_does_not_depend_on_workers(noise, workers):
    for rank in range(2):
        plain, other = (
            join(list(eval_batches(noise, PLAIN, batch=4, rank=rank, ranks=2, workers=count))) for count in (0, workers)
        )
        assert_equal(plain, other)


def test_evaluation_of_photos_is_the_same_on_other_ranks(photos):
    source = open_source(f"imagefolder:{photos}", "val")
    found = []
    for ranks, batch in ((1, 6), (2, 2), (4, 5)):
        parts = [list(eval_batches(source, PLAIN, batch=batch, rank=rank, ranks=ranks, workers=0)) for rank in range(ranks)]
        whole = join([batch for step in zip(*parts) for batch in step])
        found.append((whole.ids[whole.valid], whole.images[whole.valid]))
    assert all(torch.equal(found[0][part], other[part]) for other in found[1:] for part in (0, 1))


def test_the_stream_is_what_the_page_says(noise, reference):
    wanted = [place.id for place in Stream(3, noise.parts).places(0, 10 * GLOBAL)]
    assert reference.ids.tolist() == wanted
