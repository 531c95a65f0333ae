import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import functional, v2
from torchvision.tv_tensors import BoundingBoxes, Mask

from bigvision.data import UnreadableSample, transform
from bigvision.errors import UserError

STYLES = ("photo", "tiny", "digit")


def gradient(width: int, height: int) -> torch.Tensor:
    across = torch.linspace(0, 255, width).expand(height, width)
    down = torch.linspace(0, 255, height).view(-1, 1).expand(height, width)
    return torch.stack([across, down, (across + down) / 2]).to(torch.uint8)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (50, 31), (31, 50)])
def test_shape_and_type_from_pillow_and_tensor(style, train, shape):
    change = transform(style, 32, train=train)
    image = gradient(*shape)
    for given in (image, Image.fromarray(image.permute(1, 2, 0).numpy())):
        result, _ = change(given, 0)
        assert result.shape == (3, 32, 32) and result.dtype == torch.uint8


@pytest.mark.parametrize("style", STYLES)
def test_training_is_random_only_when_augmented(style):
    image = gradient(32, 32)
    augmented = transform(style, 32, train=True)
    assert len({augmented(image, 0)[0].numpy().tobytes() for _ in range(8)}) > 1
    plain = transform(style, 32, train=True, augment=False)
    assert torch.equal(plain(image, 0)[0], plain(image, 0)[0])
    assert torch.equal(plain(image, 0)[0], transform(style, 32, train=False)(image, 0)[0])


def test_evaluation_keeps_small_images_whole_and_crops_photos():
    image = gradient(32, 32)
    assert torch.equal(transform("digit", 32, train=False)(image, 0)[0], image)
    assert torch.equal(transform("tiny", 32, train=False)(image, 0)[0], image)
    photo, _ = transform("photo", 32, train=False, crop_pct=0.5)(image, 0)
    assert photo[0].min() > 50 and photo[0].max() < 205


def test_digits_are_never_mirrored():
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, 4:28, 2:8] = 255
    change = transform("digit", 32, train=True)
    for _ in range(50):
        pixels = change(image, 0)[0][0].float()
        assert pixels[:, :16].sum() > pixels[:, 16:].sum()


def test_interpolation_matters():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8))
    bilinear = transform("photo", 32, train=False, interpolation="bilinear")(image, 0)[0]
    assert not torch.equal(bilinear, transform("photo", 32, train=False, interpolation="bicubic")(image, 0)[0])


# Sizes and crop modes.

INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
MEAN = (0.25, 0.5, 0.75)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("share", [1.0, 0.9, 0.875])
@pytest.mark.parametrize("size", [(48, 48), (40, 64), (64, 33)])
def test_evaluation_sees_what_timms_transform_makes(mode, share, size, monkeypatch):
    random = np.random.default_rng(0)
    for interpolation in INTERPOLATIONS:
        options = {"interpolation": interpolation, "crop_pct": share, "crop_mode": mode, "mean": MEAN}
        ours = transform("photo", size, train=False, **options)
        theirs = create_transform((3, *size), normalize=False, **options)
        for height, width in ((90, 120), (120, 90), (31, 100), (64, 64), (48, 48), (20, 47), (40, 64)):
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            found, _ = ours(Image.fromarray(pixels), 0)
            assert found.shape == (3, *size)
            # Pillow rounds otherwise than torchvision, and has other nearest pixels.
            away = (found.int() - theirs(Image.fromarray(pixels)).int()).abs()
            assert interpolation == "nearest" or away.float().mean() < 0.5, (interpolation, height, width)
            with monkeypatch.context() as patch:
                # timm's steps with torchvision's newer functions, which resize bytes without a detour through floats.
                for name in ("resize", "pad"):
                    patch.setattr(functional, name, getattr(v2.functional, name))
                assert torch.equal(found, theirs(torch.from_numpy(pixels).permute(2, 0, 1)))


def test_what_a_border_is_made_of():
    ours = transform("photo", 32, train=False, crop_pct=1.0, crop_mode="border", mean=MEAN)
    found, _ = ours(torch.full((3, 10, 40), 200, dtype=torch.uint8), 0)
    assert (found[:, :11] == torch.tensor([64, 128, 191]).view(3, 1, 1)).all() and (found[:, 12:20] == 200).all()
    small = transform("tiny", 32, train=False, crop_pct=0.5, crop_mode="border", mean=MEAN)
    assert (small(torch.full((3, 10, 40), 200, dtype=torch.uint8), 0)[0] == 200).all(), "crop modes are for photos"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [(24, 40), (40, 24)])
def test_sizes_that_are_not_square(style, size):
    image = gradient(40, 24)
    torch.manual_seed(0)
    augmented = transform(style, size, train=True, policy="randaugment", jitter=0.2, erase=0.5)
    assert {augmented(image, 0)[0].shape for _ in range(5)} == {(3, *size)}
    plain, _ = transform(style, size, train=False, crop_pct=1.0)(image, 0)
    if size == (24, 40):
        assert torch.equal(plain, image)
    else:  # as high, and the middle of it
        assert plain.shape == (3, *size) and 80 < plain[0].min() < plain[0].max() < 175 and plain[1].max() == 255


