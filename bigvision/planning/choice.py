"""Which layouts of a run fit devices, how fast each is predicted to be, and which of them `auto` takes.

`plan` looks at all of them, each with the largest micro-batch that fits; `choose` at those that the keys which are auto leave
open.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bigvision.config import (
    Config,
    LoraConfig,
    admitted,
    auto_keys,
    with_values,
    without_auto,
)
from bigvision.config.values import get, spell
from bigvision.errors import UserError
from bigvision.models import GivenModel
from bigvision.models.offload import TRANSFERS
from bigvision.planning.beside import Beside, as_data, from_data
from bigvision.planning.estimates import CASTING, Estimates, has_batchnorm, with_size
from bigvision.planning.hardware import PER_HOST, Hardware
from bigvision.planning.layouts import DETAILS, Refusal, Row, layouts
from bigvision.planning.memory import Memory
from bigvision.planning.profile import Profile, collector_paused
from bigvision.planning.state import Layout
from bigvision.tasks import Task

GIB = 1 << 30
STRATEGIES = ("ddp", "fsdp", "pipeline", "zero1", "zero2", "zero3")
"""The simplest first."""
AHEAD = 1.1
"""How much faster a layout must be predicted than a simpler one for auto to take it: below that a prediction says little."""
MOST_TIMES = 64
"""How many times as many devices are looked at for what does not fit."""


@dataclass(frozen=True)
class Plan:
    """What `plan` finds."""

    config: Config
    hardware: Hardware
    profile: Profile
    rows: tuple[Row, ...]
    """The fastest first."""
    refusals: tuple[Refusal, ...]
    advice: str | None
    """What would make anything fit, where nothing does."""


@dataclass(frozen=True)
class Choice:
    """What the keys that are auto became."""

    values: dict[str, Any]
    row: Row
    reason: str


class NothingFits(UserError):
    """None of the layouts that are left open fits."""


# Whether one fits.


def _sizes(estimates: Estimates, config: Config, share: int) -> Sequence[int]:
    """The micro-batches that are looked at; those of a pipeline are equal, since its schedules are predicted for such."""
    if config.parallel.strategy != "pipeline":
        return range(1, share + 1)
    return [size for size in range(1, share + 1) if share % size == 0 and _allowed(estimates, config, size)]


def _allowed(estimates: Estimates, config: Config, size: int) -> bool:
    """Whether a run can have micro-batches of *size*, whatever memory says."""
    try:
        estimates.check(with_size(config, size))
    except UserError:
        return False
    return True


def largest(estimates: Estimates, config: Config, share: int) -> int:
    """The largest micro-batch up to *share* that fits; 0 where none does. Memory grows with it."""
    sizes = _sizes(estimates, config, share)
    fits = bisect_left(sizes, True, key=lambda size: not estimates.fits(with_size(config, size)))
    return next((size for size in reversed(sizes[:fits]) if _allowed(estimates, config, size)), 0)


def row(estimates: Estimates, recipe: Config, config: Config) -> Row | Refusal:
    """What becomes of the layout *config* of *recipe*: with the micro-batch that is asked for, or the largest that fits."""
    try:
        estimates.check(with_values(config, {"train.micro_batch": None}) if config.train.micro_batch == "auto" else config)
        layout = Layout.of(config, estimates.hardware.ranks)
        share = config.train.global_batch // layout.data_ranks
        most = largest(estimates, config, share)
        if isinstance(config.train.micro_batch, int) or config.parallel.microbatches is not None:
            size = layout.micro_batch(config)
        else:
            size = _best_size(estimates, config, share, most)
        sized = with_size(config, size or 1)
        needs = estimates.memory(sized)
        if not size or needs.peak > estimates.usable:
            return _lacks(estimates, config, needs, size or 1, most)
        keys = ("parallel.strategy", "parallel.recompute", *DETAILS, "train.micro_batch")
        values = {key: get(sized, key) for key in keys if get(sized, key) != get(recipe, key)}
        return Row(values, sized, size, most, share, needs, estimates.time(sized))
    except UserError as error:
        return Refusal(config, str(error))


def _best_size(estimates: Estimates, config: Config, share: int, most: int) -> int:
    """The micro-batch that is predicted to be fastest of those that fit, up to *most*; 0 where that is 0."""
    if not most:
        return 0
    if config.parallel.strategy == "pipeline":
        # Fewer, larger micro-batches compute faster; more of them leave a shorter bubble.
        sizes = [size for size in _sizes(estimates, config, share) if size <= most][-6:]
        return max(sizes, key=lambda size: (estimates.time(with_size(config, size)).images_per_second, size))
    # As few passes as possible, of about the same size.
    passes = -(-share // most)
    return next(size for size in range(-(-share // passes), most + 1) if size == most or _allowed(estimates, config, size))


def _lacks(estimates: Estimates, config: Config, needs: Memory, size: int, most: int) -> Refusal:
    """A layout that does not fit in micro-batches of *size*; with *most* it would."""
    why = f"needs {gib(needs.peak)} of {gib(estimates.usable)} GiB on rank {needs.rank} in micro-batches of {size}"
    return Refusal(config, why, needs.peak, f"train.micro_batch {most}" if most else None)


def _explained(estimates: Estimates, refusal: Refusal, adapters: bool) -> Refusal:
    """*refusal* with the smallest change that makes it fit."""
    if refusal.needs is None or refusal.change is not None:
        return refusal
    return replace(refusal, change=smallest_change(estimates, refusal.config, adapters))


def smallest_change(estimates: Estimates, config: Config, adapters: bool) -> str | None:
    """What makes *config* fit, which does not in micro-batches of one sample; None where nothing that is tried does.

    *adapters*: LoRA, which is another way to train, is tried too.
    """
    for name, values, hardware in _changes(config, estimates.hardware, adapters and estimates.model is None):
        there = estimates.on(hardware)
        total = -(-config.train.global_batch // hardware.ranks) * hardware.ranks
        changed = with_size(with_values(config, values | {"train.global_batch": total}), 1)
        try:
            there.check(changed)
            if there.fits(changed):
                return name
        except UserError:
            continue
    return None


def _changes(config: Config, hardware: Hardware, adapters: bool) -> Iterator[tuple[str, dict[str, Any], Hardware]]:
    """Changes that need less memory, the least first: what it is, its keys, the devices."""
    parallel, recompute = config.parallel, {"parallel.recompute": "blocks"}
    few: list[dict[str, Any]] = []
    if parallel.strategy == "ddp" and hardware.ranks > 1:
        few.append({"parallel.strategy": "fsdp"})
    also = "+activations" * parallel.offloads_activations
    if parallel.strategy.startswith("zero") and not parallel.offloads_state:
        few.append({"parallel.offload": f"optimizer{also}"})
    if parallel.strategy == "zero3" and not parallel.offloads_parameters:
        few.append({"parallel.offload": f"all{also}"})
    if not parallel.offloads_activations and hardware.device.kind in TRANSFERS and parallel.strategy != "pipeline":
        activations = "activations" if parallel.offload == "none" else f"{parallel.offload}+activations"
        few.append({"parallel.offload": activations})
    if (config.model.lora is not None or config.model.trainable != "all") and config.model.frozen_dtype == "fp32":
        few.append({"model.frozen_dtype": "bf16"})
    more = [recompute] if parallel.recompute == "none" else []
    for values in (*more, *few, *(recompute | values for values in few if more)):
        yield _named(values), values, hardware
    ranks = hardware.ranks
    while parallel.strategy != "ddp" and ranks < MOST_TIMES * hardware.ranks:
        ranks *= 2
        larger = replace(hardware, ranks=ranks, per_host=min(ranks, max(hardware.per_host, PER_HOST)))
        yield f"{ranks} ranks", {}, larger
        if more:
            yield f"{ranks} ranks and {_named(recompute)}", recompute, larger
    if config.model.lora is None and adapters:
        lora = {"model.lora": LoraConfig(), "model.frozen_dtype": "bf16"}
        for values in (lora, *(lora | recompute for _ in more)):
            yield _named(values), values, hardware


def _named(values: Mapping[str, Any]) -> str:
    return " and ".join(f"{key} {'{rank: 8}' if key == 'model.lora' else spell(value)}" for key, value in values.items())


# All layouts, ranked.


@collector_paused()
def plan(
    config: Config, hardware: Hardware, *, model: GivenModel | None = None, task: Task | None = None,
    outputs: int | None = None, forks: bool = False,
) -> Plan:  # fmt: skip
    """Look at every layout of *config* on *hardware*, whatever it says about the strategy and recompute: at recompute where it
    is asked for, or makes a larger micro-batch fit.

    A ``train.micro_batch`` that is a number is kept; null and auto take the largest that fits. *forks*: a process that is
    forked looks at some of the layouts meanwhile; the caller must have no threads. `UserError` for a model that cannot be
    built, and for what *config* says itself where it is impossible.
    """
    estimates, usual = Estimates(hardware, model, task, outputs), without_auto(config)
    estimates.check(usual)
    blocks = len(estimates.built(usual)[1])
    laid = _all_layouts(config, hardware, blocks)
    looks = [functools.partial(_looked_at, estimates, config, one, blocks) for one in laid]
    # Those that need another profile than the first one.
    forks, casts = forks and hardware.ranks > 1, usual.parallel.strategy in CASTING
    apart = [forks and (one.parallel.strategy in CASTING) != casts for one in laid]

    def look_apart() -> list[list[dict[str, Any]]]:
        found = [look() for look, there in zip(looks, apart) if there]
        return [[as_data(one if isinstance(one, Row) else _explained(estimates, one, False)) for one in mine] for mine in found]

    beside = Beside(look_apart) if any(apart) else None
    first = estimates.profile(with_values(usual, {"parallel.recompute": "none"}))
    here = [None if there else look() for look, there in zip(looks, apart)]
    sent: Iterator[list[dict[str, Any]]] = iter(beside.result() if beside is not None else [])
    found = [[from_data(data, one) for data in next(sent)] if mine is None else mine for one, mine in zip(laid, here)]
    rows = sorted((one for mine in found for one in mine if isinstance(one, Row)), key=lambda one: -one.time.images_per_second)
    refusals = tuple(
        one if there and rows else _explained(estimates, one, not rows)
        for mine, there in zip(found, apart)
        for one in mine
        if isinstance(one, Refusal)
    )
    return Plan(config, hardware, first, tuple(rows), refusals, None if rows else _advice(refusals))


def _all_layouts(config: Config, hardware: Hardware, blocks: int) -> list[Config]:
    """Every layout, without recompute: of the strategy that *config* names first as it says, then with all else usual."""
    if config.parallel.strategy == "auto":
        bases = [(config, [name for name in STRATEGIES if name in admitted(config)])]
    else:
        plain = with_values(config, {key: get(Config(), key) for key in DETAILS})
        bases = [(config, [config.parallel.strategy]), (plain, list(STRATEGIES))]
    found: dict[str, Config] = {}
    for base, strategies in bases:
        for values in layouts(base, hardware, strategies, blocks):
            laid = with_values(base, values | {"parallel.recompute": "none"})
            found.setdefault(repr(laid.parallel), laid)
    return list(found.values())


def _looked_at(estimates: Estimates, recipe: Config, laid: Config, blocks: int) -> list[Row | Refusal]:
    """What becomes of the layout *laid* of *recipe*, without recompute and with those kinds of it that may help."""
    found: list[Row | Refusal] = []
    for recompute in ("none", "blocks") if blocks else ("none",):
        if found and recipe.parallel.recompute != recompute and not _recompute_helps(estimates, found[0]):
            break
        found.append(row(estimates, recipe, with_values(laid, {"parallel.recompute": recompute})))
    if _selective_helps(found):
        one = row(estimates, recipe, with_values(laid, {"parallel.recompute": "selective"}))
        found += [one] if isinstance(one, Row) else []
    return found


def _recompute_helps(estimates: Estimates, found: Row | Refusal) -> bool:
    """Whether recompute is looked at, given what became of the layout without: where the largest micro-batch does not fit.

    It spares memory for larger ones, and takes time.
    """
    return isinstance(found, Refusal) or found.largest < max(_sizes(estimates, found.config, found.share), default=0)


def _selective_helps(found: Sequence[Row | Refusal]) -> bool:
    """Whether selective recompute is looked at, given what became of none and of blocks: where that fits, and without recompute
    a whole micro-batch does not.

    It takes a profile of its own. In pipelines it is not looked at, whose micro-batches are never whole.
    """
    if len(found) < 2 or not isinstance(found[1], Row) or found[1].config.parallel.strategy == "pipeline":
        return False
    return isinstance(found[0], Refusal) or found[0].passes > 1


# What auto takes.


@collector_paused()
def choose(config: Config, estimates: Estimates) -> Choice:
    """The values for the keys of *config* that are auto.

    Raises `NothingFits` where nothing that is left open fits, and `UserError` for ``train.micro_batch: auto`` with BatchNorm.
    """
    hardware, asked = estimates.hardware, auto_keys(config)
    strategies = _open_strategies(config, hardware) if "parallel.strategy" in asked else [config.parallel.strategy]
    # Of the strategy that is looked at first: another one's profile may not be needed.
    usual = with_values(without_auto(config), {"parallel.strategy": strategies[0]})
    if "train.micro_batch" in asked and has_batchnorm(estimates.profile(usual)):
        raise UserError(
            f"train.micro_batch: auto, but {config.model.name} has BatchNorm, which takes its statistics over a micro-batch, "
            "so its size decides what is learned: give a number, or null for a rank's whole part of the batch"
        )
    recomputes = ("none", "blocks", "selective") if "parallel.recompute" in asked else (config.parallel.recompute,)
    blocks = sum(1 for part in estimates.profile(usual).parts if part.path)
    rows: list[Row] = []
    refused: list[Refusal] = []
    # Of the plain module, which is compiled wherever another strategy's is.
    least = {strategy: estimates.least(usual, strategy) for strategy in strategies} if strategies[0] == "ddp" else {}
    for values in layouts(config, hardware, strategies, blocks) if "parallel.strategy" in asked else [{}]:
        here: list[Row | Refusal] = []
        for recompute in recomputes:
            if rows and _best(rows).time.total <= AHEAD * least.get(values.get("parallel.strategy", ""), 0.0):
                break  # what is less simple cannot be so much faster
            if recompute == "selective" and not _selective_helps(here):
                break
            found = _with_asked_size(estimates, with_values(config, values | {"parallel.recompute": recompute}))
            here.append(found)
            if isinstance(found, Refusal):
                refused += [found] if len(here) < 3 else []
                continue
            rows.append(found)
            if len(here) == 1 and (found.passes == 1 or config.train.micro_batch != "auto"):
                break  # recomputing spares memory for a larger micro-batch, and there is none
    if not rows:
        raise NothingFits(_nothing_fits(estimates, asked, refused))
    best = _best(rows)
    chosen = {key: get(best.config, key) for key in asked}
    if "parallel.strategy" in asked:
        chosen |= {key: get(best.config, key) for key in DETAILS if get(best.config, key) != get(config, key)}
    if config.train.micro_batch is None:
        chosen.pop("train.micro_batch", None)
    return Choice(chosen, best, _reason(estimates, best, rows, refused, asked))


def _best(rows: Sequence[Row]) -> Row:
    """The simplest, which comes first, unless another is so much faster."""
    best = rows[0]
    for other in rows[1:]:
        if other.time.images_per_second > AHEAD * best.time.images_per_second:
            best = other
    return best


def _open_strategies(config: Config, hardware: Hardware) -> list[str]:
    """The strategies that auto chooses from: ZeRO only where something is asked for that no other has."""
    allowed = [name for name in STRATEGIES if name in admitted(config)]
    if hardware.ranks == 1:
        return [name for name in allowed if name != "pipeline"][:1] or allowed[:1]
    return [name for name in allowed if not name.startswith("zero")] or allowed


def _with_asked_size(estimates: Estimates, config: Config) -> Row | Refusal:
    """As `row`, but null is a rank's whole part of the batch."""
    if config.train.micro_batch == "auto":
        return row(estimates, config, config)
    try:
        estimates.check(config)
        layout = Layout.of(config, estimates.hardware.ranks)
        size, share = layout.micro_batch(config), config.train.global_batch // layout.data_ranks
        needs = estimates.memory(config)
        if needs.peak > estimates.usable:
            most = largest(estimates, config, share) if config.train.micro_batch is None else 0
            return _lacks(estimates, config, needs, size, most)
        return Row({}, config, size, size, share, needs, estimates.time(config))
    except UserError as error:
        return Refusal(config, str(error))


