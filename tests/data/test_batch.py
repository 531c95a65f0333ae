import torch

from bigvision.data import Batch, normalize


def batch_of(size: int) -> Batch:
    images = torch.randint(0, 256, (size, 3, 4, 5), dtype=torch.uint8)
    return Batch(images, torch.arange(size), torch.arange(size) + 100, torch.arange(size) < size - 1)


def test_split_covers_the_batch_with_a_short_last_part():
    whole = batch_of(7)
    parts = whole.split(3)
    assert [len(part) for part in parts] == [3, 3, 1]
    for name in ("images", "labels", "ids", "valid"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_to_keeps_types():
    moved = batch_of(2).to("cpu")
    assert (moved.images.dtype, moved.labels.dtype, moved.ids.dtype, moved.valid.dtype) == (
        torch.uint8,
        torch.int64,
        torch.int64,
        torch.bool,
    )


def test_normalize():
    images = batch_of(3).images
    before = images.clone()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    wanted = (images.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)
    torch.testing.assert_close(normalize(images, mean, std).double(), wanted, atol=1e-5, rtol=1e-5)
    assert normalize(images, mean, std, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(images, before)


def test_normalised_images_are_never_written_over():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    batches = [batch_of(size).images for size in (3, 5, 2, 4, 5, 1, 5)]
    wanted = [normalize(images, mean, std).clone() for images in batches]
    whole = [normalize(images, mean, std) for images in batches[:3]]
    # Of the rest only a part is kept, or what autograd saved of it.
    parts = [normalize(images, mean, std)[-1, 1:] for images in batches[3:5]]
    weight = torch.ones(3, 1, 1, requires_grad=True)
    products = [normalize(images, mean, std) * weight for images in batches[5:]]
    places = {normalize(torch.zeros(5, 3, 4, 5, dtype=torch.uint8), mean, std).data_ptr() for _ in range(9)}
    assert len(places) == 1, "what nobody has is used again"
    assert all(torch.equal(found, other) for found, other in zip(whole, wanted))
    assert all(torch.equal(found, other[-1, 1:]) for found, other in zip(parts, wanted[3:]))
    sum(product.sum() for product in products).backward()
    torch.testing.assert_close(weight.grad, sum(other.sum((0, 2, 3)) for other in wanted[5:]).view(3, 1, 1))
