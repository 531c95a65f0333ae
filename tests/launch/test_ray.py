"""Real Ray on this machine: the losses of every launcher, ranks that are killed, mistakes and signals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bigvision import load_config
from bigvision.errors import Stopped, UserError
from bigvision.launchers.ray import Ask, import_ray, read_ask, train
from bigvision.launchers.ray import session as begin
from tests.distributed import run_ranks
from tests.launch.commands import start
from tests.launch.ray_session import ENVIRONMENT, command, descendants, listened_on, skip_without_ray
from tests.recipes import lines, losses, recipe, run, write_recipe

skip_without_ray()
TWO = Ask(workers=(2, 2))


@pytest.fixture(scope="module")
def session() -> Iterator[str]:
    """The session that `train` begins where there is none; returns its address."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        ray = import_ray(TWO)
        with begin(ray, TWO):
            yield ray.get_runtime_context().gcs_address


def weights(out: Path, step: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / f"step-{step:08}").glob("*.safetensors")}


def workers() -> list[int]:
    """The processes of this session's workers in which ranks run."""
    return sorted(process for process in descendants(os.getpid()) if command(process).startswith("ray::RayTrainWorker"))


def test_nobody_else_can_reach_it(session: str) -> None:
    processes = [process for process in descendants(os.getpid()) if "ray" in command(process)]
    assert session.startswith("127.0.0.1:") and listened_on(processes) == {"127.0.0.1"}


@pytest.mark.long
def test_the_losses_are_those_of_every_launcher(session: str, tmp_path: Path) -> None:
    expected = run_ranks(run, 2, recipe(tmp_path / "reference", train={"eval_every": 10}))[0]
    plain = recipe(tmp_path / "ray", train={"eval_every": 10}, monitor={"report": True})
    result = train(load_config(plain), TWO, {"optim.lr": "a recipe"})
    assert json.loads((tmp_path / "ray/report.json").read_text())["origins"] == {"optim.lr": "a recipe"}
    assert losses(tmp_path / "ray") == expected
    assert (result.step, result.checkpoint) == (20, tmp_path / "ray" / "step-00000020")
    assert result.metrics == {name[4:]: value for name, value in lines(tmp_path / "ray")[-1].items() if name.startswith("val_")}
    assert weights(tmp_path / "ray", 20) == weights(tmp_path / "reference", 20)


