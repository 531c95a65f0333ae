"""How fast does a GPU train, beside loops written by hand, plain fully_shard, plain DeepSpeed and Accelerate?

``python -m benchmarks.gpu`` runs every part in a process of its own, at most two minutes each; ``--part NAME`` runs one. Parts
for several ranks run under torchrun where there are several GPUs. Each part's figures go as they come, beside those of other
parts, to ``benchmarks/results/gpu_DEVICE.{json,md}``: a part that is killed loses only what it had not measured yet.
``--device cpu`` is a dry run with tiny models.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu_sides import (
    CONVNEXT_L,
    RESNET_18,
    RESNET_50,
    VIT_G,
    VIT_H,
    VIT_L,
    VIT_S,
    VIT_TI,
    Bench,
    Model,
    Side,
    Stopwatch,
    figures,
    host_time,
    idle_share,
    peak_of,
    start_side,
    warm_compiler,
)
from benchmarks.harness import Report, compare
from bigvision.runtime import from_main, start

RESULTS = Path(__file__).parent / "results"
LIMIT = 120.0
"""Seconds that a part may take."""
CALLS = 3
"""Timed steps of a side in a round."""


@dataclass(frozen=True)
class Part:
    """Sides that are measured together; the first is the baseline."""

    model: Model
    sides: tuple[Side, ...]
    ranks: bool = False
    """Whether it is for several ranks, under torchrun."""
    stages: int | None = 1
    """Ranks in a pipeline; None is all of them."""
    first_step: bool = False
    """Whether only the time to the first step is measured, which needs a process that has compiled nothing like it."""


def ours(strategy: str, **more: Any) -> Side:
    return Side("bigvision", strategy, **more)


HAND, HAND_COMPILED = Side("hand-written"), Side("hand-written", compiled=True)
FEW = replace(VIT_L, batch=8)
HAND_CHANNELS_LAST = Side("hand-written", channels_last=True)

GRAPHS = (
    ours("ddp"), ours("ddp", graphs=True, bound=1 / 1.3), ours("ddp", compiled=True), ours("ddp", compiled=True, graphs=True),
)  # fmt: skip

# At most so many sides as an 80 GB device holds beside one side's activations.
PARTS: dict[str, Part] = {
    "vit_l": Part(VIT_L, (HAND, ours("ddp", bound=1.01), ours("ddp", precision="amp_bf16"), Side("accelerate"))),
    "vit_l_compiled": Part(
        VIT_L, (HAND_COMPILED, ours("ddp", compiled=True, bound=1.01), ours("fsdp", compiled=True), HAND)
    ),
    "vit_l_fsdp": Part(VIT_L, (Side("fully_shard"), ours("fsdp", bound=1.02), HAND)),
    **{
        f"vit_l_{stage}": Part(VIT_L, (Side("deepspeed", stage), ours(stage, bound=1.02)))
        for stage in ("zero1", "zero2", "zero3")
    },
    # How much of the copies' time computing hides, and the peaks.
    "vit_l_offload": Part(
        VIT_L, (
            ours("ddp", compiled=True), ours("ddp", compiled=True, offload="activations"),
            ours("ddp", compiled=True, recompute="blocks"),
            ours("ddp", compiled=True, recompute="blocks", offload="activations"),
        )
    ),
    "vit_l_ema": Part(VIT_L, (ours("ddp"), ours("ddp", ema=True))),
    # The bound is what the new bf16 should gain over autocast: 1 / 1.03.
    "vit_h_compiled": Part(VIT_H, (HAND_COMPILED, ours("ddp", compiled=True, bound=1 / 1.03))),
    "vit_h_autocast": Part(VIT_H, (HAND_COMPILED, ours("ddp", precision="amp_bf16", compiled=True, bound=1.01))),
    "vit_h_fsdp": Part(VIT_H, (Side("fully_shard", compiled=True), ours("fsdp", compiled=True, bound=1.02))),
    # With fp8 it should be at least 1.15 times as fast.
    "vit_g_fp8": Part(
        VIT_G, (ours("ddp", compiled=True), ours("ddp", precision="fp8", compiled=True, bound=1 / 1.15))
    ),
    "convnext_l": Part(CONVNEXT_L, (HAND_CHANNELS_LAST, ours("ddp", bound=1.01), HAND)),
    "resnet_50": Part(RESNET_50, (HAND_CHANNELS_LAST, ours("ddp", bound=1.01), ours("fsdp"), HAND, Side("accelerate"))),
    # Bound by launches: passes as CUDA graphs should be at least 1.3 times as fast.
    "vit_ti_graphs": Part(VIT_TI, GRAPHS),
    "vit_s_graphs": Part(VIT_S, GRAPHS),
    "resnet_18_graphs": Part(RESNET_18, GRAPHS[:2]),
    # Compiled with drop path the first step may take 1.3 times as long as without.
    "first_step_hand_written": Part(FEW, (HAND_COMPILED,), first_step=True),
    "first_step": Part(FEW, (ours("ddp", compiled=True),), first_step=True),
    "first_step_drop_path": Part(replace(FEW, drop_path=0.2), (ours("ddp", compiled=True),), first_step=True),
    "ranks_ddp": Part(VIT_L, (HAND, ours("ddp", bound=1.01)), ranks=True),
    "ranks_fsdp": Part(VIT_L, (Side("fully_shard"), ours("fsdp", bound=1.02), Side("accelerate")), ranks=True),
    "ranks_zero2": Part(VIT_L, (Side("deepspeed", "zero2"), ours("zero2", bound=1.02)), ranks=True),
    "ranks_zero3": Part(VIT_L, (Side("deepspeed", "zero3"), ours("zero3", bound=1.02)), ranks=True),
    "ranks_pipeline": Part(VIT_L, (ours("pipeline"),), ranks=True, stages=None),
}  # fmt: skip


def main() -> int:
    """Run one part, or each in a process of its own; return the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--part", choices=[*PARTS, *SPECIAL], help="this one alone, in this process")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, help="samples of a step on one rank, where not the part's own")
    parser.add_argument("--peak", type=float, help="operations per second of the device, where its name is not known")
    parser.add_argument("--seconds", type=float, default=LIMIT - 25, help="after which a part takes no further round")
    parser.add_argument("--rounds", type=int, default=24, help="the most that a part takes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no CUDA device; --device cpu is a dry run with tiny models", file=sys.stderr)
        return 2
    if asked.part is None:
        return run_all(asked)
    if asked.device == "cuda" and peak_of(torch.cuda.get_device_name(), asked.peak) is None:
        print(f"no peak is known for {torch.cuda.get_device_name()}: give --peak for the MFU", file=sys.stderr)
    run_part(asked, time.perf_counter())
    return 0


