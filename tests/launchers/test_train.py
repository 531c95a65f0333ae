"""``bigvision.train`` from one process: ranks that are forked from it, with its objects."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import bigvision
from bigvision.api import configured
from bigvision.runtime import RankFailure
from bigvision.tasks import Classify
from tests.distributed import run_ranks
from tests.launchers.programs import small
from tests.recipes import losses, run
from tests.training.test_own_data import Pets


def logged(result: bigvision.Result) -> list[float]:
    return [line["loss"] for line in result.history if "loss" in line]


def test_forked_ranks_have_the_callers_objects_and_give_the_losses_of_one_process(tmp_path: Path) -> None:
    """After work with several threads here, whose pool forks must not wait for."""
    whole = bigvision.train(small(tmp_path / "one"), data=Pets(40), val=Pets(7))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        square = torch.rand(600, 600)
        for _ in range(20):
            square = (square @ square).softmax(dim=1)
        (square.requires_grad_() @ square).sum().backward()
    finally:
        torch.set_num_threads(before)

    note = tmp_path / "events"

    def callback(event: bigvision.Event) -> None:
        folder = event.folder is not None and (event.folder / "manifest.json").exists()
        with note.open("a") as file:
            file.write(f"{os.environ['RANK']} {event.kind} {event.step} {sorted(event.metrics)} {folder}\n")

    result = bigvision.train(
        small(tmp_path / "two", checkpoint={"every": 2}), Pets(40), Pets(7), devices=2, callbacks=[callback]
    )
    assert logged(result) == pytest.approx(logged(whole), rel=1e-5) and len(logged(whole)) == 4
    assert result.metrics == pytest.approx(whole.metrics, rel=1e-5)
    assert (result.step, result.checkpoint) == (4, tmp_path / "two/step-00000004")
    assert logged(result) == losses(tmp_path / "two")
    events = note.read_text().splitlines()
    line = "['grad_norm', 'images_per_second', 'loss', 'lr', 'peak_memory', 'samples', 'step', 'time', 'waiting']"
    metrics = str(sorted(Classify.metrics))
    assert [text for text in events if " step " in text] == [f"0 step {step} {line} False" for step in (1, 2, 3, 4)]
    assert [text for text in events if " checkpoint " in text] == ["0 checkpoint 2 [] True", "0 checkpoint 4 [] True"]
    assert f"0 evaluation 4 {metrics} False" in events and events[-1] == f"0 end 4 {metrics} True" and len(events) == 8


class Broken(Pets):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if os.environ.get("RANK") == "1":
            raise ZeroDivisionError("this sample divides by zero")
        return super().__getitem__(index)


def fails(event: bigvision.Event) -> None:
    if event.step == 2:
        raise KeyError("mine")


def test_errors_of_ranks_are_raised_in_the_caller(tmp_path: Path) -> None:
    with pytest.raises(RankFailure) as caught:
        bigvision.train(small(tmp_path / "fails"), devices=2, callbacks=[fails])
    assert str(caught.value) == "rank 0: KeyError: 'mine'" and "in fails" in caught.value.__notes__[0]
    with pytest.raises(KeyError, match="mine"):
        bigvision.train(small(tmp_path / "alone"), callbacks=[fails])
    with pytest.raises(bigvision.UserError, match=r"train.global_batch: 23 cannot be divided among 2"):
        bigvision.train(small(tmp_path / "batch", train={"global_batch": 23}), devices=2, callbacks=[fails])
    assert not multiprocessing_children()


@pytest.mark.long
def test_other_ends_of_ranks_are_raised_in_the_caller(tmp_path: Path) -> None:
    def mistaken(event: bigvision.Event) -> None:
        raise bigvision.UserError("callback: 3 is a mistake: use 4")

    def killed(event: bigvision.Event) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def leaves(event: bigvision.Event) -> None:
        os._exit(9)

    with pytest.raises(bigvision.UserError, match=r"^callback: 3 is a mistake: use 4$"):
        bigvision.train(small(tmp_path / "mistaken"), devices=2, callbacks=[mistaken], max_restarts=3)
    assert (tmp_path / "mistaken/starts.jsonl").read_text().count('"start"') == 1
    with pytest.raises(RankFailure, match=r"^rank 0: killed by SIGKILL"):
        bigvision.train(small(tmp_path / "killed"), devices=2, callbacks=[killed])
    with pytest.raises(RankFailure, match=r"^rank 0: ended with exit code 9|^rank 1: "):
        bigvision.train(small(tmp_path / "leaves"), devices=2, callbacks=[leaves])
    with pytest.raises(RankFailure, match=r"^rank 1: .*ZeroDivisionError: this sample divides by zero"):
        bigvision.train(small(tmp_path / "broken"), Broken(40), Pets(7), devices=2)
    assert not multiprocessing_children()


def multiprocessing_children() -> list[int]:
    """Processes whose parent this one is, but for the servers that multiprocessing keeps."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_text()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z" and "multiprocessing." not in command:
            found.append(int(entry.name))
    return found


