"""Plan every model of timm for some hardware, on this machine, and write a table of what was found.

    python -m benchmarks.plan_models --hardware 8xH200 --out plan_models.jsonl     # goes on where it was stopped
    python -m benchmarks.plan_models --out plan_models.jsonl --commit "abc1234 of 1 May" --table docs/plan_models.md

Each line of the file is one model: what `auto` chooses for it with AdamW, bf16 and a global batch of 1024, its memory and
predicted speed; or why there is no plan. Where several of timm's names stand for one architecture it is planned once.
Nothing is trained and no weights are read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from bigvision.config import load_config
from bigvision.errors import UserError, one_line
from bigvision.planning.choice import GIB, choose, rate
from bigvision.planning.estimates import Estimates, has_batchnorm
from bigvision.planning.hardware import parse_hardware

BATCH = 1024
AGAIN = {"blocks": " with recompute", "selective": " with selective recompute"}


def planned(name: str, hardware: str, known: dict[str, str]) -> dict[str, Any]:
    """The line of one model; *known*: the models whose architectures are planned, by `architecture`."""
    began = time.process_time()
    line: dict[str, Any] = {"model": name, "hardware": hardware}
    try:
        estimates = Estimates(parse_hardware(hardware))
        asked: dict[str, Any] = {"out": "unused", "model": {"name": name}, "train": {"global_batch": BATCH}}
        plain = load_config(asked | {"parallel": {"strategy": "ddp"}})
        made, _ = estimates.built(plain)
        line["architecture"] = architecture(made.module, made.input_shape)
        if (same := known.get(line["architecture"])) is not None:
            return line | {"same": same}
        found = estimates.profile(plain)
        # BatchNorm's micro-batch is a matter of what is learned: a rank's whole part of the batch.
        asked["train"]["micro_batch"] = None if (norm := has_batchnorm(found)) else "auto"
        config = load_config(asked | {"parallel": {"recompute": "auto"}})
        made = choose(config, estimates)
        line |= {
            "parameters": found.parameters, "image": list(found.image), "flops": found.flops, "batchnorm": norm,
            "strategy": made.row.name, "recompute": made.row.config.parallel.recompute, "micro_batch": made.row.micro_batch,
            "rank": made.row.memory.rank, "memory": made.row.memory.peak, "images_per_second": made.row.time.images_per_second,
            "mfu": made.row.time.mfu,
        }  # fmt: skip
    except UserError as error:
        line["refused"] = str(error)
    except Exception as error:  # one model must not end the others
        line["failed"] = f"{type(error).__name__}: {one_line(error)[:200]}"
    return line | {"seconds": round(time.process_time() - began, 2)}


def architecture(module: nn.Module, shape: tuple[int, ...]) -> str:
    """Equal for equal modules that get images of one shape: their code, tensors and plain attributes, and not their weights."""
    found: list[Any] = [shape]
    for path, part in module.named_modules():
        tensors = [
            (name, tuple(tensor.shape))
            for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        ]
        plain = [(name, value) for name, value in vars(part).items() if isinstance(value, (bool, int, float, str, tuple))]
        found.append((path, type(part).__qualname__, tensors, sorted(plain, key=str)))
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def read(path: Path) -> list[dict[str, Any]]:
    """The lines that are there; one that was cut by a kill is left out, and its model planned again."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def table(lines: list[dict[str, Any]], known: int, commit: str) -> str:
    """A page of all lines, the largest models first."""
    same, seconds = [line for line in lines if "same" in line], sum(line.get("seconds", 0.0) for line in lines)
    lines = [line for line in lines if "same" not in line]
    fits = sorted((line for line in lines if "strategy" in line), key=lambda line: (-line["parameters"], line["model"]))
    hardware = ", ".join(sorted({line["hardware"] for line in lines}))
    strategies = Counter((line["strategy"].partition(",")[0], line["recompute"]) for line in fits)
    counts = ", ".join(
        f"{count} {strategy}{AGAIN.get(recompute, '')}" for (strategy, recompute), count in strategies.most_common()
    )
    rows = [
        f"| `{line['model']}` | {line['parameters'] / 1e6:.1f} | {line['image'][1]} | {line['flops'] / 1e9:.4g} | "
        f"{line['strategy']}{AGAIN.get(line['recompute'], '').replace(' with', ',')} | "
        f"{line['micro_batch']}{' (whole)' if line['batchnorm'] else ''} | {line['memory'] / GIB:.1f} | "
        f"{rate(line['images_per_second'])} |"
        for line in fits
    ]
    others = [f"- `{line['model']}`: {line.get('refused') or line.get('failed')}" for line in lines if "strategy" not in line]
    page = [
        f"# All models, planned for {hardware}",
        "",
        "<!-- Written by `python -m benchmarks.plan_models --table`. -->",
        "",
        f"What `auto` chooses ([plan](plan.md)) for timm's models on {hardware}: AdamW, bf16, a global batch of {BATCH},",
        "the model's own image size. Speeds are predictions from datasheets, not measurements. With BatchNorm the",
        "micro-batch is a rank's whole part of the batch. GFLOPs are of an image's forward and backward pass, GiB of the",
        "rank that needs the most.",
        "",
        f"{len(lines) + len(same)} of timm's {known} names were planned, by commit {commit}.",
        *([f"{len(same)} names stand for the same architecture as another, with images of the same size."] if same else []),
        f"{counts or 'None'}{f'; {len(others)} have no plan' if others else ''}.",
        f"A model took {seconds / max(1, len(lines)):.1f} s of processor time on average.",
        "",
        "| model | M parameters | image | GFLOPs | layout | micro-batch | GiB | images/s |",
        "|---|--:|--:|--:|---|--:|--:|--:|",
        *rows,
    ]
    return "\n".join([*page, *(["", "Without a plan:", "", *others] if others else [])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hardware", default="8xH200")
    parser.add_argument("--out", type=Path, default=Path("plan_models.jsonl"))
    parser.add_argument("--models", nargs="*", help="patterns of timm's names; all by default")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no other model after so many")
    parser.add_argument("--commit", default="unknown", help="which made the lines, with its date; the page names it")
    parser.add_argument("--table", type=Path, help="write this page from the lines that are there, and plan nothing")
    asked = parser.parse_args()
    names = timm.list_models(asked.models or "")
    if asked.table:
        asked.table.write_text(table(read(asked.out), len(names), asked.commit), encoding="utf-8")
        return
    lines = [line for line in read(asked.out) if line["hardware"] == asked.hardware]
    done = {line["model"] for line in lines}
    known = {line["architecture"]: line["model"] for line in lines if "strategy" in line}
    end = time.monotonic() + 60 * asked.minutes
    with asked.out.open("a", encoding="utf-8", buffering=1) as file:
        if asked.out.stat().st_size and not asked.out.read_bytes().endswith(b"\n"):
            file.write("\n")  # after a line that was cut
        for number, name in enumerate(names, start=1):
            if name in done:
                continue
            if time.monotonic() > end:
                break
            line = planned(name, asked.hardware, known)
            if "strategy" in line:
                known[line["architecture"]] = name
            file.write(json.dumps(line) + "\n")
            found = next(line[key] for key in ("strategy", "same", "refused", "failed") if key in line)
            print(f"{number} of {len(names)}: {name}: {found}, {line.get('seconds', 0)} s", flush=True)
            torch._dynamo.reset()


if __name__ == "__main__":
    main()
