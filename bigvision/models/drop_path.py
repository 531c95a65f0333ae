"""Stochastic depth (Huang et al. 2016) without the work: a residual branch runs on the samples that it keeps.

timm's `DropPath` gets a branch's output for all samples and zeroes that of some. Here the samples are drawn before: the modules
by which a branch is entered take the kept samples out of their inputs, and its `DropPath` puts them back among zeros. The
forward of a block stays timm's own: a torch.fx trace of it only tells where branches begin.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from bigvision.errors import UserError
from bigvision.models.blocks import Block
from bigvision.models.branches import Found, dropping, find_branches, in_equal_blocks
from bigvision.samples import seed_from

LEAST = 2  # samples that a branch runs on
MISSED = 0.1  # how far the share of the samples that are dropped may be from the rate, as a part of the rate


def set_constant_rate(module: nn.Module, rate: float, model: str) -> None:
    """Give every `DropPath` of *module*, the timm *model*, the *rate*. timm builds an `Identity` where the rate is 0."""
    places = [(parent, name, child) for parent in module.modules() for name, child in parent.named_children()]
    known = {(type(parent), name) for parent, name, child in places if isinstance(child, DropPath) and not name.isdigit()}
    if not known:
        words = f"constant, but {model} has no timm DropPath in which a rate could be set"
        raise UserError(f"model.drop_path_schedule: {words}; use linear")
    for parent, name, child in places:
        if isinstance(child, DropPath):
            child.drop_prob = rate
        elif type(child) is nn.Identity and (type(parent), name) in known:
            setattr(parent, name, DropPath(rate))


def kept_samples(samples: int, rate: float) -> int | None:
    """On how many of so many *samples* a branch of this *rate* runs; None where it runs on all and is masked."""
    kept = round(samples * (1 - rate))
    if kept < LEAST or kept == samples or abs(1 - kept / samples - rate) > MISSED * rate:
        return None
    return kept


# What runs.


@dataclass(frozen=True)
class Drawn:
    """Which samples of a micro-batch a branch keeps."""

    origin: Tensor  # int64 (samples,): the place of each among those that the branch runs on, -1 where it is dropped
    factor: Tensor  # 0-D: what the output is multiplied with
    kept: Tensor  # int64, ascending: the samples that the branch runs on, which may be all

    @property
    def rows(self) -> Tensor | None:
        """The samples to take out, None where the branch runs on all. Compiled code always takes some: blocks share a graph."""
        return self.kept if torch.compiler.is_compiling() or len(self.kept) < len(self.origin) else None


class Branch:
    """A residual branch, with the samples that were drawn for it last."""

    drawn: Drawn | None = None
    whole: bool = False  # whether it runs on all samples in any case, and drops those that were drawn

    def __init__(self, path: str, drop: SkippingDropPath) -> None:
        self.path, self.drop = path, drop


class SkippingDropPath(DropPath):
    """Puts what a branch has made of the kept samples back among zeros. Where none were drawn it is timm's `DropPath`."""

    branches: list[Branch]  # one for each call in a forward pass
    branch: Branch  # that of the next call

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        drawn = self.branch.drawn
        if drawn is None:
            return super().forward(x)
        if (rows := drawn.rows) is None:
            return x * ((drawn.origin >= 0) * drawn.factor).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return _Put.apply(x, rows, drawn.origin, drawn.factor)


