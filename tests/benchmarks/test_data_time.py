"""The measurement of the loader: its photos, its arithmetic, and that it comes to figures of every side."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.data_sides import _rectangle
from benchmarks.data_time import BYTES, CEILING, OWN, PEERS, REDUCED, Report, find, measure, options, race
from benchmarks.photos import write_photos


def test_photos_are_like_those_of_imagenet(tmp_path: Path) -> None:
    for name in ("one", "same"):
        write_photos(tmp_path / name, 5)
    files = sorted((tmp_path / "one").glob("*/*.jpg"))
    assert [file.parent.name for file in files] == ["class0", "class0", "class1", "class2", "class3"]
    for file in files:
        data = file.read_bytes()
        assert 60_000 < len(data) < 120_000
        assert data == (tmp_path / "same" / file.relative_to(tmp_path / "one")).read_bytes()
        pixels = np.asarray(Image.open(file), dtype=float)
        assert pixels.shape == (375, 500, 3) and pixels.std() > 20
        # Of noise the differences between neighbours are larger than those from the mean.
        assert np.diff(pixels, axis=1).std() < 0.5 * pixels.std()
    assert len({file.read_bytes() for file in files}) == 5


def test_the_bare_crop_is_drawn_as_torchvision_draws_it() -> None:
    from torchvision.transforms.v2 import RandomResizedCrop

    draw, image = random.Random(0), torch.empty(3, 375, 500, device="meta")
    torch.manual_seed(0)
    ours = [_rectangle(375, 500, draw) for _ in range(3000)]
    crop = RandomResizedCrop(224)
    theirs = [tuple(crop.make_params([image])[side] for side in ("top", "left", "height", "width")) for _ in range(3000)]
    assert np.allclose(np.mean(ours, axis=0), np.mean(theirs, axis=0), rtol=0.06)
    assert all(top + height <= 375 and left + width <= 500 for top, left, height, width in ours)


def made_up() -> Report:
    drift = [1.0, 3.0, 2.0]
    seconds = {OWN: 1.0, f"{OWN} (again)": 1.0, REDUCED: 0.5, BYTES: 0.95, CEILING: 0.76}
    seconds |= dict(zip(PEERS, (1.6, 1.4, 2.0, 1.5)))
    times = {name: [second * factor for factor in drift] for name, second in seconds.items()}
    return Report("Made up", times, 512, [0.06, 0.002, 0.004], {64: [2.0, 1.0], 4096: [1.5, 3.0]}, 96.3, {"cores": 2})


def test_targets_are_ratios_of_times_in_the_same_rounds(tmp_path: Path) -> None:
    report = made_up()
    found = {target.what: (round(target.figure, 6), target.met) for target in report.targets()}
    assert found == {
        "images/s: bigvision over torchvision": (1.6, True),
        "images/s: bigvision over torchvision, v2 on tensors": (1.4, False),
        "images/s: bigvision over timm": (2.0, True),
        "images/s: bigvision over timm, prefetcher": (1.5, True),
        "images/s: bigvision over no loader": (0.76, False),
        "images/s: bigvision, uint8 batches over no loader": (0.8, False),
        "finding 256 samples in the middle of an epoch of 1,000,000,000": (4.0, True),
        "time to the first micro-batch: batch 4,096 over 64": (1.5, True),
        "shared memory of batch 4,096": (96.3, True),
    }
    report.write(tmp_path / "found")
    text = (tmp_path / "found.md").read_text()
    assert "| bigvision | 256 (171 to 512) | 1 | |" in text and "| bigvision, reduce | 512 (341 to 1024) | 0.500 |" in text
    assert json.loads((tmp_path / "found.json").read_text())["lines"][0]["name"] == OWN


def test_sides_take_turns_after_what_was_made_in_advance() -> None:
    calls: list[tuple[str, int]] = []
    times = race({name: lambda count, name=name: calls.append((name, count)) for name in "ab"}, 2, 8, 6)
    assert calls == [(name, count) for name in "ababba" for count in (6, 8)], "a first round is not timed"
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.long)])
def test_every_side_comes_to_figures(tmp_path: Path, workers: int) -> None:
    threads = torch.get_num_threads()
    asked = ["--workers", str(workers), "--photos", "8", "--batch", "4", "--image-size", "32", "--batches", "1"]
    report = measure(options().parse_args([*asked, "--rounds", "1"]))
    assert torch.get_num_threads() == threads
    assert set(report.times) == {OWN, f"{OWN} (again)", REDUCED, BYTES, *PEERS, CEILING}
    assert all(len(times) == 1 and times[0] > 0 for times in report.times.values())
    assert len(report.targets()) == 9 and report.images == 4
    report.write(tmp_path / "found")
    assert "timm, prefetcher" in (tmp_path / "found.md").read_text()


def test_the_position_is_found() -> None:
    assert 0 < find(1) < 5
