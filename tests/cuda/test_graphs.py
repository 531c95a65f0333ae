"""Passes as CUDA graphs: the numbers of passes without, resumed too, and that graphs are launched."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.jobs import job
from tests.cuda.runs import compiler, on_cpu, peak_of, plain
from tests.cuda.test_step import steps_behind_a_busy_device
from tests.graphs import on_the_cpu
from tests.recipes import MODELS, digests, losses, run

DROPS = {"drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}
SKIP = {"drop_path": 0.4, "drop_path_schedule": "constant", "drop_path_mode": "skip"}
MODEL: dict[str, dict[str, Any]] = {
    "vit": MODELS["vit"] | SKIP | {"options": MODELS["vit"]["options"] | DROPS},
    "masked": MODELS["vit"] | SKIP | {"drop_path_mode": "mask"},
    "resnet": MODELS["resnet"],
}
RUNS = [("vit", "bf16"), ("masked", "amp_bf16"), ("masked", "fp32"), ("masked", "fp16"), ("resnet", "fp32"), ("resnet", "bf16")]


@contextmanager
def launches_counted() -> Iterator[list[int]]:
    """Of each graph that is captured meanwhile, on a GPU or in the imitation, its launches."""
    from bigvision.engine import graphs

    counts: list[int] = []

    def counting(made: Callable[..., Any]) -> Callable[..., Any]:
        def recorder(device: Any) -> Any:
            one = made(device)
            capture = one.capture

            def captured(work: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
                results, launch = capture(work)
                number = len(counts)
                counts.append(0)

                def launched() -> None:
                    counts[number] += 1
                    launch()

                return results, launched

            one.capture = captured
            return one

        return recorder

    before = dict(graphs.RECORDERS)
    with on_the_cpu():
        graphs.RECORDERS |= {kind: counting(made) for kind, made in graphs.RECORDERS.items() if on_cpu() or kind == "cuda"}
        yield counts
    graphs.RECORDERS |= before


def made(out: Path, model: str, precision: str, graphs: bool, **sections: Any) -> dict[str, Any]:
    """Of 28 samples in micro-batches of 8: the first writes gradients, two and a short one add to them."""
    parallel = {"precision": precision, "cuda_graphs": graphs} | sections.pop("parallel", {})
    keys = {
        "train": {"steps": 4, "global_batch": 28, "micro_batch": 8, "deterministic": True}, "optim": {"warmup": 1, "clip": 0.5},
        "task": {"mixup": 0.8, "cutmix": 1.0}, "ema": {"decay": 0.9},
    }  # fmt: skip
    return plain(out, parallel=parallel, **keys | sections) | {"model": MODEL[model]}


def both(folder: Path, model: str, precision: str, **parallel: Any) -> dict[str, Any]:
    """Losses and bytes without and with graphs, and their launches."""
    found: dict[str, Any] = {}
    for graphs in (False, True):
        out = folder / str(graphs)
        with launches_counted() as counts:
            peak = peak_of(made(out, model, precision, graphs, parallel=parallel))
        found[str(graphs)] = {
            "losses": losses(out), "digests": digests(out / "step-00000004"), "launches": counts, "peak": peak
        }  # fmt: skip
    return found


@pytest.mark.parametrize(("model", "precision"), [pytest.param(*row, marks=job(both, *row, seconds=30)) for row in RUNS])
def test_graphs_change_no_byte(
    results: Callable[..., Any], figure: Callable[[str], None], model: str, precision: str
) -> None:  # fmt: skip
    without, with_them = results(both, model, precision).values()
    assert with_them["losses"] == without["losses"] and len(set(without["losses"])) == 4
    assert with_them["digests"] == without["digests"]
    assert (without["launches"], with_them["launches"]) == ([], [4, 8, 4])
    figure(f"{model} {precision}: peak {without['peak'] / 2**20:.0f} MiB, with graphs {with_them['peak'] / 2**20:.0f} MiB")


def compiled(folder: Path) -> dict[str, Any]:
    # The imitation sees no compiled code.
    return both(folder, "vit", "bf16", compile=not on_cpu())


@compiler()
@job(compiled, seconds=90)
def test_graphs_of_compiled_blocks(results: Callable[..., Any]) -> None:
    without, with_them = results(compiled).values()
    assert with_them["losses"] == pytest.approx(without["losses"], rel=1e-5)
    assert (without["launches"], with_them["launches"]) == ([], [4, 8, 4])


def resumed(folder: Path) -> dict[str, Any]:
    """The bytes of a run, and of one that goes on from its middle, with graphs and without."""
    kept = {"checkpoint": {"every": 2, "keep": 9}}
    with launches_counted():
        run(made(folder, "vit", "bf16", True, **kept))
        found = {"whole": digests(folder / "step-00000004")}
        for graphs in (True, False):
            shutil.rmtree(folder / "step-00000004")
            run(made(folder, "vit", "bf16", graphs, **kept))
            found[str(graphs)] = digests(folder / "step-00000004")
    return found


@job(resumed, seconds=40)
def test_a_run_resumes_with_the_same_bytes(results: Callable[..., Any]) -> None:
    found = results(resumed)
    assert found["True"] == found["whole"] == found["False"]


def launched_behind_a_busy_device(folder: Path) -> dict[str, Any]:
    with launches_counted() as counts:
        found = steps_behind_a_busy_device(folder, "ddp", "bf16", cuda_graphs=True)
    return found | {"launches": counts}


@job(launched_behind_a_busy_device)
def test_a_launch_never_waits(results: Callable[..., Any]) -> None:
    found = results(launched_behind_a_busy_device)
    assert found["launches"] == [8, 8] and found["losses"][-1] < found["losses"][0], "the steps trained"
    if not on_cpu():
        assert found["whole"] > 0.4, "the device was busy"
        assert found["host"] < found["whole"] / 2, found