class _Entry:
    """Takes the kept samples out of the arguments of a call by which a branch is entered: those at *places* and *names*."""

    def __init__(self, branch: Branch, places: Iterable[int], names: Iterable[str]) -> None:
        self.branch, self.places, self.names = branch, frozenset(places), frozenset(names)

    def __call__(self, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        drop, drawn = self.branch.drop, self.branch.drawn
        if drawn is None or not drop.training:
            return None
        if len(drop.branches) > 1:
            drop.branch = self.branch
        if (rows := drawn.rows) is None:
            return None
        args = tuple([_Take.apply(x, rows, drawn.origin) if at in self.places else x for at, x in enumerate(args)])
        return args, {name: _Take.apply(x, rows, drawn.origin) if name in self.names else x for name, x in kwargs.items()}


class _Method:
    """A method of a block by which a branch is entered."""

    def __init__(self, method: Callable[..., Any], entry: _Entry) -> None:
        self.method, self.entry = method, entry

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.entry(None, args, kwargs) or (args, kwargs)
        return self.method(*args, **kwargs)


class _Take(torch.autograd.Function):
    """The *kept* rows of a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, origin: Tensor) -> Tensor:
        ctx.save_for_backward(kept, origin)
        return _taken(x, kept)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _put(gradients[0], *ctx.saved_tensors), None, None


class _Put(torch.autograd.Function):
    """Rows times *factor* at the places of the *kept* ones, zeros at the others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, origin: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(kept, origin, factor)
        return _put(x * factor, kept, origin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        kept, origin, factor = ctx.saved_tensors
        if torch.compiler.is_compiling():  # there the kept ones may be all, and those that are dropped among them
            factor = ((origin.index_select(0, kept) >= 0) * factor).view(-1, *[1] * (gradients[0].ndim - 1))
        return (_taken(gradients[0], kept) * factor).to(gradients[0].dtype), None, None, None


def _taken(x: Tensor, kept: Tensor) -> Tensor:
    order, back = _layout(x)
    return x.permute(order).index_select(0, kept).permute(back)


def _put(x: Tensor, kept: Tensor, origin: Tensor) -> Tensor:
    order, back = _layout(x)
    rows = x.permute(order)
    if torch.compiler.is_compiling():
        # One read by place fuses with what is around it; writing by place does not.
        found = rows.index_select(0, origin.clamp(min=0))
        return torch.where((origin >= 0).view(-1, *[1] * (x.ndim - 1)), found, 0.0).to(x.dtype).permute(back)
    whole = rows.new_zeros((len(origin), *rows.shape[1:]))
    return whole.index_copy_(0, kept, rows).permute(back)


def _layout(x: Tensor) -> tuple[list[int], list[int]]:
    """The dimensions of *x* as they lie in memory, so that a copy of its rows lies so too; and the way back."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return [0, 2, 3, 1], [0, 3, 1, 2]
    return [*range(x.ndim)], [*range(x.ndim)]


# The branches of a model while it trains.


class SkippedBranches:
    """The branches of a model that run on a part of the samples, and which samples were drawn for them."""

    def __init__(self, found: Sequence[Found], module: nn.Module, device: torch.device, compiled: bool = False) -> None:
        """Change *module* in place, whose names stay: from now on its branches leave samples out where some were drawn.

        *compiled*: all branches then have tensors of the same kinds, so that blocks share a graph.
        """
        self.device, self.compiled = device, compiled
        self.masks = False  # whether nothing is drawn: modules then mask as timm's do
        self.fixed = False  # whether what is drawn lies in the same memory each time, where a CUDA graph reads it
        self._tables: dict[int, Tensor] = {}  # that memory, by the number of samples
        self.branches: list[Branch] = []
        self.parts: set[nn.Module] = set()  # modules that branches may run on the kept samples
        self.drawn: list[Drawn] | None = None
        self._factors: dict[tuple[Any, ...], list[Tensor]] = {}
        for one in found:
            drop: Any = module.get_submodule(one.path)
            if not isinstance(drop, SkippingDropPath):
                drop.__class__ = SkippingDropPath
                vars(drop).update({"drop_prob": 0.0, "scale_by_keep": True, "branches": []} | vars(drop))
            self.parts.update([*module.get_submodule(one.within).modules()][1:])
            branch = drop.branch = Branch(one.path, drop)
            drop.branches.append(branch)
            self.branches.append(branch)
            for opening in one.openings:
                entered, entry = module.get_submodule(opening.path), _Entry(branch, opening.places, opening.names)
                if opening.method:
                    vars(entered)[opening.method] = _Method(getattr(entered, opening.method), entry)
                else:
                    entered.register_forward_pre_hook(entry, with_kwargs=True)

    @classmethod
    def of(
        cls, module: nn.Module, blocks: Sequence[Block], image_shapes: Iterable[tuple[int, int, int]], device: torch.device,
        compiled: bool, micro_batch: int,
    ) -> tuple[SkippedBranches | None, str]:  # fmt: skip
        """The branches of *module*, on meta, and a line for the log; None where no branch can leave samples out.

        *image_shapes*: (channels, height, width) of all images that it gets. *compiled*: whether the *blocks* will be.
        """
        drops, found, masked = dropping(module), list[Found](), dict[str, str]()
        for number, shape in enumerate(image_shapes):
            here, others = find_branches(module, shape)
            # Of a small image one window may be all there is, and rows of windows be taken for samples.
            masked |= others | {one.path: "it depends on the size of images" for one in found if one not in here}
            found = [one for one in here if number == 0 or one in found]
        found = [one for one in found if one.path not in masked]
        holders: dict[str, list[str]] = {}
        for path, drop in drops.items():
            reason = masked.get(path)
            if reason is None and kept_samples(micro_batch, drop.drop_prob) is None:
                reason = f"no number of samples is within {MISSED:.0%} of its rate"
            holders.setdefault(path.rpartition(".")[0], []).append(reason or "")
        reasons = Counter(next(filter(None, those)) for those in holders.values() if any(those))
        note = f"model.drop_path_mode: skip in {len(holders) - reasons.total()} of {len(holders)} blocks with stochastic depth"
        note += f", for a micro-batch of {micro_batch} samples"
        if reasons:
            note += f"; mask in {'; in '.join(f'{count}: {reason}' for reason, count in reasons.most_common())}"
        if not found:
            return None, note
        more = in_equal_blocks(found, module, blocks) if compiled else []
        return cls([*found, *more], module, device, compiled), note

    def run_whole(self, blocks: Iterable[str]) -> None:
        """Run the branches that are in none of the modules at the paths *blocks* on all samples; dropped are the same ones."""
        inside = tuple(f"{path}." for path in blocks)
        for branch in self.branches:
            branch.whole = not branch.path.startswith(inside)

    def draw(self, samples: int, *place: int) -> None:
        """Draw for a micro-batch of so many *samples* at this *place* in the run, of which the draw is a function."""
        if self.masks:
            return
        generator = torch.Generator().manual_seed(seed_from("drop_path", *place))
        rates = [branch.drop.drop_prob for branch in self.branches]
        counts = [kept_samples(samples, rate) or samples for rate in rates]
        drawn = torch.rand(len(rates), samples, generator=generator, dtype=torch.float64)
        rate, count = torch.tensor(rates, dtype=torch.float64)[:, None], torch.tensor(counts)[:, None]
        skips, everyone = count < samples, torch.arange(samples).expand(len(rates), -1)
        keep = torch.where(skips, drawn.argsort(dim=1).argsort(dim=1) < count, drawn >= rate)
        origin = torch.where(keep, torch.where(skips, keep.cumsum(dim=1) - 1, everyone), -1)
        kept = torch.where(skips, (~keep).to(torch.uint8).argsort(dim=1, stable=True), everyone)
        # Rows of an even number of elements: compiled code reads tensors faster that begin at multiples of 16 bytes.
        table = torch.zeros(2, len(rates), samples + samples % 2, dtype=torch.int64)
        table[:, :, :samples] = torch.stack([origin, kept])
        if self.device.type == "cuda":
            table = table.pin_memory()
        if self.fixed:
            if samples not in self._tables:
                self._tables[samples] = torch.empty_like(table, device=self.device, pin_memory=False)
            table = self._tables[samples].copy_(table, non_blocking=True)
        else:
            table = table.to(self.device, non_blocking=True)
        factors = self._factors_of(samples, rates, counts)
        counts = [samples if branch.whole else count for branch, count in zip(self.branches, counts)]
        rows = zip(*table, counts, factors)
        self._set([Drawn(origin[:samples], factor, kept[:count]) for origin, kept, count, factor in rows])

    def _factors_of(self, samples: int, rates: list[float], counts: list[int]) -> list[Tensor]:
        """What the output of each branch is multiplied with, so that its expectation is that of all samples."""
        if (key := (samples, *rates)) not in self._factors:
            values = [samples / count if count < samples else 1 / (1 - rate) for rate, count in zip(rates, counts)]
            self._factors[key] = [
                torch.full((), value if branch.drop.scale_by_keep else 1.0, device=self.device)
                for branch, value in zip(self.branches, values)
            ]
        return self._factors[key]

    def clear(self) -> None:
        """Forget what was drawn: a forward pass of anything else has other samples."""
        self._set(None)

    def _set(self, drawn: list[Drawn] | None) -> None:
        self.drawn = drawn
        for branch, one in zip(self.branches, drawn or [None] * len(self.branches)):
            branch.drawn = one
            if self.compiled and one is not None:
                torch._dynamo.maybe_mark_dynamic(one.kept, 0)

    @contextmanager
    def using(self, drawn: list[Drawn] | None) -> Iterator[None]:
        """Compute again with what was *drawn* then: pipelines draw for other micro-batches in between."""
        now = self.drawn
        if now is not drawn:
            self._set(drawn)
        try:
            yield
        finally:
            if now is not drawn:
                self._set(now)