@pytest.mark.long
def test_a_killed_rank_is_started_again_and_resumes(tmp_path: Path) -> None:
    def killed_once(event: bigvision.Event) -> None:
        if event.kind == "checkpoint" and event.step == 2 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    plain = small(tmp_path / "out", checkpoint={"every": 2, "background": False})
    result = bigvision.train(plain, devices=2, callbacks=[killed_once], max_restarts=1)
    assert (tmp_path / "out/starts.jsonl").read_text().count('"start"') == 2
    undisturbed = run_ranks(run, 2, plain | {"out": str(tmp_path / "whole")})[0]
    assert logged(result) == undisturbed


class Hungry(torch.nn.Linear):
    """Rank 1 has no memory for more than two images at once."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(3 * 32 * 32, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        if os.environ.get("RANK") == "1" and self.training and len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(images.flatten(1))


@pytest.mark.long
def test_ranks_without_memory_are_started_again_unasked(tmp_path: Path) -> None:
    """Micro-batches of 5, then 3, then 2."""
    plain = small(tmp_path / "out") | {"model": {"image_size": 32}}
    result = bigvision.train(plain, Pets(40), Pets(7), model=Hungry, devices=2)
    alone = bigvision.train(plain | {"out": str(tmp_path / "alone")}, Pets(40), Pets(7), model=Hungry)
    assert logged(result) == pytest.approx(logged(alone), rel=1e-5) and len(logged(alone)) == 4
    assert (tmp_path / "out/starts.jsonl").read_text().count('"start"') == 3


def test_a_signal_to_a_rank_stops_the_run_in_the_caller(tmp_path: Path) -> None:
    def stopping(event: bigvision.Event) -> None:
        if event.kind == "step" and event.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(bigvision.Stopped) as caught:
        bigvision.train(small(tmp_path), devices=2, callbacks=[stopping], max_restarts=2)
    assert caught.value.checkpoint == tmp_path / f"step-{caught.value.step:08}" and 2 <= caught.value.step <= 4
    assert (caught.value.checkpoint / "manifest.json").exists()
    assert len(logged(bigvision.train(small(tmp_path), devices=2, callbacks=[print]))) == 4


@pytest.mark.long
def test_models_of_ones_own(tmp_path: Path) -> None:
    """A function is built as timm's constructors are, and a module keeps its values; both as the name says, bit for bit."""
    keys = small(tmp_path)["model"] | {"num_classes": 12}
    name, options = keys["name"], keys["options"] | {"img_size": 32, "drop_path_rate": 0.0}
    plain = small(tmp_path / "named", parallel={"strategy": "fsdp"}) | {"model": keys}
    named = run_ranks(run, 2, plain)[0]

    def build(num_classes: int) -> torch.nn.Module:
        return timm.create_model(name, num_classes=num_classes, **options)

    torch.manual_seed(0)
    module = build(12)
    values = {key: value.clone() for key, value in module.state_dict().items()}
    for label, given in {"function": build, "module": module}.items():
        plain = small(tmp_path / label, parallel={"strategy": "fsdp"}) | {"model": {"num_classes": 12, "image_size": 32}}
        result = bigvision.train(plain, model=given, devices=2)
        assert logged(result) == named, label
    assert all(torch.equal(value, values[key]) for key, value in module.state_dict().items())

    card = (tmp_path / "function/step-00000004/config.json").read_text()
    assert '"python:build"' in card and "none of timm's" in card and '"num_classes": 12' in card
    assert "name: python:VisionTransformer" in (tmp_path / "module/run.yaml").read_text()
    with pytest.raises(bigvision.UserError, match=r"model.name: the model of this run was given from Python \(build\)"):
        bigvision.train(tmp_path / "function/run.yaml")
    from bigvision.cli import main

    assert main(["eval", str(tmp_path / "function/step-00000004")]) == 2
    assert main(["export", str(tmp_path / "function/step-00000004"), str(tmp_path / "weights.safetensors")]) == 0


