"""At the start of a run: what auto becomes, kept in ``OUT/choice.json``, and what is predicted, in ``OUT/plan.json``.

A choice is kept at each restart with the same request on as many ranks of the same devices, so that a run resumes exactly,
also under a later version that would choose otherwise. Rank 0 decides for all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bigvision import checkpoint
from bigvision.config import Config, admitted, auto_keys, leaves, with_values, without_auto
from bigvision.config.values import coerce, get, spell
from bigvision.errors import UserError, one_line
from bigvision.models import GivenModel
from bigvision.planning.hardware import DEVICES, LINKED, LINKS, Hardware, hardware_here, peak_of
from bigvision.planning.state import Layout
from bigvision.runtime import Runtime, all_or_none, collective_timeout, from_main, gather_json, start
from bigvision.tasks import Task

if TYPE_CHECKING:
    from bigvision.planning.estimates import Estimates

CHOICE, PLAN = "choice.json", "plan.json"
DECISIVE = ("model.", "task.", "parallel.", "train.global_batch", "train.micro_batch", "optim.name", "ema.decay", "data.resize")
"""How keys begin that a choice depends on. Where one changes, another choice is made."""
FREE = (
    "model.pretrained", "model.weights", "model.drop_path", "model.drop_path_schedule", "model.drop_path_mode",
    "parallel.deepspeed", "parallel.device",
)  # fmt: skip
"""Keys among them of which it stays the same; some change what is predicted a little."""

Say = Callable[[str], None]


class Planner:
    """Plans the run that starts on these ranks. Rank 0's estimates are made when they are first needed, and kept.

    *outputs* are those that the task needs of the model; *model* and *task* are the caller's own.
    """

    def __init__(
        self, runtime: Runtime, say: Say, model: GivenModel | None = None, task: Task | None = None, outputs: int | None = None
    ) -> None:
        self.runtime, self.say = runtime, say
        self._given = (model, task, outputs)
        self._estimates: Estimates | None = None

    def settle(self, config: Config, earlier: str | None = None) -> tuple[Config, Callable[[Path], None]]:
        """*config* with what its keys that are auto become, a line about which is logged; and what keeps that in a folder.

        Called on every rank. *earlier* is the strategy of an earlier version's run in the same folder, which goes on with it.
        """
        keys, runtime = auto_keys(config), self.runtime
        if not keys:
            return config, lambda out: None
        names, memories = zip(*gather_json([_device_name(runtime), _device_memory(runtime)]))
        key = {"ranks": runtime.world_size, "devices": dict(sorted(Counter(names).items())), "asked": request(config)}
        path = Path(config.out) / CHOICE

        def decide() -> tuple[dict[str, Any], str, bool] | None:
            if not runtime.is_main:
                return None
            if (known := _find(path, key)) is not None:
                return known, f"kept from {path}", False
            return *self._decide(config, min(memories), earlier), True

        values, reason, fresh = from_main(all_or_none(decide))

        def keep(out: Path) -> None:
            """Write the choice into *out*, in the place of an earlier one for the same."""
            if runtime.is_main and (fresh or out != path.parent):
                others = [one for one in read_choices(out / CHOICE) if not key.items() <= one.items()]
                content = {"choices": [*others, key | {"chosen": values, "reason": reason}]}
                checkpoint.replace(out / CHOICE, (json.dumps(content, indent=1) + "\n").encode())

        asked = ", ".join(f"{key}: auto is {spell(values.get(key))}" for key in keys)
        changed = {key: value for key, value in values.items() if key not in keys and value != get(config, key)}
        self.say(f"{asked}{''.join(f', {key} {spell(value)}' for key, value in changed.items())}: {reason}")
        return with_values(config, values), keep

    def _decide(self, config: Config, memory: int, earlier: str | None) -> tuple[dict[str, Any], str]:
        """What the keys that are auto become, and why; *memory* is that of the smallest device."""
        keys, fixed, reason = auto_keys(config), dict[str, Any](), ""
        if "parallel.strategy" in keys:
            if earlier in admitted(config):
                fixed, reason = {"parallel.strategy": earlier}, "what the run of an earlier version in this folder had"
            elif self.runtime.world_size == 1 and "ddp" in admitted(config):
                fixed, reason = {"parallel.strategy": "ddp"}, "one rank has the plain module"
            if fixed and len(keys) == 1:
                return fixed, reason
        left = with_values(config, fixed)
        usual = {key: get(without_auto(left), key) for key in keys}
        estimates = self.estimates(memory)
        if estimates is None:
            return usual, f"nothing is known of the speed of {_device_name(self.runtime)}, so nothing is planned"
        from bigvision.planning import choice

        try:
            made = choice.choose(left, estimates)
        except choice.NothingFits as error:
            if estimates.hardware.device.kind == "cuda":
                raise
            return usual, one_line(error)  # a CPU's memory is no firm limit
        except UserError:
            raise
        except Exception as error:  # a module of the user's need not run without memory
            return usual, f"the model cannot be planned ({type(error).__name__}: {one_line(error)})"
        return fixed | made.values, made.reason

    def estimates(self, memory: int) -> Estimates | None:
        """What is known of the run on these devices, *memory* being that of the smallest; None for an unknown device."""
        from bigvision.planning.estimates import Estimates  # it takes a while, and not every start needs it

        if self._estimates is None and (hardware := planned_hardware(self.runtime, memory)) is not None:
            self._estimates = Estimates(hardware, *self._given)
        return self._estimates

    def write(self, config: Config, out: Path) -> None:
        """Write what is predicted of the settled *config* into *out*, or log why not. Called on rank 0.

        Only on GPUs, whose users see what happens beside it, or where the choice needed it anyway: a start of a second is not
        made one of two.
        """
        (out / PLAN).unlink(missing_ok=True)  # of an earlier start
        if self._estimates is None and not (self.runtime.device.type == "cuda" and config.monitor.progress):
            return
        try:
            if (estimates := self.estimates(_device_memory(self.runtime))) is None:
                raise LookupError(f"nothing is known of the speed of {_device_name(self.runtime)}")
            content = as_predicted(config, estimates)
        except Exception as error:  # no reason not to train
            self.say(f"{out / PLAN}: not written, since nothing can be predicted: {one_line(error)}")
            return
        checkpoint.replace(out / PLAN, (json.dumps(content) + "\n").encode())


def as_predicted(config: Config, estimates: Estimates) -> dict[str, Any]:
    """What is predicted of *config*, as plan.json has it: sizes in bytes, times in seconds."""
    memory, time, found = estimates.memory(config), estimates.time(config), estimates.profile(config)
    device, precision = estimates.hardware.device, config.parallel.precision
    return {
        "memory": asdict(memory) | {"state": memory.state},
        "step_seconds": time.total,
        "step": asdict(time),
        "images_per_second": time.images_per_second,
        "flops_per_image": found.flops_in(Layout.of(config, estimates.hardware.ranks).micro_batch(config)),
        "hardware": str(estimates.hardware),
        "peak_flops": peak_of(device, precision),
    }


def read_choices(path: Path) -> list[dict[str, Any]]:
    """The choices of a run's folder; none where the file is missing, or somebody has edited it beyond recognition."""
    try:
        found = json.loads(path.read_bytes())["choices"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _find(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """What *path* has for this request on these devices. `UserError` where somebody has made nonsense of it."""
    kinds = dict(leaves(Config))
    for one in read_choices(path):
        if key.items() <= one.items() and isinstance(chosen := one.get("chosen"), dict):
            if strange := sorted(chosen.keys() - kinds.keys()):
                raise UserError(f"{path}: unknown key {strange[0]!r}: remove the file to choose again")
            values = {name: coerce(value, kinds[name], name, str(path)) for name, value in chosen.items()}
            if missing := [name for name in auto_keys(with_values(Config(), values)) if name in values]:
                raise UserError(f"{path}: {missing[0]}: auto is no choice: remove the file to choose again")
            return values
    return None


def request(config: Config) -> dict[str, Any]:
    """What a choice depends on, as far as it is not the default: so it stays the same when later versions add keys."""
    usual, asked = Config().to_dict(), config.to_dict()
    found = {}
    for key, _ in leaves(Config):
        if key.startswith(DECISIVE) and key not in FREE:
            section, _, name = key.rpartition(".")
            if asked[section][name] != usual[section][name]:
                found[key] = asked[section][name]
    return json.loads(json.dumps(found, sort_keys=True))


def planned_hardware(runtime: Runtime, memory: int) -> Hardware | None:
    """What this run is planned for; *memory* is that of the smallest device.

    On CPUs the table alone decides, and not what was measured here: a choice must not depend on a machine's load.
    """
    if runtime.device.type == "cuda":
        found = hardware_here(runtime)
        return None if found is None else replace(found, device=replace(found.device, memory=memory))
    within, between = (LINKS[name] for name in LINKED["CPU"])
    device = replace(DEVICES["CPU"], memory=memory)
    return Hardware(device, runtime.world_size, runtime.identity.local_world_size, within, between)


def _device_name(runtime: Runtime) -> str:
    return torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else runtime.device.type


def _device_memory(runtime: Runtime) -> int:
    if runtime.device.type == "cuda":
        return torch.cuda.get_device_properties(runtime.device).total_memory
    return DEVICES["CPU"].memory


@contextmanager
def with_mesh(config: Config, runtime: Runtime) -> Iterator[Runtime]:
    """The ranks of *runtime* with the mesh that *config* asks for, where that is another. Called on every rank."""
    parallel = config.parallel
    if (runtime.pipeline_ranks, runtime.replica[1]) == (parallel.pipeline_ranks or runtime.world_size, parallel.replicas):
        yield runtime
    else:
        timeout = collective_timeout(config.limits)
        with start(parallel.device, parallel.replicas, parallel.pipeline_ranks, timeout) as other:
            yield other
