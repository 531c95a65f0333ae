"""A process for a part of a plan: layouts do not depend on each other, and Python computes on one core at a time."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from bigvision.config import Config, with_values
from bigvision.planning.estimates import with_size
from bigvision.planning.layouts import Refusal, Row
from bigvision.planning.memory import Memory
from bigvision.planning.timing import StepTime


def can_fork() -> bool:
    """Whether a forked process would help: there is a second core, and no GPU.

    Tensors without values start CUDA where there is a GPU, which no forked process can use.
    """
    return sys.platform == "linux" and len(os.sched_getaffinity(0)) > 1 and not torch.cuda.is_available()


class Beside:
    """A function that runs in a process of its own, forked now. What it returns comes back as JSON."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        reading, writing = os.pipe()
        self._process = os.fork()
        if self._process == 0:
            code = 1
            try:
                os.close(reading)
                with open(writing, "w") as pipe:
                    json.dump(function(), pipe)
                code = 0
            finally:
                os._exit(code)  # without what this process's parent does at its end
        os.close(writing)
        self._reading = reading

    def result(self) -> Any:
        """What the function returned. Where its process failed the function is called here, so that its error is seen."""
        with open(self._reading) as pipe:
            text = pipe.read()
        _, status = os.waitpid(self._process, 0)
        return json.loads(text) if status == 0 else self._function()


def as_data(found: Row | Refusal) -> dict[str, Any]:
    """*found* as JSON data, without what `from_data` is told."""
    data: dict[str, Any] = {"recompute": found.config.parallel.recompute}
    if isinstance(found, Refusal):
        return data | {"why": found.why, "needs": found.needs, "change": found.change}
    data |= {"values": found.values, "micro_batch": found.micro_batch, "largest": found.largest, "share": found.share}
    for name in ("memory", "time"):
        estimate = getattr(found, name)
        data[name] = {field.name: getattr(estimate, field.name) for field in fields(estimate)}
    return data


def from_data(data: dict[str, Any], config: Config) -> Row | Refusal:
    """What `as_data` was given; *config* is the layout's, but for recompute and the micro-batch."""
    config = with_values(config, {"parallel.recompute": data["recompute"]})
    if "why" in data:
        return Refusal(config, data["why"], data["needs"], data["change"])
    memory, time = Memory(**data["memory"]), StepTime(**data["time"])
    sized = with_size(config, data["micro_batch"])
    return Row(data["values"], sized, data["micro_batch"], data["largest"], data["share"], memory, time)