class Plain(torch.nn.Module):
    """Nothing of timm's; tied weights, a buffer, a plain tensor."""

    def __init__(self, classes: int = 3, hidden: int = 8) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, hidden, 4, 4)
        self.layers = torch.nn.Sequential(*(torch.nn.Conv2d(hidden, hidden, 1) for _ in range(3)))
        self.layers[2].weight = self.layers[0].weight
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)
        self.shift = torch.arange(3.0)
        self.head = torch.nn.Linear(hidden, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        hidden = self.layers(torch.nn.functional.gelu(self.stem(images)))
        return self.head(hidden.mean((2, 3)) * self.scale) + self.shift.to(images.device).repeat(9)[: self.head.out_features]


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.long), "fsdp"])
def test_a_plain_module_trains_alike_on_one_rank_and_three(tmp_path: Path, strategy: str) -> None:
    torch.manual_seed(3)
    module = Plain()
    plain = small(tmp_path / "one", parallel={"strategy": strategy}) | {"model": {}}
    whole = bigvision.train(plain, Pets(40), Pets(7), model=module, image_size=32)
    found = bigvision.train(plain | {"out": str(tmp_path / "three")}, Pets(40), Pets(7), model=module, image_size=32, devices=3)
    assert logged(found) == pytest.approx(logged(whole), rel=1e-5)
    with torch.no_grad():
        module.head.weight[0].add_(1)  # all rows would move all outputs alike, which changes no loss
    other = bigvision.train(plain | {"out": str(tmp_path / "other")}, Pets(40), Pets(7), model=module, image_size=32)
    assert logged(other)[0] != logged(whole)[0]


