"""What is counted of a step, part by part."""

from __future__ import annotations

import pytest

from bigvision.config import load_config
from bigvision.planning.operations import IMAGES, Amount
from bigvision.planning.profile import Profile, profile


def counted(**parallel: object) -> Profile:
    model = {"name": "vit_tiny_patch16_224", "options": {"depth": 6}}
    plain = {"strategy": "ddp", "device": "cuda", "compile": False} | parallel
    return profile(load_config({"model": model, "parallel": plain}), 10)


def test_each_block_has_its_own_operations() -> None:
    found, again = counted(), counted(recompute="blocks")
    blocks = [part for part in found.parts if part.path]
    assert len(blocks) == 6 and {part.kind for part in blocks} == {0}
    assert len({(part.forward_flops, part.backward_flops, part.saved) for part in blocks}) == 1
    # Two products for each of the forward pass; attention computes its probabilities once more.
    assert blocks[0].backward_flops == pytest.approx(2.07 * blocks[0].forward_flops, rel=0.02)
    for plain, part in zip(found.parts, again.parts, strict=True):
        assert (plain.forward_flops, plain.backward_flops) == (part.forward_flops, part.backward_flops)
        # The last product's result is not needed again.
        assert 0.6 * plain.forward_flops < part.recomputed_flops < plain.forward_flops if plain.path else True
        assert part.saved.per_image < 0.2 * plain.saved.per_image if plain.path else True


def test_what_the_number_of_images_divides_grows_with_them() -> None:
    assert Amount.of(IMAGES * 12.0) == Amount(0.0, 12.0) and Amount.of(1000 * 768 * 4) == Amount(1000 * 768 * 4, 0.0)
    assert (Amount.of(IMAGES * 3.0) + Amount(5.0)).at(2) == 11.0
