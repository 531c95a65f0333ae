"""Which pixels a photo becomes: torchvision's, drawn from the same generator, and bit for bit."""

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from bigvision.data import Sample, Source, eval_batches, train_batches, transform
from bigvision.data.order import Stream, seed_everything
from bigvision.data.reading import BadSample
from bigvision.samples import seed_from

SIZES = [(120, 90), (90, 120), (61, 200), (64, 64), (40, 47)]


def photo(width: int, height: int) -> bytes:
    """Waves and an edge: every pixel tells where it is."""
    down, across = np.mgrid[:height, :width]
    channels = [128 + 100 * np.sin(across / k + down / (k + 3)) + 25 * (across > down) for k in (5, 9, 14)]
    file = io.BytesIO()
    Image.fromarray(np.stack(channels, axis=2).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    return [photo(*size) for size in SIZES]


def decoded(file: bytes) -> torch.Tensor:
    return torch.from_numpy(simplejpeg.decode_jpeg(file)).permute(2, 0, 1)


def torchvision(
    size: int, mode: str, scale: tuple[float, float] = (0.08, 1.0), flips: Sequence[v2.Transform] = (v2.RandomHorizontalFlip(),)
) -> v2.Compose:  # fmt: skip
    crop = v2.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode(mode), antialias=True)
    return v2.Compose([crop, *flips])


FLIPS: list[tuple[dict[str, Any], list[v2.Transform]]] = [
    ({}, [v2.RandomHorizontalFlip()]),
    ({"hflip": 0.0}, []),
    ({"hflip": 0.3, "vflip": 0.6}, [v2.RandomHorizontalFlip(0.3), v2.RandomVerticalFlip(0.6)]),
    ({"hflip": 0.0, "vflip": 0.5}, [v2.RandomVerticalFlip(0.5)]),
]
SCALES = ((0.08, 1.0), (1.0, 1.0))
CROPS = [(mode, scale, FLIPS[0]) for mode in ("bilinear", "bicubic", "nearest", "lanczos") for scale in SCALES]
CROPS += [("bilinear", (0.5, 1.0), flips) for flips in FLIPS[1:]]


@pytest.mark.parametrize(("mode", "scale", "flips"), CROPS)
def test_the_random_crop_and_flips_are_torchvisions(
    files: list[bytes], mode: str, scale: tuple[float, float], flips: tuple[dict[str, Any], list[v2.Transform]]
) -> None:
    ours = transform("photo", 48, train=True, interpolation=mode, scale=scale, **flips[0])
    theirs = torchvision(48, mode, scale, flips[1])
    seen = set()
    for seed in range(8):
        for file in files:
            for given in (file, decoded(file), decoded(file).contiguous()):
                seed_everything(seed)
                found, state = ours(given, 0)[0], torch.get_rng_state()
                seed_everything(seed)
                assert torch.equal(found, theirs(decoded(file)))
                assert torch.equal(state, torch.get_rng_state()), "as much was drawn, for the steps that follow"
            seen.add(found.numpy().tobytes())
    assert len(seen) > (30 if scale[0] < 1 else 5)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_the_centre_crop_is_torchvisions(files: list[bytes], mode: str) -> None:
    ours = transform("photo", 40, train=False, interpolation=mode, crop_pct=0.8)
    theirs = v2.Compose([v2.Resize(50, interpolation=InterpolationMode(mode), antialias=True), v2.CenterCrop(40)])
    for file in files:
        assert torch.equal(ours(file, 0)[0], theirs(decoded(file)))


class Photos(Source):
    name, classes = "photos", ["only"]

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Sample:
        return Sample(self.files[index], 0)

    def label(self, index: int) -> int:
        return 0


def expected(files: list[bytes], theirs: v2.Compose, seed: int) -> Iterator[torch.Tensor]:
    for place in Stream(seed, Photos(files).parts).places(0, 24):
        seed_everything(seed_from("augment", seed, place.epoch, place.id, place.repeat))
        yield theirs(decoded(files[place.id]))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_those_pixels_and_keep_them(files: list[bytes], workers: int) -> None:
    change = transform("photo", 48, train=True, interpolation="bilinear")
    wanted = torch.stack(list(expected(files, torchvision(48, "bilinear"), 5)))
    with train_batches(
        Photos(files), change, seed=5, position=0, global_batch=2, rank=0, ranks=1, workers=workers
    ) as batches:  # fmt: skip
        # All are kept: no batch may be written over while anyone has it, or a part of it.
        found = [next(batches) for _ in range(12)]
    assert torch.equal(torch.cat([batch.images for batch in found]), wanted)


def test_a_bad_sample_is_black_beside_the_others(files: list[bytes]) -> None:
    change = transform("photo", 40, train=False)
    with eval_batches(Photos([files[0], b"no image", files[1]]), change, batch=4, rank=0, ranks=1, workers=0) as batches:
        batch = next(batches)
        assert batches.bad == [BadSample(1, "photos, sample 1", batches.bad[0].reason)]
    assert torch.equal(batch.images[0], change(files[0], 0)[0]) and torch.equal(batch.images[2], change(files[1], 0)[0])
    assert not batch.images[1].any() and batch.valid.tolist() == [True, False, True, False]
