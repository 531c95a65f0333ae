"""Mixup and CutMix: the papers' arithmetic, in pairs that do not depend on the ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bigvision.data import Batch, Mixer, Stream, open_source, train_batches, transform
from bigvision.data.batch import Mix
from bigvision.tasks import Classify


def test_mixup_is_the_papers() -> None:
    images = torch.rand(4, 3, 5, 5)
    share = torch.tensor([0.3, 0.3, 0.9, 0.9])
    mix = Mix(share, torch.zeros(4, 4, dtype=torch.int64), share, apart=1)
    mixed = mix.images(images)
    for sample, partner in ((0, 1), (1, 0), (2, 3), (3, 2)):
        wanted = share[sample] * images[sample] + (1 - share[sample]) * images[partner]
        assert torch.allclose(mixed[sample], wanted)
    own, other, left = Classify().mixed(torch.tensor([5, 6, 7, 8]), mix.partners, mix.share)
    assert own.tolist() == [5, 6, 7, 8] and other.tolist() == [6, 5, 8, 7] and torch.equal(left, share)


def test_cutmix_puts_a_box_of_the_partner_in_its_place() -> None:
    images = torch.rand(2, 3, 8, 6)
    box = torch.tensor([[1, 2, 4, 6], [1, 2, 4, 6]])
    mixed = Mix(torch.ones(2), box, torch.full((2,), 0.75), apart=1).images(images)
    inside = torch.zeros(8, 6, dtype=torch.bool)
    inside[1:4, 2:6] = True
    assert torch.equal(mixed[0][:, inside], images[1][:, inside]) and torch.equal(mixed[1][:, inside], images[0][:, inside])
    assert torch.equal(mixed[:, :, ~inside], images[:, :, ~inside])


def test_labels_are_shared_by_the_pixels_that_are_left() -> None:
    mix = Mixer(seed=1, mixup=0, cutmix=1.0).draw(0, 400, 32, 32)
    areas = (mix.box[:, 2] - mix.box[:, 0]) * (mix.box[:, 3] - mix.box[:, 1])
    assert torch.allclose(mix.share, 1 - areas / 32**2) and (mix.weight == 1).all()
    assert mix.share.min() < 0.3 and mix.share.max() > 0.9 and (mix.box >= 0).all() and (mix.box <= 32).all()
    mix = Mixer(seed=1, mixup=0.8, cutmix=0).draw(0, 4000, 32, 32)
    assert torch.equal(mix.weight, mix.share) and not mix.box.any()
    # The variance of a Beta(a, a) is 1 / (4 (2 a + 1)).
    assert mix.share.mean() == pytest.approx(0.5, abs=0.03) and mix.share.var() == pytest.approx(1 / (4 * 2.6), rel=0.1)
    both = Mixer(seed=1, mixup=0.8, cutmix=1.0).draw(0, 4000, 32, 32)
    assert (both.weight < 1).float().mean() == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize(("every", "apart"), [(2, 1), (24, 1), (6, 3), (24, 3)])
def test_how_it_is_mixed_follows_from_the_place_in_the_stream(every: int, apart: int) -> None:
    mixer = Mixer(4, 0.8, 1.0, every, apart)
    whole = mixer.draw(48, 24, 16, 16)
    for parts in (2, 4):
        size = 24 // parts
        drawn = [mixer.draw(48 + part * size, size, 16, 16) for part in range(parts)]
        for name in ("weight", "box", "share"):
            assert torch.equal(torch.cat([getattr(part, name) for part in drawn]), getattr(whole, name))
    assert len(whole.share.unique()) == (1 if every == 24 else 24 // every)
    # Both of a pair alike, or the labels would not fit the pixels.
    assert torch.equal(whole.partners(whole.share), whole.share)
    jumps = whole.partners(torch.arange(24)) - torch.arange(24)
    assert jumps.tolist() == ([apart] * apart + [-apart] * apart) * (12 // apart)


def test_the_loss_is_that_of_soft_targets() -> None:
    outputs, labels = torch.randn(4, 10), torch.tensor([1, 2, 3, 3])
    mix = Mixer(4, 0.8, 1.0).draw(0, 4, 16, 16)
    one_hot = F.one_hot(labels, 10).float()
    soft = one_hot * mix.share[:, None] + mix.partners(one_hot) * (1 - mix.share[:, None])
    wanted = F.cross_entropy(outputs, soft, label_smoothing=0.1, reduction="sum")
    assert torch.allclose(Classify(0.1).loss(outputs, Classify().mixed(labels, mix.partners, mix.share)), wanted)


def loss_targets(batch: Batch) -> torch.Tensor:
    assert batch.mix is not None
    return torch.stack([part.double() for part in Classify().mixed(batch.targets, batch.mix.partners, batch.mix.share)], dim=1)


def test_batches_carry_it_and_split_with_it() -> None:
    source = open_source("synthetic:23x10", "train")
    options = {"seed": 1, "position": 0, "global_batch": 12, "workers": 0, "mixer": Mixer(1, 0.8, 1.0)}
    change = transform("photo", 8, train=True)
    with train_batches(source, change, rank=0, ranks=1, **options) as loader:
        batch: Batch = next(loader)
    mean, std = (0.5,) * 3, (0.25,) * 3
    whole, targets = batch.inputs(mean, std), loss_targets(batch)
    parts = batch.split(4)
    assert torch.equal(torch.cat([part.inputs(mean, std) for part in parts]), whole)
    assert torch.equal(torch.cat([loss_targets(part) for part in parts]), targets)
    for cut in ({"ranks": 4}, {"ranks": 1, "micro_batch": 3}):
        with pytest.raises(ValueError, match="whole pairs"):
            train_batches(source, change, rank=0, **options | cut)


@pytest.mark.parametrize("mixing", [(0.8, 0.0), (0.0, 1.0)], ids=["mixup", "cutmix"])
@pytest.mark.parametrize(("position", "apart"), [(21, 1), (20, 3), (5, 4)])
def test_mixing_may_begin_anywhere(position: int, apart: int, mixing: tuple[float, float]) -> None:
    """Where a run that resumes was not mixed before, or had other repetitions or another global batch."""
    source = open_source("synthetic:23x10", "train")
    change, mixer = transform("photo", 8, train=True), Mixer(1, *mixing, 2 * apart, apart)
    stream = Stream(1, source.parts, repeats=apart)

    def steps(position: int, count: int, ranks: int = 1, micro_batch: int = 48) -> list[Batch]:
        options = {"seed": 1, "global_batch": 48, "workers": 0, "mixer": mixer, "stream": stream, "micro_batch": micro_batch}
        found = []
        for rank in range(ranks):
            with train_batches(source, change, position=position, rank=rank, ranks=ranks, **options) as loader:
                found += [next(loader) for _ in range(count * max(1, 48 // ranks // micro_batch))]
        return found

    def mixed(batches: list[Batch]) -> torch.Tensor:
        return torch.cat([batch.inputs((0.5,) * 3, (0.25,) * 3) for batch in batches])

    whole = mixed(steps(position, 2))
    assert torch.equal(mixed(steps(position, 1) + steps(position + 48, 1)), whole), "resumed"
    assert torch.equal(mixed(steps(position, 1, ranks=2)), whole[:48])
    assert torch.equal(mixed(steps(position, 1, micro_batch=2 * apart)), whole[:48])
    (batch, _) = steps(position, 2)
    assert batch.mix is not None
    assert (batch.mix.partners(batch.ids) != batch.ids).all(), "no image meets itself"
