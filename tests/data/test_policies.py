"""What is done to an image after its crop: torchvision's policies, from the sample's own draws."""

import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from bigvision.data import open_source, train_batches, transform
from bigvision.data.order import seed_everything
from bigvision.errors import UserError

BILINEAR = InterpolationMode.BILINEAR
THREE = [v2.RandomGrayscale(1.0), v2.RandomSolarize(128, p=1.0), v2.GaussianBlur(9, (0.1, 2.0))]
STEPS = {
    "randaugment": ({"policy": "randaugment"}, [v2.RandAugment(interpolation=BILINEAR)]),
    "autoaugment": ({"policy": "autoaugment"}, [v2.AutoAugment(interpolation=BILINEAR)]),
    "trivialaugment": ({"policy": "trivialaugment"}, [v2.TrivialAugmentWide(interpolation=BILINEAR)]),
    "three-augment": ({"policy": "three-augment"}, [v2.RandomChoice(THREE)]),
    "jitter": ({"jitter": 0.4}, [v2.ColorJitter(0.4, 0.4, 0.4, 0.1)]),
    "erase": ({"erase": 0.7}, [v2.RandomErasing(0.7, value=[124, 116, 104])]),
    "all": (
        {"policy": "three-augment", "jitter": 0.3, "erase": 0.5},
        [v2.RandomChoice(THREE), v2.ColorJitter(0.3, 0.3, 0.3, 0.075), v2.RandomErasing(0.5, value=[124, 116, 104])],
    ),
}


def noise(seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", STEPS)
def test_the_pixels_are_torchvisions(name):
    options, steps = STEPS[name]
    ours = transform("photo", 24, train=True, interpolation="bilinear", **options)
    theirs = v2.Compose([v2.RandomResizedCrop(24, interpolation=BILINEAR), v2.RandomHorizontalFlip(), *steps])
    plain = transform("photo", 24, train=True, interpolation="bilinear")
    changed = 0
    for seed in range(20):
        image = noise(seed)
        seed_everything(seed)
        found, state = ours(image, 0)[0], torch.get_rng_state()
        seed_everything(seed)
        assert torch.equal(found, theirs(image)) and torch.equal(state, torch.get_rng_state())
        seed_everything(seed)
        changed += not torch.equal(found, plain(image, 0)[0])
    assert changed > 8


@pytest.mark.parametrize("style", ["photo", "tiny", "digit"])
def test_each_sample_draws_for_itself_whoever_makes_it(style):
    """Also where a worker begins many samples before it finishes the first."""
    source = open_source("synthetic:50x30", "train")
    change = transform(style, 16, train=True, policy="three-augment", jitter=0.3, erase=0.5)
    options = {"seed": 2, "ranks": 1, "rank": 0}
    with train_batches(source, change, position=0, global_batch=48, workers=0, **options) as loader:
        whole = next(loader).images
    with train_batches(source, change, position=0, global_batch=12, workers=2, **options) as loader:
        assert torch.equal(torch.cat([next(loader).images for _ in range(4)]), whole)
    for place in (0, 31, 32, 47):
        with train_batches(source, change, position=place, global_batch=1, workers=0, **options) as loader:
            assert torch.equal(next(loader).images[0], whole[place])


def test_three_augment_does_one_of_three():
    change = transform("tiny", 16, train=True, policy="three-augment")
    grey, others = 0, 0
    image = noise(0)
    for seed in range(60):
        seed_everything(seed)
        found = change(image, 0)[0].int()
        same = bool((found[0] == found[1]).all() and (found[1] == found[2]).all())
        grey, others = grey + same, others + (not same)
    assert 10 < grey < 32 and others == 60 - grey


@pytest.mark.parametrize("options", [{"policy": "randaugment"}, {"jitter": 0.4}])
def test_what_is_for_colours_is_refused_without_them(options):
    with pytest.raises(UserError, match="is for RGB images, but these have 5 channels"):
        transform("photo", 16, train=True, channels=5, **options)
    assert transform("photo", 16, train=True, channels=5, erase=1.0)(noise(0)[[0, 1, 2, 0, 1]], 0)[0].shape == (5, 16, 16)