def run_all(asked: argparse.Namespace) -> int:
    """Every part that this machine has devices for; one that fails or takes too long does not keep the others from running."""
    devices = torch.cuda.device_count() if asked.device == "cuda" else 2
    several = [name for name, part in PARTS.items() if part.ranks]
    failed = []
    for name in [*(name for name in PARTS if name not in several), *SPECIAL, *(several if devices > 1 else [])]:
        flags = ["--part", name, "--device", asked.device, "--results", str(asked.results), "--rounds", str(asked.rounds)]
        flags += [f"--peak={asked.peak}"] * (asked.peak is not None) + [f"--batch={asked.batch}"] * (asked.batch is not None)
        with tempfile.TemporaryDirectory() as folder:
            launcher = torchrun(devices, folder) if name in several else []
            command = [sys.executable, *launcher, "-m", "benchmarks.gpu", *flags]
            begin = time.perf_counter()
            process = subprocess.Popen(command, start_new_session=True)
            try:
                code = process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                code = 124
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # also the ranks of torchrun
                process.wait()
        print(f"{name}: {time.perf_counter() - begin:.0f} s, exit code {code}", flush=True)
        failed += [name] * (code != 0)
    if failed:
        print(f"error: these parts failed or took more than {LIMIT:.0f} s: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def torchrun(ranks: int, folder: str) -> list[str]:
    """The arguments to Python of torchrun, whose ranks meet in a file in *folder*."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--rdzv-endpoint", f"{folder}/meet"]
    return ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *meeting, "--local-addr", "127.0.0.1"]


def run_part(asked: argparse.Namespace, begin: float) -> None:
    """Measure a part, in this process; *begin* is when it started."""
    if asked.part in SPECIAL:
        with start(asked.device) as runtime:
            results = Results(asked, runtime.is_main)
            results.put(SPECIAL[asked.part](asked, runtime))
        return
    part = PARTS[asked.part]
    # A limit of recompiles that is met would compare eager blocks with compiled ones.
    torch._dynamo.config.recompile_limit = 256
    with start(asked.device, stages=part.stages) as runtime:
        bench = Bench(part.model, runtime, asked.batch)
        results = Results(asked, runtime.is_main)
        found: dict[str, Any] = {
            "model": bench.name, "batch": bench.batch, "ranks": runtime.world_size, "flops": bench.flops(), "sides": {},
        }  # fmt: skip
        found["sides"] = {side.name: {"missing": side.missing} if side.missing else {} for side in part.sides}
        if any(side.compiled for side in part.sides):
            warm_compiler(runtime.device)
        watches: dict[str, Stopwatch] = {}
        # Ours first: it makes DeepSpeed forget what it counted for earlier models.
        for side in sorted(part.sides, key=lambda side: side.kind != "bigvision"):
            if not side.missing:
                watches[side.name], facts = start_side(bench, side)
                if side.compiled and not part.first_step:
                    del facts["first step"]  # of what another side has compiled the process keeps some
                found["sides"][side.name] = facts
            results.put(found)
        if watches and not part.first_step:
            check_losses(found["sides"])
            race(asked, begin, bench, {name: watches[name] for name in found["sides"] if name in watches}, found, results)


def check_losses(sides: dict[str, dict[str, Any]]) -> None:
    """Raise where the first losses of the sides differ by more than bf16's roundings: they would not do the same work."""
    first = {name: facts["loss"] for name, facts in sides.items() if "loss" in facts}
    if max(first.values()) - min(first.values()) > 2e-2 * max(first.values()):
        raise AssertionError(f"the sides do not do the same work: their first losses are {first}")


def race(
    asked: argparse.Namespace,
    begin: float,
    bench: Bench,
    watches: dict[str, Stopwatch],
    found: dict[str, Any],
    results: Results,
) -> None:
    """Time all sides in turns until the time is over, and write after each round."""
    ranks, peak = bench.runtime.world_size, peak_of(results.device, asked.peak)
    for name, watch in watches.items():
        found["sides"][name] |= {"host ms": host_time(watch), "idle": idle_share(watch)}
        watch.marks.clear()

    def take(report: Report) -> bool:
        for line in report.lines:
            if line.name not in watches:
                found["control"] = line.ratio
                continue
            # The baseline runs twice in each round.
            steps = watches[line.name].steps(CALLS)
            images = bench.batch * (1 if bench.runtime.pipeline_ranks > 1 else ranks)
            found["sides"][line.name] |= figures(steps, images, found["flops"], peak, ranks)
            found["sides"][line.name] |= {"ratio": line.ratio, "interval": line.interval}
        found["rounds"] = report.rounds
        results.put(found)
        return bool(from_main(time.perf_counter() - begin < asked.seconds))

    baseline = next(iter(watches))
    compare("", watches, baseline, rounds=asked.rounds, calls=CALLS, warmup=0, device=bench.device, after_round=take)


# Parts that are no race.


def saves(asked: argparse.Namespace, runtime: Any) -> dict[str, Any]:
    """How long training stands still for a save, in the background and not, and what it does to the steps meanwhile."""
    from bigvision.checkpoint import Retention, Saver
    from bigvision.config import parse_size
    from bigvision.data import Batch
    from bigvision.training.build import build_model
    from bigvision.training.saving import progress_of

    bench = Bench(VIT_L, runtime, asked.batch)
    config = bench.config(ours("fsdp"))
    engine, _, card = build_model(config, 10, runtime, steps=1000, say=lambda text: None)
    images, labels = bench.data
    batch = Batch(images, labels, labels, torch.ones_like(labels, dtype=torch.bool))

    def timed(work: Callable[[], Any]) -> float:
        bench.finish()
        begin = time.perf_counter()
        work()
        bench.finish()
        return time.perf_counter() - begin

    def step() -> float:
        return timed(lambda: engine.train_step(batch))

    documents = {"config.json": card, "progress.json": progress_of(engine, config, {})}
    found: dict[str, Any] = {"model": bench.name, "batch": bench.batch, "ranks": 1, "sides": {}}
    alone = median([step() for _ in range(8)][3:])
    for background in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            saver = Saver(Path(folder), parse_size("5GB", ""), Retention(1, None, None), background=background)
            stalls, during, whole = [], [], []
            for number in range(3):
                begin = time.perf_counter()
                stalls.append(timed(partial(saver.save, number, engine.fragments(), documents)))
                while not saver.done:
                    during.append(step())
                saver.wait()
                whole.append(time.perf_counter() - begin)
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
            saver.close()
        found["sides"]["background" if background else "foreground"] = {
            "GB": size / 1e9,
            "first stall ms": 1e3 * stalls[0],
            "stall ms": 1e3 * min(stalls[1:]),
            "seconds until on the disk": median(whole),
            "steps meanwhile over alone": median(during) / alone if during else None,
        }
    return found


LAYERS = (
    (768, 3072), (1024, 1024), (1024, 3072), (1024, 4096), (4096, 1024), (1280, 3840), (1280, 5120), (1408, 1408), (1408, 4224),
    (1408, 6144), (6144, 1408), (4096, 12288),
)  # fmt: skip
"""Inputs and outputs of linear layers of ViT-B, ViT-L, ViT-H, ViT-g and DINOv3's 7B."""


def fp8_layers(asked: argparse.Namespace, runtime: Any) -> dict[str, Any]:
    """Linear layers of ViTs forward and backward, behind a norm as in a block and compiled: bf16's time over fp8's, beside the
    roofline's by which a run chooses its layers."""
    from bigvision.models.float8 import speedup, use_float8

    dry = asked.device == "cpu"
    rows = 64 if dry else (asked.batch or 64) * 257
    found: dict[str, Any] = {"model": "linear layers", "batch": rows, "ranks": runtime.world_size, "sides": {}}
    for wide, out in LAYERS[:2] if dry else LAYERS:
        seconds: list[float] = []
        for names in (frozenset[str](), frozenset({"1"})):
            layers = torch.nn.Sequential(torch.nn.LayerNorm(wide), torch.nn.Linear(wide, out), torch.nn.GELU())
            layers = layers.to(runtime.device, torch.bfloat16)
            use_float8(layers, names)
            images = torch.randn(rows, wide, device=runtime.device, dtype=torch.bfloat16, requires_grad=True)
            gradient = torch.randn(rows, out, device=runtime.device, dtype=torch.bfloat16)
            run = layers if dry else torch.compile(layers, dynamic=False)
            seconds.append(_seconds(lambda run=run, images=images, gradient=gradient: run(images).backward(gradient), dry))
        found["sides"][f"{wide} to {out}"] = {
            "bf16 ms": 1e3 * seconds[0], "fp8 ms": 1e3 * seconds[1], "bf16 over fp8": seconds[0] / seconds[1],
            "by the roofline": speedup(rows, wide, out),
        }  # fmt: skip
    return found


def _seconds(work: Callable[[], object], dry: bool) -> float:
    """The median of a call of *work*, after three that do not count."""
    times = []
    for _ in range(3 + (2 if dry else 30)):
        if not dry:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        if not dry:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return median(times[3:])


SPECIAL: dict[str, Callable[[argparse.Namespace, Any], dict[str, Any]]] = {"saves": saves, "fp8_layers": fp8_layers}


# The files.


class Results:
    """``gpu_DEVICE.json``, a part beside the other, and the same as Markdown. Only rank 0 writes."""

    def __init__(self, asked: argparse.Namespace, writes: bool) -> None:
        self.part, self.writes = asked.part, writes
        self.device = torch.cuda.get_device_name() if asked.device == "cuda" else "dry run on the CPU"
        self.stem = asked.results / f"gpu_{re.sub('[^a-z0-9]+', '_', self.device.lower())}"

    def put(self, found: dict[str, Any]) -> None:
        """Replace this part's figures."""
        if not self.writes:
            return
        path = self.stem.with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = json.loads(path.read_text())["parts"] if path.exists() else {}
        versions = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        parts[self.part] = versions | found
        text = json.dumps({"device": self.device, "parts": parts}, indent=1)
        for target, content in ((path, text), (self.stem.with_suffix(".md"), table(self.device, parts))):
            temporary = target.with_suffix(".tmp")
            temporary.write_text(content + "\n")
            temporary.replace(target)


COLUMNS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "ms a step": lambda f: f"{f['ms']:.1f}",
    "over the first": lambda f: f"{f['ratio']:.3f} ({f['interval'][0]:.3f} to {f['interval'][1]:.3f})",
    "at most": lambda f: f"{f['bound']:.3f}",
    "images/s": lambda f: f"{f['images/s']:.0f}",
    "MFU": lambda f: f"{f['mfu']:.1%}",
    "mean/median": lambda f: f"{f['mean/median']:.3f}",
    "host ms": lambda f: f"{f['host ms']:.1f}",
    "device idle": lambda f: f"{f['idle']:.1%}",
    "peak memory, GiB": lambda f: f"{f['peak memory'] / 2**30:.1f}",
    "build, s": lambda f: f"{f['build']:.1f}",
    "first step, s": lambda f: f"{f['first step']:.1f}",
}


