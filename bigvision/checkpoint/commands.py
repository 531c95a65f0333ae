"""``bigvision checkpoint list | verify | diff | prune`` and ``bigvision export``: flags in, lines out."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from bigvision.checkpoint.lock import Lock
from bigvision.checkpoint.retention import (
    bytes_in,
    check_out,
    entries,
    plan_pruning,
    problems,
    remove_step,
    size_text,
    step_folders,
    table,
)
from bigvision.config import parse_size
from bigvision.errors import InUse, UserError, nearest

if TYPE_CHECKING:
    from bigvision.checkpoint.diff import Group
    from bigvision.checkpoint.export import Exported

USAGE = """usage: bigvision checkpoint COMMAND ...

  list OUT                       a line for each step folder of a run
  verify OUT_OR_STEP_FOLDER      read every byte and compare it with its checksum
  diff STEP_FOLDER STEP_FOLDER   what differs between two checkpoints
  prune OUT --keep K             remove all but the last K valid checkpoints

More: bigvision checkpoint COMMAND --help."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all errors of users."""

    def __init__(self, prog: str, description: str, epilog: str = "") -> None:
        super().__init__(prog, description=description, epilog=epilog, allow_abbrev=False)

    def read(self, arguments: list[str]) -> argparse.Namespace:
        """The flags' values, by name."""
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            name = unknown[0].split("=")[0]
            kind = "flag" if name.startswith("-") else "argument"
            raise UserError(f"{self.prog}: unknown {kind} {name!r}{nearest(name, self._option_string_actions)}")
        return known

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}: see {self.prog} --help")


def run_checkpoint(arguments: list[str]) -> int:
    """``bigvision checkpoint COMMAND ...``; the exit code is the command's own."""
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command not in COMMANDS:
        raise UserError(f"checkpoint: unknown command {command!r}{nearest(command, COMMANDS)}; there are {', '.join(COMMANDS)}")
    try:
        code = COMMANDS[command](rest)
        sys.stdout.flush()
        return code
    except InUse as error:
        raise UserError(str(error)) from None
    except BrokenPipeError:
        # "| head" has seen enough; what is left would fail again at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def run_list(arguments: list[str]) -> int:
    """``list OUT [--json]``."""
    parser = Parser(
        "bigvision checkpoint list",
        "A line for each step folder of a run, newest first: step, samples, when it was saved, size, the metrics of the last "
        "evaluation before it, and whether it is valid, damaged or unfinished.",
        "Valid means that the manifest is whole and every file has its size; 'bigvision checkpoint verify' reads every byte.",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="a run's output folder")
    parser.add_argument("--json", action="store_true", help="one JSON array, for machines")
    flags = parser.read(arguments)
    found = entries(flags.out)
    if flags.json:
        print(json.dumps([asdict(entry) for entry in found], indent=2, allow_nan=False))
    else:
        print(table(found) if found else f"no checkpoints in {flags.out}")
    return 0


def run_verify(arguments: list[str]) -> int:
    """``verify OUT_OR_STEP_FOLDER``; 1 when something is damaged."""
    parser = Parser(
        "bigvision checkpoint verify",
        "Read every byte of a checkpoint, or of all checkpoints of a run, and compare it with its checksum.",
        "Exit code 0: all are whole; 1: something is damaged; 2: a mistake in what was asked for.",
    )
    parser.add_argument("path", metavar="OUT_OR_STEP_FOLDER", type=Path, help="a step folder or a run's output folder")
    code = 0
    for folder in step_folders(parser.read(arguments).path):
        found = problems(folder)
        if found and not folder.exists():
            continue  # pruned by a run that is going on
        print("\n".join(f"{folder}: damaged: {problem}" for problem in found) or f"{folder}: ok", flush=True)
        code = 1 if found else code
    return code


def run_diff(arguments: list[str]) -> int:
    """``diff A B [--limit N]``; 1 when they differ."""
    parser = Parser(
        "bigvision checkpoint diff",
        "What differs between two checkpoints of any two runs: documents (configuration, step, samples, metrics, model card), "
        "tensors that only one has or that have another type or shape, and tensors with other values, the worst first.",
        "Exit code 0: no difference; 1: some; 2: a mistake in what was asked for.",
    )
    parser.add_argument("a", metavar="A", type=Path, help="a step folder")
    parser.add_argument("b", metavar="B", type=Path, help="another")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="tensors listed of each kind; 0: all (default: 20)")
    flags = parser.read(arguments)
    if flags.limit < 0:
        raise UserError(f"--limit: {flags.limit} is not a number of tensors: use 0 for all")
    from bigvision.checkpoint.diff import compare

    found = compare(flags.a, flags.b)
    print("documents (A | B)" if found.documents else "documents: identical")
    width = max((len(key) for key in found.documents), default=0)
    for key, (a, b) in found.documents.items():
        print(f"  {key:<{width}}  {_short(a)} | {_short(b)}")
    for name, group in found.groups.items():
        _print_group(name, group, flags.limit)
    return 0 if found.identical else 1


