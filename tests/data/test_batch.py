import torch

from bigvision.data import Batch, normalize


def batch_of(size: int) -> Batch:
    images = torch.randint(0, 256, (size, 3, 4, 5), dtype=torch.uint8)
    return Batch(images, torch.arange(size), torch.arange(size) + 100, torch.arange(size) < size - 1)


def test_split_covers_the_batch_with_a_short_last_part():
    whole = batch_of(7)
    parts = whole.split(3)
    assert [len(part) for part in parts] == [3, 3, 1]
    for name in ("images", "targets", "ids", "valid"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_to_keeps_types():
    moved = batch_of(2).to("cpu")
    assert (moved.images.dtype, moved.labels.dtype, moved.ids.dtype, moved.valid.dtype) == (
        torch.uint8,
        torch.int64,
        torch.int64,
        torch.bool,
    )


def test_images_are_normalised_and_the_batch_is_left_as_it_was():
    images = batch_of(3).images
    before = images.clone()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    wanted = (images.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)
    torch.testing.assert_close(normalize(images, mean, std).double(), wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(images, before)


def test_normalised_images_may_reuse_a_buffer():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    first, second = batch_of(3).images, batch_of(3).images.flip(0)
    buffer = normalize(first, mean, std)
    kept = buffer.clone()
    assert normalize(batch_of(2).images, mean, std, buffer=buffer).shape[0] == 2 and torch.equal(buffer, kept)
    found = normalize(second, mean, std, buffer=buffer)
    assert found.data_ptr() == buffer.data_ptr() and torch.equal(found, normalize(second, mean, std))
