"""``bigvision plan``: what fits some devices, how fast it is predicted to be, and what would make the rest fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from bigvision.config import Config, resolve
from bigvision.errors import Exit, UserError
from bigvision.planning.beside import can_fork
from bigvision.planning.choice import Plan, gib, plan, rate, spelled
from bigvision.planning.hardware import Hardware, parse_hardware
from bigvision.planning.layouts import Row

SHOWN = 12
"""Layouts that the table has; --json has all."""
SUMS = ("peak", "state", "total", "images_per_second", "mfu")


def run(recipe: str | None, flags: Sequence[str], hardware: str | None, as_json: bool, notes: list[str]) -> int:
    """Print the plan of *recipe* with *flags* and return the exit code: 2 where nothing fits. *notes* come first."""
    config, _ = resolve(recipe, flags, prog="bigvision plan", say=notes.append)
    devices = parse_hardware(hardware) if hardware else here(config)
    found = plan(config, devices, forks=can_fork())
    if as_json:
        print(json.dumps(as_dict(found)))
    else:
        print("\n".join([*(f"# {line}" for line in notes), *table(found)]))
    if not found.rows:
        raise UserError(f"nothing fits on {devices}: {found.advice or 'use more or larger devices, or a smaller model'}")
    return Exit.DONE


def here(config: Config) -> Hardware:
    """The devices of this machine."""
    import torch

    from bigvision.planning.hardware import device_named

    if config.parallel.device == "cpu" or not torch.cuda.is_available():
        return parse_hardware("cpu")
    name, count = torch.cuda.get_device_name(0), torch.cuda.device_count()
    known = device_named(name)
    if known is None:
        raise UserError(f"--hardware: {name}, which is here, is not in the table: name a similar device, or describe it")
    return parse_hardware(f"{count}x{known.name}" if count > 1 else known.name)


def table(found: Plan) -> list[str]:
    """The plan as lines of text."""
    config, hardware, profile = found.config, found.hardware, found.profile
    height, width = profile.image[1:]
    device = hardware.device
    lines = [
        f"{config.model.name}: {profile.parameters / 1e6:.1f} M parameters, images of {height} x {width}, "
        f"{profile.flops / 1e9:.3g} GFLOPs for an image's step",
        f"{hardware}: {gib(device.memory)} GiB each; {config.parallel.precision}, {config.optim.name}, global batch "
        f"{config.train.global_batch}",
        "predicted from datasheets: measure with --calibrate" if device.rates is None else "predicted from what was measured",
        "",
    ]
    if found.rows:
        heads = ("", "strategy", "recompute", "micro-batch", "largest", "GiB", "worst rank", "images/s", "s/step", "MFU")
        offloads = any(one.memory.host or one.memory.pinned for one in found.rows)
        cells: list[tuple[str, ...]] = [heads + ("host GiB",) * offloads]
        for place, one in enumerate(found.rows[:SHOWN], start=1):
            time = one.time
            mfu = "" if time.mfu is None else f"{time.mfu:.0%}"
            cells.append(
                (
                    str(place), one.name, one.config.parallel.recompute, str(one.micro_batch), str(one.largest),
                    gib(one.memory.peak), str(one.memory.rank), rate(time.images_per_second), f"{time.total:.3g}", mfu,
                    *[gib(one.memory.host + one.memory.pinned)] * offloads,
                )
            )  # fmt: skip
        lines += _columns(cells)
        if (more := len(found.rows) - SHOWN) > 0:
            lines.append(f"and {more} more that fit: --json has all")
        first = found.rows[0]
        lines += ["", f"the first: {spelled(first.values) or 'as the recipe says'}"]
    if found.refusals:
        lines += ["", "does not fit:" if found.rows else "nothing fits:"]
        cells = []
        for one in found.refusals[:SHOWN]:
            fix = f"would fit with {one.change}" if one.change else ""
            cells.append((one.name, f"recompute {one.config.parallel.recompute}", one.why, fix))
        lines += _columns(cells, left=True)
        if (more := len(found.refusals) - SHOWN) > 0:
            lines.append(f"and {more} more: --json has all")
    return lines


def _columns(cells: Sequence[Sequence[str]], left: bool = False) -> list[str]:
    """*cells*, rows of texts, in columns; numbers stand right."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        parts = [
            cell.ljust(width) if left or column in (1, 2) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(parts).rstrip())
    return lines


def as_dict(found: Plan) -> dict[str, Any]:
    """The plan as JSON data: sizes in bytes, times in seconds."""
    hardware, profile = found.hardware, found.profile
    return {
        "model": found.config.model.name,
        "parameters": profile.parameters,
        "image": list(profile.image),
        "flops_per_image": profile.flops,
        "hardware": {
            "name": str(hardware), "device": hardware.device.name, "memory": hardware.device.memory, "ranks": hardware.ranks,
            "per_host": hardware.per_host,
        },
        "global_batch": found.config.train.global_batch,
        "rows": [_row(one) for one in found.rows],
        "refusals": [
            {
                "name": one.name, "recompute": one.config.parallel.recompute, "why": one.why, "change": one.change,
                "needs": one.needs,
            }
            for one in found.refusals
        ],
        "advice": found.advice,
    }  # fmt: skip


def _row(one: Row) -> dict[str, Any]:
    return {
        "strategy": one.config.parallel.strategy, "name": one.name, "recompute": one.config.parallel.recompute,
        "values": one.values, "micro_batch": one.micro_batch, "largest": one.largest,
        "memory": numbers(one.memory), "time": numbers(one.time),
    }  # fmt: skip


def numbers(estimate: Any) -> dict[str, Any]:
    """The numbers of a `Memory` or a `StepTime`, and what they add up to."""
    sums = {name: getattr(estimate, name) for name in SUMS if hasattr(estimate, name)}
    return {name: value for name, value in (vars(estimate) | sums).items() if value is None or isinstance(value, (int, float))}