def run_prune(arguments: list[str]) -> int:
    """``prune OUT --keep K [--dry-run]``."""
    parser = Parser(
        "bigvision checkpoint prune",
        "Remove all but the last K valid checkpoints of a run, and the best one where the run has checkpoint.keep_best. "
        "Damaged ones and those that cannot be read are neither counted nor removed.",
        "Every byte of all checkpoints is read first.",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="a run's output folder")
    parser.add_argument("--keep", metavar="K", type=int, required=True, help="how many stay")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be removed")
    flags = parser.read(arguments)
    check_out(flags.out)
    with nullcontext() if flags.dry_run else Lock(flags.out, lambda text: print(text, file=sys.stderr)):
        kept, remove, left = plan_pruning(flags.out, flags.keep)
        for folder, problem in left.items():
            print(f"left as it is  {folder}: {problem}")
        for folder, reason in kept.items():
            print(f"{'would keep' if flags.dry_run else 'kept':<13}  {folder}{reason and f' ({reason})'}")
        for folder in remove:
            size = size_text(bytes_in(folder))
            if not flags.dry_run:
                try:
                    remove_step(folder)
                except OSError as error:
                    raise UserError(f"{folder} cannot be removed ({error.strerror})") from None
            print(f"{'would remove' if flags.dry_run else 'removed':<13}  {folder} ({size})", flush=True)
    if not remove:
        print("nothing to remove")
    return 0


def run_export(arguments: list[str]) -> int:
    """``bigvision export STEP_FOLDER FILE_OR_FOLDER ...``."""
    parser = Parser(
        "bigvision export",
        "Write a checkpoint's weights for other tools: to FILE.safetensors, which "
        "timm.create_model(name, checkpoint_path=FILE) opens, or to a folder in Hugging Face's form (config.json and "
        "model.safetensors, or several files and an index). Adapters (model.lora) are merged into the weights. The "
        "checkpoint's checksums are compared on the way.",
    )
    parser.add_argument("source", metavar="STEP_FOLDER", type=Path, help="the checkpoint")
    parser.add_argument("target", metavar="FILE_OR_FOLDER", type=Path, help="a name that ends with .safetensors is a file")
    parser.add_argument("--ema", action="store_true", help="the averaged weights")
    parser.add_argument("--adapter", action="store_true", help="the adapters of model.lora alone, as a folder that peft opens")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of floating-point tensors (default: as they are)")
    parser.add_argument("--shard-size", metavar="SIZE", help="largest file in a folder, such as 5GB or 512MiB (default: 5GB)")
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    flags = parser.read(arguments)
    shard_size = None if flags.shard_size is None else parse_size(flags.shard_size, "--shard-size")
    from bigvision.checkpoint.export import export

    done = export(
        flags.source, flags.target, ema=flags.ema, dtype=flags.dtype, shard_size=shard_size, force=flags.force,
        adapter=flags.adapter,
    )  # fmt: skip
    files = f"{len(done.files)} file{'s' if len(done.files) > 1 else ''}"
    print(f"exported  {flags.target} ({done.tensors} tensors, {size_text(done.bytes)}, {files})")
    print(f"load      {_loading(flags.target, done)}")
    return 0


def _loading(target: Path, done: Exported) -> str:
    """The line of Python that opens what was exported."""
    path = json.dumps(str(target), ensure_ascii=False)
    arguments = "".join(f", {name}={value!r}" for name, value in done.model_args.items())
    if done.files == ["adapter_model.safetensors"]:
        model = f"timm.create_model({json.dumps(done.architecture)}{arguments})"
        return f"peft.PeftModel.from_pretrained({model}, {path}), with the weights that the run began with"
    if target.is_file():
        return f"timm.create_model({json.dumps(done.architecture)}, checkpoint_path={path}{arguments})"
    if len(done.files) == 1:
        return f'timm.create_model("local-dir:{target}", pretrained=True)'
    return f"accelerate.load_checkpoint_in_model(timm.create_model({json.dumps(done.architecture)}{arguments}), {path})"


def _print_group(name: str, group: Group, limit: int) -> None:
    if group.identical:
        print(f"{name}: identical ({group.same} tensors)")
        return
    width = max((len(change.name) for change in group.changed), default=0)
    both = group.same + len(group.changed)
    sections = {f"only in {side}": tensors for side, tensors in group.only.items()}
    sections["other types or shapes (A | B)"] = group.reshaped
    sections[f"other values in {len(group.changed)} of {both} tensors, the worst first"] = [
        f"{change.name:<{width}}  {change.differing} of {change.elements} elements, "
        f"largest {change.largest:.3g}, relative {change.relative:.3g}"
        for change in group.changed
    ]
    for title, lines in sections.items():
        shown = lines[: limit or len(lines)]
        if shown:
            print("\n  ".join([f"{name}: {title}", *shown]))
        if len(shown) < len(lines):
            print(f"  and {len(lines) - len(shown)} more (--limit 0 shows all)")


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:99]}…"


COMMANDS = {"list": run_list, "verify": run_verify, "diff": run_diff, "prune": run_prune}
