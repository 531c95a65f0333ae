"""The memory of batches that workers make: used again, and never while anyone still looks at it."""

import gc
import pickle

import torch

from bigvision.data import eval_batches, open_source, train_batches, transform
from bigvision.data.rooms import Rooms

AUGMENTED = transform("photo", 12, train=True)
OPTIONS = {"seed": 3, "position": 0, "global_batch": 6, "rank": 0, "ranks": 1}


def test_places_come_back_when_nothing_shows_them():
    rooms = Rooms(2, 3, (3, 4, 4))
    first, second = rooms.take(), rooms.take()
    assert {first, second} == {0, 1} and rooms.take() is None
    assert first is not None
    there = pickle.loads(pickle.dumps(rooms))  # noqa: S301
    assert there.key == rooms.key and there.images(first).shape == (3, 3, 4, 4)
    images = rooms.received(first)
    part = images[1:, :, 2].flip(-1)[0], images[0, 0]
    del images
    gc.collect()
    assert rooms.take() is None, "a view is left"
    del part
    gc.collect()
    assert rooms.take() == first


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
        assert len(places) <= 2 * 2 + 2 + len(kept)


def test_more_are_kept_than_there_are_places():
    source = open_source("synthetic:40x20", "val")
    plain = transform("photo", 12, train=False)
    found = []
    for workers in (0, 1):
        with eval_batches(source, plain, batch=3, rank=0, ranks=1, workers=workers) as loader:
            found.append(list(loader))
    assert len(found[0]) == len(found[1]) == 14
    assert all(torch.equal(one.images, other.images) for one, other in zip(*found))
    assert all(torch.equal(one.valid, other.valid) for one, other in zip(*found))
