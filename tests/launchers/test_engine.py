"""``bigvision.Engine``: a loop of one's own takes the steps of a run."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import bigvision
from bigvision.models import Blueprint
from bigvision.tasks import Classify
from tests.distributed import run_ranks
from tests.launchers.programs import small
from tests.recipes import losses, run


def own_loop(plain: dict[str, Any], floats: bool = False) -> tuple[list[float], dict[str, float], str]:
    """The run's own batches, in a loop like that of the README; saves after two steps, and goes on in a second engine."""
    from bigvision.config import load_config
    from bigvision.data import normalize
    from bigvision.training.data import Feed, open_data

    config, found = load_config(plain), []
    keys = {"num_classes": 10, "steps": config.train.steps}

    with bigvision.Engine(plain, **keys) as engine:
        data = open_data(config, engine.runtime, Classify())
        for _ in range(2):
            if engine.step == 0:
                batches = feed(Feed, config, data, engine)
            batch = next(batches).whole()
            images = normalize(batch.images, engine.mean, engine.std) if floats else batch.images
            kept = images.clone()
            found.append(float(engine.train_step(images, batch.labels).loss))
            assert torch.equal(images, kept)
        batches.close()
        first = engine.save(metrics={"mine": 0.5})
    with bigvision.Engine(plain, **keys, resume=floats) as engine:
        assert (engine.step if floats else engine.resume()) == engine.step == 2
        batches = feed(Feed, config, data, engine)
        while engine.step < engine.config.train.steps:
            found.append(float(engine.train_step(next(batches)).loss))
        batches.close()
        total = None
        for start in range(0, 53, 53):
            samples = [data.val.read(index) for index in range(start, start + 53)]
            images = torch.stack([torch.as_tensor(sample.image) for sample in samples])
            metrics = engine.eval_step(images, torch.tensor([sample.label for sample in samples]))
            total = metrics if total is None else total + metrics
        last = engine.save()
        assert engine.rank == engine.runtime.rank and engine.is_main == (engine.rank == 0) and engine.device.type == "cpu"
    assert total is not None
    assert first.name == "step-00000002" and last.name == "step-00000004"
    return found, total.means(), str(last)


def feed(kind: Any, config: Any, data: Any, engine: bigvision.Engine) -> Any:
    blueprint = Shape(engine)
    return kind(config, data, blueprint, engine.runtime, step=engine.step, steps=4, position=engine.engine.samples)


class Shape:
    """What the run's own feed asks of a model."""

    interpolation, crop_pct, crop_mode = "bicubic", 0.9, "center"

    def __init__(self, engine: bigvision.Engine) -> None:
        self.image_size, self.mean = engine.image_size, engine.mean


@pytest.mark.parametrize(("strategy", "floats"), [("ddp", False), ("fsdp", True)])
def test_a_loop_of_ones_own_has_the_losses_of_a_run(tmp_path: Path, strategy: str, floats: bool) -> None:
    plain = small(tmp_path / "run", parallel={"strategy": strategy}, data={"augment": False})
    expected = run_ranks(run, 2, plain)[0]
    found = run_ranks(own_loop, 2, plain | {"out": str(tmp_path / "own")}, floats)
    for got, metrics, _ in found:
        assert got == expected
        assert set(metrics) == set(Classify.metrics)
    # A run goes on from its checkpoint.
    plain |= {"out": str(tmp_path / "more"), "checkpoint": {"resume": found[0][2]}}
    run_ranks(run, 1, plain | {"train": plain["train"] | {"steps": 5}})
    assert len(losses(tmp_path / "more")) == 1


def losses_around_resume(plain: dict[str, Any]) -> list[float]:
    """The evaluated loss of a checkpoint, after two more steps, and after taking the checkpoint over again."""
    found = []
    with bigvision.Engine(plain, num_classes=10, steps=4) as engine:
        count = engine.config.train.global_batch // engine.world_size
        generator = torch.Generator().manual_seed(3)
        batch = torch.rand(count, 3, 32, 32, generator=generator), torch.randint(10, (count,), generator=generator)
        folder = engine.save()
        for change in (lambda: None, lambda: [engine.train_step(*batch) for _ in range(2)], lambda: engine.resume(folder)):
            change()
            found.append(engine.eval_step(*batch).means()["loss"])
    return found


@pytest.mark.parametrize("reshard", ["forward", "never"])
def test_what_an_evaluation_gathered_is_not_used_after_resuming(tmp_path: Path, reshard: str) -> None:
    for before, after, again in run_ranks(
        losses_around_resume, 2, small(tmp_path, parallel={"strategy": "fsdp", "reshard": reshard})
    ):
        assert again == before != after


def test_a_mistake_in_ones_own_loop_is_one_line_with_the_key(tmp_path: Path) -> None:
    plain = small(tmp_path)
    for keys, said in (
        ({"num_classes": 3, "train.steps": None}, "train.steps: bigvision.Engine needs the number of steps"),
        ({}, "model.num_classes: bigvision.Engine does not see the data"),
        ({"num_classes": 3, "stepz": 2}, "bigvision.Engine: unknown keyword 'stepz'"),
        ({"num_classes": 3, "model": "vit_tinny"}, "model.name: 'vit_tinny' is not a timm model"),
    ):
        with pytest.raises(bigvision.UserError, match=f"^{said}"):
            bigvision.Engine(plain, **keys)
    with ExitStack() as stack:
        engine = stack.enter_context(bigvision.Engine(plain, num_classes=3))
        images = torch.zeros(5, 3, 32, 32, dtype=torch.uint8)
        with pytest.raises(bigvision.UserError, match=r"train.global_batch: 24, but 1 data-parallel ranks got 5 samples each"):
            engine.train_step(images, torch.zeros(5))
        with pytest.raises(bigvision.UserError, match=r"images, labels: got \(5, 3, 32, 32\) and \(4,\)"):
            engine.train_step(images, torch.zeros(4))
        assert engine.resume() == 0
    assert not torch.distributed.is_initialized()