@pytest.mark.parametrize(
    ("model", "keys", "said"),
    [
        (3, {}, "model: int is no model"),
        (Plain, {"image_size": None}, "model.image_size: python:Plain does not say which it takes"),
        (Plain(2), {}, "model: python:Plain has 2 outputs, but there are 3 classes"),
        (Plain().half(), {}, "model: stem.weight is float16: give it in fp32"),
        (torch.nn.Conv2d(3, 3, 3), {}, r"model: python:Conv2d returned a tensor \(2, 3, 30, 30\) for 2 images"),
        (torch.nn.Linear(5, 3), {}, "model.image_size: python:Linear cannot take images of 3 x 32 x 32"),
        (lambda: 3, {}, "model: python:<lambda> returned int, not a module"),
        (lambda: 1 / 0, {}, r"model: python:<lambda> cannot be built \(ZeroDivisionError: division by zero\)"),
        (Plain, {"model.options": {"hiden": 3}}, "model.options.hiden: python:Plain takes none; did you mean 'hidden'"),
        (Plain, {"model.pretrained": True}, "model.pretrained: True, but the model is your own"),
        (torch.nn.DataParallel(Plain()), {}, "model: DataParallel is wrapped already"),
    ],
)
def test_models_that_cannot_be(tmp_path: Path, model: Any, keys: dict[str, Any], said: str) -> None:
    plain = small(tmp_path) | {"model": {}}
    with pytest.raises(bigvision.UserError, match=f"^{said}"):
        bigvision.train(plain, Pets(9), Pets(9), model=model, **{"image_size": 32} | keys)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"lr": 1.0}, r"bigvision.train: unknown keyword 'lr'; did you mean optim=\{'lr': ...\}\?"),
        ({"optin": {"lr": 1.0}}, "bigvision.train: unknown keyword 'optin'; did you mean 'optim'"),
        ({"optim": {"lrr": 1.0}}, "bigvision.train: unknown key 'optim.lrr'; did you mean 'optim.lr'"),
        ({"optim.lrr": 1.0}, "bigvision.train: unknown keyword 'optim.lrr'; did you mean 'optim.lr'"),
        ({"device": 2}, r"bigvision.train: unknown keyword 'device'; did you mean parallel=\{'device': ...\}"),
        ({"callback": []}, "bigvision.train: unknown keyword 'callback'; did you mean 'callbacks'"),
        ({"optim": 3}, "bigvision.train: optim must be a section of keys, not 3"),
        ({"seed": "x"}, r"seed: x \(bigvision.train\(...\)\) is not a whole number"),
        ({"config": 3}, "bigvision.train: int is no recipe"),
        ({"data": Pets(3)}, "val: bigvision.train got a dataset in data, but none to validate on"),
        ({"val": Pets(3)}, "data: bigvision.train got a dataset in val, but none to train on"),
        ({"data": 3, "val": 4}, "data.train: int has no __len__"),
        ({"devices": 0}, "devices: 0: give at least 1"),
        ({"devices": "gpu"}, "devices: 'gpu': give a number, a list of CUDA devices"),
        ({"devices": [0, 0]}, "devices: .* names a device twice"),
        ({"devices": [0]}, "devices: 0, but torch sees 0 CUDA devices here"),
        ({"devices": True}, "devices: True: give a number"),
        ({"max_restarts": 2}, "max_restarts: 2, but no ranks are started here"),
        ({"devices": "cpu", "parallel": {"device": "cuda"}}, "devices: asks for cpu, but parallel.device is cuda"),
    ],
)
def test_mistakes_in_a_call(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(bigvision.UserError, match=f"^{said}"):
        bigvision.train(**{"out": tmp_path, "image_size": 32} | keys)


def test_keywords_go_before_the_recipe() -> None:
    def made(recipe: Any = None, model: Any = None, data: Any = None, val: Any = None, **keys: Any) -> Any:
        return configured("f", recipe, model, data, val, None, None, keys)

    recipe = {"data": {"train": "mnist", "val": "mnist"}, "optim": {"lr": 0.5, "clip": 2.0}}
    config, objects = made(recipe, "resnet18", "cifar10", optim={"lr": 0.1}, out=Path("x"), **{"train.steps": 3})
    assert (config.data.train, config.data.val, config.model.name) == ("cifar10", "cifar10", "resnet18")
    assert (config.optim.lr, config.optim.clip, config.train.steps, config.out) == (0.1, 2.0, 3, "x") and objects.none
    assert made(recipe, data="cifar10", val="digits")[0].data.val == "digits"
    assert made(None, {"name": "resnet18"}, {"train": "mnist", "workers": 0})[0].data.workers == 0
    pets = Pets(3)
    config, objects = made(recipe, data=pets, val="mnist")
    assert (objects.data, objects.val) == (pets, "mnist") and not objects.none
    assert made(config)[0] is config
    assert made(config, seed=3)[0] == replace(config, seed=3)


def test_under_a_launcher_the_call_joins_its_ranks(tmp_path: Path) -> None:
    assert run_ranks(join, 2, small(tmp_path, parallel={"strategy": "fsdp"})) == [True, True]


def join(plain: dict[str, Any]) -> bool:
    for devices, said in ((3, "devices: 3, but .* started 2 ranks"), ([0, 1], "let it choose the devices")):
        with pytest.raises(bigvision.UserError, match=said):
            bigvision.train(plain | {"parallel": {"strategy": "fsdp"}}, devices=devices)
    events: list[str] = []
    # Only rank 0 has a callback, which is all that counts.
    mine = [lambda event: events.append(event.kind)] if os.environ["RANK"] == "0" else []
    result = bigvision.train(plain, devices=2, callbacks=mine)
    # Rank 0 alone reads what it has logged.
    return result.step == 4 and len(logged(result)) == (4 if mine else 0) and bool(events) == bool(mine)


def test_a_process_group_here_is_refused(tmp_path: Path) -> None:
    assert run_ranks(refuse, 1, small(tmp_path)) == [True]


def refuse(plain: dict[str, Any]) -> bool:
    import torch.distributed as dist

    launched = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for callbacks in ([], [print]):
            with pytest.raises(bigvision.UserError, match="this process is in a process group already"):
                bigvision.train(plain, devices=2, callbacks=callbacks)
    finally:
        dist.destroy_process_group()
        os.environ.update(launched)
    return True


def test_cuda_in_use_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it can be shown without a device."""
    from bigvision.launchers import ranks

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(bigvision.UserError, match="CUDA is in use in this process"):
        ranks.check_parent(cuda=True)
    ranks.check_parent(cuda=False)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(bigvision.UserError, match="CUDA was asked for its devices"):
        ranks.settle(cuda=True)


@pytest.mark.long
def test_a_run_in_a_thread(tmp_path: Path) -> None:
    """Where no signals can be taken."""
    import threading

    found: list[Any] = []
    plain = small(tmp_path, train={"steps": 1})
    thread = threading.Thread(target=lambda: found.append(bigvision.train(plain, devices=2, callbacks=[lambda event: None])))
    thread.start()
    thread.join(300)
    assert found and found[0].step == 1