def killed(tmp_path: Path, steps: int, kills: int) -> None:
    """Kill a rank at random moments, and compare the end of the run with that of an undisturbed one."""
    settings: dict[str, Any] = {"train": {"steps": steps}, "checkpoint": {"every": max(1, steps // (2 * kills)), "keep": 2}}
    run_ranks(run, 2, recipe(tmp_path / "reference", **settings))
    draw, hits, done = random.Random(0), [], threading.Event()
    log = tmp_path / "ray" / "metrics.jsonl"

    def kill() -> None:
        for number in range(kills):
            # Each attempt is let come to a step beyond the last kill: otherwise it would only show that Ray restarts.
            aim = round(steps * (number + draw.random()) / kills)
            while not done.wait(0.02):
                reached = max((line["step"] for line in lines(tmp_path / "ray")), default=0) if log.exists() else 0
                if reached >= min(aim, steps - 2) and (found := workers()):
                    time.sleep(draw.random() * 0.1)
                    victim = draw.choice(found)
                    try:
                        os.kill(victim, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
                    hits.append(victim)
                    # The others' end and a new start take longer than this.
                    while not done.wait(0.02) and victim in workers():
                        pass
                    break

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        result = train(load_config(recipe(tmp_path / "ray", **settings)), Ask(workers=(2, 2), max_failures=3 * kills))
    finally:
        done.set()
        killer.join()
    assert len(hits) == kills and result.step == steps
    assert weights(tmp_path / "ray", steps) == weights(tmp_path / "reference", steps)
    assert [line["step"] for line in lines(tmp_path / "ray") if "loss" in line] == list(range(1, steps + 1))
    assert losses(tmp_path / "ray") == losses(tmp_path / "reference")


@pytest.mark.long
def test_a_rank_killed_twice(session: str, tmp_path: Path) -> None:
    killed(tmp_path, steps=20, kills=2)


@pytest.mark.long
def test_ranks_killed_at_twenty_random_moments(session: str, tmp_path: Path) -> None:
    killed(tmp_path, steps=200, kills=20)


@pytest.mark.long
def test_a_mistake_is_not_tried_again(session: str, tmp_path: Path) -> None:
    """From the command line: one line, exit code 2. What only the ranks can see: how many of them there are."""
    path = write_recipe(tmp_path, parallel={"strategy": "fsdp", "replicas": 3})
    done = start([sys.executable, "launch/ray/train.py", path, "--workers", "2", "--address", session], timeout=300)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, said) == (2, ["error: parallel.replicas: 3 does not divide the 2 ranks"]), (
        done.stdout + done.stderr
    )
    assert "RETRY" not in done.stdout + done.stderr


@pytest.mark.long
def test_signals_to_the_driver_save_and_stop_the_run(session: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, train={"steps": 100_000}, checkpoint={"every": 100_000})
    command = [sys.executable, "launch/ray/train.py", path, "--workers=2", "--address", session]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "metrics.jsonl"
    while not (log.exists() and len(lines(tmp_path / "out")) > 3):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR2)
    while not (tmp_path / "out" / "latest").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[1]
    step = lines(tmp_path / "out")[-1]["step"]
    assert process.returncode == 75, said
    assert f"stopped by SIGTERM at step {step}, saved in {tmp_path}/out/step-{step:08}: start it again to go on" in said


@pytest.mark.long
def test_a_signal_to_a_rank_is_not_an_error(session: str, tmp_path: Path) -> None:
    found = []

    def send() -> None:
        log = tmp_path / "metrics.jsonl"
        while not (log.exists() and len(lines(tmp_path)) > 3):
            time.sleep(0.05)
        found.extend(workers())
        os.kill(max(found), signal.SIGUSR1)

    threading.Thread(target=send).start()
    with pytest.raises(Stopped, match="stopped by SIGUSR1 at step") as caught:
        train(load_config(recipe(tmp_path, train={"steps": 100_000})), Ask(workers=(2, 2), max_failures=0))
    assert len(found) == 2 and caught.value.checkpoint == tmp_path / f"step-{caught.value.step:08}"
    assert weights(tmp_path, caught.value.step)


def in_a_loop_of_ones_own(settings: dict[str, Any]) -> float:
    import torch.distributed as dist

    import bigvision

    assert dist.is_initialized()
    result = bigvision.train(bigvision.load_config(settings))
    assert dist.is_initialized(), "the process group is Ray's to end"
    return result.metrics["loss"]


@pytest.mark.long
def test_a_trainer_of_ones_own(session: str, tmp_path: Path) -> None:
    """Plain TorchTrainer: Ray has made the process group, and the run joins it."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    expected = run_ranks(run, 2, recipe(tmp_path / "reference", train={"steps": 5}))[0]
    trainer = TorchTrainer(
        in_a_loop_of_ones_own,
        train_loop_config=recipe(tmp_path / "ray", train={"steps": 5}),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(tmp_path / "results")),
    )
    loss = trainer.fit().return_value
    assert losses(tmp_path / "ray") == expected and loss == lines(tmp_path / "ray")[-1]["val_loss"]


def test_more_workers_than_the_cluster_has(session: str, tmp_path: Path) -> None:
    most = max(2, os.cpu_count() or 1)
    with pytest.raises(UserError, match=f"--workers: {most + 1} need {most + 1} CPUs, but the cluster has {most}: start fewer"):
        train(load_config(recipe(tmp_path)), Ask(workers=(most + 1, most + 1)))
    with pytest.raises(UserError, match=r"--workers: 1 need 1 GPUs.*use --parallel\.device cpu"):
        train(load_config(recipe(tmp_path, parallel={"device": "cuda"})), Ask(workers=(1, 1)))


def test_what_ray_is_asked_for() -> None:
    flags = ["a.yaml", "--workers=1:4", "--cpus", "2", "--train.steps", "3", "--max-failures", "0", "--address", "head:6379"]
    assert read_ask(flags) == (Ask((1, 4), 2, 0, "head:6379"), ["a.yaml", "--train.steps", "3"])
    assert read_ask([]) == (Ask(), [])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--workers", "0"], "--workers: '0' must be a whole number from 1 on"),
        (["--workers", "two"], "--workers: 'two'"),
        (["--workers", "٢"], "--workers: '٢'"),
        (["--workers", "4:2"], "--workers: 4:2 must be MIN:MAX"),
        (["--workers", "1:"], "--workers: ''"),
        (["--max-failures", "-1"], "--max-failures: '-1'"),
        (["--cpus"], "--cpus: a value is missing"),
        (["--address", "ray://head:1; ls"], "--address: 'ray://head:1; ls' must be HOST:PORT or auto"),
    ],
)
def test_what_ray_cannot_be_asked_for(flags: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_ask(flags)
    assert str(caught.value).startswith(said)