def test_resume_is_known_before_the_model_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, asked = small(tmp_path) | {"out": str(tmp_path)}, []
    tensors = Blueprint.tensors
    monkeypatch.setattr(Blueprint, "tensors", lambda self, seed, names: asked.append(set(names)) or tensors(self, seed, names))

    def state(engine: bigvision.Engine) -> dict[str, Any]:
        return {f"{fragment.group} {fragment.name}": fragment.values.tolist() for fragment in engine.engine.fragments()}

    with bigvision.Engine(plain, num_classes=3, resume=True) as engine:
        assert asked.pop(), "nothing to resume: first values"
        # Not after a step: no backward pass may run in this process, which other tests fork.
        folder, expected = engine.save(), state(engine)
    for resume in (True, folder):
        lost = {"model.weights": str(tmp_path / "gone.safetensors"), "seed": 5}
        with bigvision.Engine(plain, num_classes=3, resume=resume, **lost) as engine:
            assert state(engine) == expected
        assert asked.pop() == set() and not asked, "first values were computed"
    with pytest.raises(bigvision.UserError, match=r"checkpoint.resume: .*step-00000009"):
        bigvision.Engine(plain, num_classes=3, resume=tmp_path / "step-00000009")
    assert not torch.distributed.is_initialized()


def in_turn(plain: dict[str, Any], strategies: tuple[str, str], together: bool) -> list[list[float]]:
    """Two engines with *strategies* of their own, in one process; *together* or one after the other."""
    generator = torch.Generator().manual_seed(3)
    batches = [(torch.rand(4, 3, 32, 32, generator=generator), torch.randint(10, (4,), generator=generator)) for _ in range(3)]
    keys: dict[str, Any] = {"num_classes": 10, "steps": 3, "global_batch": 4 * int(os.environ["WORLD_SIZE"])}
    found: list[list[float]] = []
    with ExitStack() as stack:
        engines = []
        for strategy, seed in zip(strategies, (1, 2)):
            parallel = plain["parallel"] | {"strategy": strategy}
            engine = stack.enter_context(bigvision.Engine(plain | {"parallel": parallel, "seed": seed}, **keys))
            if together:
                engines.append(engine)
                continue
            found.append([float(engine.train_step(*batch).loss) for batch in batches])
            engine.close()
        if together:
            pairs = [[float(engine.train_step(*batch).loss) for engine in engines] for batch in batches]
            found = [list(losses) for losses in zip(*pairs)]
            engines[0].close()  # the process group stays for the other one
            engines[1].eval_step(*batches[0])
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "strategies",
    [("ddp", "fsdp"), *(pytest.param(pair, marks=pytest.mark.long) for pair in (("zero3", "zero2"), ("zero3", "zero3")))],
)
def test_two_engines_share_the_process_group(ranks: int, strategies: tuple[str, str], tmp_path: Path) -> None:
    plain = small(tmp_path / "run")
    together, in_sequence = (run_ranks(in_turn, ranks, plain, strategies, both) for both in (True, False))
    assert together == in_sequence


def averages(plain: dict[str, Any], out: str) -> list[Any]:
    """Metrics with the weights, the average and the weights again; and what a step or a save meanwhile raises."""
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, said = torch.arange(12) % 10, []
    with bigvision.Engine(plain, num_classes=10, steps=2, global_batch=24, out=out) as engine:
        for _ in range(2):
            engine.train_step(images, labels)
        found = [engine.eval_step(images, labels).means()["loss"]]
        with engine.averaged():
            found.append(engine.eval_step(images, labels).means()["loss"])
            for wrong in (
                lambda: engine.train_step(images, labels),
                engine.save,
                engine.resume,
                lambda: engine.averaged().__enter__(),
            ):
                with pytest.raises(bigvision.UserError) as caught:
                    wrong()
                said.append(str(caught.value))
        found.append(engine.eval_step(images, labels).means()["loss"])
        folder = engine.save()
    with bigvision.Engine(plain, num_classes=10, steps=2, global_batch=24, out=out, ema={"decay": None}) as engine:
        with pytest.raises(bigvision.UserError, match=r"ema.decay: null keeps no average"), engine.averaged():
            pass
    return [found, said, str(folder)]


@pytest.mark.parametrize(("strategy", "ranks"), [("fsdp", 2), pytest.param("zero3", 2, marks=pytest.mark.long)])
def test_a_loop_of_ones_own_evaluates_the_average(tmp_path: Path, strategy: str, ranks: int) -> None:
    plain = small(tmp_path, parallel={"strategy": strategy}, ema={"decay": 0.9}, optim={"lr": 0.1, "warmup": 0})
    for (weights, average, again), said, folder in run_ranks(averages, ranks, plain, str(tmp_path / "own")):
        assert weights == again and abs(average - weights) > 1e-4
        assert len(said) == 4 and all("it holds the averaged weights: leave the block" in text for text in said)
        assert (Path(folder) / "ema.safetensors").exists()
