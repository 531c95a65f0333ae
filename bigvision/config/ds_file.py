"""A DeepSpeed configuration file (JSON), read without DeepSpeed; merged with the recipe, and written back for DeepSpeed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigvision.config import ds_keys
from bigvision.config.ds_keys import Choice, Knob, Neutral, Only, Ours, Refused, Rule
from bigvision.config.schema import Config
from bigvision.config.values import coerce, get, spell
from bigvision.errors import UserError, nearest

NEVER = (None, 0, math.inf)
"""Values of a number of steps."""
COMMENTS = ("_", "//", "#", "comment")
"""With what people begin the names of keys that are comments."""
UNDECIDED = ("parallel.strategy", "train.micro_batch", "train.steps")
"""Keys whose null, or auto, leaves the value open."""


@dataclass
class DsFile:
    """What a file says; `read_ds_file` fills it."""

    path: str
    asked: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """Our key → (the value that the file asks for, the file's key). What the file leaves to us is not here."""
    also: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Other values that agree with the file, where a part of what decides the key is "auto"."""
    knobs: dict[str, Any] = field(default_factory=dict)
    """What DeepSpeed gets as it stands, nested as in the file, without "auto"."""
    written: dict[str, Any] = field(default_factory=dict)
    """The file's key → its value, for the keys that are ours."""
    present: set[str] = field(default_factory=set)
    """All keys and sections of the file that ask for something."""
    notes: list[str] = field(default_factory=list)
    """What of the file has no meaning here, or another one than it looks; a line each."""
    neutral: dict[str, list[str]] = field(default_factory=dict)
    """A reason why keys have no meaning here → these keys."""

    @property
    def accumulation(self) -> int | None:
        """gradient_accumulation_steps; whether it fits is known with the number of ranks."""
        steps = self.written.get("gradient_accumulation_steps", "auto")
        return None if steps == "auto" else int(steps)

    def error(self, text: str) -> UserError:
        return UserError(f"{self.path}: {text}")

    def parse(self) -> dict[str, Any]:
        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            names = [name for name, _ in pairs]
            if twice := [name for name in names if names.count(name) > 1]:
                raise self.error(f"the key {twice[0]!r} is written twice: drop one of the two")
            return dict(pairs)

        def finite(text: str) -> float:
            # Infinity is how accelerate writes "never".
            if not math.isfinite(number := float(text)) and text != "Infinity":
                raise self.error(f"{text} is not a finite number: write one")
            return number

        try:
            text = Path(self.path).read_text(encoding="utf-8-sig")
            tree = json.loads(text, object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
        except OSError as error:
            raise self.error(f"{error.strerror or error}: name a DeepSpeed configuration file") from None
        except UnicodeDecodeError:
            raise self.error("not UTF-8 text: name a DeepSpeed configuration file") from None
        except json.JSONDecodeError as error:
            hint = _json_hint(error.doc, error.pos)
            raise self.error(f"not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}{hint}") from None
        except (RecursionError, ValueError):
            raise self.error("not valid JSON: sections or numbers of a size that no setting has") from None
        if not isinstance(tree, dict):
            raise self.error(f"must hold an object such as {{...}}, not {_json(tree)}")
        return tree

    def walk(self, tree: Mapping[str, Any], table: Mapping[str, Rule], prefix: str = "") -> dict[str, Any]:
        """Apply *table* to the section *tree*; return its knobs."""
        knobs: dict[str, Any] = {}
        for name, rule in table.items():
            if name not in tree:
                continue
            key, value = prefix + name, tree[name]
            if isinstance(rule, Mapping) and (value is None or value is False or value in ("auto", {})):
                continue  # asks for nothing, as where it is left out
            self.present.add(key)
            if isinstance(rule, Mapping):
                if not isinstance(value, dict):
                    raise self.error(f"{key}: {_json(value)} must be a section of keys: {{...}}")
                if _unquoted(value.get("enabled"), "bool") is False:
                    # What else is in a section that is switched off does not count, of whatever version it is.
                    value = {"enabled": False}
                if inner := self.walk(value, rule, f"{key}."):
                    knobs[name] = inner
            elif isinstance(rule, Refused):
                if not _is_off(value, rule.switch):
                    raise self.error(f"{key}: {_json(value)} is refused: {rule.why}")
            elif isinstance(rule, Neutral):
                if value != "auto" and not _is_off(value, rule.switch):
                    self.neutral.setdefault(rule.why, []).append(key)
            elif isinstance(rule, Only):
                self.written[key] = _unquoted(value, "number")
                if value not in (None, "auto") and not any(_same(value, right) for right in rule.values):
                    raise self.error(f"{key}: {_json(value)} is refused: {rule.why}")
            elif isinstance(rule, Choice):
                if value is None and rule.null:
                    continue
                if not isinstance(value, str):
                    raise self.error(f"{key}: {_json(value)} is not a text")
                self.written[key], low = value, value.lower()
                if low not in rule.accepts and value != "auto":
                    raise self.error(f"{key}: {_json(value)} is refused: {rule.refused.get(low, rule.fix)}")
                if value != "auto":
                    self.ask(rule.key, rule.accepts[low], key)
            else:
                value = _unquoted(value, rule.kind)
                typed = value if value == "auto" else self.typed(key, value, rule)
                if isinstance(rule, Ours):
                    self.written[key] = value
                    if rule.key and value != "auto":
                        self.ask(rule.key, None if rule.key == "optim.clip" and value == 0 else typed, key)
                elif value != "auto":
                    knobs[name] = typed
        # Comments, as JSON has none of its own.
        tree = {name: value for name, value in tree.items() if not name.startswith(COMMENTS)}
        # Last: a known key that is wrong, such as an optimizer's type, often explains an unknown one.
        for name in tree:
            if name not in table:
                known = [known for known, rule in table.items() if not isinstance(rule, Refused)]
                raise self.error(f"unknown key {prefix + name!r}{nearest(name, known)}; correct or drop it")
        return knobs

    def typed(self, key: str, value: Any, rule: Ours | Knob) -> Any:
        """*value* as the rule's kind; 5e8 is a whole number, as it is for DeepSpeed."""
        if rule.kind == "interval" and value in NEVER:
            return None
        number = _is_number(value)
        name, right = {
            "bool": ("true or false", isinstance(value, bool)),
            "int": ("a whole number", number and value % 1 == 0),
            "interval": ("a number of steps", number and value % 1 == 0),
            "number": ("a number", number),
            "stage": ("one of 0, 1, 2, 3", number and value in (0, 1, 2, 3)),
            "device": ("one of none, cpu", value in ("none", "cpu")),
            "level": ("one of " + ", ".join(ds_keys.LEVELS), value in ds_keys.LEVELS),
            "betas": ("a list of 2 numbers", _is_pair(value)),
        }[rule.kind]
        if (rule.kind, value) == ("device", "nvme"):
            raise self.error(f'{key}: "nvme" is refused: bigvision offloads to CPU memory; write "cpu" or "none"')
        if not right:
            raise self.error(f'{key}: {_json(value)} is not {name} or "auto"')
        if number and not rule.lowest <= value <= rule.highest:
            limit = f"from {rule.lowest:g} on" if rule.highest == math.inf else f"from {rule.lowest:g} to {rule.highest:g}"
            raise self.error(f"{key}: {_json(value)} must be {limit}")
        if rule.kind == "stage":
            return f"zero{int(value)}" if value else "ddp"
        return int(value) if rule.kind in ("int", "interval") else value

    def ask(self, ours: str, value: Any, key: str) -> None:
        before = self.asked.setdefault(ours, (value, key))
        if before[0] != value:
            raise self.error(f"{before[1]} and {key} both set {ours}, to {before[0]} and {value}: make them equal")

    def strategy(self) -> None:
        """Stage 0, DeepSpeed's value where none is written, is data-parallel training in which nothing is sharded."""
        key = "zero_optimization.stage"
        if key not in self.written:
            self.written[key] = 0
            self.ask("parallel.strategy", "ddp", key)
            self.also["parallel.strategy"] = ("zero1", "zero2", "zero3")
        if self.written[key] == 0:
            self.notes.append(f"{key}: 0, or none, shards nothing, which is parallel.strategy: ddp")

    def batches(self) -> None:
        """The three sizes have to be those of a whole number of ranks."""
        names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        total, *parts = (self.written.get(name, "auto") for name in names)
        if total != "auto" and "auto" not in parts and total % math.prod(parts):
            raise self.error(
                f"{names[0]}: {total} is not {names[1]}: {parts[0]} times {names[2]}: {parts[1]} times a number of ranks: "
                'make them fit, or write "auto" for one of them'
            )

    def precision(self) -> None:
        """One that is on decides. One that is off leaves the other, unless that is off too."""
        states = {"fp16": "fp16.enabled", "bf16": "bfloat16.enabled" if "bfloat16.enabled" in self.written else "bf16.enabled"}
        on = [name for name, key in states.items() if self.written.get(key) is True]
        off = [name for name, key in states.items() if self.written.get(key) is False]
        if len(on) == 2:
            raise self.error(f"{states['fp16']} and {states['bf16']} are both true: choose one of the two")
        if on:
            self.ask("parallel.precision", on[0], states[on[0]])
            self.also["parallel.precision"] = ("fp8",) if on[0] == "bf16" else ()  # which holds and sends what bf16 does
        elif off:
            self.ask("parallel.precision", "fp32", states[off[0]])
            self.also["parallel.precision"] = tuple(name for name in states if name not in off)

    def offload(self) -> None:
        keys = [f"zero_optimization.offload_{name}.device" for name in ("optimizer", "param")]
        optimizer, param = (self.written.get(key) for key in keys)
        if param == "cpu" and optimizer not in ("cpu", "auto"):
            raise self.error(
                f'{keys[1]}: "cpu" without {keys[0]}: "cpu": bigvision offloads parameters only together with the optimizer'
            )
        stage = self.written["zero_optimization.stage"]
        if param == "cpu" and stage not in (3, "auto"):
            raise self.error(f'{keys[1]}: "cpu" needs zero_optimization.stage 3, not {stage}')
        also: tuple[str, ...] = ()
        if optimizer == "none":
            self.ask("parallel.offload", "none", keys[0])
        elif param == "cpu":
            self.ask("parallel.offload", "all", keys[1])
        elif optimizer == "cpu":
            self.ask("parallel.offload", "optimizer", keys[0])
            also = ("all",) if param == "auto" else ()
        elif param == "none":
            self.ask("parallel.offload", "none", keys[1])
            also = ("optimizer",) if optimizer == "auto" else ()
        if "parallel.offload" in self.asked:
            # Of activations the file says nothing.
            mine = (self.asked["parallel.offload"][0], *also)
            others = tuple("activations" if one == "none" else f"{one}+activations" for one in mine)
            self.also["parallel.offload"] = also + others

    def optimizer(self) -> None:
        name, _ = self._chosen("optimizer", "optim.name", "AdamW, Lion, SGD")
        decoupled = self.written.get("optimizer.params.adam_w_mode")
        if self.written.get("optimizer.type", "").lower() == "adam" and decoupled is False:
            raise self.error(
                "optimizer.params.adam_w_mode: false is refused: bigvision's weight decay is decoupled; write true, or "
                "use SGD for L2 decay"
            )
        momentum, nesterov = (self.written.get(f"optimizer.params.{key}") for key in ("momentum", "nesterov"))
        if name == "sgd" and nesterov not in (True, "auto") and momentum != 0:
            raise self.error('optimizer.params.nesterov: must be true or "auto": the momentum of SGD is Nesterov\'s')

    def _chosen(self, section: str, ours: str, types: str) -> tuple[str, set[str]]:
        """Our name for what *section* chooses ("" for "auto" or no section), and the parameters that it gives."""
        if section in self.present and f"{section}.type" not in self.written:
            raise self.error(f'{section}.type: is missing: write {types} or "auto"')
        name, _ = self.asked.get(ours, ("", ""))
        given = {key.rpartition(".")[2] for key in self.present if key.startswith(f"{section}.params.")}
        if strange := sorted(given & ds_keys.FOREIGN.get(name, set())):
            kind = self.written[f"{section}.type"]
            raise self.error(f"{section}.params.{strange[0]} does not belong to {kind}: drop the key")
        return name, given

    def scheduler(self) -> None:
        schedule, given = self._chosen("scheduler", "optim.schedule", "WarmupLR, WarmupDecayLR, WarmupCosineLR")
        last = "scheduler.type" if schedule == "linear" else "scheduler.params.cos_min_ratio"
        if schedule == "linear" or (schedule == "cosine" and self.written.get(last) == 0):
            self.ask("optim.min_lr", 0.0, last)
        missing = {name: default for name, default in ds_keys.NEEDED.get(schedule, {}).items() if name not in given}
        if missing and self.written.get("scheduler.params.warmup_num_steps") == "auto":
            left = ", ".join(f"{name} ({default} in DeepSpeed)" for name, default in missing.items())
            then = ", and the cosine ends at 0" if schedule == "cosine" else ""
            self.notes.append(f"scheduler: leaves out {left}: here the warm-up is linear{then}")
            return
        for name, default in missing.items():
            fix = '"linear"' if name == "warmup_type" else '"auto"'
            raise self.error(f"scheduler.params.{name}: is missing, which means {default} in DeepSpeed: write {fix}")


def read_ds_file(path: str | Path) -> DsFile:
    """Read the DeepSpeed file *path*.

    A scheduler's warmup_type, warmup_num_steps, cos_min_ratio and total_num_steps have to be written (a value or "auto"), and
    so has SGD's nesterov: DeepSpeed's values for what is left out are not ours. A file that leaves the number of warm-up steps
    to us ("auto", as the examples of transformers do) leaves us the shape too. DeepSpeed's warm-up is one step behind
    :func:`bigvision.optim.learning_rate`, which is what trains: its first step has the rate 0, ours the first above 0.

    A `UserError`: not a JSON object, a key that DeepSpeed does not know or has removed, one that bigvision does not offer, a
    value of the wrong type, or values that contradict each other.
    """
    file = DsFile(str(path))
    file.knobs = file.walk(file.parse(), ds_keys.TOP)
    spellings = {f"zero_optimization.stage3_{name}": f"zero_optimization.{name}" for name in ds_keys.STAGE3}
    for one, other in {"bfloat16": "bf16", **spellings}.items():
        if {one, other} <= file.present:
            raise file.error(f"{one} and {other} are one key: drop one of the two")
    if "bfloat16" in file.knobs:
        file.knobs["bf16"] = file.knobs.pop("bfloat16")
    file.strategy()
    file.precision()
    file.offload()
    file.optimizer()
    file.scheduler()
    file.batches()
    file.notes += [f"{', '.join(keys)}: has no meaning here: {why}" for why, keys in file.neutral.items()]
    return file


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _unquoted(value: Any, kind: str) -> Any:
    """*value* without the quotes that some files have around numbers and switches ("5e8", "false"), where *kind* is no text."""
    if isinstance(value, list) and kind == "betas":
        return [_unquoted(item, "number") for item in value]
    if not isinstance(value, str) or kind in ("device", "level"):
        return value
    if kind == "bool":
        return {"true": True, "false": False}.get(value.lower(), value)
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() else number if math.isfinite(number) else value


def _is_off(value: Any, switch: str = "") -> bool:
    """Whether a key or section asks for nothing."""
    if isinstance(value, dict):
        states = list(_states(value))
        on = _unquoted(value.get(switch), "bool")
        return not value or bool(states and not any(states)) or bool(switch and (not on or on == "auto"))
    return value is None or _unquoted(value, "bool") is False


def _states(section: dict[str, Any]) -> Iterator[bool]:
    """Each "enabled" in *section* and in the sections in it."""
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _states(value)
        elif name == "enabled":
            yield _unquoted(value, "bool") not in (False, None, "auto")


def _json_hint(text: str, at: int) -> str:
    """What DeepSpeed files have in them that other readers take and JSON does not."""
    rest = text[at:].lstrip()
    if rest.startswith(("//", "/*", "#")):
        return "; JSON has no comments: drop them"
    if rest.startswith(",") or (rest[:1] in ("}", "]") and text[:at].rstrip().endswith(",")):
        return "; JSON has no comma before } or ]: drop it"
    if rest.startswith(("True", "False", "None", "'")):
        return "; JSON writes true, false, null and texts in double quotes"
    return ""


def _same(value: Any, right: Any) -> bool:
    """Equal, where true is not 1, a text may have capitals and a number may be in quotes."""
    if isinstance(value, str) and isinstance(right, str):
        return value.lower() == right
    value = _unquoted(value, "bool" if isinstance(right, bool) else "number")
    return value == right and isinstance(value, bool) == isinstance(right, bool)


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def keys_from_file(
    file: DsFile, config: Config, origins: Mapping[str, str], firm: set[str], kinds: Mapping[str, Any]
) -> dict[str, Any]:  # fmt: skip
    """Return the keys of ours that take the file's value.

    *origins* says where *config* got the keys that are not defaults. The file replaces defaults and the strategy, unless that
    is one of the keys in *firm*; every other key has to agree with the file.
    """
    strategy = config.parallel.strategy
    if "parallel.strategy" not in file.asked and not strategy.startswith("zero"):
        where = origins.get("parallel.strategy", "default")
        raise UserError(
            f'{file.path}: zero_optimization.stage: "auto" takes parallel.strategy: {strategy} ({where}), which is not ZeRO: '
            "use zero1, zero2 or zero3"
        )
    taken: dict[str, Any] = {}
    for key, (asked, json_key) in file.asked.items():
        value, ours = coerce(asked, kinds[key], key, file.path), get(config, key)
        decided = key in origins and not (ours in (None, "auto") and key in UNDECIDED)
        if ours in file.also.get(key, ()):
            continue
        if key == "train.steps" and not decided and "train.epochs" in origins:
            raise _contradiction(file, json_key, "train.epochs", config, origins)
        if not decided or (key == "parallel.strategy" and key not in firm):
            taken[key] = value
        elif ours != value and not (key == "optim.warmup" and _warmup_steps(config, file) == value):
            raise _contradiction(file, json_key, key, config, origins)
    return taken


def _warmup_steps(config: Config, file: DsFile) -> float | None:
    """Our warm-up as a number of steps, where that is known; the same up to rounding is the same."""
    steps = config.train.steps or file.asked.get("train.steps", (None, ""))[0]
    if config.optim.warmup >= 1 or not steps:
        return None
    count = config.optim.warmup * steps
    return float(round(count)) if math.isclose(count, round(count)) else count


def _contradiction(file: DsFile, json_key: str, key: str, config: Config, origins: Mapping[str, str]) -> UserError:
    value = json.dumps(file.written[json_key])
    return UserError(
        f"{file.path}: {json_key}: {value} contradicts {key}: {spell(get(config, key))} ({origins[key]}): "
        'make them equal, or write "auto" in the file'
    )


def deepspeed_settings(config: Config, ranks: int, device: str, parameters: int, largest: int) -> dict[str, Any]:
    """The configuration for ``deepspeed.initialize``; what the file leaves open, or calls "auto", is decided here.

    *device* is "cuda" or "cpu"; *parameters* counts those of the whole model, *largest* those of the largest block.
    """
    parallel = config.parallel
    share = config.train.global_batch // ranks
    zero: dict[str, Any] = {
        "overlap_comm": device == "cuda",
        "contiguous_gradients": True,
        "reduce_scatter": True,
        # DeepSpeed allocates this many elements in every step, so keep it small.
        "reduce_bucket_size": max(1, min(parameters, 50_000_000)),
        "allgather_bucket_size": 500_000_000,
    }
    if parallel.strategy == "zero3":
        # Two blocks at a time; what is smaller than a thousandth of the model is kept whole on every rank.
        zero |= {
            "stage3_prefetch_bucket_size": largest,
            "stage3_max_live_parameters": 2 * largest,
            "stage3_max_reuse_distance": largest,
            "stage3_param_persistence_threshold": min(parameters // 1000, 100_000),
        }
    settings: dict[str, Any] = {
        "zero_optimization": zero,
        # As in LossScale, so that a run may change its strategy.
        "fp16": {"initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1},
        "bf16": {},
        # It would wait for the device at every step.
        "timers": {"throughput": {"enabled": False}},
    }
    if parallel.deepspeed:
        settings = _with_knobs(settings, read_ds_file(parallel.deepspeed).knobs)
    zero = settings["zero_optimization"]
    for section, wanted in (("offload_optimizer", parallel.offloads_state), ("offload_param", parallel.offloads_parameters)):
        given = {"pin_memory": True} | zero.pop(section, {})
        if wanted:
            zero[section] = given | {"device": "cpu", "pin_memory": given["pin_memory"] and device == "cuda"}
    zero["stage"] = int(parallel.strategy[-1])
    held = "bf16" if parallel.precision == "fp8" else parallel.precision
    for precision in ("fp16", "bf16"):
        settings[precision]["enabled"] = held.endswith(precision)
    return settings | {
        # The engine says which micro-batch is a step's last, since the last one may be short.
        "train_batch_size": share * ranks,
        "train_micro_batch_size_per_gpu": share,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip or 0.0,
        "communication_data_type": parallel.reduce,
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": settings.get("steps_per_print"),
    }


def _with_knobs(ours: dict[str, Any], knobs: Mapping[str, Any]) -> dict[str, Any]:
    """*ours* with the file's *knobs* over it. DeepSpeed reads some names with and without ``stage3_``."""
    merged = dict(ours)
    for name, value in knobs.items():
        twin = name.removeprefix("stage3_") if name.startswith("stage3_") else f"stage3_{name}"
        merged.pop(twin, None)
        merged[name] = _with_knobs(merged.get(name, {}), value) if isinstance(value, dict) else value
    return merged
