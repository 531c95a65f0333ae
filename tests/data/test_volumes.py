"""3-D volumes."""

import gzip
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from bigvision.data import UnreadableSample, open_source, transform
from bigvision.data.sources import volumes
from bigvision.data.sources.volumes import Cut, main, parse_cut
from bigvision.errors import UserError

SHAPE = (7, 9, 12)
KINDS = (".npy", ".nii", ".nii.gz")


@pytest.fixture(autouse=True)
def forgotten():
    volumes._open.cache_clear(), volumes._percentiles.cache_clear()


def counted(number: int, dtype: type = np.int16) -> np.ndarray:
    """A volume in which each voxel says where it is."""
    return (np.arange(np.prod(SHAPE)).reshape(SHAPE) + 7 * number).astype(dtype)


def write(file: Path, values: np.ndarray, slope: float = 1.0, inter: float = 0.0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.name.endswith(".npy"):
        np.save(file, values * slope + inter if (slope, inter) != (1, 0) else values)
    else:
        image = nibabel.Nifti1Image(values, np.eye(4))
        image.header.set_slope_inter(slope, inter)
        nibabel.save(image, file)
    return file


def folder(root: Path, kind: str = ".npy", count: int = 20) -> Path:
    for name in ("ct", "mr"):
        for number in range(count):
            write(root / name / f"{number:02}{kind}", counted(number))
    return root


def opened(root: Path, query: str = "", split: str = "train", shared: bool = False, **options):
    return open_source(f"volumes:{root}{query and '?'}{query}", split, shared=shared, **options)


def refusal(root: Path, query: str = "", **options) -> str:
    with pytest.raises(UserError) as caught:
        opened(root, query, key="some.key", **options)
    message = str(caught.value)
    assert message.startswith("some.key: ") and "\n" not in message
    return message


def bytes_of(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip(np.rint((values.astype(np.float64) - low) * 255 / (high - low)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("slices", "stride"), [(1, 1), (3, 2), (4, 1), (5, 5), (30, 4)])
def test_samples_are_slices_with_their_neighbours(tmp_path, kind, axis, slices, stride):
    for number in (1, 2):
        write(tmp_path / "a" / f"{number}{kind}", counted(number))
    source = opened(tmp_path, f"slices={slices}&axis={axis}&stride={stride}&window=100,600")
    depth = SHAPE[axis]
    centres = list(range(0, depth, stride))
    assert len(source) == 2 * len(centres) and source.channels == slices and source.classes == ["a"]
    for index in range(len(source)):
        number, centre = 1 + index // len(centres), centres[index % len(centres)]
        values = np.moveaxis(counted(number), axis, 0)
        wanted = [values[min(max(centre - slices // 2 + place, 0), depth - 1)] for place in range(slices)]
        image, label = source.read(index)
        assert label == 0 and image.dtype == torch.uint8 and image.shape == (slices, *values.shape[1:])
        assert (image.numpy() == bytes_of(np.stack(wanted), 100, 600)).all()
        assert source.where(index) == f"{tmp_path}/a/{number}{kind}, slice {centre}"


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_formats_agree(tmp_path, dtype):
    values = np.random.default_rng(0).integers(0, 200, SHAPE).astype(dtype)
    read = []
    for kind in KINDS:
        write(tmp_path / kind / "a" / f"x{kind}", values, slope=0.5, inter=-10.0)
        for query in ("slices=2", "slices=2&window=-5,50"):
            source = opened(tmp_path / kind, query)
            read.append(torch.stack([source.read(index).image for index in range(len(source))]))
    for number in (2, 3, 4, 5):
        assert torch.equal(read[number], read[number % 2])
    low, high = np.percentile(values * 0.5 - 10, (1, 99))
    assert (read[0][:, 1].numpy() == bytes_of(np.moveaxis(values, 2, 0) * 0.5 - 10, low, high)).mean() > 0.999
    assert read[0].min() == 0 and read[0].max() == 255


def test_what_is_no_number_and_constant_volumes(tmp_path):
    values = counted(0, np.float32)
    values[:, :, 0] = np.nan
    values[0, 0, 1], values[1, 0, 1] = np.inf, -np.inf
    write(tmp_path / "a/0.npy", values)
    write(tmp_path / "a/1.npy", np.full(SHAPE, 3.0))
    write(tmp_path / "a/2.npy", np.full(SHAPE, np.nan))
    source = opened(tmp_path, "slices=1&stride=1")
    image = source.read(1).image[0]
    assert source.read(0).image.max() == 0 and image[0, 0] == 255 and image[1, 0] == 0
    low, high = np.percentile(values[np.isfinite(values)], (1, 99))
    assert (source.read(5).image[0].numpy() == bytes_of(values[:, :, 5], low, high)).mean() > 0.99
    for index in (12, 24, 35):
        assert source.read(index).image.max() == 0


def test_percentiles_of_large_volumes_are_of_whole_slices(tmp_path, monkeypatch):
    write(tmp_path / "a/0.npy", values := np.random.default_rng(0).normal(0, 9, SHAPE))
    monkeypatch.setattr(volumes, "COUNTED", np.prod(SHAPE) // 3)
    source = opened(tmp_path, "slices=1")
    low, high = np.percentile(values[:, :, ::3], (1, 99))
    assert (source.read(4).image[0].numpy() == bytes_of(values[:, :, 4], low, high)).mean() > 0.99


def test_whole_volumes_are_held_out(tmp_path):
    folder(tmp_path)
    train, val = (opened(tmp_path, "slices=3", split, shared=True) for split in ("train", "val"))
    found = [{source.where(index).partition(",")[0] for index in range(len(source))} for source in (train, val)]
    assert [len(files) for files in found] == [36, 4] and not found[0] & found[1]
    assert (len(train), len(val)) == (36 * 12, 4 * 12) and {val.label(index) for index in range(len(val))} == {0, 1}
    assert opened(tmp_path, "stride=4", "val", shared=True).where(5).partition(",")[0] in found[1]


def test_split_folders_and_classes(tmp_path):
    folder(tmp_path / "train", count=2)
    write(tmp_path / "val/mr/0.npy", counted(0))
    train = opened(tmp_path)
    val = opened(tmp_path, split="val", classes=train.classes)
    assert (len(train), len(val), val.label(0), train.channels) == (48, 12, 1, 3)
    assert "class 'mr'" in refusal(tmp_path / "val", classes=["ct"])


def test_only_headers_are_read_at_opening(tmp_path, monkeypatch):
    for kind in KINDS:
        write(tmp_path / "a" / f"x{kind}", counted(0))

    def read(*arguments):
        raise AssertionError("read")

    monkeypatch.setattr(volumes, "_open", read)
    monkeypatch.setattr(nibabel.arrayproxy.ArrayProxy, "_get_unscaled", read)
    assert len(opened(tmp_path)) == 36


def test_large_slices_are_augmented_as_photos_and_small_ones_are_not(tmp_path):
    write(tmp_path / "small/a/0.npy", np.zeros((64, 63, 4)))
    write(tmp_path / "large/a/0.npy", np.zeros((4, 64, 80)))
    assert opened(tmp_path / "small").style == "tiny"
    assert opened(tmp_path / "large", "axis=0").style == "photo"
    assert opened(tmp_path / "large", "axis=2").style == "tiny"


def test_few_compressed_volumes_are_kept(tmp_path, monkeypatch):
    folder(tmp_path, ".nii.gz", count=4)
    source, reads = opened(tmp_path), []
    plain = gzip.open
    monkeypatch.setattr(volumes.gzip, "open", lambda path: reads.append(path) or plain(path))
    for index in (*range(4 * 12), 0):
        source.read(index)
    assert len(reads) == 4
    for index in (4 * 12, 5 * 12, 12):
        source.read(index)
    assert len(reads) == 7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["cut", "header", "empty", "text", "gone"])
def test_damaged_volumes(tmp_path, kind, damage):
    for number in range(3):
        write(tmp_path / "a" / f"{number}{kind}", np.random.default_rng(number).integers(0, 999, SHAPE).astype(np.int16))
    file = tmp_path / "a" / f"1{kind}"
    if damage == "gone":
        source = opened(tmp_path)
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes({"cut": content[:-300], "header": content[:50], "empty": b"", "text": b"<html>404</html>"}[damage])
        source = opened(tmp_path)
    bad = [index for index in range(len(source)) if source.where(index).startswith(str(file))]
    assert bad and len(source) - len(bad) == 24 and bad[0] == 12
    raised = 0
    for index in range(len(source)):
        try:
            source.read(index)
        except UnreadableSample as error:
            assert index in bad and "\n" not in str(error) and str(error)
            raised += 1
    # Of a .nii that is cut, the slices before that are whole; without a window its percentiles are not.
    assert raised == len(bad) and source.label(bad[0]) == 0


def test_a_header_that_promises_too_much(tmp_path):
    file = write(tmp_path / "a/0.nii.gz", counted(0))
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[42:48] = np.array([32000, 32000, 32000], "<i2").tobytes()
    file.write_bytes(gzip.compress(content))
    with pytest.raises(UnreadableSample):
        opened(tmp_path, "slices=1").read(5)


def test_the_options_of_volumes_are_read():
    assert parse_cut("", "k") == Cut() == Cut(3, 2, 1, None)
    assert parse_cut("slices=5&axis=0&stride=2&window=-160,240.5", "k") == Cut(5, 0, 2, (-160.0, 240.5))


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("slice=3", "unknown 'slice' in ?slice=3; did you mean 'slices'?"),
        ("zzz=3", "known are slices, axis, stride, window"),
        ("slices", "slices in ?slices must be an integer from 1 on"),
        ("slices=0", "an integer from 1 on"),
        ("slices=1.5", "an integer from 1 on"),
        ("axis=3", "0, 1 or 2"),
        ("axis=-1", "0, 1 or 2"),
        ("stride=0", "an integer from 1 on"),
        ("window=3", "LOW,HIGH"),
        ("window=3,3", "LOW,HIGH"),
        ("window=nan,3", "LOW,HIGH"),
        ("window=0,1e999", "LOW,HIGH"),
        ("window=a,b", "LOW,HIGH"),
        ("slices=3&slices=5", "slices is twice"),
    ],
)
def test_wrong_queries(tmp_path, query, said):
    write(tmp_path / "a/0.npy", counted(0))
    assert said in refusal(tmp_path, query)


def test_what_is_no_volume(tmp_path, monkeypatch):
    assert "give an existing one as volumes:PATH" in refusal(tmp_path / "none")
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/x.png").write_text("")
    assert "holds no volume (.npy, .nii, .nii.gz)" in refusal(tmp_path / "images")
    for number, values in enumerate((np.zeros((4, 5)), np.zeros((2, 3, 4, 5)), np.zeros(SHAPE, complex), np.zeros((4, 0, 5)))):
        file = write(tmp_path / str(number) / "a/x.npy", values)
        assert (message := refusal(tmp_path / str(number))) and str(file) in message and "three dimensions" in message
    write(tmp_path / "time/a/x.nii", np.zeros((2, 3, 4, 5), np.int16))
    assert "shape (2, 3, 4, 5)" in refusal(tmp_path / "time")
    write(tmp_path / "one/a/x.nii", counted(0)[..., None])
    assert opened(tmp_path / "one", "window=0,755").read(3).image.shape == (3, 7, 9)
    monkeypatch.setitem(sys.modules, "nibabel", None)
    assert "pip install 'bigvision[volumes]'" in refusal(tmp_path / "one")


def test_objects_are_not_loaded(tmp_path):
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a/x.npy", np.full(SHAPE, None), allow_pickle=True)
    with pytest.raises(UnreadableSample):
        opened(tmp_path).read(0)


# What becomes of them


@pytest.mark.parametrize("style", ["photo", "tiny", "digit"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_augmentation_of_any_number_of_channels(style, channels):
    image = torch.arange(channels, dtype=torch.uint8).view(-1, 1, 1).expand(-1, 40, 50) * 20 + 10
    for train in (True, False):
        found = transform(style, 24, train=train, channels=channels)(image, 0)[0]
        assert found.shape == (channels, 24, 24) and found.dtype == torch.uint8
        assert (found[:, 12, 12] == image[:, 12, 12]).all()
    torch.manual_seed(0)
    change = transform(style, 24, train=True, erase=1.0, channels=channels)
    erased, _ = change(torch.zeros(channels, 40, 50, dtype=torch.uint8), 0)
    assert (erased == 115).any() and (erased == 0).any()


def test_colours_need_rgb():
    with pytest.raises(UserError, match=r"^data.policy: randaugment is for RGB images, but these have 5 channels"):
        transform("photo", 24, train=True, policy="randaugment", channels=5)
    with pytest.raises(UserError, match=r"^data.jitter: 0.3 is for RGB"):
        transform("photo", 24, train=True, jitter=0.3, channels=1)
    transform("photo", 24, train=False, jitter=0.3, channels=1)


def test_examples(tmp_path, capsys):
    main([str(tmp_path / "out")])
    assert f"volumes:{tmp_path}/out?slices=5" in capsys.readouterr().out
    source = opened(tmp_path / "out", "slices=5")
    assert source.classes == ["cube", "sphere"] and len(source) == 48 * 32 and source.style == "tiny"
    middle = source.read(16).image.float()
    assert middle[2, 12:20, 12:20].mean() > 2 * middle[2, :4, :4].mean()
