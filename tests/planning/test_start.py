"""What auto becomes at the start of a run: on all ranks, kept at restarts, for runs of earlier versions and from Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from bigvision.errors import UserError
from tests.distributed import run_ranks
from tests.recipes import losses, recipe, run


def small(out: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    plain = recipe(
        out,
        train={"steps": 2, "global_batch": 12, "micro_batch": None},
        data={"train": "synthetic:24x32", "val": "synthetic:12x32"},
    )
    del plain["parallel"]["strategy"]
    for name, keys in sections.items():
        plain[name] = plain.get(name, {}) | keys
    return plain


def planned(plain: dict[str, Any], values: dict[str, Any] | str) -> tuple[list[str], Any]:
    """Train where the planner chooses *values*, or raises an error with that text; what was logged, and the strategy."""
    from bigvision.monitor import Monitor
    from bigvision.planning import choice

    def choose(*_: Any, **__: Any) -> choice.Choice:
        if isinstance(values, str):
            raise RuntimeError(values)
        return choice.Choice(values, mock.Mock(), "because")

    said: list[str] = []
    with mock.patch.object(choice, "choose", choose), mock.patch.object(Monitor, "say", lambda _, text: said.append(text)):
        run(plain)
    return [text for text in said if ": auto is " in text], yaml.safe_load((Path(plain["out"]) / "run.yaml").read_text())


def test_the_choice_is_kept_at_restarts_and_made_anew_for_another_request(tmp_path: Path) -> None:
    plain = small(tmp_path / "out")
    asked = {"parallel.strategy": "pipeline", "parallel.stages": 2, "train.micro_batch": 3}
    plain["train"]["micro_batch"] = "auto"
    found = run_ranks(planned, 2, plain, asked)
    (text,) = found[0][0]
    assert found[0] == found[1] and text.startswith("parallel.strategy: auto is pipeline, train.micro_batch: auto is 3")
    kept = (tmp_path / "out/choice.json").read_bytes()
    assert found[0][1]["parallel"]["strategy"] == "pipeline" and found[0][1]["train"]["micro_batch"] == 3
    plain["train"]["steps"] = 4
    found = run_ranks(planned, 2, plain, {"parallel.strategy": "ddp", "train.micro_batch": 6})
    assert "kept from" in found[0][0][0] and found[0][1]["parallel"]["strategy"] == "pipeline"
    assert (tmp_path / "out/choice.json").read_bytes() == kept
    plain["train"] |= {"steps": 5, "global_batch": 24}
    found = run_ranks(planned, 2, plain, {"parallel.strategy": "fsdp", "train.micro_batch": 6})
    assert "because" in found[0][0][0] and found[0][1]["parallel"]["strategy"] == "fsdp"
    choices = json.loads((tmp_path / "out/choice.json").read_text())["choices"]
    assert [one["chosen"]["parallel.strategy"] for one in choices] == ["pipeline", "fsdp"]
    assert choices[0]["ranks"] == 2 and choices[0]["devices"] == {"cpu": 2}
    alone = recipe(tmp_path / "alone", train={"steps": 2, "global_batch": 12, "micro_batch": 3}, data=plain["data"])
    assert losses(tmp_path / "out")[:2] == pytest.approx(run_ranks(run, 1, alone)[0], rel=1e-5)


def test_one_rank_is_the_plain_module_and_nothing_is_planned(tmp_path: Path) -> None:
    (((text,), config),) = run_ranks(planned, 1, small(tmp_path), "is not called")
    assert text == "parallel.strategy: auto is ddp: one rank has the plain module" and config["parallel"]["strategy"] == "ddp"


def test_what_cannot_be_planned_is_fsdp_and_the_log_says_so(tmp_path: Path) -> None:
    ((text,), config), _ = run_ranks(planned, 2, small(tmp_path, parallel={"recompute": "auto"}), "reads its\nvalues")
    assert "auto is fsdp, parallel.recompute: auto is none" in text and "RuntimeError: reads its values" in text
    assert config["parallel"]["strategy"] == "fsdp"


def test_a_recorded_halving_wins_and_a_run_of_an_earlier_version_keeps_its_strategy(tmp_path: Path) -> None:
    plain = small(tmp_path / "old", parallel={"strategy": "zero1"})
    run_ranks(planned, 1, plain, {})
    (tmp_path / "old/choice.json").unlink(missing_ok=True)
    del plain["parallel"]["strategy"]
    plain["train"]["micro_batch"], plain["train"]["steps"] = "auto", 3
    (((text,), config),) = run_ranks(planned, 1, plain, {"train.micro_batch": 6})
    assert config["parallel"]["strategy"] == "zero1" and config["train"]["micro_batch"] == 6, text
    log = tmp_path / "old/starts.jsonl"
    log.write_text(log.read_text() + json.dumps({"crash": 3, "rank": 0, "error": "OutOfMemoryError", "micro_batch": 2}) + "\n")
    ((_, config),) = run_ranks(planned, 1, plain, {"train.micro_batch": 6})
    assert config["train"]["micro_batch"] == 2 and config["parallel"]["strategy"] == "zero1"


def test_an_edited_choice_is_refused_or_made_anew(tmp_path: Path) -> None:
    from bigvision.planning.start import _find

    key = {"ranks": 1, "devices": {"cpu": 1}, "asked": {}}
    path = tmp_path / "choice.json"
    for content in ("", "[]", '{"choices": 3}', '{"choices": [3, {"ranks": 2}]}'):
        path.write_text(content)
        assert _find(path, key) is None
    for chosen in ({"parallel.strategy": "ddq"}, {"parallel.strategie": "ddp"}, {"parallel.strategy": "auto"}):
        path.write_text(json.dumps({"choices": [key | {"chosen": chosen}]}))
        with pytest.raises(UserError, match=r"choice\.json"):
            _find(path, key)


def engine(out: str, resume: bool) -> str:
    import torch

    import bigvision

    made = bigvision.Engine(
        {"out": out}, model="test_vit", num_classes=4, steps=2, global_batch=4, image_size=32, resume=resume,
        **{"parallel.precision": "fp32", "parallel.device": "cpu"},
    )  # fmt: skip
    with made as trained:
        trained.train_step(torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64))
        trained.save()
        return trained.config.parallel.strategy


def test_the_engine_from_python_keeps_its_choice_with_its_checkpoints(tmp_path: Path) -> None:
    assert run_ranks(engine, 1, str(tmp_path / "out"), False) == ["ddp"]
    choices = json.loads((tmp_path / "out/choice.json").read_text())["choices"]
    assert choices[0]["chosen"] == {"parallel.strategy": "ddp"}
    text = (tmp_path / "out/choice.json").read_text()
    (tmp_path / "out/choice.json").write_text(text.replace('"ddp"', '"fsdp"'))
    assert run_ranks(engine, 1, str(tmp_path / "out"), True) == ["fsdp"]
