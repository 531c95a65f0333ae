"""What is trained, at which rate and with which decay: the same under every strategy."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import run_ranks
from tests.recipes import digests, lines, losses, recipe, run

LONG = pytest.mark.long
EVERY: list[tuple[str, int, dict[str, Any]]] = [
    ("fsdp", 2, {}), ("fsdp", 3, {}), ("fsdp", 4, {"replicas": 2}), ("zero2", 2, {}), ("zero3", 2, {}), ("pipeline", 2, {}),
]  # fmt: skip
LAYOUTS = EVERY[:1] + [pytest.param(*layout, marks=LONG) for layout in EVERY[1:]]  # type: ignore[operator]
MORE: list[tuple[str, int, dict[str, Any]]] = [
    ("ddp", 1, {}), ("ddp", 2, {}), ("zero1", 2, {}), ("pipeline", 4, {"stages": 2}),
]  # fmt: skip
GROUPS = [{"match": "*.mlp", "weight_decay": 0.3}, {"match": "blocks.1", "lr_scale": 0.5}, {"match": "head", "lr_scale": 3}]
RATES = {"schedule": "wsd", "cooldown": 4, "min_lr": 1e-4, "lr_base_size": 12, "lr": 5e-4, "warmup": 3}
CASES: dict[str, dict[str, Any]] = {
    "groups": {"optim": RATES | {"layer_decay": 0.7, "groups": GROUPS}},
    "lora": {
        "optim": RATES | {"layer_decay": 0.7, "groups": [*GROUPS, {"match": "*.lora_B", "lr_scale": 2}]},
        "model": {"lora": {"rank": 4, "alpha": 8}},
    },
    "last": {"optim": RATES | {"groups": GROUPS[2:]}, "model": {"trainable": "last:2"}},
    "head": {"optim": RATES | {"groups": GROUPS[2:]}, "model": {"trainable": "head"}},
    "bf16": {"optim": RATES, "model": {"trainable": ["*.bias", "head"], "frozen_dtype": "bf16"}},
    "names": {"optim": RATES | {"groups": GROUPS[2:]}, "model": {"trainable": ["*.bias", "head", "pos_embed"]}},
}


def run_and_read(plain: dict[str, Any]) -> tuple[list[float], list[str]]:
    """Train on this rank; return the loss of every step and the table of the groups as it was printed."""
    with redirect_stdout(io.StringIO()) as text:
        found = run(plain)
    printed = text.getvalue().splitlines()
    begin = next((number for number, line in enumerate(printed) if line.endswith("parameter groups:")), len(printed))
    return found, list(takewhile(lambda line: line.startswith("  "), printed[begin + 1 :]))


def made(out: Path, case: str, **parallel: Any) -> dict[str, Any]:
    plain = recipe(out, parallel=parallel, train={"steps": 10})
    return plain | {key: plain[key] | keys for key, keys in CASES[case].items()}


@pytest.mark.parametrize(("strategy", "ranks", "more"), LAYOUTS)
@pytest.mark.parametrize(
    "case", ["groups", *(pytest.param(case, marks=LONG) for case in ("lora", "last", "head", "names", "bf16"))]
)
def test_losses_and_groups_are_those_of_one_process(
    tmp_path: Path, case: str, strategy: str, ranks: int, more: dict[str, Any]
) -> None:
    reference, table = run_ranks(run_and_read, 1, made(tmp_path / "ddp", case, strategy="ddp"))[0]
    found, other_table = run_ranks(run_and_read, ranks, made(tmp_path / "other", case, strategy=strategy, **more))[0]
    assert found == pytest.approx(reference, rel=1e-5) and len(set(reference)) == 10
    assert table == other_table and len(table) >= 4
    one, other = (tmp_path / name / "step-00000010" for name in ("ddp", "other"))
    state = load_file(one / "optimizer.safetensors").keys()
    assert state == load_file(other / "optimizer.safetensors").keys() and "head.weight/exp_avg" in state
    assert ("blocks.0.mlp.fc1.weight/exp_avg" in state) == (case == "groups"), "what is frozen needs no state"
    rates = [line["lr"] for line in lines(tmp_path / "other") if "loss" in line]
    assert rates == pytest.approx([1e-3 * n / 3 for n in (1, 2, 3)] + [1e-3] * 4 + [1e-3 - 9e-4 * n / 4 for n in (1, 2, 3)])


GO_ON = [("bf16", *EVERY[0])]
GO_ON += [
    pytest.param(case, *layout, marks=LONG)
    for case in ("groups", "last", "bf16")
    for layout in EVERY + MORE
    if (case, *layout) not in GO_ON
]


@pytest.mark.parametrize(("case", "strategy", "ranks", "more"), GO_ON)
def test_a_run_goes_on_bit_for_bit_and_elsewhere(
    tmp_path: Path, case: str, strategy: str, ranks: int, more: dict[str, Any]
) -> None:  # fmt: skip
    """From its middle; its end under one process and that of one process here, with the same bytes and metrics."""

    def plain(name: str, resume: str = "auto", alone: bool = False) -> dict[str, Any]:
        plain = made(tmp_path / name, case, **{"strategy": "ddp"} if alone else {"strategy": strategy, **more})
        plain["train"] |= {"micro_batch": 6}
        return plain | {"checkpoint": {"every": 5, "resume": resume}}

    def end(name: str) -> Path:
        return tmp_path / name / "step-00000010"

    reference, found = run_ranks(run, 1, plain("one", alone=True))[0], run_ranks(run, ranks, plain("whole"))[0]
    assert found == pytest.approx(reference, rel=1e-5) and len(set(reference)) == 10
    one, here = (next(line for line in lines(tmp_path / name) if "val_loss" in line) for name in ("one", "whole"))
    assert here["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5) and here["val_top1"] == one["val_top1"]
    run_ranks(run, ranks, plain("on", str(tmp_path / "whole" / "step-00000005")))
    assert losses(tmp_path / "on") == found[5:] and digests(end("on")) == digests(end("whole"))
    run_ranks(run, 1, plain("elsewhere", str(end("whole")), alone=True))
    assert digests(end("elsewhere")) == digests(end("whole"))
    run_ranks(run, ranks, plain("here", str(end("one"))))
    assert digests(end("here")) == digests(end("one"))
    types = {values.dtype for values in load_file(end("whole") / "model.safetensors").values()}
    assert types == {torch.float32} | ({torch.bfloat16} if case == "bf16" else set())