def _advice(refused: Sequence[Refusal]) -> str:
    """What would make one of them fit, the one that lacks least first."""
    lacking = sorted((one for one in refused if one.needs is not None), key=lambda one: one.needs or 0)
    found = next((f"{one.name} would with {one.change}" for one in lacking if one.change is not None), None)
    return found or "use more or larger devices, a smaller model, or smaller images"


def _nothing_fits(estimates: Estimates, asked: Sequence[str], refused: Sequence[Refusal]) -> str:
    keys = " and ".join(f"{key}: auto" for key in asked)
    lacking = [_explained(estimates, one, adapters=True) for one in refused if one.needs is not None]
    if not lacking:
        return f"{keys}: no layout is possible on {estimates.hardware}: {refused[-1].why}"
    least = min(lacking, key=lambda one: one.needs or 0)
    return f"{keys}: nothing fits on {estimates.hardware}: {least.name} {least.why}: {_advice(lacking)}"


def _reason(
    estimates: Estimates, best: Row, rows: Sequence[Row], refused: Sequence[Refusal], asked: Sequence[str]
) -> str:  # fmt: skip
    """One line: what was chosen, what is predicted for it, and what became of the others."""
    parts = [best.name]
    if "parallel.recompute" in asked:
        parts.append(f"recompute {best.config.parallel.recompute}")
    if "train.micro_batch" in asked:
        parts.append(f"micro-batches of {best.micro_batch}")
    others = []
    for strategy in dict.fromkeys(one.config.parallel.strategy for one in rows if one is not best):
        if strategy != best.config.parallel.strategy:
            fastest = max(
                (one for one in rows if one.config.parallel.strategy == strategy), key=lambda one: one.time.images_per_second
            )
            others.append(f"{fastest.name} {rate(fastest.time.images_per_second)}")
    names = {one.name.partition(",")[0] for one in rows}
    lacking = {one.name.partition(",")[0]: one for one in refused if one.needs is not None}
    others += [f"{name} {one.why.partition(' on rank')[0]}" for name, one in lacking.items() if name not in names]
    text = (
        f"{', '.join(parts)}: predicted {rate(best.time.images_per_second)} images/s and {gib(best.memory.peak)} of "
        f"{gib(estimates.hardware.device.memory)} GiB on {estimates.hardware}"
    )
    return f"{text} ({'; '.join(others)})" if others else text


def gib(count: float) -> str:
    """*count* bytes in GiB, with three digits."""
    value = count / GIB
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def rate(value: float) -> str:
    """*value*, with three digits or as a whole number."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def spelled(values: Mapping[str, Any]) -> str:
    """*values* as flags."""
    return " ".join(f"--{key} {spell(value)}" for key, value in values.items())
