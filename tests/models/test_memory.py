"""A replay holds one tensor at a time, whatever the model."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from bigvision.models import blueprint
from bigvision.models.exact_init.trace import record, replay
from tests.models.configs import Model


class LiveBytes(TorchDispatchMode):
    """The most bytes that storages made in the body held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known and storage.nbytes():
                    self._known.add(storage._cdata)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes


@pytest.mark.parametrize("name", ["vit_large_patch16_224", "beit_large_patch16_224", "eva02_large_patch14_224"])
def test_peak_is_about_one_tensor(name):
    plan = blueprint(Model(name, options={"depth": 6}), 10)
    sizes = [p.numel() * p.element_size() for p in plan.module.parameters()]
    gc.collect()
    with LiveBytes() as memory:
        for _, value in plan.tensors(0):
            del value
    # trunc_normal_ of torch works on a copy and masks: three times the tensor.
    assert memory.peak < 3.5 * max(sizes) < sum(sizes) / 4
    assert memory.peak >= max(sizes), "the measurement sees the tensors"


def test_intermediates_are_freed_after_their_last_use():
    with record() as recorder:
        value = torch.randn(1000)
        for _ in range(9):
            value = value * 2 + value
    wanted = recorder.view(value)
    with LiveBytes() as memory:
        ((_, storage),) = replay(recorder.trace, 3, [wanted.storage])
    assert memory.peak < 5 * 4000 + 6 * 5056 + 1000, "a few values and generator states, not 19 values"
    torch.manual_seed(3)
    expected = torch.randn(1000)
    for _ in range(9):
        expected = expected * 2 + expected
    assert torch.equal(wanted.on(storage), expected)
