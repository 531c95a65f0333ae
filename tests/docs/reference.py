"""The reference of all keys, from the schema's docstrings, and the table of tasks and strategies, from the tests of both.

``python -m tests.docs.reference`` writes docs/configuration.md and the table in docs/tasks.md.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from bigvision.config import schema
from bigvision.config.values import kind_name, spell
from tests.tasks.test_strategies import ROWS, STRATEGIES

TASKS = Path(__file__).parents[2] / "docs" / "tasks.md"
BEGIN, END = "<!-- strategies -->\n", "<!-- end -->\n"
"""Around the table in it."""
PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
HEAD = """# All keys

<!-- Written by `python -m tests.docs.reference` from the docstrings of bigvision/config/schema.py: change those. -->

Each row is a key of a [recipe](recipes.md) and, as `--section.key value`, a flag of `bigvision train`.
`bigvision train --help` prints the same text, `--print-config` the values of a run and where each comes from.
"""
PAGES = {
    "model": "models.md",
    "task": "tasks.md",
    "data": "data.md",
    "optim": "strategies.md#optimizers",
    "ema": "evaluate.md#averaged-weights",
    "parallel": "strategies.md",
    "train": "recipes.md#steps-epochs-and-batches",
    "checkpoint": "resume.md",
    "limits": "faults.md#hangs",
    "faults": "faults.md",
    "monitor": "debug.md",
}
"""The page about a section."""
SEE = {
    "out": "recipes.md#paths",
    "task.class_weights": "tasks.md#classify",
    "task.standardize": "tasks.md#regress",
    "task.decoder": "tasks.md#segment",
    "task.decoder_options": "tasks.md#segment",
    "task.ignore": "tasks.md#segment",
    "task.mixup": "reading.md#mixing",
    "data.balance": "tasks.md#classify",
    "model.weights": "models.md#weights",
    "model.lora": "models.md#lora",
    "model.sync_batchnorm": "strategies.md#batchnorm",
    "data.classes": "data.md#classes",
    "data.resize_schedule": "models.md#resolution",
    "data.val_size": "models.md#resolution",
    "data.shuffle_block": "reading.md#order",
    "data.max_pixels": "reading.md#limits",
    "data.image_range": "data.md#more-than-8-bits",
    "data.bad_budget": "data.md#bad-samples",
    "data.trace": "reading.md#trace",
    "parallel.strategy": "plan.md#auto",
    "parallel.recompute": "plan.md#auto",
    "train.micro_batch": "plan.md#auto",
    "parallel.stages": "stages.md",
    "parallel.schedule": "stages.md#schedules",
    "parallel.precision": "strategies.md#precision",
    "parallel.fp8_layers": "strategies.md#fp8",
    "parallel.reshard": "strategies.md#memory-of-a-rank",
    "parallel.channels_last": "engine.md#channels_last",
    "parallel.compile": "engine.md#compile",
    "parallel.cuda_graphs": "engine.md#cuda-graphs",
    "parallel.offload": "strategies.md#zero",
    "parallel.deepspeed": "launching/deepspeed.md#a-deepspeed-file",
    "task.k": "embed.md",
    "task.teacher": "distillation.md",
    "train.deterministic": "determinism.md",
    "checkpoint.minutes": "faults.md#stopping",
    "checkpoint.resume": "resume.md#from-which-checkpoint",
    "checkpoint.allow": "resume.md#other-data-or-classes",
    "checkpoint.verify_after_save": "checkpoints.md#commit",
    "faults.spike": "faults.md#spikes",
    "faults.digest_every": "faults.md#silent-corruption",
    "faults.out_of_memory": "faults.md#out-of-memory",
    "faults.restarts": "faults.md#restarts",
    "limits.grace": "faults.md#lost-ranks",
}
"""Where a key is explained at length."""


def docstrings(cls: type) -> dict[str, str]:
    """The text below each field of a dataclass, on one line."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    texts = {}
    for field, below in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            texts[typing.cast(ast.Name, field.target).id] = " ".join(str(below.value.value).split())
    return texts


def values(kind: typing.Any) -> str:
    """What a key takes: the choices, or the kind of value."""
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    return re.sub(r"\ba (?=[a-z])", "", kind_name(kind).replace("a list of 2 numbers", "two numbers"))


def escaped(text: str) -> str:
    """*text* in a cell of a table: what Markdown would read as markup stands for itself."""
    return re.sub(r"([*|<\[\]])", r"\\\1", text)


def rows(cls: type, section: str) -> Iterator[str]:
    """A row for each key of a section, with a link where a page says more."""
    texts, kinds = docstrings(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(kinds[field.name]):
            continue
        key = f"{section}.{field.name}" if section else field.name
        default = field.default if field.default is not dataclasses.MISSING else {}
        text = escaped(texts[field.name]) + (f" ([more]({SEE[key]}))" if key in SEE else "")
        yield f"| `{field.name}` | {values(kinds[field.name])} | `{spell(default)}` | {text} |"


def page() -> str:
    """docs/configuration.md."""
    table = "| key | value | default | |\n|---|---|---|---|"
    parts = [HEAD, "## Top level\n", table, *rows(schema.Config, "")]
    for name, kind in typing.get_type_hints(schema.Config).items():
        if not dataclasses.is_dataclass(kind):
            continue
        section = typing.cast(type, kind)
        parts += [f"\n## {name}\n\nSee [{PAGES[name].partition('.')[0]}]({PAGES[name]}).\n"]
        if "\n" in (about := section.__doc__ or ""):  # not the signature that dataclass writes where there is none
            parts += [" ".join(about.split()) + "\n"]
        parts += [table, *rows(section, name)]
    return "\n".join(parts) + "\n"


def support() -> str:
    """Which task runs under which strategy; the numbers are those of the ranks in the tests."""
    columns = {layout: parallel["strategy"] for layout, (_, parallel) in STRATEGIES.items()}
    lines = ["| `task.name` | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in ROWS.items():
        cells = ["no" if strategy in row.refused else "yes" for strategy in columns.values()]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_support(text: str) -> str:
    """The page about tasks, with the table of today."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + support() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    TASKS.write_text(with_support(TASKS.read_text(encoding="utf-8")), encoding="utf-8")
