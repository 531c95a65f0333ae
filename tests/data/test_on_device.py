"""``data.decode: cuda``, with a CPU for its device: the same samples, crops and stand-ins, and nearly the same pixels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from bigvision.config import load_config
from bigvision.data import Batch, Sample, Source, eval_batches, on_device, train_batches, transform
from bigvision.errors import UserError
from tests.data.test_photo_pixels import photo
from tests.recipes import recipe, run

KINDS = ("jpeg", "png", "progressive", "grey", "turned", "cmyk", "large", "cut", "broken", "jpeg")
"""Of the samples, again and again; "cut" and "broken" cannot be read."""


def encoded(kind: str, number: int) -> bytes:
    file = photo(90 + number % 7, 70 + number % 5)
    if kind in ("cut", "broken"):
        return file[: len(file) // 2] if kind == "cut" else b"\xff\xd8\xff no image"
    image, out = Image.open(io.BytesIO(file if kind != "large" else photo(400, 300))), io.BytesIO()
    options: dict[str, Any] = {"quality": 95}
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif
    image = image.convert({"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB"))
    image.save(out, "PNG" if kind == "png" else "JPEG", progressive=kind == "progressive", **options)
    return out.getvalue()


class Photos(Source):
    name, classes = "photos", ["a", "b"]

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Sample:
        return Sample(self.files[index], index % 2)

    def label(self, index: int) -> int:
        return index % 2


@pytest.fixture(scope="module")
def source() -> Photos:
    return Photos([encoded(kind, number) for number, kind in enumerate(KINDS * 2)])


def trained(source: Source, on_device: bool, *, workers: int = 0, position: int = 0, count: int = 4, **change: Any) -> Any:
    made = transform("photo", 48, train=True, **change)
    with train_batches(
        source, made, seed=3, position=position, global_batch=10, rank=0, ranks=1, workers=workers, on_device=on_device
    ) as batches:
        found = [next(batches) for _ in range(count)]
        return found, batches.bad


def same(found: list[Batch], usual: list[Batch]) -> None:
    for one, other in zip(found, usual, strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.valid, other.valid)
        assert torch.equal(one.labels, other.labels)  # type: ignore[arg-type]


def differences(found: list[Batch], usual: list[Batch]) -> Tensor:
    return torch.cat([(one.images.int() - other.images.int()).abs() for one, other in zip(found, usual)])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many files each call of the device's decoder was given."""
    counts: list[int] = []
    usual = on_device._decoded

    def count(files: Any, device: torch.device) -> list[Tensor]:
        counts.append(len(files))
        return usual(files, device)

    monkeypatch.setattr(on_device, "_decoded", count)
    return counts


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_the_samples_and_crops_are_the_same_and_pixels_differ_by_rounding(
    source: Photos, counted: list[int], workers: int, mode: str
) -> None:
    usual, bad = trained(source, False, interpolation=mode)
    found, also = trained(source, True, workers=workers, interpolation=mode)
    assert sum(counted), "files were left to the device"
    same(found, usual)
    assert bad == also and {one.id % len(KINDS) for one in bad} == {KINDS.index("cut"), KINDS.index("broken")}
    pixels = differences(found, usual)
    assert pixels.max() <= 2 and pixels.float().mean() < 0.3, (pixels.max(), pixels.float().mean())
    assert pixels.max() > 0, "it is resized in another way"
    left = torch.tensor([KINDS[id % len(KINDS)] in ("jpeg", "large") for batch in usual for id in batch.ids.tolist()])
    assert not pixels[~left].any(), "what is left to the CPU is as ever"


def test_an_evaluation_and_a_start_in_the_middle(source: Photos) -> None:
    for on in (False, True):
        first, _ = trained(source, on)
        later, _ = trained(source, on, position=20, count=2)
        for one, other in zip(first[2:], later, strict=True):
            assert torch.equal(one.ids, other.ids) and torch.equal(one.images, other.images)
    made = transform("photo", 48, train=False)
    found = []
    for on in (False, True):
        with eval_batches(source, made, batch=12, rank=0, ranks=1, workers=0, on_device=on) as batches:
            found.append((list(batches), batches.bad))
    (usual, bad), (evaluated, also) = found
    same(evaluated, usual)
    assert bad == also and differences(evaluated, usual).max() <= 2
    assert sum(int(batch.valid.sum()) for batch in evaluated) == 16


def test_later_steps_draw_the_same_on_the_device(source: Photos, counted: list[int]) -> None:
    changes: list[dict[str, Any]] = [{"erase": 1.0}, {"policy": "three-augment"}, {"jitter": 0.3}]
    for change in changes:
        usual, _ = trained(source, False, **change)
        found, _ = trained(source, True, **change)
        same(found, usual)
        # Solarising turns a difference at its threshold into a large one.
        assert differences(found, usual).float().quantile(0.98) <= 4, change
    assert sum(counted)


def test_what_the_device_cannot_decode_is_made_as_a_worker_would(source: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among it files that only decoding shows to be cut off, which give their place to others."""
    usual, bad = trained(source, False)
    monkeypatch.setattr("bigvision.data.decode.Jpeg.for_devices", True)
    refused, real = [], on_device._decoded

    def decode(files: Any, device: torch.device) -> list[Tensor]:
        for file in files:
            if len(file) % 2:
                refused.append(len(file))
                raise RuntimeError("a decoder's error")
        return real(files, device)

    monkeypatch.setattr(on_device, "_decoded", decode)
    found, also = trained(source, True)
    assert refused
    same(found, usual)
    assert sorted(bad) == sorted(also), "the same samples could not be read"
    assert differences(found, usual).max() <= 2


def test_no_gpu_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.decode: cuda needs a GPU, but this run is on the CPU: use cpu$"):
        run(recipe(tmp_path, data={"decode": "cuda"}))
    with pytest.raises(UserError, match=r"data\.reduce: true is for data\.decode: cpu"):
        load_config(recipe(tmp_path, data={"decode": "cuda", "reduce": True}))


def test_a_run_resumes_with_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigvision.training.data.check_decoder", lambda device: None)
    for number in range(40):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded("cut" if number == 7 else "jpeg", number))
    name = f"imagefolder:{tmp_path / 'photos'}"

    def losses(out: str, steps: int) -> list[float]:
        data = {"train": name, "val": name, "decode": "cuda", "bad_budget": 5}
        optim = {"schedule": "constant", "warmup": 0}
        return run(recipe(tmp_path / out, data=data, train={"steps": steps, "global_batch": 16}, optim=optim))

    whole = losses("whole", 4)
    losses("parts", 1)
    assert losses("parts", 4) == whole and len(whole) == 4
