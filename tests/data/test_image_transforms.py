import numpy as np
import pytest
import torch
from PIL import Image

from bigvision.data import transform

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
