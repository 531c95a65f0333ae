"""`data.decode: cuda`: nvJPEG's pixels beside libjpeg-turbo's, and the same samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bigvision.data import train_batches, transform
from tests.cuda.jobs import job
from tests.cuda.runs import device
from tests.data.test_on_device import KINDS, Photos, encoded


def photos() -> Photos:
    return Photos([encoded(kind, number) for number, kind in enumerate(KINDS * 2)])


def pixels(folder: Path) -> dict[str, Any]:
    """The samples of both ways of decoding, and by how much their pixels differ."""
    found = []
    for on in (False, True):
        made, to = transform("photo", 48, train=True), device() if on else "cpu"
        with train_batches(
            photos(), made, seed=3, position=0, global_batch=10, rank=0, ranks=1, workers=2, device=to, on_device=on
        ) as batches:
            some = [next(batches) for _ in range(4)]
            found.append(
                ([one.ids.tolist() for one in some], sorted(batches.bad), torch.cat([one.images.cpu() for one in some]))
            )
    (ids, bad, usual), (also, unread, decoded) = found
    far = (usual.int() - decoded.int()).abs()
    return {"same": ids == also and bad == unread, "max": int(far.max()), "mean": far.float().mean().item()}


@job(pixels)
def test_samples_are_the_same_and_pixels_near(results: Callable[..., Any], figure: Callable[[str], None]) -> None:
    found = results(pixels)
    assert found["same"]
    figure(f"pixels decoded on the device differ by {found['mean']:.2f} on average and {found['max']} at most")
    assert found["mean"] < 3.0
