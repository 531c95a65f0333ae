"""What is counted of a step, part by part."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bigvision.config import load_config
from bigvision.engine.parallelize import make_offload, wrap_blocks
from bigvision.models import blueprint, find_blocks
from bigvision.models.offload import LEAST
from bigvision.planning.hardware import parse_hardware
from bigvision.planning.memory import rank_memory
from bigvision.planning.operations import IMAGES, Amount
from bigvision.planning.profile import USUAL, Profile, planned, profile
from bigvision.planning.program import Compute, Copy, Mesh, Wait, passes, reached
from bigvision.planning.state import Layout
from bigvision.planning.timing import step_time
from bigvision.tasks import build_task
from bigvision.training.build import flops_of_image
from tests.offload import on_the_cpu


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


@pytest.mark.parametrize(
    ("name", "options"), [("vit_tiny_patch16_224", {"depth": 4}), pytest.param("convnext_atto", {}, marks=pytest.mark.long)]
)
def test_what_branches_leave_out_is_not_counted(name: str, options: dict[str, int]) -> None:
    """Neither in the predicted time and MFU nor in the FLOPs that a run's MFU is of, which count the same."""
    found = {}
    for mode in ("mask", "skip"):
        model = {"name": name, "num_classes": 10, "image_size": 64, "drop_path": 0.4, "drop_path_mode": mode}
        model["options"] = options
        plain = {"model": model, "parallel": {"strategy": "ddp", "device": "cuda", "compile": False}}
        config = load_config(plain | {"train": {"global_batch": 20000, "micro_batch": 10000}})
        plan = planned(config, 10, build_task(config.task))
        counted = profile(config, 10, plan=plan)
        flops = [flops_of_image(config, *plan, (64, 64), samples) for samples in (10000, 2)]
        time = step_time(counted, config, Layout.of(config, 1), parse_hardware("H100"))
        found[mode] = counted, flops, time
    (every, (all_of_them, few_of_all), slow), (some, (kept, few), fast) = found["mask"], found["skip"]
    assert some.flops == every.flops == every.flops_in(10000)
    share = some.flops_in(10000) / every.flops
    assert 0.75 < share < 0.85, "a fifth is left out: rates grow from 0 to 0.4"
    assert kept / all_of_them == pytest.approx(share, rel=0.01)
    assert fast.mfu * fast.total / (slow.mfu * slow.total) == pytest.approx(share)
    assert share < (fast.forward + fast.backward) / (slow.forward + slow.backward) < share + 0.1
    assert few == few_of_all and some.flops_in(2) == every.flops, "of two samples none can be left out"


def test_what_the_number_of_images_divides_grows_with_them() -> None:
    assert Amount.of(IMAGES * 12.0) == Amount(0.0, 12.0) and Amount.of(1000 * 768 * 4) == Amount(1000 * 768 * 4, 0.0)
    assert (Amount.of(IMAGES * 3.0) + Amount(5.0)).at(2) == 11.0


POOLED = """
import sys
from bigvision.config import load_config
from bigvision.planning.profile import profile

keys = {"model": {"name": "poolformer_s12"}, "parallel": {"device": "cuda"}, "data": {"train": "none"}}
config = load_config({"out": "out"} | keys)
print(profile(config).compiled, "torch._inductor.lowering" in sys.modules)
"""


@pytest.mark.long
def test_pooling_in_compiled_blocks_is_profiled_in_a_new_process() -> None:
    done = subprocess.run([sys.executable, "-c", POOLED], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True True\n"), done.stderr


@pytest.mark.parametrize("device", ["cuda", pytest.param("cpu", marks=pytest.mark.long)])
def test_what_is_random_in_a_compiled_block_is_computed_again(device: str) -> None:
    """The backward pass draws as the forward pass did; its work counts as recompute."""
    options = {"proj_drop_rate": 0.1, "depth": 2}
    model = {"name": "vit_tiny_patch16_224", "image_size": 64, "num_classes": 5, "options": options}
    parallel = {"device": device, "strategy": "ddp", "compile": True}
    found = []
    for recompute in ("blocks", "none"):
        keys = {"model": model, "parallel": parallel | {"recompute": recompute}, "data": {"train": "none"}}
        found.append([part for part in profile(load_config({"out": "out"} | keys)).parts if part.path.endswith(".attn")])
    for one, other in zip(*found, strict=True):
        assert one.backward_flops == other.backward_flops and 0 < one.recomputed_flops <= one.forward_flops
        assert one.saved.per_image < other.saved.per_image / 3


def test_offloaded_activations_are_the_bytes_that_move_and_are_waited_for() -> None:
    model = {"name": "vit_tiny_patch16_224", "num_classes": 10, "image_size": 64, "options": {"depth": 5}}
    plain = {"strategy": "ddp", "device": "cpu", "precision": "fp32", "compile": False, "offload": "activations"}
    config = load_config({"model": model, "parallel": plain, "train": {"global_batch": 4096, "micro_batch": 4096}})
    found, images, here = profile(config, 10), 16, torch.device("cpu")
    with on_the_cpu(LEAST * images // USUAL) as made:
        plan = blueprint(config.model, 10)
        blocks = [block.module for block in find_blocks(plan.module, plan.image_size)]
        offload = make_offload(config, here)
        wrap_blocks(blocks, config, here, plan.module, plan.input_shape, offload=offload)
        plan.module.train().to_empty(device=here)
        plan.module(torch.zeros(images, *plan.input_shape)).sum().backward()
    leaves, returns = ([getattr(part, way).at(images) for part in found.parts if part.path] for way in ("leaves", "returns"))
    moved = sum(made[0].leaving)
    assert leaves == [0, *[moved / 4] * 4] and returns == [0, *[moved / 4] * 3, 0] and sum(returns) == made[0].back
    # What a block begins to copy is waited for when the next one begins.
    order = []
    for one in passes(found, config, Mesh.of(Layout.of(config, 1)), last=True):
        if not isinstance(one, Compute):
            order.append("copy" if isinstance(one, Copy) else "wait" if isinstance(one, Wait) else "send")
        elif found.parts[one.part].path:
            order.append(f"{one.what} {found.parts[one.part].path[-1]}")
    assert " ".join(order) == (
        "forward 0 copy forward 1 wait copy forward 2 wait copy forward 3 wait copy forward 4 "
        "backward 4 copy backward 3 wait copy backward 2 wait copy backward 1 wait backward 0"
    )
    # So narrow a model waits for most of its copies.
    hardware = parse_hardware("H100")
    time, copies = step_time(found, config, Layout.of(config, 1), hardware), 7 * moved / 4 * (4096 / images)
    assert 0.7 * time.total < time.offload < copies / reached(hardware.host) < time.total
    assert rank_memory(found, config, Layout.of(config, 1), 0).pinned == moved * (4096 / images)