@pytest.mark.parametrize(
    ("shape", "train", "mode", "words"),
    [
        (
            (3, 1, 100_000),
            False,
            "center",
            "100000x1 pixels resized to 25600000x256 are more than data.max_pixels: 180,000,000",
        ),
        ((3, 900_000, 1), False, "squash", "1x900000 pixels resized to 256x256 are more"),
        ((3, 1, 100_000), False, "border", "nothing is left of 100000x1 pixels resized to 256x0"),
        ((3, 1, 100_000), True, "center", None),
    ],
)
def test_sides_that_are_too_unlike(shape, train, mode, words):
    change = transform("photo", 256, train=train, crop_pct=1.0, crop_mode=mode)
    image = torch.zeros(1, dtype=torch.uint8).expand(shape)
    if words is None:
        assert change(image, 0)[0].shape == (3, 256, 256)
    else:
        with pytest.raises(UnreadableSample, match=words):
            change(image, 0)


# Targets that lie in the image.


def spots(height: int, width: int) -> tuple[torch.Tensor, dict]:
    """A white rectangle on black, its mask and its box, beside what is not in the image."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    top, left, bottom, right = height // 4, width // 5, height * 3 // 4, width // 2
    image[:, top:bottom, left:right] = 255
    box = BoundingBoxes(torch.tensor([[left, top, right, bottom]]).float(), format="XYXY", canvas_size=(height, width))
    return image, {"mask": Mask(image[:1] // 255), "more": [box, 7, "text"], "vector": torch.ones(3), "label": 3}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", [(60, 80), (90, 50)])
@pytest.mark.parametrize("options", [{}, {"policy": "three-augment", "crop_mode": "squash"}, {"crop_mode": "border"}])
def test_masks_and_boxes_move_with_the_image(style, train, shape, options):
    image, target = spots(*shape)
    change = transform(style, (48, 64), train=train, scale=(0.5, 1.0), crop_pct=0.9, **options)
    for seed in range(12):
        torch.manual_seed(seed)
        found, moved = change(image, target)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        plain, label = change(image, 3)
        assert label == 3 and torch.equal(plain, found) and torch.equal(torch.get_rng_state(), state), "as for a label"
        assert moved["label"] == 3 and moved["more"][1:] == [7, "text"] and torch.equal(moved["vector"], torch.ones(3))
        assert "mask" in target and target["mask"].shape == (1, *shape), "the source's own is left as it is"
        mask, box = moved["mask"][0].bool(), moved["more"][0]
        assert mask.shape == (48, 64) and box.canvas_size == (48, 64)
        if not options.get("policy"):
            # But for the edge, which is soft in the image.
            assert ((found[0] > 127) != mask).float().mean() < 0.02
        if mask.any() and not (style == "digit" and train):  # a box around a turned one is larger
            rows, columns = (torch.nonzero(mask.any(side)).flatten() for side in (1, 0))
            edges = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert (edges - box[0]).abs().max() <= 1.5, (edges, box)


def test_a_flip_is_one_of_all():
    image, target = spots(40, 40)
    change = transform("photo", 40, train=True, scale=(1.0, 1.0), interpolation="nearest")
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        found, moved = change(image, target)
        assert torch.equal(found[0] > 0, moved["mask"][0] > 0)
        seen.add(found.numpy().tobytes())
    assert len(seen) > 1


@pytest.mark.parametrize(("style", "usual"), [("photo", {False, True}), ("tiny", {False, True}), ("digit", {False})])
def test_how_often_images_are_flipped(style, usual):
    """The image has a dark left and upper half, and its mask tells the same."""
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[0, :, 16:], image[1, 16:] = 255, 255
    target = {"mask": Mask(image[:2] // 255)}

    def sides(**flips):
        """Whether images came mirrored, and upside down."""
        change = transform(style, 32, train=True, scale=(1.0, 1.0), interpolation="bilinear", **flips)
        mirrored, turned = set(), set()
        for seed in range(24):
            torch.manual_seed(seed)
            pixels, moved = change(image, target)
            for shown in (pixels[:2].float(), moved["mask"].float()):
                mirrored.add(bool(shown[0, :, :16].mean() > shown[0, :, 16:].mean()))
                turned.add(bool(shown[1, :16].mean() > shown[1, 16:].mean()))
        return mirrored, turned

    assert sides() == (usual, {False}), "as fits the images"
    assert sides(hflip=0.0) == ({False}, {False}) and sides(hflip=1.0, vflip=1.0) == ({True}, {True})
    assert sides(hflip=0.5, vflip=0.5) == ({False, True}, {False, True})


def test_targets_that_cannot_move():
    image, target = spots(40, 30)
    with pytest.raises(UnreadableSample, match=r"its Mask is of \[40, 30\] pixels, but the image of \[30, 40\]"):
        transform("photo", 16, train=True)(image.permute(0, 2, 1), target)
    with pytest.raises(UserError, match=r"data.policy: it turns and shifts images, but not their masks"):
        transform("photo", 16, train=True, policy="randaugment")(image, target)