def table(device: str, parts: dict[str, Any]) -> str:
    """All parts as Markdown."""
    rows = [f"# {device}", ""]
    for name, found in parts.items():
        facts = (
            f"{found['model']}, batch {found['batch']} a rank, {found['ranks']} ranks, torch {found['torch']}, {found['date']}"
        )
        rows += [f"## {name}", "", facts + (f", {found['rounds']} rounds of {CALLS} steps" if "rounds" in found else ""), ""]
        sides = found["sides"]
        if name in SPECIAL:
            columns = {key: (lambda f, key=key: f"{f[key]:.3g}") for key in next(iter(sides.values()))}
        else:
            # Without those that no side has.
            columns = {key: form for key, form in COLUMNS.items() if any(_cell(form, side) for side in sides.values())}
        rows += ["| side | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
        for side, measured in sides.items():
            cells = [_cell(form, measured) for form in columns.values()]
            rows.append(f"| {side} | " + (measured["missing"] if "missing" in measured else " | ".join(cells)) + " |")
        if "control" in found:
            rows += ["", f"The first side a second time, over itself: {found['control']:.3f}."]
        rows.append("")
    return "\n".join(rows)


def _cell(form: Callable[[dict[str, Any]], str | None], facts: dict[str, Any]) -> str:
    try:
        return form(facts) or ""
    except (KeyError, TypeError):  # not measured here
        return ""


if __name__ == "__main__":
    sys.exit(main())
